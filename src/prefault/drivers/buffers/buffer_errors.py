"""The error of a request that buffer objects refuse."""

from __future__ import annotations


class BufferObjectError(OSError):
    """Request that was refused, with an errno as the kernel's ioctls have it; nothing has changed.

    ENOENT: no such object. EEXIST: the name is taken. EINVAL: an argument. ENOSPC: no room. EBUSY: pinned or reserved.
    EALREADY, EPERM: misuse of a ticket. ENODEV: the device is unplugged. ENODATA: the object was purged.
    """
