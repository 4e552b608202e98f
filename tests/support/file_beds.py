"""Files on file systems of several kinds, and what is known of their page cache without the code under test."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefault._kernel.cachestat import cachestat
from prefault._system import capabilities
from support import needs

PAGE = mmap.PAGESIZE
NOBODY = 65534


def make(path: Path, size: int) -> Path:
    """Write a file whose pages differ, and have it on the disk."""
    block = bytes(range(256)) * (PAGE // 256)
    with path.open("wb") as file:
        for start in range(0, size, PAGE):
            file.write((start.to_bytes(8, "little") + block[8:])[: min(PAGE, size - start)])
        file.flush()
        os.fsync(file.fileno())
    return path


def evict(path: Path) -> None:
    """Drop the clean pages of a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        for _ in range(20):  # pages that another CPU has in hand stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not capabilities.CACHESTAT.available or not cachestat(file.fileno()).cached:
                return
            time.sleep(0.005)


def make_cold(path: Path, size: int) -> Path:
    """Make a file as :func:`make` does, none of whose pages is cached."""
    make(path, size)
    evict(path)
    return path


def touch(path: Path, *pages: int) -> None:
    """Read some pages of a file, and no others."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
        for page in pages:
            os.pread(file.fileno(), 1, page * PAGE)


def cached_pages(path: Path) -> int:
    """Return the number of cached pages, as fincore(1) of util-linux counts them."""
    if not os.access("/usr/bin/fincore", os.X_OK):
        needs.missing("fincore (util-linux) is not installed")
    done = subprocess.run(["fincore", "--json", "--bytes", path], capture_output=True, errors="replace", check=True)
    return int(json.loads(done.stdout)["fincore"][0]["pages"])


@contextmanager
def mounted(directory: Path, *arguments: str) -> Iterator[Path]:
    """Mount a file system at a new directory; unmounted at the end."""
    needs.root("mount a file system")
    directory.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *arguments, str(directory)], capture_output=True, text=True)
    if done.returncode:
        needs.missing(f"cannot be mounted: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@contextmanager
def bound(source: str | Path, target: Path) -> Iterator[Path]:
    """Mount a file or a directory at another place, which is there; unmounted at the end."""
    needs.root("mount")
    subprocess.run(["mount", "--bind", source, target], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)


@contextmanager
def overlay(directory: Path) -> Iterator[Path]:
    """Mount an overlay; yield its directory, beside which ``lower`` holds the files below."""
    for name in ("lower", "upper", "work"):
        (directory / name).mkdir()
    options = f"lowerdir={directory}/lower,upperdir={directory}/upper,workdir={directory}/work"
    with mounted(directory / "merged", "-t", "overlay", "-o", options, "prefault-test") as merged:
        yield merged


@contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    """Make a block device of a file."""
    needs.root("make a loop device")
    done = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True)
    if done.returncode:
        needs.missing(f"no loop device: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
