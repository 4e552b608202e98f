"""Another process, whose mappings a test makes line by line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from support.children import die_with_parent

_PROGRAM = """
import ctypes, json, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
libc.madvise.argtypes = libc.mprotect.argtypes = libc.mlock2.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
libc.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t

def mapped(length, prot=3, flags=0x22, fd=-1, offset=0):
    address = libc.mmap(None, length, prot, flags, fd, offset)
    assert address not in (None, ctypes.c_void_p(-1).value), os.strerror(ctypes.get_errno())
    return address

def checked(result):
    assert result == 0, os.strerror(ctypes.get_errno())

def store(address, value=7):
    ctypes.c_ubyte.from_address(address).value = value

def load(address):
    return ctypes.c_ubyte.from_address(address).value

print("ready", flush=True)
names = globals()
for line in sys.stdin:
    names["answer"] = None
    exec(json.loads(line), names)
    print(json.dumps(names["answer"]), flush=True)
"""


class MappedProcess:
    """A process that runs lines of Python; a context manager that ends it.

    ``mapped``, ``checked``, ``store``, ``load``, ``libc`` and ``mmap`` are defined there, and a line that sets ``answer``
    sends that.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-E", "-c", _PROGRAM],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        self.pid = self._process.pid
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def do(self, lines: str) -> Any:
        """Run lines there, and return what they set ``answer`` to."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(lines) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def map(self, length: int, **keywords: int) -> int:
        """Map memory there (private anonymous by default), and return its address."""
        given = "".join(f", {name}={value}" for name, value in keywords.items())
        address: int = self.do(f"answer = mapped({length}{given})")
        return address

    def become(self, user: int) -> None:
        """Give it to another user, who may ptrace it."""
        self.do(f"os.setuid({user}); libc.prctl(4, 1, 0, 0, 0)")  # PR_SET_DUMPABLE, which setuid switches off

    def kill(self) -> None:
        """End it and wait for it."""
        self._process.kill()
        self._process.wait(30)

    def __enter__(self) -> MappedProcess:
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()
