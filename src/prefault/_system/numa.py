"""The NUMA nodes of this machine (Documentation/ABI/stable/sysfs-devices-node), and those that this process may use."""

from __future__ import annotations

import contextlib

from prefault._system.meminfo import number_in
from prefault.sizes import KIB

_NODES = "/sys/devices/system/node"


def nodes_with_memory() -> tuple[int, ...]:
    """Read the numbers of the nodes that have memory; node 0 alone where the kernel or a sandbox shows none."""
    with contextlib.suppress(OSError), open(f"{_NODES}/has_memory") as file:
        return parse_list(file.read())
    return (0,)


def allowed_nodes() -> tuple[int, ...]:
    """Read the numbers of the nodes with memory that the cpuset of this process leaves it."""
    having = nodes_with_memory()
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("Mems_allowed_list:"):
                allowed = parse_list(line.partition(":")[2])
                return tuple(node for node in having if node in allowed)
    return having


def read_node_meminfo(node: int, *names: str) -> tuple[int, ...]:
    """Read sizes in bytes from the meminfo of a node, such as ``"MemFree"``; 0 for one that this kernel does not have.

    Raises:
        OSError: there is no such node, or no sysfs.
    """
    with open(f"{_NODES}/node{node}/meminfo", "rb") as file:
        text = file.read().replace(b"Node %d " % node, b"")
    found = []
    for name in names:
        try:
            found.append(number_in(text, name))
        except KeyError:
            found.append(0)
    return tuple(found)


def node_pool(node: int, page_size: int) -> str:
    """Return the directory of a node's hugetlb pool, whose files are named as those of the machine's pool."""
    return f"{_NODES}/node{node}/hugepages/hugepages-{page_size // KIB}kB"


def parse_list(text: str) -> tuple[int, ...]:
    """Parse a list as sysfs prints it: ``"0-2,5"``."""
    numbers: list[int] = []
    for item in filter(None, text.strip().split(",")):
        first, _, last = item.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(numbers)


def format_list(nodes: tuple[int, ...]) -> str:
    """Format numbers of nodes for people: ``"node 1"``, ``"nodes 0, 2"``."""
    return f"node{'s' if len(nodes) > 1 else ''} {', '.join(map(str, nodes))}"
