"""Measure remote files, on an HTTP server on loopback in a process of its own, with 20 ms of added latency.

Prints text for docs/results/device.md, and asserts nothing: the reader judges the figures.

python bench/remote.py [populate] [random] [files] [model] [--mib 512] [--rounds 5] [--files 1000]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import http.client
import json
import os
import platform
import random
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy

import prefault
import prefault.device
from prefault.drivers import RemoteFile
from prefault.sizes import KIB, MIB, PAGE_SIZE

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import processes
from support.http_server import HttpServer, Request

_LATENCY_S = 0.02
_TOUCHED_PAGES = 400


def _pieces(length: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, length)) for start in range(0, length, size))


def _populate(url: str, expected: int, **options: Any) -> dict[str, float]:
    """Return seconds of populating, and of mapping and populating."""
    began = time.perf_counter()
    device = RemoteFile(url, **options)
    with prefault.device.map(device) as area:
        mapped = time.perf_counter()
        area.populate()
        ended = time.perf_counter()
        content = area.ndarray()
        assert int(content[:: 64 * KIB].sum()) == expected
        del content
    return {"populate": ended - mapped, "map and populate": ended - began}


def _touch(url: str, pages: int) -> float:
    """Return seconds per page, touched one after another without fault-around."""
    with prefault.device.map(RemoteFile(url, fault_around=(0, 0))) as area:
        content = area.ndarray()
        began = time.perf_counter()
        for page in range(pages):
            content[page * PAGE_SIZE]
        seconds = (time.perf_counter() - began) / pages
        del content
    return seconds


def _cat_ranges(url: str, length: int, size: int, expected: int) -> dict[str, float]:
    from fsspec.implementations.http import HTTPFileSystem  # type: ignore[import-untyped]

    fs = HTTPFileSystem(skip_instance_cache=True, use_listings_cache=False)
    starts, stops = zip(*_pieces(length, size), strict=True)
    fs.cat_file(url, 0, 1)  # opens the session
    began = time.perf_counter()
    found = fs.cat_ranges([url] * len(starts), list(starts), list(stops))
    seconds = time.perf_counter() - began
    assert sum(int(numpy.frombuffer(piece, numpy.uint8)[:: 64 * KIB].sum()) for piece in found) == expected
    asyncio.run_coroutine_threadsafe(fs._session.close(), fs.loop).result()
    return {"": seconds}


def _threads(server: HttpServer, length: int, size: int, workers: int, expected: int, kind: str) -> dict[str, float]:
    """Return seconds of range requests by threads, each with its connection, into fresh memory: the lower bound.

    ``kind``: "private" is numpy's memory, which asks for huge pages; "memfd" can be shared by processes, as frames are.
    """
    mapping = None if kind == "private" else prefault.Mapping(length, backing="memfd")
    content = numpy.empty(length, numpy.uint8) if mapping is None else mapping.ndarray("uint8")
    view = content.data
    todo = list(_pieces(length, size))[::-1]

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        while todo:
            start, stop = todo.pop()
            connection.request("GET", "/f", headers={"Range": f"bytes={start}-{stop - 1}"})
            response = connection.getresponse()
            while start < stop:
                start += response.readinto(view[start:stop])
        connection.close()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    assert int(content[:: 64 * KIB].sum()) == expected
    return {"": seconds}


def populate(server: HttpServer, length: int, rounds: int) -> None:
    url = server.url("f")
    content = numpy.fromfile(server.directory / "f", numpy.uint8)
    expected = int(content[:: 64 * KIB].sum())
    del content
    results: dict[str, list[float]] = {}
    ways: dict[str, Callable[[], dict[str, float]]] = {"RemoteFile": partial(_populate, url, expected)}
    for size in (4, 16):
        ways[f"fsspec cat_ranges, {size} MiB"] = partial(_cat_ranges, url, length, size * MIB, expected)
        for workers in (8, 16):
            for memory in ("private", "memfd"):
                name = f"{workers} threads, {size} MiB, into {memory} memory"
                ways[name] = partial(_threads, server, length, size * MIB, workers, expected, memory)
    names = list(ways)
    for number in range(-1, rounds):
        for name in names if number % 2 else reversed(names):
            gc.collect()
            for part, seconds in ways[name]().items():
                if number >= 0:
                    results.setdefault(f"{name} {part}".strip(), []).append(seconds)
    for name, times in sorted(results.items(), key=lambda item: statistics.median(item[1])):
        median = statistics.median(times)
        print(f"{name}: {median:.3f} s (best {min(times):.3f}), {length / median / 1e9:.2f} GB/s")
    ours = results["RemoteFile populate"]
    others = {name: times for name, times in results.items() if not name.startswith("RemoteFile")}
    for kind in ("fsspec", "memfd", ""):
        name = min((name for name in others if kind in name), key=lambda name: statistics.median(others[name]))
        against = statistics.median(ours) / statistics.median(others[name])
        print(
            f"populate against {name}, the best of {kind or 'all'}: {against:.2f}x its time (best against best"
            f" {min(ours) / min(others[name]):.2f}x)"
        )
    per_page = _touch(url, _TOUCHED_PAGES)
    pages = -(-length // PAGE_SIZE)
    print(
        f"page by page without fault-around: {per_page * 1e3:.2f} ms a page ({_TOUCHED_PAGES} pages measured), so"
        f" {per_page * pages:.0f} s for all {pages}: {per_page * pages / statistics.median(ours):.0f}x the time of populate"
    )


def random_access(server: HttpServer, length: int, rounds: int) -> None:  # noqa: ARG001  the bytes moved do not vary
    url = server.url("f")
    for piece, around in ((PAGE_SIZE, (0, 0)), (PAGE_SIZE, (64 * KIB, 64 * KIB)), (64 * KIB, (MIB, 8 * MIB)),
                          (MIB, (MIB, 8 * MIB))):  # fmt: skip
        count = length // 100 // piece
        starts = random.Random(1).sample(range(length // piece), count)
        with prefault.device.map(RemoteFile(url, fault_around=around)) as area:
            content = area.ndarray()
            server.requests(clear=True)
            began = time.perf_counter()
            for start in starts:
                content[start * piece : (start + 1) * piece].sum()
            seconds = time.perf_counter() - began
            del content
        requests = server.requests()
        moved = sum(request.sent for request in requests)
        block = max(around[0], PAGE_SIZE)
        bound = 0.05 * length + count * block
        print(
            f"1 % of the file in {count} random pieces of {prefault.format_size(piece)}, windows of"
            f" {prefault.format_size(block)}: {len(requests)} requests moved {prefault.format_size(moved)},"
            f" {moved / length:.1%} of the file; 5 % and a window each would be {prefault.format_size(int(bound))};"
            f" {seconds / count * 1e3:.1f} ms a piece"
        )


def _processes() -> list[int]:
    """Return the pids of this process's servers and wardens."""
    return [pid for pid in processes.descendants(os.getpid()) if processes.name(pid).startswith("prefault")]


