"""Places that must be made: the hugetlb pool and a hugetlbfs, both put back as they were; and where files go."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefault._kernel import hugetlb, proc
from prefault.bench.kinds import HUGE_PAGE_BYTES
from prefault.bench.machine import available_memory_bytes
from prefault.sizes import MIB, format_size

MARGIN_BYTES = 256 * MIB
"""Memory that stays free for everybody else."""

_SPARE_PAGES = 4
_MOUNT_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Pool:
    """The hugetlb pool of 2 MiB pages while the cells that need it run.

    Attributes:
        available_pages: free and not reserved.
        refusal: why there are no more; None where there are as many as asked for.
    """

    available_pages: int
    refusal: str | None = None


@contextmanager
def hugetlb_pool(pages: int) -> Iterator[Pool]:
    """A pool with ``pages`` free pages and a few more if that can be had. It has its old size afterwards."""
    if HUGE_PAGE_BYTES not in hugetlb.page_sizes():
        yield Pool(0, "this kernel has no huge pages of 2 MiB")
        return
    before = hugetlb.read_pool(HUGE_PAGE_BYTES)
    missing = pages + _SPARE_PAGES - before.available
    if before.available >= pages:
        yield Pool(before.available)
        return
    room = (available_memory_bytes() - MARGIN_BYTES) // HUGE_PAGE_BYTES
    grown = False
    try:
        refusal = _grow(before.total, max(0, min(missing, room)))
        grown = hugetlb.read_pool(HUGE_PAGE_BYTES).total > before.total
        if refusal is None and room < missing:
            refusal = f"only {format_size(max(0, room) * HUGE_PAGE_BYTES)} of memory could be given to it"
        now = hugetlb.read_pool(HUGE_PAGE_BYTES).available
        yield Pool(now, None if now >= pages else refusal)
    finally:
        # Surplus pages are not the pool's: they go away by themselves. What others did to the pool is theirs.
        if grown:
            hugetlb.resize_pool(HUGE_PAGE_BYTES, before.total - before.surplus)


def _grow(total: int, missing: int) -> str | None:
    """Ask for more pages; why there are fewer than that, if so."""
    try:
        got = hugetlb.resize_pool(HUGE_PAGE_BYTES, total + missing)
    except OSError as error:
        return f"only root can grow it ({error.strerror})"
    return None if got >= total + missing else "the kernel found no more: memory is full or fragmented"


@dataclass(frozen=True, slots=True)
class Hugetlbfs:
    """A hugetlbfs of 2 MiB pages.

    Attributes:
        directory: in which files can be made; None without one.
        fds: descriptors that a process must inherit for the directory to mean something there.
        refusal: why there is none; None where there is.
    """

    directory: str | None
    fds: tuple[int, ...] = ()
    refusal: str | None = None


@contextmanager
def hugetlbfs() -> Iterator[Hugetlbfs]:
    """A hugetlbfs that is mounted and that we may write to, or else one of our own, if we may mount."""
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
    """A descriptor of the root of a new hugetlbfs that is in no directory: however we end, it goes with its descriptor."""
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
    # A session of its own: Ctrl-C at the terminal must not stop a umount half-way.
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
    """The name of the file system that a directory lies on, such as ``ext4``; None where it is not to be seen."""
    path = Path(directory).resolve()
    best: tuple[int, str] | None = None
    for mount in proc.read_mounts():
        # The last of equal length is on top.
        if path.is_relative_to(mount.directory) and (best is None or len(mount.directory) >= best[0]):
            best = len(mount.directory), mount.filesystem
    return None if best is None else best[1]


def in_memory(directory: str) -> bool:
    """Whether what is in the directory lies in memory only."""
    return filesystem_of(directory) in ("tmpfs", "ramfs", "hugetlbfs", "devtmpfs")


def default_file_directory() -> str:
    """A directory for temporary files that lies on a disk, if the usual ones have one."""
    candidates = (tempfile.gettempdir(), "/var/tmp")
    return next((found for found in candidates if os.path.isdir(found) and not in_memory(found)), candidates[0])
