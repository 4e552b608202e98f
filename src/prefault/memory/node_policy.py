"""The NUMA nodes that memory is to come from: a policy for a mapping's life, or for one populate call."""

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple, TypeAlias

from prefault._kernel.mempolicy import (
    MPOL_BIND,
    MPOL_INTERLEAVE,
    MPOL_PREFERRED,
    get_mempolicy,
    mbind,
)
from prefault._system import capabilities
from prefault._system.numa import allowed_nodes, format_list, nodes_with_memory
from prefault.intervals import Intervals
from prefault.memory.vma import vmas

Interleave: TypeAlias = bool | Sequence[int]
"""True: pages alternate among all nodes that this process may use; numbers: among these; False: no policy."""

_MOST_RANGES = 16384
"""Separate ranges that may get a policy: each becomes a mapping, of which a process has 65 530 (vm.max_map_count)."""

_WORDS = {
    MPOL_BIND: "only from {nodes} (MPOL_BIND)",
    MPOL_PREFERRED: "from {nodes} as long as it has some (MPOL_PREFERRED)",
    MPOL_INTERLEAVE: "in turn from {nodes} (MPOL_INTERLEAVE)",
}


class NodePolicy(NamedTuple):
    """A memory policy that a caller asked for.

    Attributes:
        mode: MPOL_BIND, MPOL_PREFERRED or MPOL_INTERLEAVE.
        nodes: numbers of the nodes.
    """

    mode: int
    nodes: tuple[int, ...]

    @property
    def bound(self) -> tuple[int, ...]:
        """The nodes that must have room for all of the memory; none where other nodes may help out."""
        return self.nodes if self.mode == MPOL_BIND else ()

    @property
    def words(self) -> str:
        """Continuation of "memory comes", for people."""
        return _WORDS[self.mode].format(nodes=format_list(self.nodes))

    def apply(self, start: int, stop: int) -> None:
        """Set the policy of a range of pages, for those that are allocated from now on; OSError where that fails."""
        mbind(start, stop - start, self.mode, self.nodes)


def policy_for(node: int | None, interleave: Interleave, *, strict: bool = True) -> NodePolicy | None:
    """Return the policy for the arguments ``node`` and ``interleave``; None where neither is given.

    Args:
        node: number of a node.
        interleave: see :data:`Interleave`.
        strict: memory must come from ``node``; False: other nodes help out when it is full.

    Raises:
        ValueError, TypeError: both are given; there is no such node, or the cpuset of this process forbids it.
        OSError: this process cannot set policies.
    """
    if node is None and (interleave is False or interleave is None):
        return None
    if node is not None and interleave is not False:
        raise ValueError("node puts all pages on one node and interleave spreads them: give one of the two")
    if node is not None:
        wanted: tuple[int, ...] = (node,)
    elif interleave is True:
        wanted = allowed_nodes()
    elif isinstance(interleave, int | str) or not isinstance(interleave, Iterable):
        raise TypeError(f"interleave is True or numbers of nodes, such as [0, 1], not {interleave!r}")
    else:
        wanted = tuple(interleave)
    if not wanted:
        raise ValueError("interleave is True or numbers of nodes, of which there is none")
    for number in wanted:
        _check(number)
    if not capabilities.MBIND.available:
        raise OSError(errno.ENOSYS, f"memory policies are not available: {capabilities.MBIND.refusal}")
    mode = MPOL_INTERLEAVE if node is None else MPOL_BIND if strict else MPOL_PREFERRED
    return NodePolicy(mode, tuple(sorted(set(wanted))))


def _check(node: int) -> None:
    if isinstance(node, bool) or not isinstance(node, int):
        raise TypeError(f"a node is given by its number, not by {type(node).__name__}")
    having = nodes_with_memory()
    if node not in having:
        raise ValueError(f"node {node} has no memory here: this machine has {format_list(having)}")
    allowed = allowed_nodes()
    if node not in allowed:
        raise ValueError(
            f"the cpuset of this process forbids node {node}: it leaves {format_list(allowed)} (cpuset.mems of its cgroup)"
        )


@contextmanager
def under_policy(wanted: NodePolicy, pages: Intervals) -> Iterator[None]:
    """Set a policy for pages, given by addresses, while a block runs; each mapping gets its own policy back afterwards.

    Raises:
        ValueError: so many separate ranges that the process could have no mapping for each.
        OSError: the kernel refuses it; policies are as before.
    """
    if len(pages) > _MOST_RANGES:
        raise ValueError(
            f"node and interleave make a mapping of each separate range, and these are {len(pages)}, more than"
            f" {_MOST_RANGES}: leave them out, or map the memory with Mapping(node=...)"
        )
    before = [
        (max(start, vma.start), min(stop, vma.stop), *get_mempolicy(max(start, vma.start)))
        for start, stop in pages
        for vma in vmas(start, stop)
    ]
    try:
        for start, stop, _, _ in before:
            wanted.apply(start, stop)
        yield
    finally:
        for start, stop, mode, nodes in before:
            with suppress(OSError):  # unmapped meanwhile
                mbind(start, stop - start, mode, nodes)
