"""A command that is started in two steps: its process exists first, and runs the program when it is released."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence

_SI_KERNEL = 0x80
"""``si_code`` of a signal of the terminal, which goes to the whole foreground group (asm-generic/siginfo.h)."""
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_POLL_S = 0.1
_STOP_S = 90.0
"""Seconds that a command has to end after a SIGTERM that was passed on: the default of systemd's TimeoutStopSec."""
_ABANDON_S = 5.0
"""Seconds that a command has to end after an error of this process."""


class HeldCommand:
    """Process of a command that waits until :meth:`release`; a context manager that ends it if it still waits.

    In the main thread, from here on to the end of :meth:`wait`, signals that ask to end go to the command; Ctrl-C at a
    terminal, which the command gets anyway, is not passed on twice.

    A command that ignores SIGTERM is killed (SIGKILL): 90 seconds after one that was passed on, or at the next Ctrl-C; at
    the end of the ``with`` block after 5 seconds, or at Ctrl-C. Its own children are not killed. Ctrl-C alone has no such
    limit, since interactive programs go on after it.

    Args:
        command: program, by path or in PATH, and its arguments.
        environment: environment of the command; None: that of this process.

    Attributes:
        pid: the process.
    """

    def __init__(self, command: Sequence[str | bytes], environment: dict[str, str] | None = None) -> None:
        self._command = list(command)
        self._mask: set[signal.Signals] | None = None
        if threading.current_thread() is threading.main_thread():
            self._mask = {*signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, signal.SIGCHLD))}  # type: ignore[arg-type]
        self._status: int | None = None
        self._kill_at: float | None = None
        gate, self._gate = os.pipe()
        self._failed, failed = os.pipe()
        try:
            self.pid = os.fork()
        except BaseException:
            for fd in (gate, self._gate, self._failed, failed):
                os.close(fd)
            self._restore_mask()
            raise
        if not self.pid:
            self._run(gate, failed, environment)
        os.close(gate)
        os.close(failed)

    def _run(self, gate: int, failed: int, environment: dict[str, str] | None) -> None:
        """Wait for the release and run the program; never return."""
        try:
            os.close(self._gate)
            if os.read(gate, 1):
                for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
                    signal.signal(number, signal.SIG_DFL)
                for number in _FORWARDED:  # one that came meanwhile ends this process now, as it would end the program
                    if callable(signal.getsignal(number)):
                        signal.signal(number, signal.SIG_DFL)
                if self._mask is not None:
                    signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
                os.execvpe(self._command[0], self._command, os.environ if environment is None else environment)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.write(failed, str(error.errno or errno.ENOEXEC).encode())
        finally:
            os._exit(127)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let Ctrl-C and other signals reach this process in a block, before the command is released."""
        if self._mask is None:
            yield
            return
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, (*_FORWARDED, signal.SIGCHLD))

    def release(self) -> None:
        """Let the program run.

        Raises:
            OSError: it cannot be run; the message names it.
        """
        with contextlib.suppress(BrokenPipeError):  # it was killed while it waited: wait() tells
            os.write(self._gate, b"x")
        os.close(self._gate)
        self._gate = -1
        answer = os.read(self._failed, 16)  # the end of file comes with a successful exec
        os.close(self._failed)
        self._failed = -1
        if answer:
            _, self._status = os.waitpid(self.pid, 0)
            self._restore_mask()
            raise OSError(
                int(answer), f"the command cannot be run: {os.strerror(int(answer))}", os.fsdecode(self._command[0])
            )

    def wait(self, meanwhile: Callable[[], None] | None = None, every_s: float = _POLL_S) -> int:
        """Wait until the command ends, and return its exit status: 128 and the signal's number after a death by signal.

        Args:
            meanwhile: called again and again while the command runs.
            every_s: seconds between two calls.
        """
        while self._status is None:
            if meanwhile is not None:
                meanwhile()
            self._pass_on(self._wait_for_signal(every_s))
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._send(signal.SIGKILL)
            self._reap()
        self._restore_mask()
        code = os.waitstatus_to_exitcode(self._status)
        return code if code >= 0 else 128 - code

    def _pass_on(self, got: signal.struct_siginfo | None) -> None:
        """Send a signal on to the command, unless the terminal did."""
        if got is None:
            return
        if got.si_signo == signal.SIGINT and self._kill_at is not None:
            self._kill_at = 0.0
        elif got.si_signo == signal.SIGTERM and self._kill_at is None:
            self._kill_at = time.monotonic() + _STOP_S
        if got.si_code != _SI_KERNEL:
            self._send(got.si_signo)

    def _wait_for_signal(self, seconds: float) -> signal.struct_siginfo | None:
        """Wait until the command ends, a signal comes, which is returned, or the time is over."""
        if self._mask is None:
            threading.Event().wait(seconds)
            return None
        got = signal.sigtimedwait((*_FORWARDED, signal.SIGCHLD), seconds)
        return None if got is None or got.si_signo == signal.SIGCHLD else got

    def _send(self, number: int) -> None:
        # Until it is reaped, no other process has its number.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _reap(self) -> None:
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self._status = status

    def _end(self) -> None:
        """Have the command end: ask it, then kill it. One that cannot be killed, in an I/O that hangs, is left alone."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._send(number)
            until = time.monotonic() + _ABANDON_S
            while time.monotonic() < until:
                self._reap()
                if self._status is not None:
                    return
                if self._wait_for_signal(_POLL_S) is not None:
                    break

    def _restore_mask(self) -> None:
        mask, self._mask = self._mask, None
        if mask is not None:
            # A signal that came after the end of the command has nobody to go to: it ends neither.
            while signal.sigtimedwait((*_FORWARDED, signal.SIGCHLD), 0) is not None:
                pass
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def __enter__(self) -> HeldCommand:
        return self

    def __exit__(self, *_: object) -> None:
        if self._gate >= 0:
            os.close(self._gate)
            self._gate = -1
        if self._failed >= 0:
            os.close(self._failed)
            self._failed = -1
        if self._status is None:
            self._end()
        self._restore_mask()
