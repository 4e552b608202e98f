"""Measure device memory against a handler process in C (bench/uffd.c), alternating in the same run.

``make bench-device`` prints a table in Markdown, and histograms of fault latencies, for docs/results/device.md. It asserts
nothing: the reader judges the figures.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from device_areas import crowd, cycles, many
from device_buffers import buffers
from device_common import Effort, Measure, Trivial, spread
from prefault import device as devices
from prefault._kernel import mman
from prefault._system import hugetlb
from prefault.bench.routes.device_processes import cpu_ns, helpers, stat
from prefault.bench.routes.shipped_routes import warm
from prefault.device import Area
from prefault.device.server.populate_requests import PIECE
from prefault.sizes import GIB, MIB, PAGE_SIZE, format_size

_HERE = Path(__file__).parent
_HUGE = 2 * MIB


# --- C


@contextmanager
def native() -> Iterator[Path]:
    """Compile bench/uffd.c into a program."""
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "uffd"
        subprocess.run(["gcc", "-O2", "-o", program, _HERE / "uffd.c"], check=True)
        yield program


@contextmanager
def continued_in_c(program: Path, area: Area) -> Iterator[Callable[[int], float]]:
    """Yield a function of bytes per call (0: one call) that returns the ns that C takes to map the area's frames."""
    frames = area.fd
    assert frames is not None
    command = [str(program), "continue", str(len(area)), str(frames)]
    with subprocess.Popen(command, pass_fds=[frames], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        asked, said = child.stdin, child.stdout

        def once(piece: int) -> float:
            asked.write(f"{piece}\n")
            asked.flush()
            return float(said.readline())

        yield once
        asked.close()


def loads_in_c(program: Path, count: int, placement: str) -> list[int]:
    """Return nanoseconds of each load of a new page that the handler in C answers."""
    done = subprocess.run([str(program), "latency", str(count), placement], check=True, stdout=subprocess.PIPE, text=True)
    return [int(line) for line in done.stdout.split()]


# --- populating


def forget(area: Area) -> None:
    """Empty the page table. The frames stay ready."""
    mman.madvise(area.address, len(area), mman.MADV_DONTNEED)


@contextmanager
def ready_area(length: int, page_size: int = PAGE_SIZE) -> Iterator[Area]:
    with devices.map(Trivial(length, page_size), populate=True) as area:
        yield area


def populated_ns(area: Area) -> float:
    """Return nanoseconds of one populate call, from an empty page table."""
    forget(area)
    began = time.perf_counter_ns()
    result = area.populate("read")
    took = time.perf_counter_ns() - began
    assert result.bytes == len(area), result
    return float(took)


def against_c(program: Path, effort: Effort, page_size: int) -> Iterator[Measure]:
    """Measure bulk populate of ready frames."""
    length = effort.length
    kind = "2 MiB hugetlb frames" if page_size == _HUGE else "4 KiB frames"
    with ready_area(length, page_size) as area, continued_in_c(program, area) as in_c:
        assert page_size == PAGE_SIZE or not area.notes, area.notes
        routes: list[tuple[str, Callable[[], float]]] = [
            ("ours", lambda: populated_ns(area)),
            ("pieces", lambda: in_c(PIECE * page_size)),
            ("one", lambda: in_c(0)),
        ]
        times: dict[str, list[float]] = {name: [] for name, _ in routes}
        for round_ in range(effort.rounds + 1):
            for name, route in routes if round_ % 2 else reversed(routes):
                took = route()
                if round_:  # round 0 does not count
                    times[name].append(took)
    ours = times["ours"]
    for name, what in (("pieces", f"{PIECE} entries a call, as the server does"), ("one", "one call")):
        c = times[name]
        best, middle = min(ours) / min(c), statistics.median(ours) / statistics.median(c)
        yield Measure(
            f"populate {format_size(length)}, {kind}, ready, against UFFDIO_CONTINUE in C, {what}",
            "at most 1.15x",
            f"{best:.3f}x best, {middle:.3f}x median",
            best <= 1.15 and middle <= 1.15,
            f"C {min(c) / 1e6:.2f} ms best, {statistics.median(c) / 1e6:.2f} median; ours {min(ours) / 1e6:.2f} and"
            f" {statistics.median(ours) / 1e6:.2f}, {min(ours) / length * PAGE_SIZE:.0f} ns a 4 KiB page; {len(c)} of each",
        )


def against_touching(effort: Effort) -> Iterator[Measure]:
    """Measure bulk populate against one fault per page in address order: of ready frames, and with the driver's work."""
    length = effort.length
    touched: dict[str, list[float]] = {"ready": [], "supplied": []}
    populated: dict[str, list[float]] = {"ready": [], "supplied": []}

    def touch(area: Area) -> float:
        column = area.ndarray("uint8")[::PAGE_SIZE]
        began = time.perf_counter_ns()
        column.sum()
        return float(time.perf_counter_ns() - began)

    for _ in range(max(2, effort.rounds // 4)):
        warm(2 * length)
        with devices.map(Trivial(length)) as area:
            began = time.perf_counter_ns()
            area.populate("read")
            populated["supplied"].append(float(time.perf_counter_ns() - began))
            populated["ready"] += [populated_ns(area) for _ in range(3)]
            forget(area)
            touched["ready"].append(touch(area))
        with devices.map(Trivial(length)) as area:
            touched["supplied"].append(touch(area))
    for kind, what in (("ready", "ready frames"), ("supplied", "with the driver's work")):
        faults, bulk = statistics.median(touched[kind]), statistics.median(populated[kind])
        yield Measure(
            f"{format_size(length)} touched page by page against populate, {what}",
            "at least 100x" if kind == "ready" else "(none)",
            f"{faults / bulk:.0f}x",
            faults / bulk >= 100 if kind == "ready" else None,
            f"{faults / 1e9:.2f} s ({faults / length * PAGE_SIZE / 1e3:.1f} us a page) and {bulk / 1e6:.1f} ms"
            f" ({bulk / length * PAGE_SIZE / 1e3:.2f} us a page), medians of {len(touched[kind])} and"
            f" {len(populated[kind])};"
            " the numerator is the fault latency: the better it is, the smaller the ratio",
        )


@contextmanager
def huge_pool(pages: int) -> Iterator[str]:
    """Provide a pool with ``pages`` free huge pages, and yield ""; where that fails, yield the reason."""
    if _HUGE not in hugetlb.page_sizes():
        yield "the kernel has no huge pages of 2 MiB"
        return
    with open(Path(tempfile.gettempdir()) / "prefault-hugetlb-pool.lock", "w") as lock:  # the lock that the tests take
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = hugetlb.read_pool(_HUGE)
        if before.available >= pages:
            yield ""
            return
        try:
            hugetlb.resize_pool(_HUGE, before.total + pages)
        except PermissionError:
            yield f"write {pages} to {before.setting} first, or be root"
            return
        try:
            short = hugetlb.read_pool(_HUGE).available < pages
            yield f"the kernel found no {pages} huge pages" if short else ""
        finally:
            hugetlb.resize_pool(_HUGE, before.total)


def populating(program: Path, effort: Effort) -> Iterator[Measure]:
    yield from against_c(program, effort, PAGE_SIZE)
    with huge_pool(effort.length // _HUGE + 16) as why_not:
        if why_not:
            yield Measure("populate 2 MiB hugetlb frames", "at most 1.15x", "not measured", None, why_not)
        else:
            yield from against_c(program, effort, _HUGE)


# --- latency


def loads(view: memoryview, offsets: Sequence[int], pause_ns: int = 0) -> list[int]:
    """Return nanoseconds of each load, by perf_counter_ns around it; the thread computes for ``pause_ns`` before each."""
    clock = time.perf_counter_ns
    took = []
    for at in offsets:
        if pause_ns:
            until = clock() + pause_ns
            while clock() < until:
                pass
        began = clock()
        view[at]
        took.append(clock() - began)
    return took


def our_loads(count: int, *, colocate: bool = False, pause_ns: int = 0) -> tuple[list[int], list[int], list[int]]:
    """Return nanoseconds of loads of new pages, of ready frames, and of mapped pages (the cost of measuring)."""
    offsets = range(0, count * PAGE_SIZE, PAGE_SIZE)
    with devices.map(Trivial(count * PAGE_SIZE), colocate=colocate) as area, area.memoryview() as view:
        new = loads(view, offsets, pause_ns)
        nothing = loads(view, offsets)
        forget(area)
        return new, loads(view, offsets, pause_ns), nothing


def histogram(values: list[int]) -> list[str]:
    """Return lines that count the values between powers of two of microseconds."""
    counts: dict[int, int] = {}
    for value in values:
        bucket = (value // 1000).bit_length()
        counts[bucket] = counts.get(bucket, 0) + 1
    lines = []
    for bucket in range(min(counts), max(counts) + 1):
        count = counts.get(bucket, 0)
        low = 1 << bucket - 1 if bucket else 0
        bar = "#" * -(-50 * count // len(values))
        lines.append(f"{low:>7} to {1 << bucket:>6} us {count:>7} {100 * count / len(values):5.1f} % {bar}".rstrip())
    return lines


_IN_C = {
    "same": "C, both pinned to one CPU, blocking",
    "two": "C, pinned to two CPUs, blocking",
    "free": "C, left to the scheduler, blocking",
    "spin": "C, left to the scheduler, spinning without end",
}


def latency(program: Path, effort: Effort) -> Iterator[Measure | str]:
    """Measure fault latency, round by round through all placements."""
    count = effort.loads
    times: dict[str, list[int]] = {name: [] for name in (*_IN_C, "ours", "colocated", "ready", "paused", "nothing")}
    for _ in range(effort.rounds):
        warm()
        for placement in _IN_C:
            times[placement] += loads_in_c(program, count, placement)
        new, ready, nothing = our_loads(count)
        times["ours"] += new
        times["ready"] += ready
        times["nothing"] += nothing
        times["colocated"] += our_loads(count, colocate=True)[0]
        times["paused"] += our_loads(count // 10, pause_ns=1_000_000)[0]
    middle = {name: statistics.median(values) for name, values in times.items()}
    names = _IN_C | {
        "ours": "ours, default", "colocated": "ours, colocate=True", "ready": "ours, default, the frame is ready already",
        "paused": "ours, default, the client computes for 1 ms between two faults",
        "nothing": "the measuring itself: a page that is there",
    }  # fmt: skip
    for name, limit_us in (("colocated", 15), ("ours", 30)):
        yield Measure(
            f"fault latency, {names[name]}", f"median at most {limit_us} us", f"{middle[name] / 1e3:.1f} us",
            middle[name] <= limit_us * 1000, spread(times[name]) + f"; {len(times[name])} faults in {effort.rounds} runs",
        )  # fmt: skip
    for name, other in (("colocated", "same"), ("ours", "free"), ("ours", "spin")):
        ratio = middle[name] / middle[other]
        yield Measure(
            f"fault latency, {names[name]}, against {names[other]}", "at most 1.5x", f"{ratio:.2f}x", ratio <= 1.5,
            f"medians, {middle[name] / 1e3:.1f} and {middle[other] / 1e3:.1f} us",
        )  # fmt: skip
    for name in ("ready", "paused", *_IN_C, "nothing"):
        figure = f"{middle[name] / 1e3:.2f} us"
        yield Measure(f"fault latency, {names[name]}", "(none)", figure, None, spread(times[name]))
    for name in ("ours", "colocated", "paused", *_IN_C):
        yield "\n".join(("", f"{names[name]}:", "", "```", *histogram(times[name]), "```"))


def idle(effort: Effort) -> Iterator[Measure]:
    """Measure the CPU time of idle server and warden, just after faults."""
    count = effort.loads
    with devices.map(Trivial(count * PAGE_SIZE)) as area, area.memoryview() as view:
        pids = helpers()
        loads(view, range(0, count * PAGE_SIZE, PAGE_SIZE))
        time.sleep(0.1)
        before = {role: (cpu_ns(pid), stat(pid)[2]) for role, pid in pids.items()}
        time.sleep(effort.seconds)
        for role, pid in pids.items():
            used, ticks = cpu_ns(pid) - before[role][0], stat(pid)[2] - before[role][1]
            yield Measure(
                f"CPU that the idle {role} takes in {effort.seconds:.0f} s", "about 0 (below 0.1 %)",
                f"{used / 1e6:.3f} ms", used < 1e6 * effort.seconds,
                f"{ticks} ticks of /proc/PID/stat; begun 0.1 s after {count} faults",
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only",
        action="append",
        choices=["populate", "touch", "latency", "idle", "many", "crowd", "cycles", "buffers"],
    )
    parser.add_argument("--quick", action="store_true", help="do a tenth of the work, as a trial")
    parser.add_argument("--rounds", type=int, help="rounds of each measure that is repeated")
    options = parser.parse_args()
    rounds = options.rounds or (3 if options.quick else 11)
    effort = Effort(rounds, GIB, 2000, 10_000, 2.0, 500_000)
    if options.quick:
        effort = Effort(rounds, 64 * MIB, 500, 500, 1.0, 5000)
    cpus = len(os.sched_getaffinity(0))
    print(
        f"{date.today()}, Linux {platform.release()}, {cpus} CPUs, Python {platform.python_version()}"
        f": {' '.join(sys.argv)}\n"
    )
    print("| measure | limit | figure | | detail |\n|---|---|---|---|---|")
    figures: list[str] = []
    with native() as program:
        parts: dict[str, Callable[[], Iterator[Measure | str]]] = {
            "populate": lambda: populating(program, effort),
            "touch": lambda: against_touching(effort),
            "latency": lambda: latency(program, effort),
            "idle": lambda: idle(effort),
            "many": lambda: many(effort),
            "crowd": lambda: crowd(effort),
            "cycles": lambda: cycles(effort),
            "buffers": lambda: buffers(effort),
        }
        for name, part in parts.items():
            if not options.only or name in options.only:
                for row in part():
                    if isinstance(row, Measure):
                        print(row, flush=True)
                    else:
                        figures.append(row)
    print("\n".join(figures))


if __name__ == "__main__":
    main()
