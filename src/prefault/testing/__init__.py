"""Help for tests, ours and yours. Needs no test framework."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prefault import capabilities


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Behave as on a kernel that lacks these capabilities (``"madv_populate"``, ``"pagemap_scan"``, ...).

    For the whole process, all threads included. ``prefault doctor`` lists the names.

    Raises:
        ValueError: there is no capability of that name.
    """
    known = {capability.name for capability in capabilities.ALL}
    unknown = set(names) - known
    if unknown:
        raise ValueError(f"unknown capabilities {sorted(unknown)}: known are {', '.join(sorted(known))}")
    added = set(names) - capabilities.disabled
    capabilities.disabled |= added
    try:
        yield
    finally:
        capabilities.disabled -= added
