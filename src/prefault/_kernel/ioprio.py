"""ioprio_set(2): the priority of a thread's reads at the disk's scheduler. Linux 2.6.13."""

from __future__ import annotations

from prefault._kernel._call import INT, MACHINE, declare_syscall, fail

NR_IOPRIO_SET = 251 if MACHINE == "x86_64" else 30  # 30: asm-generic
NR_IOPRIO_GET = 252 if MACHINE == "x86_64" else 31

IOPRIO_WHO_PROCESS = 1
IOPRIO_CLASS_IDLE = 3
IOPRIO_CLASS_SHIFT = 13

_ioprio_set = declare_syscall(NR_IOPRIO_SET, INT, INT, INT)
_ioprio_get = declare_syscall(NR_IOPRIO_GET, INT, INT)


def ioprio_set(which: int, who: int, priority: int) -> None:
    """Set the priority, the class shifted by IOPRIO_CLASS_SHIFT; ``who`` 0 is the calling *thread*.

    Schedulers of disks obey it (BFQ, and mq-deadline since Linux 5.14), network file systems do not.
    """
    if _ioprio_set(which, who, priority):
        fail("ioprio_set")


def ioprio_get(which: int, who: int) -> int:
    """Return the priority, the class shifted by IOPRIO_CLASS_SHIFT."""
    priority = _ioprio_get(which, who)
    if priority < 0:
        fail("ioprio_get")
    return priority
