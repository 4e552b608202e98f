"""Measure remote files, on an HTTP server on loopback in a process of its own, with 20 ms of added latency.

Prints text for docs/results/device.md, and asserts nothing: the reader judges the figures.

python bench/remote.py [populate] [random] [--mib 512] [--rounds 5]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import http.client
import os
import platform
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
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
from support.http_server import HttpServer

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


_MEASURES = {"populate": populate, "random": random_access}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measures", nargs="*", choices=[*_MEASURES, []], default=[])
    parser.add_argument("--mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
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
                _MEASURES[name](server, length, options.rounds)


if __name__ == "__main__":
    main()
