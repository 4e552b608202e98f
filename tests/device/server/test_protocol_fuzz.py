"""Clients that break the protocol: the server lives, serves a good client, and keeps nothing of theirs."""

from __future__ import annotations

import contextlib
import faulthandler
import mmap
import os
import random
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

import prefault
import prefault.device
from prefault._kernel import userfaultfd as kernel
from prefault.device import protocol
from prefault.device.client.fault_descriptor import open_userfaultfd
from prefault.device.device_pool import DeviceObject
from prefault.ipc import socket_path
from prefault.sizes import PAGE_SIZE
from support import needs, processes
from support.children import Child, in_child
from support.devices import content
from support.raw_clients import HELLO, LENGTH, PAGES, WHOLE, Raw, page_of, served

_NOBODY = 65534


def _packed(*values: Any) -> bytes:
    return msgspec.msgpack.encode(values)


_NONSENSE = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "one byte": b"\0",
    "not msgpack": b"\xc1garbage",
    "deep": b"\x91" * 5000,
    "large": b"\x81" * (protocol.MAX_MESSAGE + 1),
    "random": random.Random(1).randbytes(3000),
    "unknown": _packed("shutdown", 1),
    "no string": _packed(1, 1, 1),
    "wrong types": _packed("hello", "1", 1),
    "too long": _packed("hello", 1, 1, 1, 1),
    "too short": _packed("hello"),
    "negative": _packed("hello", -1, 1),
    "huge number": _packed("hello", 1 << 63, 1),
    "a map": msgspec.msgpack.encode({"type": "hello"}),
    "nothing but nil": _packed(None),
    "runs without end": _packed("populate", 1, 1, [[0, 1]] * 2001, "read", False, False, True),
    "wrong access": _packed("map", 1, 0, 0, 4096, "execute", False),
    "not utf-8": b"\x92\xa5\xff\xff\xff\xff\xff\x01",
    "a reply": protocol.encode(protocol.Done(1)),
    "a control request that is too long": protocol.encode(protocol.Control(1, bytes(protocol.MAX_CONTROL + 1))),
    "a control request that is text": _packed("control", 1, "text"),
}


@pytest.mark.parametrize("greeted", [False, True])
@pytest.mark.parametrize("name", _NONSENSE)
def test_nonsense_is_hung_up_on(tmp_path: Path, no_leaks: None, name: str, greeted: bool) -> None:
    with served(tmp_path) as path, Raw(path) as raw:
        if greeted:
            raw.greet()
        with contextlib.suppress(BrokenPipeError):
            raw.say(_NONSENSE[name])
        replies = raw.hear_all()
        assert all(isinstance(reply, protocol.Refused) for reply in replies)


@pytest.mark.parametrize(
    "first",
    [
        WHOLE,
        protocol.Unmap(1, 1),
        protocol.Populate(1, 1, ((0, 1),), "read", False, False, True),
        protocol.Discard(1, 1, 0, 1),
        protocol.Undo(1, 1, ((0, 1),)),
        protocol.AskStatistics(1, 1),
        protocol.Cancel(1),
        protocol.Control(1, b"request"),
        protocol.FindObject(1, "x"),
        protocol.AskObjectStatistics(1, "x"),
        protocol.Hello(1, 99),
        protocol.Hello(1, 0),
    ],
)
def test_hello_comes_first(tmp_path: Path, no_leaks: None, first: protocol.Request) -> None:
    with served(tmp_path) as path, Raw(path) as raw:
        raw.say(first)
        assert all(isinstance(reply, protocol.Refused) for reply in raw.hear_all())


# --- descriptors


def _kinds_of_descriptors() -> dict[str, Callable[[], int]]:
    def end(number: int) -> int:
        ends = os.pipe2(os.O_CLOEXEC)
        os.close(ends[1 - number])
        return ends[number]

    def connected() -> int:
        one, two = socket.socketpair()
        two.close()
        return one.detach()

    def without_handshake() -> int:
        return kernel.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK | kernel.UFFD_USER_MODE_ONLY)

    def blocking() -> int:
        fd = open_userfaultfd().fd
        os.set_blocking(fd, True)
        return fd

    return {
        "the reading end of a pipe": lambda: end(0),
        "the writing end of a pipe": lambda: end(1),
        "a socket": connected,
        "/dev/null": lambda: os.open("/dev/null", os.O_RDWR),
        "/dev/zero": lambda: os.open("/dev/zero", os.O_RDWR),
        "a directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY),
        "a path": lambda: os.open("/", os.O_PATH),
        "a memfd": lambda: os.memfd_create("not a userfaultfd"),
        "an epoll": _epoll,
        "an eventfd": lambda: os.eventfd(1),
        "a pidfd": lambda: os.pidfd_open(os.getpid()),
        "a userfaultfd without a handshake": without_handshake,
        "a userfaultfd that blocks": blocking,
    }


