"""The worker: a process that measures cells, and may be killed in the middle of one.

Only a fatal signal stops a system call over 4 GiB, and a by-hand cell whose memory runs out ends in a SIGBUS. Both may
happen in this process and in no other. Requests come on stdin and answers go to stdout, one JSON object per line:

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
    """Answer requests until stdin ends or the parent closes its end of stdout."""
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
    """Have a SIGIO, which is fatal, end this process when the parent closes the pipe, even inside a long system call.

    The signal is off between requests, where the next line would raise it too. A parent that died before it was switched on
    is noticed when the first answer cannot be written.
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
    # Ctrl-C at the terminal reaches the whole foreground group: only the parent acts on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a dump of 4 GiB of zeros helps no user
    with contextlib.suppress(OSError):
        # If memory runs out after all, the kernel should kill the worker and not another program.
        Path("/proc/self/oom_score_adj").write_text("1000")
    gc.disable()


if __name__ == "__main__":
    _prepare()
    with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as _answers:
        serve(sys.stdin.buffer, _answers)
