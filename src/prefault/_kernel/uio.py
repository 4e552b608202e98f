"""process_vm_readv(2) and process_vm_writev(2)."""

from __future__ import annotations

from prefault._kernel._call import INT, LONG, POINTER, declare, fail

_process_vm_readv = declare("process_vm_readv", INT, POINTER, LONG, POINTER, LONG, LONG, result=LONG)
_process_vm_writev = declare("process_vm_writev", INT, POINTER, LONG, POINTER, LONG, LONG, result=LONG)


def process_vm_readv(pid: int, local: int, local_count: int, remote: int, remote_count: int) -> int:
    """Copy from the ``remote`` iovec array (address) of process ``pid`` to the caller's ``local`` one.

    Returns:
        The bytes copied; fewer than asked where an address of the remote side fails after the first.
    """
    result = _process_vm_readv(pid, local, local_count, remote, remote_count, 0)
    if result < 0:
        fail("process_vm_readv")
    return result


def process_vm_writev(pid: int, local: int, local_count: int, remote: int, remote_count: int) -> int:
    """Copy from the caller's ``local`` iovec array (address) to the ``remote`` one of process ``pid``.

    Returns:
        The bytes copied; fewer than asked where an address of the remote side fails after the first.
    """
    result = _process_vm_writev(pid, local, local_count, remote, remote_count, 0)
    if result < 0:
        fail("process_vm_writev")
    return result