def _private_kib(pids: list[int]) -> int:
    """Return the KiB of memory that only these processes have, all together."""
    found = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                found += int(line.split()[1])
    return found


def files(server: HttpServer, count: int, rounds: int) -> None:
    """Map many files of 10 KB, and read a page of each; alternate with files that have a server each (a capacity)."""
    names = [f"many-{number}" for number in range(count)]
    for name in names:
        (server.directory / name).write_bytes(os.urandom(10_000))
    server.set_latency(0)
    own, further, first, memory, taken = [], [], [], [], []
    for number in range(rounds):
        devices = [RemoteFile(server.url(name)) for name in names]
        gc.collect()
        began = time.perf_counter()
        areas = [prefault.device.map(devices[0])]
        mapped = time.perf_counter()
        before = _private_kib([os.getpid(), *_processes()])
        then = time.perf_counter()
        areas += [prefault.device.map(device) for device in devices[1:]]
        took = time.perf_counter() - then
        for area in areas:
            assert len(area.read(0, 10)) == 10
        pids = _processes()
        memory.append((_private_kib([os.getpid(), *pids]) - before) / (count - 1))
        taken.append(len(pids))
        first.append(mapped - began)
        further.append(took / (count - 1))
        for area in areas:
            area.close()
        began = time.perf_counter()
        alone = [prefault.device.map(RemoteFile(server.url(name), capacity=MIB)) for name in names[:5]]
        own.append((time.perf_counter() - began) / len(alone))
        for area in alone:
            area.close()
        print(
            f"round {number + 1}, load {os.getloadavg()[0]:.1f}: {count} files in {taken[-1]} processes; the first"
            f" {first[-1]:.3f} s, each further one {further[-1] * 1e3:.2f} ms and {memory[-1]:.1f} KiB of private memory"
            f" (with a page read); a file with a server of its own {own[-1] * 1e3:.0f} ms, {own[-1] / further[-1]:.0f}x that"
        )
    print(
        f"median: {statistics.median(further) * 1e3:.2f} ms and {statistics.median(memory):.1f} KiB a file, against"
        f" {statistics.median(own) * 1e3:.0f} ms with a server each"
    )


