"""A running process, named by its pid and held by a pidfd."""

from __future__ import annotations

import errno
import os
import select
from contextlib import ExitStack
from typing import NoReturn, Self

from prefault._system.descriptors import opened
from prefault.sizes import KIB

_CAP_SYS_PTRACE = 19  # include/uapi/linux/capability.h
_MAX_PID = 1 << 22  # PID_MAX_LIMIT, include/linux/threads.h


class OtherProcess:
    """A process that is read from outside; a context manager.

    The pid may go to another process when this one ends. While :meth:`ensure_running` does not raise, all that was read by
    the pid since the start of the block was of this process.

    Attributes:
        pid: its number.
        pidfd: a descriptor that refers to this process for ever.
        name: its name, up to 15 bytes (``comm``).
        fields: the lines of ``/proc/PID/status`` by name.
    """

    def __init__(self, pid: int) -> None:
        """Check that ``pid`` can be one.

        Raises:
            TypeError, ValueError: it is not a number of a process.
        """
        if isinstance(pid, bool) or not isinstance(pid, int):
            raise TypeError(f"a pid is an int, not {type(pid).__name__}")
        if pid <= 0:
            raise ValueError(f"a pid is a positive number, not {pid}")
        self.pid = pid
        self.pidfd = -1
        self.name = ""
        self.fields: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.pidfd = self._open(stack)
            self.fields = self._read_status()
            self.name = self.fields.get("Name", "?")
            self._ensure_memory()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack) -> int:
        if self.pid > _MAX_PID:
            self._fail(ProcessLookupError, errno.ESRCH, f"no process has the pid {self.pid}: pids end at {_MAX_PID}")
        try:
            return stack.enter_context(opened(os.pidfd_open, self.pid))
        except OSError as error:
            if error.errno == errno.ESRCH:
                self._fail(
                    ProcessLookupError, errno.ESRCH,
                    f"no process has the pid {self.pid}: it has ended, or is not visible in this pid namespace",
                )  # fmt: skip
            # A thread: EINVAL, since Linux 6.15 ENOENT.
            leader = self._read_status().get("Tgid") if error.errno in (errno.EINVAL, errno.ENOENT) else None
            if leader is not None:
                self._fail(OSError, errno.EINVAL, f"{self.pid} is a thread of the process {leader}: give that pid")
            raise

    def _read_status(self) -> dict[str, str]:
        try:
            with open(f"/proc/{self.pid}/status", "rb") as file:
                text = os.fsdecode(file.read())
        except (FileNotFoundError, ProcessLookupError):
            self._fail(
                ProcessLookupError, errno.ESRCH,
                f"process {self.pid} has ended, or /proc hides it (mounted with hidepid, or not at all)",
            )  # fmt: skip
        return dict(line.split(":\t", 1) for line in text.split("\n") if ":\t" in line)

    def _ensure_memory(self) -> None:
        """Raise the error that says why this process has no memory, if it has none."""
        if "VmSize" in self.fields:
            return
        if self.fields.get("State", "").startswith(("Z", "X")):
            if int(self.fields.get("Threads", "1")) > 1:  # pthread_exit(3) in main()
                self._fail(
                    OSError, errno.EINVAL,
                    f"the main thread of process {self.label} has ended while others run, and the kernel shows the memory"
                    " of a process by its main thread only",
                )  # fmt: skip
            self._fail(
                ProcessLookupError, errno.ESRCH,
                f"process {self.label} has ended and given back its memory; its parent"
                f" {self.fields.get('PPid', '?')} has not waited for it yet (a zombie)",
            )  # fmt: skip
        self._fail(OSError, errno.EINVAL, f"process {self.label} is a kernel thread: it has no memory of its own")

    @property
    def label(self) -> str:
        """Pid and name for messages: ``"123 (postgres)"``."""
        return f"{self.pid} ({self.name})"

    @property
    def owner(self) -> int:
        """Effective user id."""
        return int(self.fields["Uid"].split()[1])

    def bytes_of(self, field: str) -> int | None:
        """Return a size of ``/proc/PID/status``, such as ``"VmRSS"``, in bytes; None where the kernel has no such line."""
        number = self.fields.get(field, "").split()
        return int(number[0]) * KIB if number else None

    def ensure_running(self) -> None:
        """Raise an error if the process has ended: another one may have its pid.

        Raises:
            ProcessLookupError: it has.
        """
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        if poll.poll(0):
            self._fail(ProcessLookupError, errno.ESRCH, f"process {self.label} has ended meanwhile")

    def refusal(self, what: str) -> str:
        """Return the sentence for EPERM and EACCES: the right that is missing, and how to get it. Source: ptrace(2)."""
        user = os.geteuid()
        place = f"process {self.label} of user {self.owner}"
        if _has_cap_sys_ptrace():
            return (
                f"{what} {place} is not permitted to user {user}, despite CAP_SYS_PTRACE: a security module (Landlock,"
                " SELinux, Yama) or a user namespace forbids it: run it outside of that sandbox or container"
            )
        if user == 0:
            remedy = "run it with that capability (in a container: --cap-add SYS_PTRACE)"
        elif user == self.owner:
            remedy = "run it as root (sudo), as the process is not dumpable or kernel.yama.ptrace_scope is not 0"
        else:
            remedy = f"run it as root (sudo) or as user {self.owner}"
        return f"{what} {place} is not permitted to user {user} without CAP_SYS_PTRACE: {remedy}"

    def _fail(self, kind: type[OSError], number: int, message: str) -> NoReturn:
        raise kind(number, message) from None


def _has_cap_sys_ptrace() -> bool:
    """Return whether this process has CAP_SYS_PTRACE among its effective capabilities (capabilities(7))."""
    with open("/proc/self/status", "rb") as file:
        effective = file.read().partition(b"\nCapEff:")[2].split(maxsplit=1)
    return bool(effective) and bool(int(effective[0], 16) >> _CAP_SYS_PTRACE & 1)
