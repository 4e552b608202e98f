"""File systems by the name of their type, and those whose files the kernel makes up at each read."""

from __future__ import annotations

import os

from prefault._kernel.statfs import statfs_type

_NAMES = {
    0x794C7630: "overlay",
    0x01021994: "tmpfs",
    0x858458F6: "ramfs",
    0x958458F6: "hugetlbfs",
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0xF2F52010: "f2fs",
    0xCA451A4E: "bcachefs",
    0x2FC12FC1: "zfs",
    0x65735546: "fuse",
    0x6969: "nfs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x517B: "smb",
    0x01021997: "9p",
    0x00C36400: "ceph",
    0x0BD00BD0: "lustre",
    0x47504653: "gpfs",
    0x5346414F: "afs",
    0x73717368: "squashfs",
    0xE0F5E1E2: "erofs",
    0x9660: "iso9660",
    0x4D44: "vfat",
    0x2011BAB0: "exfat",
    0x7366746E: "ntfs3",
    0xF15F: "ecryptfs",
}
"""Names of file systems by their magic number (linux/magic.h, and for out-of-tree ones their own source)."""

IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
"""File systems whose pages are nowhere but in memory, or in swap: none of them is page cache that could be evicted."""

_MADE_BY_KERNEL = {
    0x9FA0: "proc",
    0x62656572: "sysfs",
    0x64626720: "debugfs",
    0x74726163: "tracefs",
    0x27E0EB: "cgroup",
    0x63677270: "cgroup2",
    0x62656570: "configfs",
    0x73636673: "securityfs",
    0xF97CFF8C: "selinuxfs",
    0x43415D53: "smackfs",
    0x5A3C69F0: "apparmorfs",
    0xCAFE4A11: "bpf",
    0x6165676C: "pstore",
    0xDE5E81E4: "efivarfs",
    0x65735543: "fusectl",
    0x42494E4D: "binfmt_misc",
    0x07655821: "resctrl",
    0x67596969: "rpc_pipefs",
    0x6E667364: "nfsd",
    0x6E736673: "nsfs",
    0x19800202: "mqueue",
    0x1CD1: "devpts",
    0x6C6F6F70: "binderfs",
    0xABBA1974: "xenfs",
}

MADE_BY_KERNEL = frozenset(_MADE_BY_KERNEL.values())
"""File systems whose files the kernel makes at each read: there is nothing to cache, and a read may do something, or wait
for ever (``trace_pipe`` of tracefs)."""


def name_of(magic: int) -> str:
    """Return the name of a type of file systems, such as ``"ext4"``; ``"0x1234"`` for a number without one."""
    return _NAMES.get(magic) or _MADE_BY_KERNEL.get(magic) or f"{magic:#x}"


def made_by_kernel(name: str) -> str:
    """Return the reason why the files of a file system of that name are left alone."""
    return f"is on {name}: the kernel makes its files at each read, and keeps no page cache"


class KernelMade:
    """Devices of which it is known whether the kernel makes their files; each is asked about once."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def name(self, device: int, path: str) -> str:
        """Return the name of the file system if the kernel makes its files, else an empty string.

        Args:
            device: the device number of ``path`` (st_dev), which is the same for all of the file system.
            path: a file or a directory on it. One that cannot be looked at is left to those who open it.
        """
        name = self._names.get(device)
        if name is None:
            try:
                kind = name_of(statfs_type(os.fsencode(path)))
            except OSError:
                return ""
            name = self._names[device] = kind if kind in MADE_BY_KERNEL else ""
        return name
