"""The hugetlb pools in sysfs (Documentation/admin-guide/mm/hugetlbpage.rst)."""

import os
from typing import NamedTuple

_POOLS = "/sys/kernel/mm/hugepages"


class HugetlbPool(NamedTuple):
    """The hugetlb pool of one page size. All but ``page_size``, in bytes, are counts of such pages."""

    page_size: int
    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int

    @property
    def setting(self) -> str:
        """The sysfs file that sets the size of the pool."""
        return _path(self.page_size, "nr_hugepages")

    @property
    def available(self) -> int:
        """Free pages that no mapping has reserved."""
        return self.free - self.reserved

    @property
    def surplus_left(self) -> int:
        """Surplus pages that the kernel may still allocate from ordinary memory (nr_overcommit_hugepages)."""
        return max(0, self.overcommit - self.surplus)


def page_sizes() -> list[int]:
    """List the page sizes in bytes of this kernel's hugetlb pools, smallest first."""
    try:
        names = os.listdir(_POOLS)
    except FileNotFoundError:
        return []
    return sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) * 1024 for name in names)


def read_pool(page_size: int) -> HugetlbPool:
    """Read the state of the pool of huge pages of ``page_size`` bytes.

    Raises:
        FileNotFoundError: the kernel has no huge pages of that size.
    """
    return HugetlbPool(
        page_size,
        total=_read(page_size, "nr_hugepages"),
        free=_read(page_size, "free_hugepages"),
        reserved=_read(page_size, "resv_hugepages"),
        surplus=_read(page_size, "surplus_hugepages"),
        overcommit=_read(page_size, "nr_overcommit_hugepages"),
    )


def resize_pool(page_size: int, pages: int) -> int:
    """Set the size of a pool to ``pages`` huge pages; return the size it got, which may be smaller. Needs root."""
    with open(_path(page_size, "nr_hugepages"), "w") as file:
        file.write(str(pages))
    return _read(page_size, "nr_hugepages")


def _read(page_size: int, name: str) -> int:
    with open(_path(page_size, name)) as file:
        return int(file.read())


def _path(page_size: int, name: str) -> str:
    return f"{_POOLS}/hugepages-{page_size // 1024}kB/{name}"
