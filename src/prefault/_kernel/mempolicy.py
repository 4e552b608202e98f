"""mbind(2), get_mempolicy(2) and move_pages(2): the NUMA nodes that memory comes from, and those where pages are."""

from __future__ import annotations

import ctypes
from array import array

from prefault._kernel._call import INT, MACHINE, POINTER, UINT, ULONG, declare_syscall, fail

# The C library has no functions for these; asm-generic's numbers are those of arm64, riscv64 and loongarch64.
NR_MBIND = 237 if MACHINE == "x86_64" else 235
NR_GET_MEMPOLICY = 239 if MACHINE == "x86_64" else 236
NR_MOVE_PAGES = 279 if MACHINE == "x86_64" else 239

MPOL_DEFAULT = 0
MPOL_PREFERRED = 1
MPOL_BIND = 2
MPOL_INTERLEAVE = 3

MPOL_F_ADDR = 2

_MAX_NODES = 1024
"""Bits of a node mask: the most nodes that a kernel can be built for (CONFIG_NODES_SHIFT of 10)."""

_NodeMask = ctypes.c_ulong * (_MAX_NODES // (8 * ctypes.sizeof(ctypes.c_ulong)))

_mbind = declare_syscall(NR_MBIND, POINTER, ULONG, ULONG, POINTER, ULONG, UINT)
_get_mempolicy = declare_syscall(NR_GET_MEMPOLICY, POINTER, POINTER, ULONG, POINTER, ULONG)
_move_pages = declare_syscall(NR_MOVE_PAGES, INT, ULONG, POINTER, POINTER, POINTER, INT)


def mbind(address: int, length: int, mode: int, nodes: tuple[int, ...]) -> None:
    """Set the policy of ``length`` bytes at ``address``, for pages that are allocated from now on. mbind(2).

    Args:
        address: start of a page.
        length: bytes.
        mode: an ``MPOL_*`` constant, perhaps with the mode flags that :func:`get_mempolicy` reports.
        nodes: numbers of nodes; none for MPOL_DEFAULT.
    """
    mask = _NodeMask()
    for node in nodes:
        mask[node // 64] |= 1 << node % 64
    # The kernel takes one bit less than it is told.
    if _mbind(address, length, mode, mask if nodes else None, _MAX_NODES + 1 if nodes else 0, 0):
        fail("mbind")


def get_mempolicy(address: int) -> tuple[int, tuple[int, ...]]:
    """Return mode (with its flags) and nodes of the policy of the mapping at ``address``. get_mempolicy(2), MPOL_F_ADDR.

    MPOL_DEFAULT where the mapping has none of its own, also if the thread has one.
    """
    mode, mask = ctypes.c_int(), _NodeMask()
    if _get_mempolicy(ctypes.byref(mode), mask, _MAX_NODES, address, MPOL_F_ADDR):
        fail("get_mempolicy")
    return mode.value, tuple(64 * index + bit for index, word in enumerate(mask) for bit in range(64) if word >> bit & 1)


def nodes_of_pages(addresses: array[int]) -> array[int]:
    """Return the node of each page, given by addresses of type ``Q``; a negative errno for one that is not there.

    move_pages(2) of this process without nodes, which moves nothing.
    """
    status = array("i", bytes(4 * len(addresses)))
    if _move_pages(0, len(addresses), addresses.buffer_info()[0], None, status.buffer_info()[0], 0) < 0:
        fail("move_pages")
    return status
