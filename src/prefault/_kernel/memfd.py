"""memfd_create(2), with huge pages."""

from __future__ import annotations

import os

from prefault._kernel._call import explain

MFD_CLOEXEC = 1
MFD_ALLOW_SEALING = 2
MFD_HUGETLB = 4  # Linux 4.14
MFD_HUGE_SHIFT = 26


def memfd_create(name: str, flags: int = MFD_CLOEXEC) -> int:
    """Create an anonymous file in memory and return its descriptor. memfd_create(2), Linux 3.17."""
    try:
        return os.memfd_create(name, flags)
    except OSError as error:
        raise OSError(error.errno, f"memfd_create: {explain(error.errno or 0)}") from error


def huge_page_flag(page_size: int, shift: int = MFD_HUGE_SHIFT) -> int:
    """Encode the size of a huge page (a power of two, in bytes) as MAP_HUGE_* and MFD_HUGE_* do."""
    return (page_size.bit_length() - 1) << shift
