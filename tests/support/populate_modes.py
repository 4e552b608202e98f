"""The two ways to populate: by MADV_POPULATE_*, and on kernels that lack it."""

from __future__ import annotations

import enum

from prefault.engine.methods import Access


class Way(enum.Enum):
    """How this test populates."""

    MADVISE = "madvise"
    FALLBACKS = "fallbacks"

    def method(self, access: Access) -> str:
        """The name of the method that populates for ``access``."""
        if self is Way.MADVISE:
            return f"populate_{access}"
        return "process_vm_readv" if access == "read" else "futex_add"
