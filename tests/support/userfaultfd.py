"""userfaultfd(2), as far as the tests need it: memory whose missing pages another process supplies, poisons or withholds."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from prefault._kernel import userfaultfd as kernel
from prefault._kernel.userfaultfd import (
    UFFD_PAGEFAULT_FLAG_WRITE,
    UFFD_USER_MODE_ONLY,
    UFFDIO_REGISTER_MODE_MISSING,
    UFFDIO_REGISTER_MODE_WP,
    UFFDIO_WRITEPROTECT_MODE_WP,
    UffdFeature,
)
from prefault.sizes import PAGE_SIZE
from support import needs

__all__ = ["UFFDIO_REGISTER_MODE_WP", "Fault", "Toucher", "UffdFeature", "Userfaultfd", "opened", "tracking_writes"]


class Fault(NamedTuple):
    """A page fault that waits for an answer."""

    address: int
    write: bool


class Userfaultfd:
    """A userfaultfd that a fork shares: whoever holds it may answer the faults of the process that made it."""

    def __init__(self, features: int = 0, *, user_mode_only: bool = True) -> None:
        """``user_mode_only``: faults that the kernel raises fail instead of waiting. Without it: CAP_SYS_PTRACE."""
        # Not blocking: only then does poll(2) say whether there is a fault.
        self.fd = kernel.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | (UFFD_USER_MODE_ONLY if user_mode_only else 0))
        try:
            kernel.api(self.fd, features)
        except OSError:
            os.close(self.fd)
            raise

    def register(self, address: int, length: int, mode: int = UFFDIO_REGISTER_MODE_MISSING) -> kernel.UffdIoctl:
        return kernel.register(self.fd, address, length, mode)

    def poison(self, address: int, length: int = PAGE_SIZE) -> None:
        """Whoever touches these pages gets SIGBUS, and the kernel EHWPOISON. Linux 6.6."""
        assert kernel.poison(self.fd, address, length) == length

    def zeropage(self, address: int, length: int = PAGE_SIZE) -> None:
        """Supply zeros, and wake who waits for them."""
        assert kernel.zeropage(self.fd, address, length) == length

    def write_protect(self, address: int, length: int, *, protect: bool) -> None:
        """Protect pages against writing; or unprotect them, and wake who waits."""
        kernel.writeprotect(self.fd, address, length, UFFDIO_WRITEPROTECT_MODE_WP if protect else 0)

    def events(self, timeout_s: float = 30.0) -> list[kernel.Event]:
        """What has happened, once something has. TimeoutError if nothing does for so long."""
        ready, _, _ = select.select([self.fd], [], [], timeout_s)
        if not ready:
            raise TimeoutError("no page fault came")
        return kernel.read_events(self.fd)

    def silent(self, seconds: float = 0.05) -> bool:
        """Whether no event comes for so long."""
        return not select.select([self.fd], [], [], seconds)[0]

    def wait(self, timeout_s: float = 30.0) -> Fault:
        """The next fault. TimeoutError if there is none for so long."""
        ready, _, _ = select.select([self.fd], [], [], timeout_s)
        if not ready:
            raise TimeoutError("no page fault came")
        (event,) = kernel.read_events(self.fd, 1)
        if not isinstance(event, kernel.PageFault):
            raise OSError(errno.EPROTO, f"not a page fault: {event}")
        return Fault(event.address, bool(event.flags & UFFD_PAGEFAULT_FLAG_WRITE))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(features: int = 0, *, user_mode_only: bool = True) -> Userfaultfd:
    """A :class:`Userfaultfd`, or a skip where the kernel or our privileges do not give one."""
    found: Userfaultfd | OSError
    try:
        found = Userfaultfd(features, user_mode_only=user_mode_only)
    except OSError as refusal:
        found = refusal
    if isinstance(found, OSError):
        what = "userfaultfd" if user_mode_only else "userfaultfd for faults raised by the kernel (CAP_SYS_PTRACE)"
        needs.missing(f"{what} with features {UffdFeature(features)!r} cannot be had: {found}")
    return found


_memcpy = ctypes.CDLL(None).memcpy
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@contextmanager
def tracking_writes(address: int, length: int) -> Iterator[None]:
    """Have the kernel itself record which pages are written inside the block (Linux 6.7); all of them start out clean."""
    with opened(UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED) as tracker:
        tracker.register(address, length, UFFDIO_REGISTER_MODE_WP)
        tracker.write_protect(address, length, protect=True)
        yield


class Toucher:
    """A thread that touches one byte of memory and lets the others run meanwhile: a memcpy(3) without the GIL."""

    def __init__(self, address: int, *, write: bool = False) -> None:
        self._byte = ctypes.create_string_buffer(b"w", 1)
        ours = ctypes.addressof(self._byte)
        arguments = (address, ours, 1) if write else (ours, address, 1)
        # A daemon: a test that fails must not wait for it for ever.
        self.thread = threading.Thread(target=_memcpy, args=arguments, daemon=True)
        self.thread.start()

    @property
    def waits(self) -> bool:
        return self.thread.is_alive()

    def finish(self, timeout_s: float = 30.0) -> bytes:
        """The byte that was read or written."""
        self.thread.join(timeout_s)
        assert not self.thread.is_alive(), "the thread still waits for its page"
        return self._byte.raw
