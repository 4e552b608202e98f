"""The worker: a process that measures cells, and that may be killed in the middle of one.

A system call over 4 GiB can be stopped by nothing but a fatal signal, and a by-hand cell whose memory runs out ends in a
SIGBUS. Both may happen here and nowhere else. One JSON object a line, requests on stdin and answers on stdout:

    {"do": "measure", "cell": {...}, "repeats": 3, "places": {...}}    {"ns": 1234, "note": null} for each repetition
    {"do": "warm_up", "bytes": 1234, "hugetlb": false}                 nothing
                                                                       {"done": true} or {"failed": "why"} at the end
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from prefault.bench.grid import Cell
from prefault.bench.kinds import Places
from prefault.bench.measure import measure, warm_up


def serve(requests: BinaryIO, answers: FileIO) -> None:
    """Answer requests until there are no more, or nobody to answer to."""
    with contextlib.suppress(BrokenPipeError):
        for line in iter(requests.readline, b""):
            _serve_one(json.loads(line), requests, answers)


def _serve_one(request: dict[str, Any], requests: BinaryIO, answers: FileIO) -> None:
    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message).encode() + b"\n")

    try:
        with _dying_with_parent(requests):
            if request["do"] == "warm_up":
                warm_up(request["bytes"], hugetlb=request["hugetlb"])
            else:
                for repetition in measure(Cell(**request["cell"]), request["repeats"], Places(**request["places"])):
                    answer({"ns": repetition.value_ns, "note": repetition.note})
    except BrokenPipeError:
        raise
    except (OSError, MemoryError) as error:
        answer({"failed": str(error) or type(error).__name__})
    else:
        answer({"done": True})


@contextlib.contextmanager
def _dying_with_parent(requests: BinaryIO) -> Iterator[None]:
    """Ask for a SIGIO, which is fatal, when the parent's end of the pipe goes away. Also inside a long system call.

    Between requests it is off: there the next line would be such an event too. A parent that dies before this is switched
    on is noticed when the first answer cannot be written.
    """
    fd = requests.fileno()
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_ASYNC)
    try:
        yield
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)


def _prepare() -> None:
    # Ctrl-C at the terminal reaches the whole foreground group: the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants a dump of 4 GiB of zeros
    with contextlib.suppress(OSError):
        # If memory runs out after all, the kernel should choose us and not somebody's work.
        Path("/proc/self/oom_score_adj").write_text("1000")
    gc.disable()


if __name__ == "__main__":
    _prepare()
    with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as _answers:
        serve(sys.stdin.buffer, _answers)
