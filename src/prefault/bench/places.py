"""The hugetlb pool and a hugetlbfs, set up and restored; and the directory for files."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefault._system import hugetlb, proc
from prefault.bench.kinds import HUGE_PAGE_BYTES
from prefault.bench.machine import available_memory_bytes
from prefault.sizes import MIB, format_size

MARGIN_BYTES = 256 * MIB
"""Bytes of memory that stay free for other processes."""

_SPARE_PAGES = 4
_MOUNT_SECONDS = 30


@dataclass(frozen=True, slots=True)
class TemporaryHugetlbPool:
    """The hugetlb pool of 2 MiB pages while the cells that need it run.

    Attributes:
        available_pages: pages that are free and not reserved.
        refusal: the reason why there are not more; None where there are as many as asked for.
    """

    available_pages: int
    refusal: str | None = None


@contextmanager
def hugetlb_pool(pages: int) -> Iterator[TemporaryHugetlbPool]:
    """Grow the pool to ``pages`` free pages and a few more, as far as possible. Restore its size afterwards."""
    if HUGE_PAGE_BYTES not in hugetlb.page_sizes():
        yield TemporaryHugetlbPool(0, "this kernel has no huge pages of 2 MiB")
        return
    before = hugetlb.read_pool(HUGE_PAGE_BYTES)
    missing = pages + _SPARE_PAGES - before.available
    if before.available >= pages:
        yield TemporaryHugetlbPool(before.available)
        return
    room = (available_memory_bytes() - MARGIN_BYTES) // HUGE_PAGE_BYTES
    grown = False
    try:
        refusal = _grow(before.total, max(0, min(missing, room)))
        grown = hugetlb.read_pool(HUGE_PAGE_BYTES).total > before.total
        if refusal is None and room < missing:
            refusal = f"only {format_size(max(0, room) * HUGE_PAGE_BYTES)} of memory could be given to it"
        now = hugetlb.read_pool(HUGE_PAGE_BYTES).available
        yield TemporaryHugetlbPool(now, None if now >= pages else refusal)
    finally:
        # Surplus pages go away by themselves. A pool that this function did not grow is left as it is.
        if grown:
            hugetlb.resize_pool(HUGE_PAGE_BYTES, before.total - before.surplus)


def _grow(total: int, missing: int) -> str | None:
    """Ask the kernel for more pages; return the reason where there are fewer than that."""
    try:
        got = hugetlb.resize_pool(HUGE_PAGE_BYTES, total + missing)
    except OSError as error:
        return f"only root can grow it ({error.strerror})"
    return None if got >= total + missing else "the kernel found no more: memory is full or fragmented"


@dataclass(frozen=True, slots=True)
class Hugetlbfs:
    """A hugetlbfs of 2 MiB pages.

    Attributes:
        directory: the directory for files; None without a hugetlbfs.
        fds: descriptors that a process must inherit to use the directory.
        refusal: the reason why there is no hugetlbfs; None where there is one.
    """

    directory: str | None
    fds: tuple[int, ...] = ()
    refusal: str | None = None


@contextmanager
def hugetlbfs() -> Iterator[Hugetlbfs]:
    """Find a mounted hugetlbfs that this process may write to; else mount one, if this process may."""
    for mount in proc.read_mounts():
        if mount.filesystem == "hugetlbfs" and _usable(mount.directory):
            yield Hugetlbfs(mount.directory)
            return
    try:
        fd = _mount_detached()
    except (OSError, subprocess.SubprocessError) as error:
        cause = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        yield Hugetlbfs(
            None, refusal=f"no writable hugetlbfs of 2 MiB pages is mounted, and only root can mount one ({cause})"
        )
        return
    try:
        yield Hugetlbfs(f"/proc/self/fd/{fd}", (fd,))
    finally:
        os.close(fd)


def _usable(directory: str) -> bool:
    try:
        return os.statvfs(directory).f_bsize == HUGE_PAGE_BYTES and os.access(directory, os.W_OK | os.X_OK)
    except OSError:
        return False


def _mount_detached() -> int:
    """Mount a hugetlbfs in no directory and return a descriptor of its root: it goes when the last descriptor does."""
    directory = tempfile.mkdtemp(prefix="prefault-hugetlbfs-")
    try:
        _command("mount", "-t", "hugetlbfs", "-o", "pagesize=2M,mode=0700", "prefault-bench", directory)
        try:
            return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        finally:
            _command("umount", "--lazy", directory)
    finally:
        os.rmdir(directory)


def _command(*words: str) -> None:
    # The command gets a session of its own: Ctrl-C at the terminal must not stop umount half-way.
    subprocess.run(
        words,
        check=True,
        capture_output=True,
        text=True,
        timeout=_MOUNT_SECONDS,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
    )


def filesystem_of(directory: str) -> str | None:
    """Return the type of the file system of a directory, such as ``ext4``; None where no mount shows it."""
    path = Path(directory).resolve()
    best: tuple[int, str] | None = None
    for mount in proc.read_mounts():
        # The last mount of equal length is on top.
        if path.is_relative_to(mount.directory) and (best is None or len(mount.directory) >= best[0]):
            best = len(mount.directory), mount.filesystem
    return None if best is None else best[1]


def in_memory(directory: str) -> bool:
    """Return whether files in the directory lie in memory only."""
    return filesystem_of(directory) in ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")


def default_file_directory() -> str:
    """Return a directory for temporary files that lies on a disk, if one of the usual ones does."""
    candidates = (tempfile.gettempdir(), "/var/tmp")
    return next((found for found in candidates if os.path.isdir(found) and not in_memory(found)), candidates[0])