def _epoll() -> int:
    import select

    epoll = select.epoll()
    fd = os.dup(epoll.fileno())
    epoll.close()
    return fd


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("kind", _kinds_of_descriptors())
def test_descriptors_of_the_wrong_kind(tmp_path: Path, no_leaks: None, kind: str, at: int) -> None:
    """The server neither waits for one of them nor keeps it. Some kinds are in order at some places."""
    with served(tmp_path) as path, Raw(path) as raw:
        descriptors = raw.descriptors()
        wrong = _kinds_of_descriptors()[kind]()
        descriptors[at] = wrong
        raw.say(HELLO, descriptors)
        os.close(wrong)
        reply = raw.hear()
        if at == 0 and not kind.startswith("a userfaultfd that"):
            assert isinstance(reply, protocol.Refused), reply
            assert raw.hear() is None


@pytest.mark.parametrize("count", [0, 1, 2, 4, 10, 200])
def test_the_wrong_number_of_descriptors(tmp_path: Path, no_leaks: None, count: int) -> None:
    with served(tmp_path) as path, Raw(path) as raw:
        raw.say(HELLO, (raw.descriptors() * 67)[:count])
        assert all(isinstance(reply, protocol.Refused) for reply in raw.hear_all())


def test_descriptors_where_none_belong(tmp_path: Path, no_leaks: None) -> None:
    """Descriptors that come with another message are closed: no process keeps the pipe open."""
    with served(tmp_path) as path:
        for greeted in (False, True):
            reader, writer = os.pipe()
            with Raw(path) as raw:
                if greeted:
                    raw.greet()
                raw.say(protocol.AskStatistics(1, 1), [writer] * 3)
                os.close(writer)
                raw.hear()
            assert os.read(reader, 1) == b""
            os.close(reader)


# --- what lies outside


@pytest.mark.parametrize(
    ("address", "offset", "length"),
    [
        (0, 0, LENGTH + PAGE_SIZE),
        (0, LENGTH, PAGE_SIZE),
        (0, PAGE_SIZE, LENGTH),
        (0, 0, 0),
        (0, 0, 1),
        (0, 1, PAGE_SIZE),
        (1, 0, PAGE_SIZE),
        (0, (1 << 63) - PAGE_SIZE, PAGE_SIZE),
        ((1 << 63) - PAGE_SIZE, 0, LENGTH),
        ((1 << 63) - 1, 0, PAGE_SIZE),
        (0, 0, (1 << 63) - 1),
        (0, (1 << 63) - 1, (1 << 63) - 1),
    ],
)
def test_areas_outside_of_the_device(tmp_path: Path, no_leaks: None, address: int, offset: int, length: int) -> None:
    with served(tmp_path) as path, Raw(path) as raw:
        raw.greet()
        raw.say(protocol.Map(2, address, offset, length, "read", False))
        reply = raw.hear()
        assert reply is None or isinstance(reply, protocol.Refused | protocol.Mapped)
        if isinstance(reply, protocol.Mapped):  # the address is the client's affair: what is wrong with it hits the client
            assert (offset, length) == (0, LENGTH)
            raw.say(protocol.Populate(3, reply.area, ((0, PAGES),), "read", False, False, True))
            assert not isinstance(raw.hear(), protocol.Populated)


@pytest.mark.parametrize(
    "runs",
    [
        ((0, PAGES + 1),),
        ((PAGES, PAGES + 1),),
        ((5, 5),),
        ((7, 3),),
        ((0, (1 << 63) - 1),),
        (((1 << 63) - 2, (1 << 63) - 1),),
        tuple((page, page + 1) for page in range(PAGES)) * 60,
        ((3, 9), (0, 5), (4, 6)),
        (),
    ],
)
def test_runs_outside_of_an_area(tmp_path: Path, no_leaks: None, runs: protocol.RunList) -> None:
    inside = all(first < stop <= PAGES for first, stop in runs)

    def ask(path: str) -> None:
        with Raw(path) as raw:
            raw.greet()
            area = raw.map_whole()
            raw.say(protocol.Populate(3, area, runs, "read", False, False, True))
            reply = raw.hear()
            assert inside or reply is None or isinstance(reply, protocol.Refused | protocol.Failed), reply
            if reply is not None and runs:
                raw.say(protocol.Discard(4, area, runs[0][0], runs[0][1]))
                raw.hear()

    with served(tmp_path) as path:
        in_child(lambda: ask(path))


