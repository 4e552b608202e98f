"""status: the memory of a running process, mapping by mapping."""

from __future__ import annotations

import errno
from array import array
from typing import NamedTuple, NoReturn

from prefault._system import proc
from prefault._system.proc import MapsLine
from prefault.processes.other_process import OtherProcess
from prefault.processes.process_pages import ProcessPages
from prefault.ranges import RangeSet
from prefault.sizes import format_size

_HUGETLB = ("Shared_Hugetlb", "Private_Hugetlb")
_HUGE = ("AnonHugePages", "ShmemPmdMapped", "FilePmdMapped", *_HUGETLB)
_END_OF_USER_SPACE = 1 << 63


class MappingStatus(NamedTuple):
    """One mapping of a process at one moment. All sizes are bytes.

    Attributes:
        start, stop: addresses.
        name: the path or ``[name]`` that ``/proc/PID/maps`` shows; empty for anonymous memory without a name.
        permissions: four letters, such as ``rw-p``; the last is ``p``rivate or ``s``hared.
        present_bytes: with a page-table entry, the shared zero page included: reading does not fault. None: not known.
        allocated_bytes: present, and memory of their own lies behind the pages.
        huge_bytes: of these, mapped by entries for whole huge pages (PMD-mapped, or hugetlb).
        swapped_bytes: in swap space. For shared memory all pages of the file's part count, mapped here or not.
        locked_bytes: allocated, in a mapping that is locked (mlock(2)).
        present: the present pages, as byte offsets from ``start``; None where they are not known.
        page_size: the kernel's page size of the mapping, larger than a base page for hugetlb.
        file_offset: offset in the file that ``start`` maps.
        device, inode: the file behind it; 0 without one.
        vm_flags: the two-letter VmFlags of smaps (proc_pid_smaps(5)).
        unknown: the reason why pages are not known; empty where they are.
    """

    start: int
    stop: int
    name: str
    permissions: str
    present_bytes: int | None
    allocated_bytes: int
    huge_bytes: int
    swapped_bytes: int
    locked_bytes: int
    present: RangeSet | None
    page_size: int
    file_offset: int
    device: int
    inode: int
    vm_flags: frozenset[str]
    unknown: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of address space."""
        return self.stop - self.start

    @property
    def label(self) -> str:
        """The name, or ``[anonymous]`` where the mapping has none."""
        return self.name or "[anonymous]"


class ProcessStatus(NamedTuple):
    """The memory of a process at one moment. All sizes are bytes.

    Attributes:
        pid, name: the process.
        mappings: in order of address; empty where they may not be read.
        unknown: the reason for that; empty where they were read.
        size_bytes, allocated_bytes, swapped_bytes, locked_bytes: sums of the mappings. Where these may not be read, they are
            those of ``/proc/PID/status``, and None where that has no such line.
        present_bytes, huge_bytes: sums of the mappings; None where these may not be read.
    """

    pid: int
    name: str
    mappings: tuple[MappingStatus, ...]
    unknown: str
    size_bytes: int | None
    present_bytes: int | None
    allocated_bytes: int | None
    huge_bytes: int | None
    swapped_bytes: int | None
    locked_bytes: int | None

    def __str__(self) -> str:
        parts = [
            f"{format_size(count)} {word}"
            for count, word in (
                (self.size_bytes, "mapped"), (self.present_bytes, "present"), (self.allocated_bytes, "allocated"),
                (self.huge_bytes or None, "huge"), (self.swapped_bytes or None, "swapped"),
                (self.locked_bytes or None, "locked"),
            )
            if count is not None
        ]  # fmt: skip
        return f"process {self.pid} ({self.name}): {', '.join(parts)}"


def status(pid: int) -> ProcessStatus:
    """Return what the process has in memory, a row for each mapping.

    The process runs meanwhile, so the numbers may be of slightly different moments. Nothing of it is changed.

    Args:
        pid: number of the process, also this one's own.

    Raises:
        ProcessLookupError: no process has this pid, or it ended meanwhile (a zombie too).
        OSError: it is a kernel thread, which has no memory of its own (EINVAL).
        TypeError, ValueError: not a pid.

    Another user's process is no error: the answer has no mappings but the reason, and sums as far as the kernel shows them.

    Source: proc_pid_smaps(5); PAGEMAP_SCAN and pagemap, Documentation/admin-guide/mm/pagemap.rst.
    """
    with OtherProcess(pid) as process:
        unknown = ""
        mappings: tuple[MappingStatus, ...] = ()
        try:
            mappings = tuple(read_mappings(process))
        except PermissionError as error:
            unknown = error.strerror or str(error)
        process.ensure_running()
    return _summed(process, unknown, mappings)


def _summed(process: OtherProcess, unknown: str, mappings: tuple[MappingStatus, ...]) -> ProcessStatus:
    if unknown:
        return ProcessStatus(
            process.pid, process.name, (), unknown, process.bytes_of("VmSize"), None,
            (process.bytes_of("VmRSS") or 0) + (process.bytes_of("HugetlbPages") or 0),
            None, process.bytes_of("VmSwap"), process.bytes_of("VmLck"),
        )  # fmt: skip
    return ProcessStatus(
        process.pid, process.name, mappings, "",
        sum(mapping.size_bytes for mapping in mappings), sum(mapping.present_bytes or 0 for mapping in mappings),
        sum(mapping.allocated_bytes for mapping in mappings), sum(mapping.huge_bytes for mapping in mappings),
        sum(mapping.swapped_bytes for mapping in mappings), sum(mapping.locked_bytes for mapping in mappings),
    )  # fmt: skip


def read_mappings(process: OtherProcess) -> list[MappingStatus]:
    """Read all mappings of a process.

    Raises:
        PermissionError: they may not be read.
        ProcessLookupError: the process has ended.
    """
    try:
        lines = [line for line in proc.read_smaps(process.pid) if line.start < _END_OF_USER_SPACE]  # without [vsyscall]
        walked = [line for line in lines if not walk_refusal(line.vm_flags)]
        states = _page_states(process, walked)
    except OSError as error:
        _translate(process, error)
    return [_mapping_status(line, states) for line in lines]


def _page_states(process: OtherProcess, lines: list[MapsLine]) -> ProcessPages:
    spans = array("Q", [edge for line in lines for edge in (line.start, line.end)])
    with proc.opened_proc(f"/proc/{process.pid}/pagemap") as fd:
        return ProcessPages(fd, spans)


def walk_refusal(vm_flags: frozenset[str]) -> str:
    """Return why the kernel shows no pages of a mapping with these VmFlags; empty where it does."""
    if "io" in vm_flags or "pf" in vm_flags:
        return "device memory (VM_IO or VM_PFNMAP): the kernel does not walk its page tables"
    return ""


def _mapping_status(line: MapsLine, states: ProcessPages) -> MappingStatus:
    unknown = walk_refusal(line.vm_flags)
    inside = states.present.clipped(line.start, line.end).shifted(-line.start)
    present = None if unknown else RangeSet.from_edges(inside.edges)
    fields = line.fields
    allocated = fields.get("Rss", 0) + sum(fields.get(name, 0) for name in _HUGETLB)
    return MappingStatus(
        line.start, line.end, line.name, line.permissions,
        None if present is None else present.length, allocated,
        sum(fields.get(name, 0) for name in _HUGE), fields.get("Swap", 0), allocated if "lo" in line.vm_flags else 0,
        present, fields.get("KernelPageSize", 0), line.offset, line.device, line.inode, line.vm_flags, unknown,
    )  # fmt: skip


def _translate(process: OtherProcess, error: OSError) -> NoReturn:
    """Raise the error of a file in /proc/PID as one that names the cause."""
    process.ensure_running()
    if error.errno in (errno.EACCES, errno.EPERM):
        raise PermissionError(error.errno, process.refusal("reading the mappings of")) from error
    raise error
