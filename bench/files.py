"""Measure bringing files into the page cache. Prints tables for docs/results/files.md; asserts nothing: the reader judges.

python bench/files.py [--size 2GiB] [--rounds 5] [--quick] [--on ext4,tmpfs,overlay,fuse1,fuse5,fuse20]

Each round runs all ways, each on cold pages, in an order of its own (seeded): a way that always follows the same one finds
memory as that leaves it. Of a dozen ways that are equally fast, the fastest of each round is the one that noise favours, so
that the ratios are to the way whose median is the smallest.
As root: it mounts file systems. `make bench-files` installs vmtouch.
"""

from __future__ import annotations

import argparse
import functools
import mmap
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import prefault
from prefault import format_size, parse_size
from prefault._kernel import mman
from prefault.files.cached_pages import cached_count
from prefault.files.open_file import OpenFile
from prefault.sizes import KIB, MIB, PAGE_SIZE
from support import file_beds, fuse_files

_TOUCH = "touch the mapping"


# --- ways ------------------------------------------------------------------------------------------------------------


def _touch(path: Path) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        for at in range(0, len(memory), PAGE_SIZE):
            memory[at]


def _populate(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        address = mman.mmap(0, size, mman.PROT_READ, mman.MAP_PRIVATE, file.fileno())
        try:
            for at in range(0, size, 8 * MIB):
                mman.madvise(address + at, min(8 * MIB, size - at), mman.MADV_POPULATE_READ)
        finally:
            mman.munmap(address, size)


def _map_populate(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        flags = mman.MAP_PRIVATE | mman.MAP_POPULATE
        mman.munmap(mman.mmap(0, size, mman.PROT_READ, flags, file.fileno()), size)


def _pread(path: Path) -> None:
    buffer = bytearray(MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _one_willneed(path: Path) -> None:
    """Advise all of it at once, and read it then, as the advice alone ends before the pages are there."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    _pread(path)


def _readahead_steps(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for at in range(0, size, 128 * KIB):
            os.posix_fadvise(file.fileno(), at, 128 * KIB, os.POSIX_FADV_WILLNEED)
    _pread(path)


def _command(words: str, path: Path) -> None:
    subprocess.run([*words.split(), str(path)], stdout=subprocess.DEVNULL, check=True)


def _ours(path: Path, **arguments: object) -> None:
    prefault.warm(path, **arguments)  # type: ignore[arg-type]


def _ways() -> dict[str, Callable[[Path], None]]:
    found: dict[str, Callable[[Path], None]] = {
        _TOUCH: _touch,
        "MADV_POPULATE_READ": _populate,
        "MAP_POPULATE": _map_populate,
        "read, 1 MiB": _pread,
        "one WILLNEED, then read": _one_willneed,
        "WILLNEED by 128 KiB, then read": _readahead_steps,
        "prefault, populate": functools.partial(_ours, method="populate"),
        "prefault, readahead": functools.partial(_ours, method="readahead"),
        "prefault, pread": functools.partial(_ours, method="pread"),
        "cat": functools.partial(_command, "cat"),
        "prefault.warm": _ours,
    }
    if shutil.which("vmtouch"):
        found["vmtouch -t"] = functools.partial(_command, "vmtouch -t -q")
    return found


# --- places ----------------------------------------------------------------------------------------------------------


@contextmanager
def _place(name: str, directory: Path, size: int) -> Iterator[Path]:
    """Make a file of ``size`` bytes on a file system of that name."""
    directory = directory / name
    with ExitStack() as stack:
        if name.startswith("fuse"):
            bed = stack.enter_context(fuse_files.mounted(directory, {"file": size}, latency_s=int(name[4:]) / 1000))
            yield bed / "file"
            return
        directory.mkdir()
        if name == "overlay":
            directory = stack.enter_context(file_beds.overlay(directory))
        elif name == "tmpfs":
            mount = ("-t", "tmpfs", "-o", f"size={size + MIB}", "prefault-bench")
            directory = stack.enter_context(file_beds.mounted(directory / "mount", *mount))
        path = directory / "file"
        block = os.urandom(MIB)
        with path.open("wb") as file:
            for _ in range(size // MIB):
                file.write(block)
        yield path


def _evict(path: Path) -> bool:
    """Evict a file; return whether it is gone, which a file on tmpfs never is."""
    file_beds.evict(path)
    with OpenFile(path) as file:
        return not cached_count(file).pages


# --- measuring -------------------------------------------------------------------------------------------------------


def _compare(ways: dict[str, Callable[[Path], None]], path: Path, size: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    seeded = random.Random(5)
    for _ in range(rounds):
        seeded.shuffle(order)
        for name in order:
            _evict(path)
            began = time.perf_counter()
            ways[name](path)
            seconds[name].append(time.perf_counter() - began)
    best = min(map(statistics.median, seconds.values()))
    touched = statistics.median(seconds[_TOUCH]) if _TOUCH in seconds else None
    print("| way | median s | MB/s | spread s | smallest s | times the best median | times faster than touching |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in sorted(ways, key=lambda name: statistics.median(seconds[name])):
        took = statistics.median(seconds[name])
        spread = f"{max(seconds[name]) - min(seconds[name]):.3f}"
        faster = f"{touched / took:.1f}" if touched else ""
        print(
            f"| {name} | {took:.3f} | {size / took / 1e6:.0f} | {spread} | {min(seconds[name]):.3f} "
            f"| {took / best:.2f} | {faster} |"
        )
    print(flush=True)


def _stream(path: Path) -> None:
    with prefault.stream(path, "256 MiB") as file:
        for _ in file:
            pass


def _sequential(path: Path) -> None:
    buffer = bytearray(8 * MIB)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _many_files(directory: Path, rounds: int, count: int) -> None:
    """Ask for the residency of cached files, against vmtouch."""
    directory = directory / "many"
    directory.mkdir()
    block = os.urandom(2 * MIB)
    for number in range(count):
        (directory / str(number)).write_bytes(block)
    ways: dict[str, Callable[[Path], object]] = {"prefault.status": prefault.status}
    if shutil.which("vmtouch"):
        ways["vmtouch"] = functools.partial(_command, "vmtouch")
    print(f"## Residency of {count} cached files of 2 MiB\n\n| way | median ms |\n|---|---:|")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way(directory)
            seconds[name].append(time.perf_counter() - began)
    for name, all_of in seconds.items():
        print(f"| {name} | {statistics.median(all_of) * 1e3:.1f} |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", default="2GiB")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="256 MiB, two rounds")
    parser.add_argument("--on", default="ext4,tmpfs,overlay,fuse1,fuse5,fuse20")
    parser.add_argument("--directory", type=Path, help="a directory on the disk to measure; default: for temporary files")
    chosen = parser.parse_args()
    size, rounds = (256 * MIB, 2) if chosen.quick else (parse_size(chosen.size), chosen.rounds)
    print(f"{date.today()}, Linux {platform.release()}, Python {platform.python_version()}, {os.cpu_count()} CPUs, "
          f"load {os.getloadavg()[0]:.1f}; {format_size(size)}, {rounds} rounds\n")  # fmt: skip
    with tempfile.TemporaryDirectory(dir=chosen.directory) as temporary:
        directory = Path(temporary)
        for name in chosen.on.split(","):
            if name == "fuse20":  # one request at a time, 256 MiB take 20 s
                size //= 4
            with _place(name, directory, size) as path:
                shown = f"FUSE, {name[4:]} ms a request" if name.startswith("fuse") else name
                with OpenFile(path) as file:
                    kind = file.file_system
                cold = "cold" if _evict(path) else "always in memory"
                print(f"## Warm: {shown} ({kind}; {cold}; {format_size(size)})\n")
                _compare(_ways(), path, size, rounds)
                if name in ("ext4", "overlay", "fuse5"):
                    print(f"## Stream: {shown}\n")
                    _compare({"prefault.stream, 256 MiB": _stream, "read, 8 MiB": _sequential}, path, size, rounds)
        _many_files(directory, max(3, rounds), 100 if chosen.quick else 1000)


if __name__ == "__main__":
    main()
