"""Processes that act as virtual machines on a pool: plug, write self-describing blocks, verify, unplug."""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import prefault.device
from prefault.drivers import VmPoolControl
from prefault.errors import DeviceError, DeviceGoneError, PopulateError
from prefault.sparse import SparseMemory

_HEADER = struct.Struct("<16sQQI")
_TESTS = Path(__file__).parent.parent


def described(name: str, block: int, version: int, size: int) -> bytes:
    """Return the bytes of a block that describe themselves: machine, number, version, checksum."""
    body = random.Random(f"{name} {block} {version}").randbytes(64)
    body *= (size - _HEADER.size) // len(body)
    body += bytes(size - _HEADER.size - len(body))
    return _HEADER.pack(name.encode(), block, version, zlib.crc32(body)) + body


class Guest:
    """A machine's use of its memory, against a model of what each block holds."""

    def __init__(self, memory: SparseMemory, name: str, seed: int) -> None:
        self.memory = memory
        self.name = name
        self.chance = random.Random(seed)
        self.versions: dict[int, int] = {}
        self.plugs = self.refusals = 0

    def step(self) -> None:
        """Plug, write to, verify or unplug some random block."""
        block = self.chance.randrange(len(self.memory) // self.memory.block)
        if block not in self.versions:
            self.plug(block)
        elif self.chance.random() < 0.4:
            self.verify(block)
            self.memory.discard(block * self.memory.block, self.memory.block)
            del self.versions[block]
        elif self.chance.random() < 0.5:
            self.write(block)
        else:
            self.verify(block)

    def plug(self, block: int) -> None:
        size = self.memory.block
        try:
            self.memory.populate(block * size, size)
        except PopulateError:
            self.refusals += 1
            return
        self.plugs += 1
        found = self.memory.read(block * size, size)
        assert found.count(0) == size, f"{self.name}: block {block} came with the bytes {found[:40]!r}"
        self.write(block)

    def write(self, block: int) -> None:
        version = self.versions.get(block, 0) + 1
        self.memory.write(block * self.memory.block, described(self.name, block, version, self.memory.block))
        self.versions[block] = version

    def verify(self, block: int) -> None:
        size = self.memory.block
        found = self.memory.read(block * size, size)
        assert found == described(self.name, block, self.versions[block], size), f"{self.name}: block {block} has changed"


def _connected(path: str) -> prefault.device.DeviceClient:
    """Connect; again where the server was killed between accepting the connection and its answer."""
    for _ in range(20):
        with contextlib.suppress(DeviceGoneError):
            return prefault.device.connect(path, timeout=20)
    return prefault.device.connect(path, timeout=20)


def run(path: str, name: str, size: int, seed: int, steps: int) -> None:
    """Be a machine for some steps; for ever with 0. Prints the number of plugs and refusals."""
    with _connected(path) as client:
        for attempt in range(20):
            try:
                memory = VmPoolControl(client).create(name, size)
                break
            except (DeviceError, DeviceGoneError):  # the server was killed in the middle of it
                if attempt == 19:
                    raise
                name += "'"
        with memory:
            guest = Guest(memory, name, seed)
            print("ready", flush=True)
            done = 0
            while not steps or done < steps:
                guest.step()
                done += 1
            for block in guest.versions:
                guest.verify(block)
            print(guest.plugs, guest.refusals, flush=True)


def start(path: str, name: str, size: int, seed: int, steps: int) -> subprocess.Popen[str]:
    """Start a process that runs :func:`run`."""
    code = f"from support.vm_machines import run; run({path!r}, {name!r}, {size}, {seed}, {steps})"
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=_TESTS, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
