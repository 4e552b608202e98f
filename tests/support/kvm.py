"""A virtual machine of one vCPU by KVM's ioctls: Documentation/virt/kvm/api.rst, linux/kvm.h, asm/kvm.h.

:class:`Guest` runs eleven instructions in ring 3 of 32-bit protected mode, without paging: an address of the program is a
guest-physical address. ``tests/virtio_mem/test_kvm_headers.py`` compares numbers and structures with the kernel's headers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Iterator
from ctypes import c_int16, c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import dataclass
from typing import Any

from prefault.sparse import SparseMemory
from support import needs

DEVICE = "/dev/kvm"
PAGE = 4096

KVM_CREATE_VM = 0xAE01
KVM_CHECK_EXTENSION = 0xAE03
KVM_GET_VCPU_MMAP_SIZE = 0xAE04
KVM_CREATE_VCPU = 0xAE41
KVM_SET_USER_MEMORY_REGION = 0x4020AE46
KVM_SET_TSS_ADDR = 0xAE47
KVM_RUN = 0xAE80
KVM_GET_REGS = 0x8090AE81
KVM_SET_REGS = 0x4090AE82
KVM_GET_SREGS = 0x8138AE83
KVM_SET_SREGS = 0x4138AE84
KVM_GET_STATS_FD = 0xAECE  # Linux 5.14
KVM_PRE_FAULT_MEMORY = 0xC040AED5  # Linux 6.11

KVM_CAP_SYNC_MMU = 16
KVM_CAP_BINARY_STATS_FD = 203
KVM_CAP_PRE_FAULT_MEMORY = 236

KVM_EXIT_IO = 2


class UserMemoryRegion(ctypes.Structure):
    """``struct kvm_userspace_memory_region``."""

    _fields_ = [
        ("slot", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64), ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]  # fmt: skip


class Regs(ctypes.Structure):
    """``struct kvm_regs``."""

    _fields_ = [
        (name, c_uint64)
        for name in "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags".split()  # noqa: SIM905
    ]


class Segment(ctypes.Structure):
    """``struct kvm_segment``."""

    _fields_ = [
        ("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16),
        *((name, c_uint8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")),
    ]  # fmt: skip


class Dtable(ctypes.Structure):
    """``struct kvm_dtable``."""

    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class Sregs(ctypes.Structure):
    """``struct kvm_sregs``."""

    _fields_ = [
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", Dtable), ("idt", Dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", c_uint64 * 4),
    ]  # fmt: skip


class PreFaultMemory(ctypes.Structure):
    """``struct kvm_pre_fault_memory``."""

    _fields_ = [("gpa", c_uint64), ("size", c_uint64), ("flags", c_uint64), ("padding", c_uint64 * 5)]


class StatsHeader(ctypes.Structure):
    """``struct kvm_stats_header``."""

    _fields_ = [(name, c_uint32) for name in ("flags", "name_size", "num_desc", "id_offset", "desc_offset", "data_offset")]


class StatsDesc(ctypes.Structure):
    """``struct kvm_stats_desc``; the name follows."""

    _fields_ = [
        ("flags", c_uint32),
        ("exponent", c_int16),
        ("size", c_uint16),
        ("offset", c_uint32),
        ("bucket_size", c_uint32),
    ]


# struct kvm_run: exit_reason, and the port of an exit for I/O.
RUN_EXIT_REASON = struct.Struct("=8xI")
RUN_IO_PORT = struct.Struct("=34xH")

# Each loop visits `ecx` pages from `edi` on, and ends by `out` to its own port, with cs in ebp.
PROGRAM = bytes.fromhex(
    "8907"  # 0: mov [edi], eax
    "40"  # inc eax
    "81c700100000"  # add edi, 4096
    "e2f5"  # loop 0
    "8ccd"  # mov ebp, cs
    "e610"  # out 0x10, al
    "031f"  # 15: add ebx, [edi]
    "81c700100000"  # add edi, 4096
    "e2f6"  # loop 15
    "8ccd"  # mov ebp, cs
    "e611"  # out 0x11, al
)
_WRITE, _READ = 0, 15
_WRITTEN, _SUMMED = 0x10, 0x11

_CODE_AT = 0x1000
_TSS_AT = 0x7FFFD000  # three pages that KVM wants for itself on Intel, below 4 GiB; fcntl.ioctl takes a signed int
_RING = 3
_RFLAGS = 0x3002  # IOPL 3: ring 3 may use ports


@dataclass(frozen=True)
class Stopped:
    """The touch that ended KVM_RUN: the guest-physical address, and how many pages were visited before."""

    address: int
    pages: int


class Guest:
    """A virtual machine with sparse memory at a guest-physical address below 4 GiB; slot 1, all of it.

    KVM takes over the monitor's page tables, and pins no page: unpopulated memory that faults ends KVM_RUN with EFAULT.
    """

    def __init__(self, memory: SparseMemory, addr: int) -> None:
        self._open: list[int] = []
        self._code = mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._code[: len(PROGRAM)] = PROGRAM
        try:
            self._kvm = self._keep(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
            self._vm = self._keep(_ioctl(self._kvm, KVM_CREATE_VM, 0))
            _ioctl(self._vm, KVM_SET_TSS_ADDR, _TSS_AT)
            byte = ctypes.c_char.from_buffer(self._code)
            self._set_slot(0, _CODE_AT, PAGE, ctypes.addressof(byte))
            del byte  # else the page could not be unmapped
            self._set_slot(1, addr, len(memory), memory.range.start)
            self._vcpu = self._keep(_ioctl(self._vm, KVM_CREATE_VCPU, 0))
            self._run = mmap.mmap(self._vcpu, _ioctl(self._kvm, KVM_GET_VCPU_MMAP_SIZE, 0))
            self._enter_ring_3()
        except BaseException:
            self.close()
            raise

    def _keep(self, fd: int) -> int:
        self._open.append(fd)
        return fd

    def close(self) -> None:
        """End the virtual machine."""
        if hasattr(self, "_run"):
            self._run.close()
        while self._open:
            os.close(self._open.pop())
        self._code.close()

    def _set_slot(self, slot: int, addr: int, length: int, address: int) -> None:
        _ioctl(self._vm, KVM_SET_USER_MEMORY_REGION, UserMemoryRegion(slot, 0, addr, length, address))

    def _enter_ring_3(self) -> None:
        sregs = Sregs()
        _ioctl(self._vcpu, KVM_GET_SREGS, sregs)
        # No descriptor table is needed as long as the program loads no segment and meets no exception.
        sregs.cs = _flat(selector=0x8 | _RING, kind=0xB)
        sregs.ds = sregs.es = sregs.ss = _flat(selector=0x10 | _RING, kind=0x3)
        sregs.cr0 |= 1  # PE
        _ioctl(self._vcpu, KVM_SET_SREGS, sregs)

    @property
    def privilege(self) -> int:
        """The ring in which the program ran, as it found it in cs."""
        return int(self._registers().rbp) & 3

    def write(self, addr: int, pages: int, value: int) -> Stopped | None:
        """Store ``value``, ``value + 1`` ... at the starts of pages; return the touch that ended KVM_RUN, if one did."""
        return self._start(_WRITE, rdi=addr, rcx=pages, rax=value)

    def sum(self, addr: int, pages: int) -> int | Stopped:
        """Add up the 32-bit numbers at the starts of pages; return the touch that ended KVM_RUN, if one did."""
        return self._start(_READ, rdi=addr, rcx=pages) or self._registers().rbx

    def resume(self) -> Stopped | None:
        """Go on at the instruction that ended the last KVM_RUN."""
        before = self._registers()
        for _ in range(1000):
            try:
                _ioctl(self._vcpu, KVM_RUN, 0)
            except OSError as error:
                if error.errno == errno.EINTR:  # a signal whose handler did not raise
                    continue
                if error.errno != errno.EFAULT:
                    raise
                now = self._registers()
                return Stopped(now.rdi, before.rcx - now.rcx)
            (reason,) = RUN_EXIT_REASON.unpack_from(self._run)
            (port,) = RUN_IO_PORT.unpack_from(self._run)
            if reason == KVM_EXIT_IO and port in (_WRITTEN, _SUMMED):
                return None
            raise AssertionError(f"the guest ended with exit reason {reason} at {self._registers().rip:#x}")
        raise AssertionError("KVM_RUN was interrupted 1000 times")

    def pre_fault(self, addr: int, length: int) -> None:
        """Have KVM fill its second-level page tables (KVM_PRE_FAULT_MEMORY).

        Raises:
            OSError: EFAULT at an unplugged block, ENOENT at an address without a slot.
        """
        want = PreFaultMemory(addr, length)
        while want.size:  # it advances both fields, and may stop early
            with contextlib.suppress(InterruptedError):
                _ioctl(self._vcpu, KVM_PRE_FAULT_MEMORY, want)

    def second_level_faults(self) -> int:
        """Return how many page faults the second-level page tables have had, the vCPU's statistic ``pf_taken``."""
        fd = _ioctl(self._vcpu, KVM_GET_STATS_FD, 0)
        try:
            header = StatsHeader.from_buffer_copy(os.pread(fd, ctypes.sizeof(StatsHeader), 0))
            each = ctypes.sizeof(StatsDesc) + header.name_size
            for place in range(header.desc_offset, header.desc_offset + header.num_desc * each, each):
                raw = os.pread(fd, each, place)
                if raw[ctypes.sizeof(StatsDesc) :].rstrip(b"\0") == b"pf_taken":
                    at = header.data_offset + StatsDesc.from_buffer_copy(raw).offset
                    return int.from_bytes(os.pread(fd, 8, at), "little")
        finally:
            os.close(fd)
        raise AssertionError("this kernel's KVM has no statistic pf_taken")

    def _start(self, rip: int, **values: int) -> Stopped | None:
        registers = Regs(rip=_CODE_AT + rip, rflags=_RFLAGS, **values)
        _ioctl(self._vcpu, KVM_SET_REGS, registers)
        return self.resume()

    def _registers(self) -> Any:
        registers = Regs()
        _ioctl(self._vcpu, KVM_GET_REGS, registers)
        return registers


