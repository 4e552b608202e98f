"""Messages between a warden, its server, and the process that starts a warden: typed, one per packet, never pickles.

All of them are processes of one user and one program. Long arguments travel as a file in memory, since a packet has at most
some 200 KiB.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import time
from collections import deque
from typing import Any, Final, NamedTuple, TypeAlias

from prefault.device import recipes
from prefault.device.driver import Recipe
from prefault.device.registry import ClientRecord, DeviceFacts
from prefault.ipc import socket_path
from prefault.ipc.messages import Decoder, TaggedMessage, encode, msgspec
from prefault.ipc.transport import ProtocolError
from prefault.ipc.transport import receive as receive_packet

VERSION = 3
"""Version of these messages and of the shared memory; the program on disk may be another than the one that runs."""

MAX_PACKET = 128 << 10
MAX_DESCRIPTORS = 10
_TEXT = 1
"""MessagePack's number of the extension type of text."""


class PlaceFacts(NamedTuple):
    """A :class:`~prefault.ipc.socket_path.Place`, with its path in bytes: a path need not be UTF-8."""

    path: bytes
    device: int
    inode: int


# --- to a fresh warden


class Start(TaggedMessage, frozen=True):
    """Request to a fresh warden: make the device and serve it.

    Two descriptors come with it: the arguments of the recipe, and a pidfd of the process that asks. Without a path, this
    connection becomes that of the only client.
    """

    version: int
    factory: str
    path: bytes | None


class Reattach(TaggedMessage, frozen=True):
    """Request to a fresh warden: supervise a live server whose warden has died.

    ``descriptors`` names the descriptors that come with it, in order. The clients follow (:class:`Admitted`); the last
    message is :class:`HandoverDone`.
    """

    version: int
    device: DeviceFacts
    generation: int
    factory: str | None
    place: PlaceFacts | None
    lingers: bool
    """The server is to end with its last client."""
    descriptors: tuple[str, ...]


# --- from the server to its warden


class Admitted(TaggedMessage, frozen=True):
    """A client; ``descriptors`` names the descriptors that come with it, in order: fields of its record."""

    number: int
    pid: int
    uid: int
    descriptors: tuple[str, ...]


class Left(TaggedMessage, frozen=True):
    """A client is gone."""

    client: int


class HandoverDone(TaggedMessage, frozen=True):
    """The end of a handover, or of a server that ends in an orderly way."""


# --- to a warden, from the process that started it


class End(TaggedMessage, frozen=True):
    """Request to a warden: end in an orderly way."""


# --- from a server to its warden, and from a warden to the process that started it


class ServerStarted(TaggedMessage, frozen=True):
    """The server runs."""

    server: int


class ServerNotStarted(TaggedMessage, frozen=True):
    """The server could not be started: an errno, and the reason for people."""

    number: int
    message: str


Message: TypeAlias = Start | Reattach | Admitted | Left | HandoverDone | End | ServerStarted | ServerNotStarted

ENDS: Final = ("listener", "first", "control")
"""Fields of the registry that are sockets; their descriptors have these names."""

_decode: Decoder[Message] = Decoder(Message)


def pair() -> tuple[socket.socket, socket.socket]:
    """Return two connected sockets of packets, neither of which is one of the three standard descriptors."""
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return socket.socket(fileno=above_stdio(one.detach())), socket.socket(fileno=above_stdio(other.detach()))


def above_stdio(fd: int) -> int:
    """Return ``fd``, or a duplicate that is none of the three standard descriptors in its place.

    Where a process was started with its standard input closed, the next descriptor is 0, and a process that it starts
    has /dev/null there.
    """
    if fd > 2:
        return fd
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)


def send(link: socket.socket, message: Message, descriptors: list[int] | None = None) -> None:
    """Send a message; OSError if the other side is gone."""
    packet = encode(message)
    if descriptors:
        socket.send_fds(link, [packet], descriptors)
    else:
        link.send(packet)


def receive(link: socket.socket) -> tuple[Message, list[int]] | None:
    """Return the next message, and its descriptors, the caller's to close; None if the other side has hung up.

    Raises:
        ProtocolError: the packet is no message.
        BlockingIOError: there is none yet, on a socket that does not block.
    """
    try:
        packet, descriptors = receive_packet(link, MAX_PACKET, MAX_DESCRIPTORS)
    except ConnectionResetError:
        return None
    if not packet:
        return None
    try:
        return _decode(packet), descriptors
    except ProtocolError:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


