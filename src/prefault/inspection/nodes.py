"""The NUMA node of each page, by move_pages(2)."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefault._kernel.mempolicy import nodes_of_pages
from prefault._system import capabilities
from prefault._system.numa import format_list
from prefault.intervals import Intervals
from prefault.sizes import PAGE_SIZE, format_size

if TYPE_CHECKING:
    import numpy
    import numpy.typing

_AT_ONCE = 16384
"""Pages that one call asks for: some milliseconds, so that Ctrl-C is not kept waiting."""


def node_of_each_page(start: int, stop: int, present: Intervals) -> numpy.typing.NDArray[numpy.int16] | None:
    """Return the number of the node of each page of ``[start, stop)``; -1 for pages that are not ``present``, or zero pages.

    None where the kernel does not tell this process.
    """
    import numpy

    if not capabilities.MOVE_PAGES.available:
        return None
    nodes = numpy.full((stop - start) // PAGE_SIZE, -1, numpy.int16)
    for first, last in present:
        for at in range(first, last, _AT_ONCE * PAGE_SIZE):
            pages = array("Q", range(at, min(last, at + _AT_ONCE * PAGE_SIZE), PAGE_SIZE))
            index = (at - start) // PAGE_SIZE
            nodes[index : index + len(pages)] = numpy.maximum(numpy.frombuffer(nodes_of_pages(pages), numpy.int32), -1)
    return nodes


def count_bytes(nodes: numpy.typing.NDArray[numpy.int16]) -> dict[int, int]:
    """Return how many bytes of pages, given by the numbers of their nodes, are on each node."""
    import numpy

    counts: list[int] = numpy.bincount(nodes[nodes >= 0]).tolist()
    return {node: count * PAGE_SIZE for node, count in enumerate(counts) if count}


def note_on_others(pages: Intervals, wanted: Sequence[int]) -> str | None:
    """Return a note about pages that are on other nodes than ``wanted``; None: none, or the kernel tells nothing."""
    found = bytes_by_node(pages) or {}
    others = [f"{format_size(count)} on node {node}" for node, count in found.items() if node not in wanted]
    return f"{' and '.join(others)}, in place of {format_list(tuple(wanted))}: pages do not move" if others else None


def bytes_by_node(pages: Intervals) -> dict[int, int] | None:
    """Return how many bytes of these pages are on each node; None where the kernel does not tell this process."""
    if not capabilities.MOVE_PAGES.available:
        return None
    found: Counter[int] = Counter()
    for start, stop in pages:
        for at in range(start, stop, _AT_ONCE * PAGE_SIZE):
            found.update(nodes_of_pages(array("Q", range(at, min(stop, at + _AT_ONCE * PAGE_SIZE), PAGE_SIZE))))
    return {node: count * PAGE_SIZE for node, count in sorted(found.items()) if node >= 0}
