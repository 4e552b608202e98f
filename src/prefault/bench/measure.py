"""Measure one cell, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from time import perf_counter_ns

from prefault.bench.grid import PREFAULT, Cell
from prefault.bench.kinds import HUGE_PAGE_BYTES, KINDS, Places
from prefault.engine.methods import METHODS, Target
from prefault.engine.populating import populate
from prefault.inspection.scan import residency
from prefault.mapping.mapping import Mapping
from prefault.memory.backings import Anonymous, File, Memfd
from prefault.sizes import PAGE_SIZE, format_size


@dataclass(frozen=True, slots=True)
class Repetition:
    """The time of one repetition.

    Attributes:
        value_ns: the time of the method over the whole mapping.
        note: a remark for the reader, such as the method that was chosen.
    """

    value_ns: int
    note: str | None = None


def measure(cell: Cell, repeats: int, places: Places) -> Iterator[Repetition]:
    """Run the cell's method ``repeats`` times, each time over a fresh and empty mapping.

    Only the method is timed: neither making the mapping nor giving it back.

    Raises:
        MappingError, PopulateError, OSError: the memory cannot be mapped or populated.
    """
    # One untimed run: it takes imports, probes of the kernel and first calls out of the times, and has the host of a virtual
    # machine supply memory that it took back. Pages of another order than those before come from other memory.
    with fresh_mapping(cell, places, cell.size_bytes) as mapping:
        _runner(cell, mapping)()
    for index in range(repeats):
        with fresh_mapping(cell, places, cell.size_bytes) as mapping:
            run = _runner(cell, mapping)
            began = perf_counter_ns()
            decided = run()
            value_ns = perf_counter_ns() - began
            note = decided or (_page_size_note(cell, mapping) if index == 0 else None)
        yield Repetition(value_ns, note)


@contextmanager
def fresh_mapping(cell: Cell, places: Places, size_bytes: int) -> Iterator[Mapping]:
    """Map memory as the cell asks for, with no page present. Unmap it, and remove its file, afterwards."""
    kind = KINDS[cell.backing]
    shared = cell.sharing == "shared"
    with ExitStack() as stack:
        backing = kind.source(places)
        if kind.filled:
            # The file stays alive through a mapping of its own, and is mapped a second time for the measurement.
            file = stack.enter_context(Mapping(size_bytes, backing=backing, shared=True, huge=kind.huge))
            populate(file)
            backing = File(f"/proc/self/fd/{file.fd}")
        yield stack.enter_context(Mapping(size_bytes, backing=backing, shared=shared, huge=kind.huge))


def target_of(mapping: Mapping) -> Target:
    """Describe the mapping for methods. Its file, if it has one, is as long as the mapping."""
    return Target(
        page_size=mapping.page_size,
        fd=mapping.fd,
        file_base=mapping.file_offset - mapping.range.start,
        file_size=mapping.file_offset + mapping.range.length,
        shared=mapping.shared,
        writable=mapping.writable,
    )


def warm_up(size_bytes: int, *, hugetlb: bool = False) -> None:
    """Populate memory and give it back, so that a virtual machine's host has supplied it before the first time is taken."""
    backing = Memfd(page_size=HUGE_PAGE_BYTES) if hugetlb else Anonymous()
    with Mapping(size_bytes, backing=backing, huge="auto" if hugetlb else "advise", noreserve=not hugetlb) as mapping:
        populate(mapping, access="write")


def _runner(cell: Cell, mapping: Mapping) -> Callable[[], str | None]:
    """Return the function that is timed: the method over the whole mapping, and nothing else."""
    if cell.method == PREFAULT:

        def call_populate() -> str:
            result = populate(mapping)
            return f"{result.method}, {result.threads} thread{'s' if result.threads > 1 else ''}"

        return call_populate
    method, pages, target = METHODS[cell.method], mapping.range, target_of(mapping)
    start, length = pages.start, pages.length

    def run_method() -> None:
        method.run(start, length, target)

    return run_method


def _page_size_note(cell: Cell, mapping: Mapping) -> str | None:
    """Return a note where pages came in another size than the row says."""
    if mapping.page_size > PAGE_SIZE:
        return None
    huge_bytes = residency(mapping).huge_bytes
    if huge_bytes is None:
        return None
    if KINDS[cell.backing].huge == "advise":
        if huge_bytes == mapping.range.length:
            return None
        return f"{format_size(huge_bytes)} of {format_size(mapping.range.length)} came as huge pages"
    return f"{format_size(huge_bytes)} of it came as huge pages, unasked" if huge_bytes else None
