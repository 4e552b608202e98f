"""Pages of 1 GiB. They are rarely to be had once a machine has run for a while, so this is kept out of the default run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import prefault
from prefault._system import hugetlb
from prefault.sizes import GIB
from support import needs, oracle


@pytest.fixture
def one_gigantic_page() -> Iterator[None]:
    """A pool with one free page of 1 GiB; restored afterwards."""
    if GIB not in hugetlb.page_sizes():
        needs.missing("the kernel has no huge pages of 1 GiB")
    needs.root("resize the hugetlb pool")
    before = hugetlb.read_pool(GIB)
    try:
        if hugetlb.resize_pool(GIB, before.total + 1) <= before.total:
            needs.missing("no 1 GiB of contiguous memory is free")
        yield
    finally:
        hugetlb.resize_pool(GIB, before.total)


@pytest.mark.big
@pytest.mark.parametrize("backing", [prefault.Hugetlb("1 GiB"), prefault.Memfd(page_size="1 GiB")])
def test_one_byte_asked_for_is_one_page_of_1_gib(one_gigantic_page: None, backing: prefault.BackingSource) -> None:
    free = hugetlb.read_pool(GIB).free
    with prefault.Mapping("1 GiB", backing=backing) as mapping:
        start = mapping.range.start
        assert start % GIB == 0
        result = prefault.populate(mapping, offset=5000, length=1)
        assert (result.bytes, result.threads) == (GIB, 1)
        assert all(oracle.present(start, GIB))
        assert hugetlb.read_pool(GIB).free == free - 1
        assert prefault.discard(mapping, length="512 MiB").bytes == 0  # no whole page
        assert prefault.discard(mapping).bytes == GIB
        assert not any(oracle.present(start, GIB))
        assert hugetlb.read_pool(GIB).free == free
        with pytest.raises(prefault.HugePagesError, match="hugepages-1048576kB"):
            prefault.Mapping(free * GIB + 1, backing=backing)
