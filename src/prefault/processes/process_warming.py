"""warm: bring in the pages that a running process has lost, or not yet touched."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from time import perf_counter
from typing import NamedTuple

from prefault._kernel import mman, uio
from prefault._system import cgroups, proc
from prefault._system.memory_cgroups import MemoryCgroup
from prefault._system.proc import MapsLine
from prefault.engine.progress import Progress, reporting
from prefault.engine.rate import RateLimit, rate_limit
from prefault.limits.memory_limits import check_cgroups, check_machine
from prefault.processes.missing_pages import Missing, MissingPages
from prefault.processes.other_process import OtherProcess
from prefault.processes.process_pages import ProcessPages
from prefault.processes.process_status import MappingStatus, read_mappings, walk_refusal
from prefault.ranges import RangeSet
from prefault.sizes import MIB, Size, format_size, parse_size

_FIRST_PAGES = 64
_AHEAD = 16 * MIB
_CALL_S = 0.004, 0.016
_MOST_FAILURES = 16


class SkippedMapping(NamedTuple):
    """A mapping, or a part of one, that was not brought in.

    Attributes:
        mapping: the mapping, as it was before.
        reason: a few words.
        failed: False if it was left out on purpose, True if pages that were wanted did not come in.
    """

    mapping: MappingStatus
    reason: str
    failed: bool


class ProcessWarmResult(NamedTuple):
    """Pages of a process that were brought in.

    Attributes:
        pid, name: the process.
        bytes: pages that were missing, and came in.
        wanted_bytes: pages that were missing, and were to come in.
        mappings: count of the mappings in which pages came in.
        seconds: the call took.
        skipped: mappings that were left out or failed, each with its reason.
        stopped: the limit or budget that ended the call early; empty where none did.
    """

    pid: int
    name: str
    bytes: int
    wanted_bytes: int
    mappings: int
    seconds: float
    skipped: tuple[SkippedMapping, ...]
    stopped: str

    @property
    def complete(self) -> bool:
        """True if every page that was wanted came in."""
        return not self.stopped and not any(skipped.failed for skipped in self.skipped)

    def __str__(self) -> str:
        text = f"process {self.pid} ({self.name}): {format_size(self.bytes)} brought in, in {self.seconds:.2g} s"
        return f"{text}; stopped: {self.stopped}" if self.stopped else text


def warm(
    pid: int,
    mappings: str | Iterable[str] | None = None,
    *,
    untouched: bool = False,
    budget: Size | None = None,
    rate: RateLimit | Size | None = None,
    progress: Progress | bool = False,
) -> ProcessWarmResult:
    """Bring in the pages of a running process that are in swap space or only in files, each by a read of one byte.

    The process goes on meanwhile, and no byte of it changes. Pages that are present are not read. Ctrl-C ends it after some
    ten milliseconds; pages that came in stay.

    Args:
        pid: number of the process.
        mappings: names of mappings, as ``/proc/PID/maps`` shows them (``[heap]``, ``/usr/lib/libx.so``, a file name without
            directories, ``[anonymous]``) or patterns with ``*`` and ``?``; None: all.
        untouched: bring in pages that hold nothing as well: never touched memory, holes of files.
        budget: bytes to bring in at most.
        rate: bytes a second at most, such as ``"200 MiB/s"``.
        progress: True draws a bar on stderr, or logs where that is no terminal; a function is called with the bytes done and
            in all.

    Raises:
        ProcessLookupError: no process has this pid, or it ended meanwhile (a zombie too).
        PermissionError: this user may not ptrace the process.
        OSError: it is a kernel thread, or this process itself (EINVAL): use :func:`prefault.populate`.
        TypeError, ValueError: not a pid; nothing is mapped by that name; a bad budget.

    Limits of the memory cgroups of that process, and the machine's, are checked before each chunk; where they leave too
    little, the result says so in ``stopped``.

    Source: process_vm_readv(2), proc_pid_mem(5), process_madvise(2).
    """
    began = perf_counter()
    most = None if budget is None else parse_size(budget)
    limit = rate_limit(rate)
    with reporting(progress, "warm") as report, OtherProcess(pid) as process:
        if pid == os.getpid():
            raise OSError(errno.EINVAL, f"process {pid} is this process itself: use prefault.populate on its buffers")
        chosen = _chosen(process, read_mappings(process), mappings)
        run = _Warming(process, most, limit, report)
        run.plan(chosen, untouched=untouched)
        run.run()
        process.ensure_running()
        return run.result(perf_counter() - began)


def _chosen(process: OtherProcess, found: list[MappingStatus], names: str | Iterable[str] | None) -> list[MappingStatus]:
    if names is None:
        return found
    chosen: dict[int, MappingStatus] = {}
    for name in [names] if isinstance(names, str) else list(names):
        some = [mapping for mapping in found if _is_named(mapping.label, name)]
        if not some:
            raise ValueError(
                f"process {process.label} maps nothing of the name {name!r}: prefault.processes.status lists all"
            )
        chosen.update((mapping.start, mapping) for mapping in some)
    return [chosen[start] for start in sorted(chosen)]


def _is_named(label: str, name: str) -> bool:
    # Exactly first: "[heap]" is a pattern too, for one of the letters h, e, a and p.
    return name in (label, os.path.basename(label)) or (
        any(letter in name for letter in "*?")
        and (fnmatch.fnmatchcase(label, name) or fnmatch.fnmatchcase(os.path.basename(label), name))
    )


class _Part(NamedTuple):
    """Pages of a mapping to bring in; ``one_by_one`` where some of them may be shared with a fork, in swap space."""

    mapping: MappingStatus
    missing: Missing
    one_by_one: bool


class _Warming:
    """One call of warm: the pages to bring in, and what came of them."""

    def __init__(self, process: OtherProcess, budget: int | None, rate: RateLimit | None, progress: Progress | None) -> None:
        self._process = process
        self._budget = budget
        self._rate = rate
        self._progress = progress
        self._parts: list[_Part] = []
        self._skipped: list[SkippedMapping] = []
        self._done = self._wanted = self._mappings = 0
        self._stopped = ""
        self._levels = _memory_cgroups(process.pid)
        self._pages_a_call = _FIRST_PAGES
        self._sink = ctypes.create_string_buffer(mman.IOV_MAX)
        self._local = mman.IoVec(ctypes.addressof(self._sink), len(self._sink))
        self._may_advise = True
        self._maps: list[MapsLine] = []
        self._memory = -1

    def plan(self, mappings: list[MappingStatus], *, untouched: bool) -> None:
        """Find the pages to bring in."""
        swapped, guards = self._swapped_and_guards(mappings)
        look = MissingPages(self._process, untouched=untouched)
        for mapping in mappings:
            inside = mapping.start, mapping.stop
            in_swap = swapped.clipped(*inside)
            missing = look.of(mapping, in_swap, guards.clipped(*inside))
            if missing.reason:
                self._skipped.append(SkippedMapping(mapping, missing.reason, failed=False))
            if missing.pages:
                one_by_one = mapping.permissions[3] == "p" and bool(in_swap & missing.pages)
                self._parts.append(_Part(mapping, missing, one_by_one))
                self._wanted += missing.pages.length

    def _swapped_and_guards(self, mappings: list[MappingStatus]) -> tuple[RangeSet, RangeSet]:
        spans = array("Q", [edge for one in mappings if not walk_refusal(one.vm_flags) for edge in (one.start, one.stop)])
        with proc.opened_proc(f"/proc/{self._process.pid}/pagemap") as fd:
            pages = ProcessPages(fd, spans)
        return RangeSet.from_edges(pages.swapped.edges), RangeSet.from_edges(pages.guards.edges)

    def run(self) -> None:
        """Bring them in, until a limit or the budget stops it."""
        with ExitStack() as stack:
            if any(part.one_by_one for part in self._parts):
                with suppress(PermissionError):  # restricted more than process_vm_readv(2) by proc_mem.restrict_open_read
                    self._memory = stack.enter_context(proc.opened_proc(f"/proc/{self._process.pid}/mem"))
                self._process.ensure_running()
            for part in self._parts:
                before = self._done
                self._warm_part(part)
                self._mappings += self._done > before
                if self._stopped:
                    return

    def result(self, seconds: float) -> ProcessWarmResult:
        """Return what came of it."""
        return ProcessWarmResult(
            self._process.pid, self._process.name, self._done, self._wanted, self._mappings, seconds,
            tuple(self._skipped), self._stopped,
        )  # fmt: skip

    def _warm_part(self, part: _Part) -> None:
        step = part.mapping.page_size
        failures = 0
        advised = 0
        for start, stop in part.missing.pages:
            at = start
            while at < stop:
                pages = range(at, stop, step)[: self._allowed_pages(part.missing, step)]
                if not pages:
                    return
                if self._rate is not None:
                    self._rate.wait(len(pages) * step)
                if "rr" in part.mapping.vm_flags and pages[-1] >= advised - _AHEAD // 2:
                    advised = self._advise(part.missing.pages, max(at, advised))
                came = self._read(pages, one_by_one=part.one_by_one and self._memory >= 0)
                self._done += came * step
                at += came * step
                if self._progress is not None:
                    self._progress(self._done, self._wanted)
                if came < len(pages):
                    failures += 1
                    reason = self._why_failed(part.mapping, at, failures)
                    if reason:
                        self._skipped.append(SkippedMapping(part.mapping, reason, failed=True))
                        return
                    at += step
        if failures:
            text = f"{failures} of its pages cannot be read"
            self._skipped.append(SkippedMapping(part.mapping, text, failed=True))

    def _allowed_pages(self, missing: Missing, step: int) -> int:
        """Return how many pages the next call may bring in; 0 where a limit stops it, which ``_stopped`` then says."""
        count = self._pages_a_call
        if self._rate is not None:
            count = max(1, min(count, self._rate.chunk_bytes // step))
        if self._budget is not None:
            count = min(count, (self._budget - self._done) // step)
            if count <= 0:
                self._stopped = f"the budget of {format_size(self._budget)} is used up"
                return 0
        if missing.charged:
            answer = check_cgroups(count * step, levels=self._levels)
            if answer.short is None:
                answer = check_machine(count * step)
            if answer.short is not None:
                self._stopped = answer.short.advice
                return 0
        return count

    def _read(self, pages: Sequence[int], *, one_by_one: bool) -> int:
        """Read a byte of each page; return how many came in before one failed."""
        began = perf_counter()
        try:
            came = self._read_one_by_one(pages) if one_by_one else self._read_together(pages)
        except OSError as error:
            self._process.ensure_running()
            if error.errno in (errno.EPERM, errno.EACCES):
                raise PermissionError(error.errno, self._process.refusal("reading the memory of")) from error
            if error.errno not in (errno.EFAULT, errno.ENOMEM):
                raise
            came = 0
        else:
            self._process.ensure_running()
        seconds = perf_counter() - began
        shortest, longest = _CALL_S
        if seconds > longest:
            self._pages_a_call = max(1, self._pages_a_call // 2)
        elif seconds < shortest:
            self._pages_a_call = min(mman.IOV_MAX, 2 * self._pages_a_call)
        return came

    def _read_together(self, pages: Sequence[int]) -> int:
        remote = array("Q", [1]) * (2 * len(pages))  # struct iovec: base, length
        remote[::2] = array("Q", pages)
        return uio.process_vm_readv(self._process.pid, ctypes.addressof(self._local), 1, remote.buffer_info()[0], len(pages))

    def _read_one_by_one(self, pages: Sequence[int]) -> int:
        """Read through /proc/PID/mem: process_vm_readv(2) pins pages, and copies those that a fork shares (Linux 5.19)."""
        for count, address in enumerate(pages):
            try:
                if not os.pread(self._memory, 1, address):  # the process has ended, or called execve(2)
                    return count
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return count
        return len(pages)

    def _advise(self, pages: RangeSet, start: int) -> int:
        """Start the input of the next pages from ``start`` on; return the address up to which that is done.

        For mappings under MADV_RANDOM, of which the kernel reads no page ahead; elsewhere its own read-ahead is faster. A
        hint: where the kernel refuses it, the pages come in one by one.
        """
        stop = start + _AHEAD
        if self._may_advise:
            ranges = [(first, last - first) for first, last in pages.clipped(start, stop)]
            try:
                mman.process_madvise(self._process.pidfd, ranges[: mman.IOV_MAX], mman.MADV_WILLNEED)
            except OSError as error:
                self._may_advise = error.errno not in (errno.EPERM, errno.EINVAL, errno.ENOSYS)
        return stop

    def _why_failed(self, mapping: MappingStatus, address: int, failures: int) -> str:
        """Return why the rest of a mapping is given up after a page that could not be read; empty to go on after it."""
        # First by the list that an earlier failure read: of thousands that vanished together, one reading tells.
        for again in (False, True):
            found = self._read_maps() if again else self._maps
            at = bisect_right(found, address, key=lambda line: line.start) - 1
            now = found[at] if at >= 0 and address < found[at].end else None
            if now is None and found:
                return "it was unmapped meanwhile"
            if now and (now.device, now.inode, now.permissions) != (mapping.device, mapping.inode, mapping.permissions):
                return "another mapping took its place meanwhile, or its permissions changed"
        if failures >= _MOST_FAILURES:
            return f"{failures} of its pages cannot be read, this one last: {address:#x}; the rest was not tried"
        return ""

    def _read_maps(self) -> list[MapsLine]:
        try:
            self._maps = list(proc.read_maps(self._process.pid))
        except OSError:
            self._process.ensure_running()
            raise
        return self._maps


def _memory_cgroups(pid: int) -> Sequence[MemoryCgroup]:
    """Return the memory cgroups of a process; none where they cannot be found."""
    try:
        found = cgroups.governing("memory", pid)
    except OSError:
        return ()
    return tuple(MemoryCgroup(directory, found.version) for directory in found.directories)
