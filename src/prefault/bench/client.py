"""The parent's side of a worker process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from prefault.bench.grid import Cell
from prefault.bench.kinds import Places
from prefault.bench.stopping import StopRequest

_END_SECONDS = 10.0
# A killed worker may need this long to give 4 GiB back; nobody at a prompt should wait for that.
_KILLED_SECONDS = 0.02
_BUFFER_BYTES = 1 << 16

_HINTS = {
    "SIGKILL": ", perhaps by the OOM killer",
    "SIGBUS": ": memory behind the mapping ran out",
}


class WorkerError(Exception):
    """The worker did not do what it was asked; the message says why. It is of no use any more."""


class CellFailedError(Exception):
    """The worker says that it could not be done, and is ready for more."""


class StoppedError(Exception):
    """The user wants an end; the worker is killed."""


class Worker:
    """A process that runs ``prefault.bench.worker``.

    Args:
        stop: when it is requested, waiting ends and the worker is killed.
        fds: descriptors that the worker inherits.
    """

    def __init__(self, stop: StopRequest | None = None, fds: Sequence[int] = ()) -> None:
        self._stop = stop
        self._received = b""
        process = subprocess.Popen(
            [sys.executable, "-m", "prefault.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(fds),
            bufsize=0,
            process_group=0,  # out of the terminal's foreground group: Ctrl-C is ours alone
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs still."""
        return self._process.poll() is None

    def measure(self, cell: Cell, repeats: int, places: Places) -> None:
        """Ask for a cell; :meth:`repetition` gives what comes of it."""
        self._ask(
            {"do": "measure", "cell": dataclasses.asdict(cell), "repeats": repeats, "places": dataclasses.asdict(places)}
        )

    def repetition(self, limit_seconds: float) -> tuple[int, str | None] | None:
        """The next time in nanoseconds, with a note; None after the last.

        Raises:
            WorkerError, CellFailedError, StoppedError: there is none.
        """
        answer = self._answer(limit_seconds)
        return (int(answer["ns"]), answer["note"]) if "ns" in answer else None

    def warm_up(self, size_bytes: int, limit_seconds: float, *, hugetlb: bool = False) -> None:
        """Have memory populated and freed.

        Raises:
            WorkerError, CellFailedError, StoppedError: it was not.
        """
        self._ask({"do": "warm_up", "bytes": size_bytes, "hugetlb": hugetlb})
        self._answer(limit_seconds)

    def close(self) -> None:
        """End it, kindly where that works."""
        self._stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_SECONDS)
        self._stdout.close()

    def kill(self, wait_seconds: float = _KILLED_SECONDS) -> None:
        """Kill it. It runs no more code from now on; its memory may take longer to go than we wait."""
        with contextlib.suppress(ProcessLookupError):
            # The kernel frees its memory in its own time: let that not be the time of whoever waits for the report.
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)
        self._process.kill()
        self._stdin.close()
        self._stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_seconds)

    def _ask(self, request: dict[str, Any]) -> None:
        try:
            self._stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._died() from None

    def _answer(self, limit_seconds: float) -> dict[str, Any]:
        line = self._line(time.monotonic() + limit_seconds)
        if line is None:
            self.kill(_END_SECONDS)
            raise WorkerError(f"the worker gave no answer within {limit_seconds:.0f} s and was killed")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise CellFailedError(answer["failed"])
        return answer

    def _line(self, deadline: float) -> bytes | None:
        """The next line; None when the deadline has passed."""
        output = self._stdout.fileno()
        poll = select.poll()
        poll.register(output, select.POLLIN)
        if self._stop is not None:
            poll.register(self._stop, select.POLLIN)
        while b"\n" not in self._received:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if self._stop is not None and self._stop.requested:
                self.kill()
                raise StoppedError
            if not ready:
                return None
            received = os.read(output, _BUFFER_BYTES)
            if not received:
                raise self._died()
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line

    def _died(self) -> WorkerError:
        try:
            status = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill(_END_SECONDS)
            return WorkerError("the worker closed its output and was killed")
        self._stdin.close()
        self._stdout.close()
        if status >= 0:
            return WorkerError(f"the worker ended with status {status}")
        name = signal.Signals(-status).name
        return WorkerError(f"the worker was killed by {name}{_HINTS.get(name, '')}")
