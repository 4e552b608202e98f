"""Real fragmentation of one NUMA node: a page that cannot be moved in every 2 MiB of its free memory."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import prefault
from prefault._kernel import mman
from prefault._system import numa
from prefault.sizes import MIB, PAGE_SIZE
from support import needs, oracle

_HUGE = 2 * MIB
_SLOTS = 512
_KEPT = 40 * MIB
"""Left free while the node is filled, for the kernel and this process."""


@contextmanager
def fragmented(node: int) -> Iterator[int]:
    """Fragment the free memory of a node for the length of a block; the value is how many pages are pinned.

    The node is filled with base pages; one of each 2 MiB goes to a pipe by vmsplice(2), which pins it as direct I/O does,
    so that compaction cannot move it; and all others are freed.
    """
    needs.root("see the frame numbers of pages")
    needs.page_frames()
    chosen: dict[int, int] = {}
    fillers: list[prefault.Mapping] = []
    with ExitStack() as stack:
        # Filling has the kernel free some page cache.
        while (free := numa.read_node_meminfo(node, "MemFree")[0]) > _KEPT + 8 * MIB:
            filler = stack.enter_context(prefault.Mapping(free - _KEPT, huge="never", node=node))
            prefault.populate(filler, headroom="ignore")
            start, stop = filler.range
            for index, frame in enumerate(oracle.frames(start, stop - start)):
                if frame >= 0:
                    chosen.setdefault(frame * PAGE_SIZE // _HUGE, start + index * PAGE_SIZE)
            fillers.append(filler)
        _pin(stack, list(chosen.values()))
        for filler in fillers:
            mman.madvise(*_extent(filler), mman.MADV_DONTNEED)
        yield len(chosen)


def _extent(mapping: prefault.Mapping) -> tuple[int, int]:
    return mapping.range.start, mapping.range.length


def _pin(stack: ExitStack, pages: list[int]) -> None:
    vmsplice = ctypes.CDLL(None, use_errno=True).vmsplice
    for first in range(0, len(pages), _SLOTS):
        read, write = os.pipe()
        stack.callback(os.close, read)
        stack.callback(os.close, write)
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, _SLOTS * PAGE_SIZE)
        for page in pages[first : first + _SLOTS]:
            vector = mman.IoVec(page, PAGE_SIZE)
            if vmsplice(write, ctypes.byref(vector), 1, 2) != PAGE_SIZE:  # SPLICE_F_NONBLOCK
                raise OSError(ctypes.get_errno(), "vmsplice")
