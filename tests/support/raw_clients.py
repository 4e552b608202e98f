"""Clients that send arbitrary messages to a device's server, and checks that the server keeps serving others."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

import prefault
import prefault.device
from prefault._kernel import userfaultfd as kernel
from prefault.device import protocol
from prefault.device.client.fault_descriptor import open_userfaultfd
from prefault.ipc import socket_path
from prefault.sizes import PAGE_SIZE
from support import processes
from support.devices import Pattern, content

PAGES = 32
LENGTH = PAGES * PAGE_SIZE
HELLO = protocol.Hello(1, protocol.VERSION)
WHOLE = protocol.Map(2, 0, 0, LENGTH, "read", False)


def _state_of_servers() -> dict[int, list[str]]:
    return {
        pid: processes.descriptors(pid)
        for pid in processes.descendants(os.getpid())
        if processes.name(pid).startswith("prefault-")
    }


@contextmanager
def served(directory: Path) -> Iterator[str]:
    """Serve a device; assert at the end that a well-behaved client is served, and nothing of the others is left."""
    with prefault.device.serve(Pattern(PAGES), directory / "s") as server:
        path = str(server.path)
        with prefault.device.connect(path) as client, client.map() as area:
            assert page_of(area, 1) == content(1)
            before = _state_of_servers()
            yield path
            assert page_of(area, 2) == content(2)
            prefault.populate(area, offset=3 * PAGE_SIZE, length=4 * PAGE_SIZE)
            assert page_of(area, 4) == content(4)
            prefault.discard(area, offset=PAGE_SIZE, length=PAGE_SIZE)
            assert page_of(area, 1) == content(1)
            with prefault.device.connect(path) as other, other.map(populate=True) as another:
                assert page_of(another, 9) == content(9)
            # The same processes, with as many descriptors as before, once they have noticed that clients left.
            assert processes.eventually(lambda: _counts(_state_of_servers()) == _counts(before), 8), _changed(before)


def _counts(state: dict[int, list[str]]) -> dict[int, int]:
    return {pid: len(held) for pid, held in state.items()}


def _changed(before: dict[int, list[str]]) -> str:
    now = _state_of_servers()
    return f"{sorted(before)} -> {sorted(now)}; {[(len(before.get(pid, [])), held) for pid, held in now.items()]}"


def page_of(area: prefault.device.Area, page: int) -> bytes:
    view = area.memoryview()
    found = bytes(view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])
    view.release()
    return found


class Raw:
    """A connection on which anything can be said."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket_path.connect_to(self.socket, path, 10)
        self.socket.settimeout(10)
        self._held: list[int] = []
        self.memory: mmap.mmap | None = None
        self.userfaultfd = -1
        self.frames = -1

    def say(self, what: bytes | protocol.Request, descriptors: list[int] | None = None) -> None:
        packet = what if isinstance(what, bytes) else protocol.encode(what)
        if descriptors is None:
            self.socket.send(packet)
        else:
            socket.send_fds(self.socket, [packet], descriptors)

    def hear(self) -> protocol.Reply | None:
        """The next reply; None where the server has hung up."""
        try:
            packet, descriptors, _, _ = socket.recv_fds(self.socket, protocol.MAX_MESSAGE, 3)
        except ConnectionResetError:
            return None
        self._held += descriptors
        if descriptors:
            self.frames = descriptors[0]
        return protocol.decode_reply(packet) if packet else None

    def hear_all(self) -> list[protocol.Reply]:
        """Until the server hangs up."""
        found = []
        while (reply := self.hear()) is not None:
            found.append(reply)
        return found

    def descriptors(self) -> list[int]:
        """Proper ones, for Hello."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        self.userfaultfd = open_userfaultfd().fd
        self._held += [reader, writer, self.userfaultfd]
        return [self.userfaultfd, writer, reader]

    def greet(self) -> None:
        self.say(HELLO, self.descriptors())
        welcome = self.hear()
        assert isinstance(welcome, protocol.Welcome), welcome

    def map_whole(self, access: str = "read") -> int:
        """Maps all frames, as a client should; the number of the area."""
        import numpy

        self.memory = mmap.mmap(self.frames, LENGTH)
        address = numpy.frombuffer(self.memory, numpy.uint8).ctypes.data
        mode = kernel.UFFDIO_REGISTER_MODE_MISSING | kernel.UFFDIO_REGISTER_MODE_MINOR
        kernel.register(self.userfaultfd, address, LENGTH, mode)
        self.say(msgspec.structs.replace(WHOLE, address=address))
        mapped = self.hear()
        assert isinstance(mapped, protocol.Mapped), mapped
        return mapped.area

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        for fd in self._held:
            os.close(fd)
        if self.memory is not None:
            self.memory.close()