def test_areas_of_another_client(tmp_path: Path, no_leaks: None) -> None:
    with served(tmp_path) as path:
        for number in (0, 1, 2, 1 << 62):
            for request in (
                protocol.Populate(3, number, ((0, 1),), "read", False, False, True),
                protocol.Discard(3, number, 0, 1),
                protocol.Undo(3, number, ((0, 1),)),
                protocol.AskStatistics(3, number),
                protocol.AskLog(3, number),
                protocol.AskObjectStatistics(3, "x"),
                protocol.FindObject(3, "x" * 60_000),
                protocol.DirtyPages(3, number, True),
            ):
                with Raw(path) as raw:
                    raw.greet()
                    raw.say(request)
                    reply = raw.hear()
                    assert reply is None or isinstance(reply, protocol.Refused | protocol.Failed), (request, reply)


def test_requests_that_a_reader_may_not_make(tmp_path: Path, no_leaks: None) -> None:
    with served(tmp_path) as path, Raw(path) as raw:
        raw.greet()
        raw.say(msgspec.structs.replace(WHOLE, access="write"))
        assert isinstance(raw.hear(), protocol.Refused)  # the device is read-only


def test_memory_that_is_not_the_announced_area(tmp_path: Path, no_leaks: None) -> None:
    """An area that is unmapped behind the server's back, and one that never was the frames."""

    def misbehave(path: str, frames: bool) -> None:
        import numpy

        faulthandler.disable()  # SIGBUS is an answer as well
        raw = Raw(path)
        raw.greet()
        memory = mmap.mmap(raw.frames if frames else -1, LENGTH)
        address = numpy.frombuffer(memory, numpy.uint8).ctypes.data
        kernel.register(raw.userfaultfd, address, LENGTH, kernel.UFFDIO_REGISTER_MODE_MISSING)
        raw.say(msgspec.structs.replace(WHOLE, address=address))
        mapped = raw.hear()
        if not isinstance(mapped, protocol.Mapped):
            return
        if frames:
            memory.close()
        raw.say(protocol.Populate(3, mapped.area, ((0, PAGES),), "read", False, False, True))
        raw.hear()
        if not frames:
            assert memory[0] is not None

    with served(tmp_path) as path:
        in_child(lambda: misbehave(path, True))
        with Child(lambda: misbehave(path, False)) as child:
            assert processes.eventually(child.ended)


def test_random_changes_of_good_messages(tmp_path: Path, no_leaks: None) -> None:
    """Seeded: bits flipped, bytes cut, added and swapped, numbers at their ends."""
    chance = random.Random(17)
    numbers = (0, 1, 2, PAGES, PAGE_SIZE, LENGTH, (1 << 32) - 1, 1 << 47, (1 << 63) - 1)

    def number() -> int:
        return chance.choice(numbers)

    def messages() -> tuple[protocol.Request, ...]:
        runs = tuple((number(), number()) for _ in range(chance.randrange(4)))
        return (
            protocol.Hello(number(), number()),
            protocol.Map(number(), number(), number(), number(), chance.choice(("read", "write")), chance.random() < 0.5),
            protocol.Map(number(), number(), number(), number(), "read", False, None, DeviceObject("x", number(), number())),
            protocol.FindObject(number(), chance.choice(("", "x", "x" * 3000))),
            protocol.AskObjectStatistics(number(), chance.choice(("", "x", "\0" * 3000))),
            protocol.Unmap(number(), number()),
            protocol.Populate(number(), number(), runs, "read", chance.random() < 0.5, chance.random() < 0.5, True),
            protocol.Cancel(number()),
            protocol.Discard(number(), number(), number(), number()),
            protocol.Undo(number(), number(), runs),
            protocol.DirtyPages(number(), number(), True),
            protocol.AskStatistics(number(), number()),
            protocol.AskLog(number(), number()),
            protocol.Control(number(), chance.randbytes(chance.choice((0, 1, 100, protocol.MAX_CONTROL)))),
        )

    assert {type(message) for message in messages()} == set(get_args(protocol.Request)), "a request is not tested here"

    def changed(packet: bytes) -> bytes:
        text = bytearray(packet)
        for _ in range(chance.choice((0, 0, 1, 2, 5))):
            at = chance.randrange(len(text)) if text else 0
            match chance.randrange(3):
                case 0 if text:
                    text[at] ^= 1 << chance.randrange(8)
                case 1:
                    del text[at:]
                case _:
                    text[at:at] = chance.randbytes(chance.randrange(5))
        return bytes(text) or b"\0"

    def talk(path: str) -> None:
        for _ in range(60):
            with Raw(path) as raw:
                if chance.random() < 0.8:
                    raw.greet()
                    if chance.random() < 0.5:
                        raw.map_whole()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    for _ in range(10):
                        raw.say(changed(protocol.encode(chance.choice(messages()))))

    with served(tmp_path) as path:  # what a process mapped is served until the process ends: another process than ours
        in_child(lambda: talk(path))


