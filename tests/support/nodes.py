"""NUMA nodes as the kernel's files show them, and cpusets for processes of our own."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support import needs


def two_needed() -> None:
    """Skip unless nodes 0 and 1 have memory."""
    if Path("/sys/devices/system/node/has_memory").read_text().strip() != "0-1":
        needs.missing("two NUMA nodes: `make numa` runs these tests in an emulated machine", unless="PREFAULT_REQUIRE_NODES")


def _lines(start: int, stop: int) -> Iterator[tuple[int, str]]:
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        address = int(line.split()[0], 16)
        if start <= address < stop:
            yield address, line


def in_numa_maps(start: int, stop: int) -> dict[int, int]:
    """Bytes on each node, of the mappings that begin in a range of addresses."""
    found: Counter[int] = Counter()
    for _, line in _lines(start, stop):
        # Pages of 2 MiB count as 512 where they are transparent.
        unit = re.search(r"kernelpagesize_kB=(\d+)", line)
        for node, pages in re.findall(r" N(\d+)=(\d+)", line):
            assert unit is not None
            found[int(node)] += int(pages) * int(unit[1]) * 1024
    return dict(sorted(found.items()))


def policies(start: int, stop: int) -> set[str]:
    """The policies of the mappings that begin in a range of addresses."""
    return {line.split()[1] for _, line in _lines(start, stop)}


@contextmanager
def cpuset(node: int) -> Iterator[Path]:
    """A cpuset of cgroup v2 that leaves one node."""
    needs.root("make a cpuset")
    root = Path("/sys/fs/cgroup")
    if "cpuset" not in (root / "cgroup.controllers").read_text().split():
        needs.missing("the cpuset controller of cgroup v2")
    (root / "cgroup.subtree_control").write_text("+cpuset")
    directory = root / f"prefault-test-cpuset-{os.getpid()}"
    directory.mkdir()
    try:
        (directory / "cpuset.mems").write_text(str(node))
        yield directory
    finally:
        directory.rmdir()
