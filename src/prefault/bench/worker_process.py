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
from prefault.bench.stopping import StoppedError, StopRequest

_END_SECONDS = 10.0
# A killed worker takes longer than this to free 4 GiB; a user at a prompt should not wait for that.
_KILLED_SECONDS = 0.02
_BUFFER_BYTES = 1 << 16

_dying: list[subprocess.Popen[bytes]] = []
"""Killed workers that had not ended when the wait for them was over. The next worker reaps them."""

_HINTS = {
    "SIGKILL": ", perhaps by the OOM killer",
    "SIGBUS": ": memory behind the mapping ran out",
}


class WorkerError(Exception):
    """The worker failed or died; the message says why. It takes no more requests."""


class CellFailedError(Exception):
    """The worker could not measure the cell, and is ready for more requests."""


class Worker:
    """A process that runs ``prefault.bench.worker``.

    Args:
        stop: ends waiting, and kills the worker, as soon as a stop is requested.
        fds: descriptors that the worker inherits.
    """

    def __init__(self, stop: StopRequest | None = None, fds: Sequence[int] = ()) -> None:
        self._stop = stop
        self._received = b""
        _dying[:] = [process for process in _dying if process.poll() is None]
        process = subprocess.Popen(
            [sys.executable, "-m", "prefault.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=tuple(fds),
            bufsize=0,
            process_group=0,  # out of the terminal's foreground group: Ctrl-C reaches only the parent
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._stdin, self._stdout = process, process.stdin, process.stdout

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while the worker runs."""
        return self._process.poll() is None

    def measure(self, cell: Cell, repeats: int, places: Places) -> None:
        """Ask the worker to measure a cell; :meth:`repetition` returns the times."""
        self._ask(
            {"do": "measure", "cell": dataclasses.asdict(cell), "repeats": repeats, "places": dataclasses.asdict(places)}
        )

    def repetition(self, limit_seconds: float) -> tuple[int, str | None] | None:
        """Return the next time in nanoseconds, with a note; None after the last.

        Raises:
            WorkerError, CellFailedError, StoppedError: no time could be taken.
        """
        answer = self._answer(limit_seconds)
        return (int(answer["ns"]), answer["note"]) if "ns" in answer else None

    def warm_up(self, size_bytes: int, limit_seconds: float, *, hugetlb: bool = False) -> None:
        """Ask the worker to populate memory and free it, and wait until it has.

        Raises:
            WorkerError, CellFailedError, StoppedError: it could not.
        """
        self._ask({"do": "warm_up", "bytes": size_bytes, "hugetlb": hugetlb})
        self._answer(limit_seconds)

    def close(self) -> None:
        """Ask the worker to end; kill it if it does not."""
        self._stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_SECONDS)
        self._stdout.close()

    def kill(self, wait_seconds: float = _KILLED_SECONDS) -> None:
        """Kill the worker. It runs no more code from now on; the kernel may take longer to free its memory."""
        with contextlib.suppress(ProcessLookupError):
            # The kernel frees the memory on the worker's CPU time: that must not delay the report.
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 19)
        self._process.kill()
        self._stdin.close()
        self._stdout.close()
        try:
            self._process.wait(wait_seconds)
        except subprocess.TimeoutExpired:
            _dying.append(self._process)

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
        """Wait for the next line and return it; None when the deadline has passed."""
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
