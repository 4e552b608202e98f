"""The hugetlb pools in sysfs (Documentation/admin-guide/mm/hugetlbpage.rst)."""

from __future__ import annotations

import os
from typing import NamedTuple

_POOLS = "/sys/kernel/mm/hugepages"


class HugetlbPool(NamedTuple):
    """The pool of huge pages of one size; counts are pages of ``page_size`` bytes."""

    page_size: int
    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int

    @property
    def setting(self) -> str:
        """The file that its size is written to."""
        return _path(self.page_size, "nr_hugepages")

    @property
    def available(self) -> int:
        """Free pages that no mapping has reserved."""
        return self.free - self.reserved

    @property
    def surplus_left(self) -> int:
        """Pages that the kernel would still take from ordinary memory when the pool is used up (nr_overcommit_hugepages)."""
        return max(0, self.overcommit - self.surplus)


def page_sizes() -> list[int]:
    """The sizes of huge pages that this kernel has pools for, in bytes, smallest first."""
    try:
        names = os.listdir(_POOLS)
    except FileNotFoundError:
        return []
    return sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) * 1024 for name in names)


def read_pool(page_size: int) -> HugetlbPool:
    """The state of the pool of huge pages of ``page_size`` bytes.

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
    """Ask for a pool of ``pages`` huge pages; how many it has now, which may be fewer. Needs root."""
    with open(_path(page_size, "nr_hugepages"), "w") as file:
        file.write(str(pages))
    return _read(page_size, "nr_hugepages")


def _read(page_size: int, name: str) -> int:
    with open(_path(page_size, name)) as file:
        return int(file.read())


def _path(page_size: int, name: str) -> str:
    return f"{_POOLS}/hugepages-{page_size // 1024}kB/{name}"
