"""futex(2), of which only the atomic addition to a word is used."""

from __future__ import annotations

import ctypes

from prefault._kernel._call import INT, LONG, MACHINE, POINTER, declare_syscall, fail

FUTEX_WAKE_OP = 5
FUTEX_PRIVATE_FLAG = 128
FUTEX_OP_ADD = 1
FUTEX_OP_CMP_EQ = 0

NR_FUTEX = 202 if MACHINE == "x86_64" else 98  # 98: asm-generic, which arm64, riscv64 and loongarch64 use

_futex = declare_syscall(NR_FUTEX, POINTER, INT, INT, LONG, POINTER, INT)

_unwaited = ctypes.c_uint32()
_UNWAITED = ctypes.addressof(_unwaited)
# FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, -2048): add 0; and wake a waiter on that word if it held -2048.
_ADD_ZERO = FUTEX_OP_ADD << 28 | FUTEX_OP_CMP_EQ << 24 | 0 << 12 | 0x800


def futex_add_zero(address: int) -> None:
    """Add 0 to the 32-bit word at ``address``, atomically: FUTEX_WAKE_OP with FUTEX_OP_ADD. futex(2).

    The call takes a write fault, changes no byte and loses no other thread's write. It fails with ``EFAULT``, and never
    raises a signal, where the page cannot be supplied. A futex waiter on that very word may be woken without cause; futex(2)
    tells every waiter to expect that.
    """
    # _ADD_ZERO sets bit 11 only, so it is positive and fits the int.
    if _futex(_UNWAITED, FUTEX_WAKE_OP | FUTEX_PRIVATE_FLAG, 0, 0, address, _ADD_ZERO) < 0:
        fail("futex")