@contextlib.contextmanager
def guest(memory: SparseMemory, addr: int) -> Iterator[Guest]:
    """A virtual machine for a test, or a skip."""
    needed()
    machine = Guest(memory, addr)
    try:
        yield machine
    finally:
        machine.close()


def needed() -> None:
    """Skip unless virtual machines can be run; CI does not require it, as many machines are virtual ones themselves."""
    if platform.machine() != "x86_64":
        needs.missing("the guest's program is for x86-64", unless="PREFAULT_REQUIRE_KVM")
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        reason = f"{DEVICE} cannot be opened ({error.strerror}): `make guest` runs these tests in an emulated machine"
        needs.missing(reason, unless="PREFAULT_REQUIRE_KVM")


def extension(number: int, name: str) -> None:
    """Skip unless KVM has an extension."""
    needed()
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        found = _ioctl(fd, KVM_CHECK_EXTENSION, number)
    finally:
        os.close(fd)
    if not found:
        needs.missing(f"this KVM has no {name}", unless="PREFAULT_REQUIRE_KVM")


def _flat(selector: int, kind: int) -> Segment:
    return Segment(0, 0xFFFF_FFFF, selector, type=kind, present=1, dpl=_RING, db=1, s=1, g=1)


def _ioctl(fd: int, request: int, argument: Any) -> int:
    answer: int = fcntl.ioctl(fd, request, argument)
    return answer