class _Text:
    """A str that may have lone surrogates, as names of files have; also as a key, which msgspec's ``Ext`` cannot be."""

    def __init__(self, text: str) -> None:
        self.text = text


def _wrap_text(value: Any) -> Any:
    match value:
        case str():
            return _Text(value)
        case list():
            return [_wrap_text(item) for item in value]
        case dict():
            return {_wrap_text(key): _wrap_text(item) for key, item in value.items()}
        case _:
            return value


def _encode_text(wrapped: _Text) -> Any:
    return msgspec.msgpack.Ext(_TEXT, wrapped.text.encode(errors="surrogatepass"))


def _decode_text(number: int, data: memoryview) -> str:
    if number != _TEXT:
        raise ValueError(f"{number} is not the number of an extension type")
    return str(data, errors="surrogatepass")


_encode_arguments = msgspec.msgpack.Encoder(enc_hook=_encode_text).encode
_decode_arguments = msgspec.msgpack.Decoder(ext_hook=_decode_text).decode


def arguments_file(arguments: dict[str, Any]) -> int:
    """Write the arguments of a recipe, which were checked, to a new file in memory; return its descriptor."""
    fd = os.memfd_create("prefault-arguments", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(_encode_arguments(_wrap_text(arguments)))
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_recipe(factory: str | None, arguments: int) -> Recipe | None:
    """Return the recipe of a message, with its arguments from a file of :func:`arguments_file`.

    Raises:
        ProtocolError: the file does not hold the arguments of a recipe.
    """
    if factory is None:
        return None
    try:
        recipe = Recipe(factory, _decode_arguments(os.pread(arguments, os.fstat(arguments).st_size, 0)))
        recipes.check_arguments(recipe.arguments)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"not the arguments of a recipe: {error}") from None
    return recipe


def place_facts(listens_at: socket_path.Place | None) -> PlaceFacts | None:
    """Return a place in the form in which it is sent."""
    return None if listens_at is None else PlaceFacts(os.fsencode(listens_at.path), listens_at.device, listens_at.inode)


def make_place(facts: PlaceFacts | None) -> socket_path.Place | None:
    """Return the place in a message."""
    return None if facts is None else socket_path.Place(os.fsdecode(facts.path), facts.device, facts.inode)


def admitted(client: ClientRecord) -> tuple[Admitted, list[int]]:
    """Return the message about a client, and the descriptors that come with it."""
    named = client.descriptors
    return Admitted(client.number, client.pid, client.uid, tuple(named)), list(named.values())


def client_record(message: Admitted, descriptors: list[int]) -> ClientRecord:
    """Return the client that was admitted; it owns the descriptors from now on."""
    named: dict[str, Any] = dict(zip(message.descriptors, descriptors, strict=True))
    return ClientRecord(message.number, message.pid, message.uid, **named)


def wait_for(pidfd: int, timeout: float) -> bool:
    """Wait until a process ends, ``timeout`` seconds at most; return whether it did."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout) * 1000))


def kill(pidfd: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process, if it still exists."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def is_stopped(pidfd: int) -> bool:
    """Return whether a process is stopped by a signal."""
    with open(f"/proc/self/fdinfo/{pidfd}") as facts:
        pid = facts.read().partition("\nPid:")[2].split()[0]
    try:
        with open(f"/proc/{pid}/stat", "rb") as status:
            return status.read().rpartition(b")")[2].split()[0] == b"T"
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False


def reap(pid: int, timeout: float) -> int | None:
    """Wait for a child, ``timeout`` seconds at most; its exit status, or minus the signal. None: it lives.

    0 if it is gone already: the program has a handler of SIGCHLD that reaps every child.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    try:
        if not wait_for(pidfd, timeout):
            return None
    finally:
        os.close(pidfd)
    try:
        _, status = os.waitpid(pid, 0)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status)


class EventLimit:
    """Limit on repeated events: more than ``most`` of them in ``window_s`` seconds exceed it."""

    def __init__(self, most: int, window_s: float) -> None:
        self._most = most
        self._window_s = window_s
        self._times: deque[float] = deque()

    def record(self) -> bool:
        """Record an event; return whether there were too many."""
        now = time.monotonic()
        self._times.append(now)
        while self._times[0] < now - self._window_s:
            self._times.popleft()
        return len(self._times) > self._most