# --- how often, and how slowly


def _flood(path: str, count: int) -> None:
    with contextlib.ExitStack() as stack:
        for index in range(count):
            raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.callback(raw.close)
            with contextlib.suppress(ConnectionError, TimeoutError):
                socket_path.connect_to(raw, path, 10)
                if index % 7 == 0:
                    raw.send(b"\xc1")


def test_many_connections(tmp_path: Path, no_leaks: None) -> None:
    with served(tmp_path) as path:
        _flood(path, 200)


@pytest.mark.stress
def test_a_thousand_connections_and_a_good_client_meanwhile(tmp_path: Path, no_leaks: None) -> None:
    with served(tmp_path) as path, Child(lambda: _flood(path, 1000)) as child:
        for page in range(PAGES):
            with prefault.device.connect(path) as client, client.map() as area:
                assert page_of(area, page) == content(page)
        child.result()


def test_silence(tmp_path: Path, no_leaks: None) -> None:
    """Silent clients disturb no other, before Hello and after."""
    with _Silent(tmp_path) as (path, raws):
        for raw in raws[::2]:
            raw.say(HELLO, raw.descriptors())  # and never hears
        with prefault.device.connect(path) as client, client.map() as area:
            assert page_of(area, 20) == content(20)


class _Silent:
    def __init__(self, directory: Path) -> None:
        self._stack = contextlib.ExitStack()
        self._directory = directory

    def __enter__(self) -> tuple[str, list[Raw]]:
        path = self._stack.enter_context(served(self._directory))
        return path, [self._stack.enter_context(Raw(path)) for _ in range(6)]

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def test_a_client_that_reads_no_replies_harms_only_itself(tmp_path: Path, no_leaks: None) -> None:
    def ask(path: str) -> None:
        with Raw(path) as deaf:
            deaf.greet()
            area = deaf.map_whole()
            deaf.socket.settimeout(0.5)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                for number in range(20_000):
                    deaf.say(protocol.AskStatistics(number + 3, area))
            with prefault.device.connect(path) as client, client.map() as mine:
                assert page_of(mine, 21) == content(21)

    with served(tmp_path) as path:
        in_child(lambda: ask(path))


def test_a_client_that_hangs_up_is_served_until_it_ends(tmp_path: Path, no_leaks: None) -> None:
    """The connection is gone, the mapping is not: its faults are answered until the process ends."""

    def hang_up_and_touch(path: str) -> bytes:
        raw = Raw(path)
        raw.greet()
        raw.map_whole()
        raw.socket.shutdown(socket.SHUT_RDWR)
        raw.socket.close()
        assert raw.memory is not None
        return raw.memory[7 * PAGE_SIZE : 8 * PAGE_SIZE]

    with served(tmp_path) as path:
        assert in_child(lambda: hang_up_and_touch(path)) == content(7)


# --- who may come


def _become_another_user(directory: Path) -> None:
    os.chdir(directory)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that other users may enter, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="prefault-fuzz-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_the_socket_is_for_its_owner(open_directory: Path, no_leaks: None) -> None:
    needs.root("become another user")

    def as_another_user() -> None:
        _become_another_user(open_directory)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection, pytest.raises(PermissionError):
            connection.connect("s")

    before = os.umask(0)
    try:
        with served(open_directory) as path:
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            in_child(as_another_user)
    finally:
        os.umask(before)


def test_another_user_is_refused_by_its_credentials(open_directory: Path, no_leaks: None) -> None:
    needs.root("become another user")

    def as_another_user() -> list[str]:
        _become_another_user(open_directory)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.settimeout(10)
        connection.connect("s")
        said = []
        while packet := connection.recv(protocol.MAX_MESSAGE):
            reply = protocol.decode_reply(packet)
            assert isinstance(reply, protocol.Refused), reply
            said.append(reply.message)
        return said

    with served(open_directory) as path:
        os.chmod(path, 0o666)
        said = in_child(as_another_user)
        assert len(said) == 1
        assert said[0].endswith(f"it serves user {os.geteuid()}, not user {_NOBODY}")
