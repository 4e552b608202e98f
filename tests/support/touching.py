"""Commands that touch known pages of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from prefault.recordings.trace_instance import TraceInstance, TraceRefusedError
from support import needs
from support.file_beds import PAGE

BY_MAPPING = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
memory = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
memory.madvise(mmap.MADV_RANDOM)
sum(memory[int(page) * mmap.PAGESIZE] for page in sys.argv[2:])
"""

BY_READING = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
for page in sys.argv[2:]:
    os.pread(fd, 1, int(page) * mmap.PAGESIZE)
"""


def command(program: str, path: Path, *pages: int) -> list[str]:
    """Return a command that touches these pages of a file."""
    return [sys.executable, "-S", "-E", "-c", program, str(path), *map(str, pages)]


def edges_of(*pages: int) -> list[int]:
    """Return the ranges of single pages that do not touch each other."""
    return [edge for page in pages for edge in (page * PAGE, (page + 1) * PAGE)]


def major_faults(arguments: list[str]) -> int:
    """Run a command, and return how many of its page faults waited for a disk."""
    program = (
        "import resource, subprocess, sys; status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode;"
        " print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_majflt)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    status, faults = map(int, done.stdout.split())
    assert status == 0
    return faults


def tracing() -> None:
    """Skip where the kernel's tracepoints cannot be used."""
    try:
        TraceInstance([1]).stop()
    except TraceRefusedError as error:
        needs.missing(f"tracing is refused: {error.strerror}")
