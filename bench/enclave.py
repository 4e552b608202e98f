"""Measure the enclave page cache: pages added one by one against populate, with and without reclaim, and what that costs.

``make bench-enclave`` prints a table in Markdown, for docs/results/enclave.md. Routes alternate in each round; figures are
ratios of medians, or bytes for each second of the server's CPU time. It asserts nothing: the reader judges the figures.
"""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import prefault
from device_common import Measure
from prefault import device as devices
from prefault.bench.routes.enclave_routes import repetition
from prefault.bench.routes.shipped_results import INSTRUCTION_BYTES, EnclaveRoute, Taken
from prefault.bench.routes.shipped_routes import warm
from prefault.device import DeviceArea
from prefault.device.device_pool import Access
from prefault.device.driver import Supplied
from prefault.drivers.enclave import Enclave, EnclavePageCache
from prefault.sizes import MIB, PAGE_SIZE

_SIZE = 64 * MIB


class Timings:
    """Times of each route for the whole enclave: wall clock of the client, CPU of the server, in seconds."""

    def __init__(self) -> None:
        self._taken: dict[EnclaveRoute, list[Taken]] = {route: [] for route in EnclaveRoute}

    def round(self, client: devices.DeviceClient) -> None:
        for route, each in self._taken.items():
            each.append(repetition(client, route, _SIZE))

    def median(self, route: EnclaveRoute) -> float:
        return statistics.median(one.total_ns * _SIZE / PAGE_SIZE / one.pages / 1e9 for one in self._taken[route])

    def cpu_median(self, route: EnclaveRoute) -> float:
        return statistics.median(one.server_cpu_ns / 1e9 for one in self._taken[route])


def routes(rounds: int) -> Iterator[Measure]:
    """Measure the ways in which pages come in."""
    timings = Timings()
    with devices.open(EnclavePageCache(_SIZE)) as client:
        for _ in range(rounds):
            warm()
            timings.round(client)

    def ratio(slow: EnclaveRoute, fast: EnclaveRoute, limit: float | None, name: str) -> Measure:
        value = timings.median(slow) / timings.median(fast)
        return Measure(
            name, "(none)" if limit is None else f"at least {limit:.0f}x", f"{value:.0f}x",
            None if limit is None else value >= limit,
            f"{timings.median(slow) * 1e3:.0f} and {timings.median(fast) * 1e3:.0f} ms; {rounds} of each",
        )  # fmt: skip

    yield ratio(EnclaveRoute.FAULTS, EnclaveRoute.POPULATE, 50, "64 MiB, EAUG page by page on fault, against populate")
    yield ratio(
        EnclaveRoute.INSTRUCTIONS,
        EnclaveRoute.POPULATE,
        None,
        f"the same with explicit EAUG, EACCEPT and touch ({INSTRUCTION_BYTES // PAGE_SIZE} pages, the rest extrapolated)",
    )
    yield ratio(
        EnclaveRoute.FAULTS_RECLAIM,
        EnclaveRoute.POPULATE_RECLAIM,
        None,
        "64 MiB with reclaim, EAUG page by page on fault, against populate",
    )
    size_mb = _SIZE / 1e6
    for name, route, limit in (
        ("reclaim with encryption, pages in runs", EnclaveRoute.POPULATE_RECLAIM, 300),
        ("reclaim with encryption, single pages scattered over 128 MiB", EnclaveRoute.SCATTERED_RECLAIM, None),
    ):
        rate = size_mb / (timings.cpu_median(route) - timings.cpu_median(EnclaveRoute.POPULATE))
        yield Measure(
            name, "(none)" if limit is None else f"at least {limit} MB/s on one core", f"{rate:.0f} MB/s",
            None if limit is None else rate >= limit,
            f"CPU of the server: {timings.cpu_median(route) * 1e3:.0f} ms for populating 64 MiB,"
            f" {timings.cpu_median(EnclaveRoute.POPULATE) * 1e3:.0f} without reclaim",
        )  # fmt: skip
    yield Measure(
        "64 MiB loaded (ELDU) by populate, while as much is evicted", "(none)",
        f"{size_mb / timings.cpu_median(EnclaveRoute.LOAD):.0f} MB/s", None,
        f"CPU of the server: {timings.cpu_median(EnclaveRoute.LOAD) * 1e3:.0f} ms",
    )  # fmt: skip


