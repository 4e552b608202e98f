"""Huge pages in memory that is really fragmented: node 1 of the emulated machine that `make numa` boots."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterator

import pytest

import prefault
from prefault._system.vmstat import read_vmstat
from prefault.memory import huge_advice
from prefault.sizes import MIB
from support import nodes, oracle
from support.fragmentation import fragmented

SIZE = 256 * MIB


def _huge(mapping: prefault.Mapping) -> int:
    """Bytes of all mappings in the range that smaps counts as huge: parts with the advice are mappings of their own."""
    return sum(smaps["AnonHugePages"] for smaps in oracle.smaps_within(*mapping.range))


@pytest.fixture
def fragments(thp_setting: Callable[[str, str], None]) -> Iterator[int]:
    nodes.two_needed()
    thp_setting("enabled", "madvise")
    thp_setting("defrag", "madvise")
    with fragmented(1) as pinned:
        assert pinned > 200  # of the 384 times 2 MiB that the node has
        yield pinned


@pytest.mark.usefixtures("fragments")
def test_huge_pages_are_given_up_where_compaction_makes_them_slow() -> None:
    with prefault.Mapping(SIZE, node=1) as mapping:
        (before,) = read_vmstat("compact_stall")
        result = prefault.populate(mapping, huge="auto")
        (after,) = read_vmstat("compact_stall")
        advised = sum("hg" in oracle.vma_flags(at) for at in range(*mapping.range, 2 * MIB)) * 2 * MIB
        huge = _huge(mapping)
        assert nodes.in_numa_maps(*mapping.range) == {1: SIZE}
    print(
        result, f"{advised >> 20} MiB were advised, {huge >> 20} MiB are huge, compact_stall {after - before:+}"
    )  # -rP shows it
    assert result.bytes == SIZE
    assert after > before
    assert re.search(r"base pages from offset \d+ on: huge pages took \d+ times as long", str(result))
    assert advised < SIZE // 2


@pytest.mark.usefixtures("fragments")
def test_without_giving_up_all_of_it_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_advice, "SLOWER", 1 << 30)
    with prefault.Mapping(SIZE, node=1) as mapping:
        result = prefault.populate(mapping, huge="auto")
        print(result)
        assert "base pages from" not in str(result)
        assert "hg" in oracle.vma_flags(mapping.range.stop - 2 * MIB)


@pytest.mark.usefixtures("fragments")
def test_collapse_says_that_memory_is_fragmented() -> None:
    with prefault.Mapping(SIZE, node=1) as mapping:
        prefault.populate(mapping)
        result = prefault.collapse(mapping)
        assert result.made_bytes == _huge(mapping) < SIZE // 2
    short = sum(item.bytes for item in result.left if item.errno == errno.ENOMEM)
    assert short > SIZE // 4
    assert {item.errno for item in result.left} <= {errno.ENOMEM, errno.EAGAIN}
    assert "in one piece, even after compaction" in str(result)


def test_memory_in_one_piece_gets_huge_pages(thp_setting: Callable[[str, str], None]) -> None:
    nodes.two_needed()
    thp_setting("enabled", "madvise")
    with prefault.Mapping(64 * MIB, node=1) as mapping:
        result = prefault.populate(mapping, huge="auto")
        assert _huge(mapping) >= 56 * MIB
        assert "base pages from" not in str(result)
