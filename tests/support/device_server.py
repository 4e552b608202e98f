"""A device's server in a child process without a warden, and a client of it that sends raw protocol messages."""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import resource
import select
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from prefault._kernel import userfaultfd as uffd
from prefault._kernel.mman import MADV_DONTFORK
from prefault.device import handover, protocol
from prefault.device.driver import Device
from prefault.device.frames import Frames
from prefault.device.registry import DeviceFacts, Registry
from prefault.device.server.event_loop import run_server
from prefault.device.server.warden_link import WardenLink
from prefault.memory.borrowing import borrow
from support import needs
from support.children import die_with_parent

Reply = TypeVar("Reply", bound=protocol.Reply)
PAGE = mmap.PAGESIZE
TIMEOUT_S = 20.0


class ForgetfulLink(WardenLink):
    """A link to no warden: every message is dropped, and there is no other warden to start."""

    def __init__(self) -> None:
        self.pidfd = -1

    def notify(self, message: handover.Message, descriptors: list[int] | None = None) -> None:
        pass

    def replace_warden(self, registry: Registry) -> None:
        pass


class Running:
    """The server process, and the client's end of the private connection. Leaving the ``with`` kills it if it still runs."""

    def __init__(
        self, device: Device, *, warden_link: WardenLink | None = None, listener: socket.socket | None = None,
        registry: Registry | None = None, descriptors: int | None = None, keep: bool = False,
        connection: socket.socket | None = None, other: socket.socket | None = None,
    ) -> None:  # fmt: skip
        made = Frames.create(device.length, device.page_size, device.capacity) if registry is None else registry.frames
        self.frames = made
        self.registry = registry or Registry(DeviceFacts.of(device, self.frames), self.frames)
        if connection is None or other is None:
            connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection = connection
        self.other: socket.socket | None = other
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                if registry is not None:  # a restart, which a fork may do that is killed
                    die_with_parent()
                self.connection.close()
                self.registry.listener = listener
                self.registry.first = None if listener is not None or self.registry.clients else other
                if descriptors is not None:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
                run_server(device, self.registry, warden_link or ForgetfulLink())
                status = 0
            except BaseException:  # noqa: BLE001  it is a child process, in which nothing of pytest may run
                traceback.print_exc()
            finally:
                os._exit(status)
        if not keep:
            other.close()
            self.other = None
        self.status: int | None = None

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait until the server ends by itself, and return its exit status."""
        if self.status is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                assert select.select([pidfd], [], [], timeout_s)[0], "the server does not end"
            finally:
                os.close(pidfd)
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        if self.other is not None:
            self.other.close()
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.frames.close()


class Handmade:
    """A client: a connection, a userfaultfd, a pipe, and areas.

    Whoever touches its memory waits for the server, which is another process: in the tests' own process that is well.
    """

    def __init__(self, connection: socket.socket, *, features: int | None = None, greet: bool = True) -> None:
        self.connection = connection
        connection.settimeout(TIMEOUT_S)
        wanted = (
            uffd.UffdFeature.MISSING_SHMEM
            | uffd.UffdFeature.MINOR_SHMEM
            | uffd.UffdFeature.POISON
            | uffd.UffdFeature.THREAD_ID
        )
        wanted |= uffd.UffdFeature.PAGEFAULT_FLAG_WP | uffd.UffdFeature.WP_HUGETLBFS_SHMEM
        wanted |= uffd.UffdFeature.MISSING_HUGETLBFS | uffd.UffdFeature.MINOR_HUGETLBFS
        refusal = None
        try:
            self.fd = uffd.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | uffd.UFFD_USER_MODE_ONLY)
            uffd.api(self.fd, int(wanted) if features is None else features)
        except OSError as error:
            refusal = error
        if refusal is not None:
            needs.missing(f"userfaultfd cannot be had as device memory needs it: {refusal}")
        self.lifeline_read, self.lifeline_write = os.pipe()
        self.numbers = iter(range(1, 1 << 30))
        self.areas: list[HandmadeArea] = []
        self.frames_fd = -1
        if greet:
            self.hello()

    def hello(self) -> protocol.Welcome:
        packet = protocol.encode(protocol.Hello(next(self.numbers), protocol.VERSION))
        socket.send_fds(self.connection, [packet], [self.fd, self.lifeline_write, self.lifeline_read])
        data, fds, _, _ = socket.recv_fds(self.connection, protocol.MAX_MESSAGE, 4)
        reply = protocol.decode_reply(data)
        assert isinstance(reply, protocol.Welcome), reply
        (self.frames_fd,) = fds
        self.welcome = reply
        return reply

    def send(self, request: protocol.Request) -> None:
        self.connection.send(protocol.encode(request))

    def receive(self) -> protocol.Reply:
        packet = self.connection.recv(protocol.MAX_MESSAGE)
        assert packet, "the server hung up"
        return protocol.decode_reply(packet)

    def ask(self, kind: type[Reply], request: protocol.Request) -> Reply:
        """Send a request and return its final reply, which must be of this kind."""
        self.send(request)
        while isinstance(reply := self.receive(), protocol.Progress):
            pass
        assert isinstance(reply, kind), reply
        assert reply.id == request.id
        return reply

    def map(
        self, length: int, offset: int = 0, *, access: Any = "write", track_dirty: bool = False, protect: bool | None = None,
        cpu: int | None = None,
    ) -> HandmadeArea:  # fmt: skip
        return HandmadeArea(self, length, offset, access, track_dirty, protect, cpu)

    def close(self) -> None:
        for area in list(self.areas):
            area.forget()
        self.connection.close()
        for fd in (self.fd, self.lifeline_read, self.lifeline_write, self.frames_fd):
            if fd >= 0:
                os.close(fd)
        self.fd = self.lifeline_read = self.lifeline_write = self.frames_fd = -1

    def __enter__(self) -> Handmade:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HandmadeArea:
    """A registered mapping of the frames."""

    def __init__(
        self, client: Handmade, length: int, offset: int, access: Any, track_dirty: bool, protect: bool | None,
        cpu: int | None,
    ) -> None:  # fmt: skip
        self.client = client
        flags = mmap.MAP_SHARED | (0x4000 if client.welcome.huge else 0)
        self.map = mmap.mmap(client.frames_fd, length, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
        self.map.madvise(MADV_DONTFORK)
        self.view = memoryview(self.map)
        with borrow(self.view) as memory:
            self.address = memory.address
        if protect is None:
            protect = track_dirty or (client.welcome.evicts and access == "write")
        mode = uffd.UFFDIO_REGISTER_MODE_MISSING | uffd.UFFDIO_REGISTER_MODE_MINOR
        uffd.register(client.fd, self.address, length, mode | (uffd.UFFDIO_REGISTER_MODE_WP if protect else 0))
        request = protocol.Map(next(client.numbers), self.address, offset, length, access, track_dirty, cpu)
        self.number = client.ask(protocol.Mapped, request).area
        client.areas.append(self)

    def populate(self, *runs: tuple[int, int], kind: type[Reply] = protocol.Populated, **options: Any) -> Reply:  # type: ignore[assignment]
        return self.client.ask(kind, self.populate_request(*runs, **options))

    def populate_request(
        self, *runs: tuple[int, int], access: Any = "read", rollback: bool = False, progress: bool = False,
        check_headroom: bool = True,
    ) -> protocol.Populate:  # fmt: skip
        number = next(self.client.numbers)
        return protocol.Populate(number, self.number, runs, access, rollback, progress, check_headroom)

    def discard(self, first: int, stop: int) -> int:
        request = protocol.Discard(next(self.client.numbers), self.number, first, stop)
        return self.client.ask(protocol.Discarded, request).pages

    def dirty(self, *, clear: bool = False) -> list[tuple[int, int]]:
        return self._runs(protocol.DirtyPages(next(self.client.numbers), self.number, clear))

    def log(self) -> list[tuple[int, int]]:
        return self._runs(protocol.AskLog(next(self.client.numbers), self.number))

    def _runs(self, request: protocol.Request) -> list[tuple[int, int]]:
        reply = self.client.ask(protocol.Runs, request)
        found = list(reply.runs)
        while reply.more:
            again = self.client.receive()
            assert isinstance(again, protocol.Runs)
            reply = again
            found += reply.runs
        return found

    def statistics(self) -> protocol.Statistics:
        return self.client.ask(protocol.Statistics, protocol.AskStatistics(next(self.client.numbers), self.number))

    def unmap(self) -> None:
        self.client.ask(protocol.Done, protocol.Unmap(next(self.client.numbers), self.number))
        self.forget()

    def forget(self) -> None:
        if self in self.client.areas:
            self.client.areas.remove(self)
            self.view.release()
            self.map.close()


@contextlib.contextmanager
def served(device: Device, **options: Any) -> Iterator[tuple[Running, Handmade]]:
    """Start a server with its private client."""
    with Running(device, **options) as running, Handmade(running.connection) as client:
        yield running, client


class listening:  # noqa: N801
    """A server of many clients; entering returns a function that connects."""

    def __init__(self, device: Device, directory: Any, **options: Any) -> None:
        self._path = str(directory / "s")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(self._path)
        listener.listen(64)
        self.running = Running(device, listener=listener, **options)
        listener.close()

    def connect(self) -> Handmade:
        return Handmade(self.raw())

    def raw(self) -> Any:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(self._path)
        return connection

    def __enter__(self) -> Callable[[], Handmade]:
        return self.connect

    def __exit__(self, *_: object) -> None:
        self.running.__exit__()


def _write(fd: int, text: str) -> None:
    os.write(fd, text.encode())


def ends_by(function: Callable[[Callable[[str], None]], object], timeout_s: float = TIMEOUT_S) -> tuple[str, int]:
    """Run ``function(say)`` in a fork; return what it said, and its exit status (negative: the signal that ended it)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(reader)
            faulthandler.disable()  # pytest's, which would show where the test died as it should
            function(lambda text: _write(writer, text))
            status = 0
        except BaseException:  # noqa: BLE001  as above
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    said = b""
    try:
        while True:
            if not select.select([reader], [], [], timeout_s)[0]:
                os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"the child hangs; it said {said!r}")
            data = os.read(reader, 65536)
            if not data:
                break
            said += data
    finally:
        os.close(reader)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return said.decode(), status