def _read_all_the_time(path: Path, out: int, until: float) -> None:
    """Touch a page of an enclave, then the next one; write the longest times in ns."""
    times = []
    with devices.connect(path) as client, Enclave(client, "reader").map() as area, area.memoryview() as memory:
        page = 0
        while time.monotonic() < until:
            began = time.perf_counter_ns()
            memory[page * PAGE_SIZE]
            times.append(time.perf_counter_ns() - began)
            page = (page + 1) % (len(memory) // PAGE_SIZE)
            time.sleep(0.0002)
    times.sort()
    os.write(out, struct.pack("<QQQ", len(times), times[-1], times[int(len(times) * 0.999)]))


class Timed(EnclavePageCache):
    """Notes the longest time that the server's loop computes for a batch of populate, its reclaim included, in ns."""

    def __init__(self) -> None:
        super().__init__(_SIZE)
        self.longest = memoryview(mmap.mmap(-1, PAGE_SIZE)).cast("Q")
        """Shared with the server, which is a fork of this process."""
        self._began = 0

    def reclaim(self, area: DeviceArea, pages: int) -> None:
        self._began = time.thread_time_ns()
        super().reclaim(area, pages)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> Supplied:
        began, self._began = self._began or time.thread_time_ns(), 0
        answer = super().populate(area, pages, access)
        self.longest[0] = max(self.longest[0], time.thread_time_ns() - began)
        return answer


def readers(seconds: float) -> Iterator[Measure]:
    """Measure how long a reader in another process waits while others populate and evict."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "socket"
        device = Timed()
        with devices.serve(device, path), devices.connect(path) as client:
            Enclave.create(client, "reader", "16 MiB")
            others = [Enclave.create(client, name, _SIZE, overcommit=True) for name in ("one", "two")]
            reader, writer = os.pipe()
            until = time.monotonic() + seconds
            pid = os.fork()
            if pid == 0:
                try:
                    _read_all_the_time(path, writer, until)
                finally:
                    os._exit(0)
            moved = 0
            with others[0].map() as one, others[1].map() as two:
                while time.monotonic() < until:
                    prefault.populate(one)
                    prefault.populate(two)
                    moved += 2 * _SIZE
            os.waitpid(pid, 0)
            count, longest, most = struct.unpack("<QQQ", os.read(reader, 24))
            os.close(reader)
            os.close(writer)
    yield Measure(
        "a reader waits, while populate brings in and evicts without a pause", "at most 50 ms", f"{longest / 1e6:.1f} ms",
        longest <= 50e6, f"longest of {count} touches, 99.9 %: {most / 1e6:.1f} ms; {moved / MIB:.0f} MiB came in meanwhile",
    )  # fmt: skip
    yield Measure(
        "the server computes for one batch of that, in which it answers no fault", "at most 50 ms",
        f"{device.longest[0] / 1e6:.1f} ms", device.longest[0] <= 50e6, "CPU time of the longest, without waiting for a CPU",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each route")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the reader's measure")
    options = parser.parse_args()
    cpus, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(
        f"{date.today()}, Linux {platform.release()}, {cpus} CPUs, load average {load:.1f},"
        f" Python {platform.python_version()}: {' '.join(sys.argv)}\n"
    )
    print("| measure | limit | figure | | detail |\n|---|---|---|---|---|")
    for measures in (routes(options.rounds), readers(options.seconds)):
        for measure in measures:
            print(measure, flush=True)


if __name__ == "__main__":
    main()
