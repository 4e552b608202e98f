"""Open a userfaultfd, in the most capable of three ways that this process is permitted, or explain why it may not."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import NamedTuple

from prefault._kernel import userfaultfd as kernel
from prefault._kernel.userfaultfd import UffdFeature
from prefault._system import capabilities
from prefault.errors import DeviceError

_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK

# Missing pages of shared memory are supplied, supplied ones mapped (minor faults), and those that failed poisoned.
_NEEDED = {
    UffdFeature.MISSING_SHMEM: "missing pages of shared memory (Linux 4.11)",
    UffdFeature.MINOR_SHMEM: "minor faults of shared memory (Linux 5.14)",
    UffdFeature.POISON: "UFFDIO_POISON (Linux 6.6)",
}
_WANTED = (
    UffdFeature.PAGEFAULT_FLAG_WP
    | UffdFeature.WP_HUGETLBFS_SHMEM
    | UffdFeature.MISSING_HUGETLBFS
    | UffdFeature.MINOR_HUGETLBFS
    # Without it mremap(2) ends the registration: at the new address the kernel puts zeros into the frames that all share.
    | UffdFeature.EVENT_REMAP
)
_BY_CAPABILITY = {
    "uffd_minor_shmem": UffdFeature.MINOR_SHMEM,
    "uffd_wp_shmem": UffdFeature.PAGEFAULT_FLAG_WP | UffdFeature.WP_HUGETLBFS_SHMEM | UffdFeature.WP_ASYNC,
    "uffd_poison": UffdFeature.POISON,
    "uffd_wp_async": UffdFeature.WP_ASYNC,
}
"""Features that are taken as missing when PREFAULT_WITHOUT names the capability."""
_TRACKING = UffdFeature.WP_ASYNC | UffdFeature.WP_UNPOPULATED

USER_MODE_ONLY_NOTE = (
    "page faults that the kernel itself raises are not answered here: a system call that is given pages which are not"
    " populated, such as write(2), fails with EFAULT (populate them first). It takes access to /dev/userfaultfd,"
    " CAP_SYS_PTRACE or vm.unprivileged_userfaultfd = 1"
)


class OpenedUserfaultfd(NamedTuple):
    """A userfaultfd after its handshake.

    Attributes:
        fd: the descriptor, non-blocking and close-on-exec; the caller closes it.
        features: features that the handshake enabled.
        user_mode_only: faults that the kernel itself raises are not delivered, and fail with EFAULT.
    """

    fd: int
    features: UffdFeature
    user_mode_only: bool


def open_userfaultfd(*, tracking: bool = False) -> OpenedUserfaultfd:
    """Open a userfaultfd for shared memory and do the handshake.

    Args:
        tracking: have the kernel resolve write-protect faults and so record which pages are written (WP_ASYNC, Linux 6.7),
            if it can; ``features`` says so.

    Raises:
        DeviceError: this process may not open one, or the kernel's lacks a feature; the message names the setting that
            forbids it.
    """
    probe, _ = _open()
    try:
        offered, _ = kernel.api(probe)
    finally:
        os.close(probe)
    for name, feature in _BY_CAPABILITY.items():
        if name in capabilities.disabled:
            offered &= ~feature
    missing = [name for feature, name in _NEEDED.items() if not offered & feature]
    if missing:
        raise DeviceError(
            errno.ENOSYS, f"device memory cannot be mapped: this kernel's userfaultfd lacks {', '.join(missing)}"
        )
    wanted = UffdFeature(sum(_NEEDED)) | _WANTED | (_TRACKING if tracking else UffdFeature(0))
    if offered & _TRACKING != _TRACKING or not capabilities.PAGEMAP_SCAN.available:  # reads the record
        wanted &= ~_TRACKING
    # A descriptor takes one handshake only, and the probe's asked for the features.
    fd, user_mode_only = _open()
    try:
        features, _ = kernel.api(fd, wanted & offered)
    except BaseException:
        os.close(fd)
        raise
    return OpenedUserfaultfd(fd, wanted & offered & features, user_mode_only)


def _open() -> tuple[int, bool]:
    """Return a descriptor before its handshake, and whether it is for user mode only."""
    refusals: list[str] = []
    last = 0
    if "userfaultfd" not in capabilities.disabled:
        ways = (
            ("/dev/userfaultfd", kernel.userfaultfd_from_device, _FLAGS),
            ("userfaultfd(2)", kernel.userfaultfd, _FLAGS),
            ("userfaultfd(2) for user mode only", kernel.userfaultfd, _FLAGS | kernel.UFFD_USER_MODE_ONLY),
        )
        without_kernel = "uffd_kernel_faults" in capabilities.disabled
        for name, way, flags in ways[2:] if without_kernel else ways:
            try:
                return way(flags), bool(flags & kernel.UFFD_USER_MODE_ONLY)
            except OSError as error:
                if error.errno not in (
                    errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EINVAL,
                    errno.ENOTTY,
                ):  # fmt: skip
                    raise
                last = error.errno or 0
                refusals.append(f"{name}: {os.strerror(last)}")
    else:
        last = errno.ENOSYS
        refusals.append("PREFAULT_WITHOUT names it")
    raise DeviceError(last, _explain(last, refusals))


def _explain(number: int, refusals: list[str]) -> str:
    what = f"device memory needs userfaultfd, which this process is refused ({'; '.join(refusals)})"
    if number == errno.ENOSYS:
        return (
            f"{what}: the kernel was built without CONFIG_USERFAULTFD, or a sandbox hides it. In a container allow the"
            " system call userfaultfd in the seccomp profile, or pass the device through (--device /dev/userfaultfd)"
        )
    setting = ""
    with contextlib.suppress(OSError), open("/proc/sys/vm/unprivileged_userfaultfd") as file:
        setting = f" (vm.unprivileged_userfaultfd is {file.read().strip()})"
    return (
        f"{what}: most often that is a container's default seccomp profile. Allow the system call userfaultfd there, or pass"
        f" the device through (--device /dev/userfaultfd), or give the process CAP_SYS_PTRACE{setting}"
    )
