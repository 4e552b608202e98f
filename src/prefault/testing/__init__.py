"""Tools for tests, for any test framework: check a driver's contract, and behave as on a kernel that lacks features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prefault._system import capabilities

if TYPE_CHECKING:
    from prefault.testing.device_contract import Checked, ContractError, check_device

__all__ = ["Checked", "ContractError", "check_device", "without"]


def __getattr__(name: str) -> Any:
    # Imported on first use: device memory needs msgspec, which is an extra.
    if name in ("Checked", "ContractError", "check_device"):
        from prefault.testing import device_contract

        return getattr(device_contract, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Behave as on a kernel that lacks these capabilities (``"madv_populate"``, ``"pagemap_scan"``, ...).

    The context manager affects all threads of the process. ``prefault doctor`` lists the names.

    Raises:
        ValueError: a name is not that of a capability.
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