def _write_model(directory: Path, shards: int, tensors: int) -> None:
    shard_of: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header: dict[str, Any] = {}
        for index in range(tensors):
            header[f"model.layers.{number}.block.{index}.weight"] = {
                "dtype": "F32", "shape": [64, 64], "data_offsets": [index * 16384, (index + 1) * 16384],
            }  # fmt: skip
        text = json.dumps(header).encode()
        (directory / name).write_bytes(struct.pack("<Q", len(text)) + text + bytes(tensors * 16384))
        shard_of |= dict.fromkeys(header, name)
    content = {"metadata": {"total_size": shards * tensors * 16384}, "weight_map": shard_of}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def _same_requests(server: HttpServer, log: list[Request], shards: int) -> float:
    """Return seconds of the requests of a log, bare: first those for the index, then those of each shard in a thread."""
    by_path: dict[str, list[Request]] = {}
    for request in log:
        by_path.setdefault(request.path, []).append(request)

    def work(path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        for request in by_path[path]:
            connection.request("GET", path, headers={"Range": f"bytes={request.first}-{request.last}"})
            connection.getresponse().read()
        connection.close()

    began = time.perf_counter()
    index, *others = by_path
    work(index)
    with ThreadPoolExecutor(shards) as threads:
        list(threads.map(work, others))
    return time.perf_counter() - began


def model(server: HttpServer, shards: int, rounds: int) -> None:
    """Map a safetensors model by its index, against the same requests alone, in turn."""
    _write_model(server.directory, shards, 100)
    server.set_latency(_LATENCY_S)
    beyond, all_of_it = [], []
    for number in range(-1, rounds):
        server.requests(clear=True)
        began = time.perf_counter()
        tensors = prefault.open_remote(server.url("model.safetensors.index.json"))
        took = time.perf_counter() - began
        log = server.requests()
        pids = _processes()
        assert len(tensors) == shards * 100
        del tensors
        gc.collect()
        bare = _same_requests(server, log, shards)
        if number >= 0:
            beyond.append(took - bare)
            all_of_it.append(took)
            print(
                f"round {number + 1}, load {os.getloadavg()[0]:.1f}: {shards} shards, {len(pids)} processes: mapped in"
                f" {took:.3f} s; its {len(log)} requests alone {bare:.3f} s; {took - bare:.3f} s beyond them"
            )
    print(f"median: {statistics.median(all_of_it):.3f} s, {statistics.median(beyond):.3f} s beyond its requests")


_MEASURES = {"populate": populate, "random": random_access, "files": files, "model": model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measures", nargs="*", choices=[*_MEASURES, []], default=[])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--shards", type=int, default=20)
    options = parser.parse_args()
    print(
        f"{date.today()}, Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs,"
        f" {options.mib} MiB over HTTP on loopback, {_LATENCY_S * 1e3:.0f} ms added to each request"
    )
    with tempfile.TemporaryDirectory() as directory:
        length = options.mib * MIB
        with open(Path(directory) / "f", "wb") as file:
            generator = numpy.random.default_rng(1)
            for _ in range(options.mib):
                file.write(generator.bytes(MIB))
        with HttpServer(Path(directory), latency_s=_LATENCY_S) as server:
            for name in options.measures or _MEASURES:
                size = {"files": options.files, "model": options.shards}.get(name, length)
                _MEASURES[name](server, size, options.rounds)


if __name__ == "__main__":
    main()
