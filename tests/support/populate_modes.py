"""Two modes of populate that tests run in: with MADV_POPULATE_*, and with the fallbacks of kernels that lack it."""

from __future__ import annotations

import enum

from prefault.engine.methods import Access


class PopulateMode(enum.Enum):
    """Mode in which a test populates."""

    MADVISE = "madvise"
    FALLBACKS = "fallbacks"

    def method(self, access: Access) -> str:
        """Return the name of the method that populates for ``access``."""
        if self is PopulateMode.MADVISE:
            return f"populate_{access}"
        return "process_vm_readv" if access == "read" else "futex_add"
