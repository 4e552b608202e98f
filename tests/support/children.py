"""Run a function in a forked child, whose locks, poisoned pages and blocked threads end with it."""

from __future__ import annotations

import os
import pickle
import select
import signal
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from prefault._kernel._call import INT, LONG, declare

Result = TypeVar("Result")

TIMEOUT_S = 30.0

_PR_SET_PDEATHSIG = 1
_prctl = declare("prctl", INT, LONG)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A fork that runs ``function`` and sends its result. Leaving the ``with`` kills it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(writer)
            return
        status = 1
        try:
            die_with_parent()  # a child of a child must not outlive a parent that is killed
            os.close(self._reader)
            try:
                answer: tuple[bool, Any] = (True, function())
            except BaseException:  # noqa: BLE001  reported by the parent: no code of pytest may run here
                answer = (False, traceback.format_exc())
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(answer, pipe)
            status = 0
        finally:
            os._exit(status)

    def result(self, timeout_s: float = TIMEOUT_S) -> Any:
        """Return the result of the function.

        Raises:
            AssertionError: the function raised, or the child died or hangs.
        """
        with os.fdopen(os.dup(self._reader), "rb") as pipe:
            ready, _, _ = select.select([pipe], [], [], timeout_s)
            assert ready, f"the child process hangs (no answer for {timeout_s} s)"
            text = pipe.read()
        assert text, f"the child process died: {os.waitstatus_to_exitcode(self._reap())}"
        well, value = pickle.loads(text)
        assert well, f"in the child process:\n{value}"
        return value

    def ended(self) -> bool:
        """Whether the result is there, or the process is gone."""
        return bool(select.select([self._reader], [], [], 0)[0])

    def _reap(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return status

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._reader)
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            self._reap()


def in_child(function: Callable[[], Result], timeout_s: float = TIMEOUT_S) -> Result:
    """``function()``, run in a fork that has ``timeout_s`` seconds."""
    with Child(function) as child:
        result: Result = child.result(timeout_s)
        return result
