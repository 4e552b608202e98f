"""Requirements of tests on the machine: an unmet one skips the test, or fails it with PREFAULT_REQUIRE_ALL=1 (CI).

One that CI cannot promise has a variable of its own: PREFAULT_REQUIRE_KVM=1 for virtual machines (`make guest`),
PREFAULT_REQUIRE_NODES=1 for two NUMA nodes (`make numa`).
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from prefault._system import capabilities, hugetlb
from prefault._system.capabilities import Capability
from support import oracle

HUGE = 2 << 20


def missing(reason: str, unless: str = "PREFAULT_REQUIRE_ALL") -> NoReturn:
    if os.environ.get(unless) == "1":
        pytest.fail(f"this machine must have it ({unless}=1): {reason}")
    pytest.skip(reason)


def root(why: str) -> None:
    """Skip unless we are root; ``why`` completes "only root can ..."."""
    if os.geteuid() != 0:
        missing(f"only root can {why}")


def capability(what: Capability) -> None:
    # A test that switches capabilities off is not about the machine.
    if not what.available and what.name not in capabilities.disabled:
        missing(f"{what.name} (Linux {what.since}) is not available: {what.refusal}")


def page_frames() -> None:
    """Skip where pagemap hides the frame numbers."""
    if not oracle.shows_frames():
        missing("pagemap hides frame numbers without CAP_SYS_ADMIN")


def huge_pages(pages: int, page_size: int = HUGE) -> None:
    """Require free pages in a hugetlb pool; the fixture ``hugetlb_pool`` makes some."""
    if page_size not in hugetlb.page_sizes():
        missing(f"the kernel has no huge pages of {page_size >> 20} MiB")
    if hugetlb.read_pool(page_size).available < pages:
        missing(f"fewer than {pages} free huge pages of {page_size >> 20} MiB (vm.nr_hugepages)")


def fuse() -> None:
    """Require what mounts a FUSE file system."""
    root("mount a FUSE file system without fusermount3")
    if not os.path.exists("/dev/fuse"):
        missing("there is no /dev/fuse")
    try:
        import mfusepy  # type: ignore[import-untyped]  # noqa: F401
    except (ImportError, OSError) as error:  # the package, or the library that it loads
        missing(f"mfusepy or libfuse3-3 is not installed (make packages): {error}")
