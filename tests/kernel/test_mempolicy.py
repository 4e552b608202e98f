"""Memory policies as the kernel has them, with /proc/self/numa_maps as the oracle."""

from __future__ import annotations

import ctypes
import errno
import re
from array import array
from pathlib import Path

import pytest

from prefault._kernel import mempolicy, mman
from prefault._kernel.mempolicy import MPOL_BIND, MPOL_DEFAULT, MPOL_INTERLEAVE, MPOL_PREFERRED
from support import needs
from support.children import in_child
from support.regions import PAGE, Region

STATIC_NODES = 1 << 15


@pytest.fixture(autouse=True)
def _needed() -> None:
    if not Path("/proc/self/numa_maps").exists():
        needs.missing("this kernel has NUMA (CONFIG_NUMA)")


def _policy(address: int) -> str:
    """The policy that numa_maps shows for the mapping at an address."""
    return re.search(rf"^{address:08x} (\S+)", Path("/proc/self/numa_maps").read_text(), re.MULTILINE)[1]  # type: ignore[index]


@pytest.mark.parametrize(
    ("mode", "shown"), [(MPOL_BIND, "bind:0"), (MPOL_PREFERRED, "prefer:0"), (MPOL_INTERLEAVE, "interleave:0")]
)
@pytest.mark.parametrize("flags", [0, STATIC_NODES])
def test_a_policy_is_set_read_and_removed(mode: int, shown: str, flags: int) -> None:
    with Region(8) as region:
        middle = region.page(2)
        mempolicy.mbind(middle, 4 * PAGE, mode | flags, (0,))
        assert re.fullmatch(shown.replace(":", "(=static)?:"), _policy(middle))
        assert mempolicy.get_mempolicy(middle + 3 * PAGE) == (mode | flags, (0,))
        assert mempolicy.get_mempolicy(region.page(6)) == (MPOL_DEFAULT, ())
        mempolicy.mbind(middle, 4 * PAGE, MPOL_DEFAULT, ())
        assert mempolicy.get_mempolicy(middle) == (MPOL_DEFAULT, ())


def test_the_policy_of_the_thread_is_not_that_of_a_mapping() -> None:
    def with_a_policy() -> tuple[int, tuple[int, ...]]:
        mask = ctypes.c_ulong(1)
        number = 238 if mempolicy.NR_MBIND == 237 else 237
        assert ctypes.CDLL(None).syscall(number, MPOL_BIND, ctypes.byref(mask), ctypes.c_ulong(64)) == 0
        with Region(1) as region:
            return mempolicy.get_mempolicy(region.address)

    assert in_child(with_a_policy) == (MPOL_DEFAULT, ())


def test_a_mask_of_all_nodes_is_taken() -> None:
    with Region(1) as region:
        mempolicy.mbind(region.address, PAGE, MPOL_BIND, (0, 1023))
        assert mempolicy.get_mempolicy(region.address) == (MPOL_BIND, (0,))


@pytest.mark.parametrize("node", [64, 500, 1023])
def test_a_node_that_is_not_there(node: int) -> None:
    with Region(1) as region, pytest.raises(OSError, match="mbind") as caught:
        mempolicy.mbind(region.address, PAGE, MPOL_BIND, (node,))
    assert caught.value.errno == errno.EINVAL


def test_nodes_of_pages() -> None:
    with Region(4) as region:
        mman.madvise(region.page(1), PAGE, mman.MADV_POPULATE_WRITE)
        mman.madvise(region.page(2), PAGE, mman.MADV_POPULATE_READ)
        found = mempolicy.nodes_of_pages(array("Q", (region.page(index) for index in range(4))))
    assert found[1] >= 0  # page 0 and 3 are holes, and 2 is the zero page
    assert [found[index] for index in (0, 2, 3)] == [
        -errno.ENOENT,
        -errno.EFAULT,
        -errno.ENOENT,
    ]


def test_what_is_not_mapped() -> None:
    with Region(1) as region:
        address = region.address
    with pytest.raises(OSError, match="get_mempolicy"):
        mempolicy.get_mempolicy(address)
    with pytest.raises(OSError, match="mbind"):
        mempolicy.mbind(address, PAGE, MPOL_BIND, (0,))
    assert mempolicy.nodes_of_pages(array("Q", [address]))[0] == -errno.EFAULT
