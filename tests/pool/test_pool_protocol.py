"""The protocol, and every client that does not keep to it: the server lives, others are served, nothing leaks."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prefault import PAGE_SIZE
from prefault.errors import PoolFullError, PoolGoneError
from prefault.ipc import socket_path
from prefault.ipc.transport import ProtocolError
from prefault.pool import connect as connect_to_pool
from prefault.pool.service import pool_protocol
from prefault.pool.service.pool_connection import PoolConnection
from support.children import in_child
from support.raw_pool_clients import create_member, frame, neighbour, raw, replies, serving

_HELLO = pool_protocol.PoolHello(1, pool_protocol.VERSION, False)
_NOBODY = 65534


def _packed(*values: Any) -> bytes:
    return frame(msgspec.msgpack.encode(values))


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "a message of 542393671 bytes"),
        (struct.pack("<I", 0), "a message of 0 bytes"),
        (struct.pack("<I", 0xFFFFFFFF) + b"x" * 5000, "a message of 4294967295 bytes"),
        (struct.pack("<I", pool_protocol.MAX_REQUEST + 1), f"1 to {pool_protocol.MAX_REQUEST} are allowed"),
        (frame(b"\xc1garbage"), "not a message"),
        (frame(b"\x91" * 4000), "not a message"),
        (frame(random.Random(1).randbytes(100)), "not a message"),
        (_packed("shutdown", 1), "not a message"),
        (_packed("hello", 1, "1", False), "not a message"),
        (_packed("hello", 1, 1, False, "and more"), "not a message"),
        (_packed("hello", -1, 1, False), "not a message"),
        (_packed("hello", 1, 1 << 63, False), "not a message"),
        (_packed("hello", 1, 99, False), "version 1 of the protocol is spoken here, not 99"),
        (_packed("settle", 1, 1, 4096), "Hello comes first"),
        (_packed("ask", 1), "Hello comes first"),
        (pool_protocol.encode(_HELLO) * 2, "Hello comes first, and once"),
        (
            pool_protocol.encode(pool_protocol.PoolHello(1, 1, True))
            + pool_protocol.encode(pool_protocol.StatisticsRequest(2)),
            "asks for nothing",
        ),
    ],
)
def test_nonsense_is_answered_and_hung_up_on(tmp_path: Path, no_descriptors: None, said: bytes, complaint: str) -> None:
    with serving(tmp_path) as (_, server), neighbour(server.path), raw(server.path) as connection:
        connection.sendall(said)
        last = replies(connection)[-1]
        assert isinstance(last, pool_protocol.PoolRefused)
        assert last.kind == "protocol"
        assert complaint in last.message


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\x05",
        struct.pack("<I", 100) + b"half",
        pool_protocol.encode(_HELLO) + b"\x05\0\0",
        pool_protocol.encode(_HELLO)[:-1],
    ],
)
def test_half_a_message_ends_the_connection_at_the_deadline(tmp_path: Path, no_descriptors: None, said: bytes) -> None:
    with serving(tmp_path, timeout=0.5) as (_, server), neighbour(server.path), raw(server.path) as connection:
        connection.sendall(said)
        assert all(isinstance(reply, pool_protocol.PoolWelcome) for reply in replies(connection))  # until it hangs up


def test_a_byte_now_and_then_does_not_buy_time(tmp_path: Path) -> None:
    with serving(tmp_path, timeout=0.5) as (_, server), raw(server.path, _HELLO) as connection:
        replies(connection, 1)

        def drip() -> None:
            for byte in frame(b"x" * 2000):
                connection.sendall(bytes([byte]))
                time.sleep(0.02)

        with pytest.raises(ConnectionError):
            drip()


def test_a_client_that_is_silent_after_hello_stays_connected(tmp_path: Path) -> None:
    with serving(tmp_path, timeout=0.5) as (_, server), raw(server.path, _HELLO) as connection:
        replies(connection, 1)
        time.sleep(0.8)
        connection.sendall(pool_protocol.encode(pool_protocol.StatisticsRequest(2)))
        assert isinstance(replies(connection, 1)[0], pool_protocol.StatisticsReply)


def test_members_belong_to_their_connection(tmp_path: Path, no_leaks: None) -> None:
    with serving(tmp_path) as (pool, server), neighbour(server.path):
        (other,) = pool.statistics().members
        link = PoolConnection(server.path, 10.0)
        link.greet(events=False)
        for number in (1, 2, 0, 1 << 62):
            with pytest.raises(ValueError, match=f"member {number} is none of this connection"):
                link.call(pool_protocol.Settle(0, number, 0), pool_protocol.PoolDone)
            with pytest.raises(ValueError, match=f"member {number} is none of this connection"):
                link.call(pool_protocol.Close(0, number), pool_protocol.PoolDone)
        assert pool.statistics().members == (other,)
        mine, fd = create_member(link)
        link.call(pool_protocol.Close(0, mine), pool_protocol.PoolDone)
        with pytest.raises(ValueError, match="none of this connection"):  # closed is gone
            link.call(pool_protocol.Settle(0, mine, PAGE_SIZE), pool_protocol.PoolDone)
        os.close(fd)
        link.close()


@pytest.mark.parametrize(
    ("create", "error"),
    [
        (pool_protocol.Create(0, 0, 0, None, None), ValueError),
        (pool_protocol.Create(0, (1 << 63) - 1, 0, None, None), ValueError),
        (pool_protocol.Create(0, PAGE_SIZE, 2 * PAGE_SIZE, None, None), ValueError),
        (pool_protocol.Create(0, PAGE_SIZE, 0, 1, None), ValueError),
        (pool_protocol.Create(0, PAGE_SIZE, PAGE_SIZE, 0, None), ValueError),
        (pool_protocol.Create(0, PAGE_SIZE, 0, None, ""), ValueError),
        (pool_protocol.Create(0, PAGE_SIZE, 0, None, "a\nb"), ValueError),
        (pool_protocol.Create(0, PAGE_SIZE, 0, None, "n" * 101), ValueError),
        (pool_protocol.Create(0, 1 << 40, 1 << 21, None, None), PoolFullError),
        (pool_protocol.Create(0, 1 << 53, 0, None, None), ValueError),
    ],
)
def test_requests_that_are_refused(
    tmp_path: Path, no_descriptors: None, create: pool_protocol.Create, error: type[Exception]
) -> None:
    with serving(tmp_path) as (pool, server):
        link = PoolConnection(server.path, 10.0)
        link.greet(events=False)
        with pytest.raises(error):
            link.call(create, pool_protocol.Created)
        member, fd = create_member(link)
        for charged in (1, PAGE_SIZE - 1, 65 * PAGE_SIZE, 1 << 62):
            with pytest.raises(ValueError, match="cannot have"):
                link.call(pool_protocol.Settle(0, member, charged), pool_protocol.PoolDone)
        assert pool.statistics().charged == 0
        os.close(fd)
        link.close()


def test_descriptors_that_a_client_sends_never_arrive(tmp_path: Path, no_leaks: None) -> None:
    with serving(tmp_path) as (_, server), neighbour(server.path):
        for messages in ((), (_HELLO,)):
            reader, writer = os.pipe()
            with raw(server.path, *messages) as connection:
                replies(connection, len(messages))
                socket.send_fds(connection, [pool_protocol.encode(_HELLO)], [writer] * 200)
                os.close(writer)
                last = replies(connection)[-1]
                assert isinstance(last, pool_protocol.PoolRefused)
                assert "sends no descriptors" in last.message
            assert os.read(reader, 1) == b""  # nobody holds the other end
            os.close(reader)


def test_one_connection_too_many_is_refused_with_the_reason(tmp_path: Path, no_leaks: None) -> None:
    with serving(tmp_path, max_connections=3) as (_, server), neighbour(server.path):
        with raw(server.path, _HELLO) as one, raw(server.path, _HELLO) as two:
            replies(one, 1)
            replies(two, 1)
            with raw(server.path) as three:
                (refused,) = replies(three)
                assert isinstance(refused, pool_protocol.PoolRefused)
                assert "has 3 connections, the most that it takes" in refused.message
            with pytest.raises(PoolGoneError, match="the pool's server refuses: it has 3 connections"):
                connect_to_pool(server.path)
        # A place is free again as soon as the server has seen the hang-up.
        for _ in range(100):
            try:
                connect_to_pool(server.path).close()
                break
            except PoolGoneError:
                time.sleep(0.02)
        else:
            pytest.fail("the places of closed connections are not given again")


def _flood(path: str, count: int) -> None:
    held = []
    for _ in range(count):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        socket_path.connect_to(connection, path, 10)
        held.append(connection)
    for connection in held:
        connection.close()


def test_many_connections_at_once(tmp_path: Path, no_leaks: None) -> None:
    with serving(tmp_path, max_connections=8) as (_, server), neighbour(server.path):
        _flood(server.path, 300)


@pytest.mark.stress
def test_a_thousand_connections_from_several_threads(tmp_path: Path, no_descriptors: None) -> None:
    with serving(tmp_path, max_connections=8) as (_, server), neighbour(server.path):
        threads = [threading.Thread(target=_flood, args=(server.path, 250)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def test_no_descriptors_left(tmp_path: Path, no_leaks: None) -> None:
    """The server says so, and goes on when there are some again."""

    def exhausted() -> tuple[str, bool]:
        import resource

        with serving(tmp_path) as (_, server), neighbour(server.path):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(10)
            directory = os.open(tmp_path, os.O_PATH)
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
            held = []
            try:
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                pass
            connection.connect(f"/proc/self/fd/{directory}/s")
            (refused,) = replies(connection)
            for fd in (*held, directory):
                os.close(fd)
            connection.close()
            with connect_to_pool(server.path) as client:
                served = client.capacity == 1 << 20
            assert isinstance(refused, pool_protocol.PoolRefused)
            return refused.message, served

    message, served = in_child(exhausted)
    assert "no descriptors left" in message
    assert served


def test_a_client_that_does_not_read_its_replies_is_disconnected(tmp_path: Path, no_leaks: None) -> None:
    def ask_and_never_listen(connection: socket.socket) -> None:
        while True:  # the server stops reading what it cannot answer, and then hangs up
            connection.sendall(pool_protocol.encode(pool_protocol.StatisticsRequest(2)))

    with serving(tmp_path, timeout=0.5) as (_, server), neighbour(server.path), raw(server.path, _HELLO) as deaf:
        with pytest.raises(ConnectionError):
            ask_and_never_listen(deaf)
        assert len(replies(deaf)) > 1


def test_an_event_of_a_connection_that_is_gone(tmp_path: Path, no_leaks: None) -> None:
    """An earlier event of the round ended the connection, and a new one has its descriptors by now."""
    with serving(tmp_path) as (_, server):
        with raw(server.path, _HELLO) as first:
            replies(first, 1)
            (gone,) = server._clients
        while server._clients:
            time.sleep(0.001)
        with connect_to_pool(server.path) as client:
            (new,) = server._clients
            gone.pidfd = new.pidfd  # the lowest free number, so often the same; here it must be
            server._on_ready(gone)
            gone.members.add(1)
            server._on_process_end(gone)
            assert server._clients == {new}
            assert client.statistics().charged == 0


def test_members_have_a_limit_too(tmp_path: Path, no_leaks: None) -> None:
    with serving(tmp_path, max_members=3) as (_, server):
        link = PoolConnection(server.path, 10.0)
        link.greet(events=False)
        held = [create_member(link) for _ in range(3)]
        with pytest.raises(PoolFullError, match="given out 3 members"):
            create_member(link)
        link.call(pool_protocol.Close(0, held[0][0]), pool_protocol.PoolDone)
        held.append(create_member(link))
        for _, fd in held:
            os.close(fd)
        link.close()


def test_members_that_a_connection_left_count_as_well(tmp_path: Path, no_leaks: None) -> None:
    """Each holds a descriptor of the server: connecting again and again does not get a process more of them."""
    with serving(tmp_path, max_members=3) as (pool, server), ExitStack() as stack:
        for _ in range(3):
            link = PoolConnection(server.path, 10.0)
            link.greet(events=False)
            stack.callback(os.close, create_member(link)[1])
            link.close()
        with connect_to_pool(server.path) as client:
            with pytest.raises(PoolFullError, match="given out 3 members"):
                client.sparse(PAGE_SIZE)
            assert [member.orphaned for member in client.statistics().members] == [True] * 3
        assert len(pool.statistics().members) == 3


# --- fuzz


_VALID: list[Callable[[random.Random], pool_protocol.Request]] = [
    lambda rng: pool_protocol.PoolHello(rng.randrange(9), pool_protocol.VERSION, rng.random() < 0.1),
    lambda rng: pool_protocol.Create(rng.randrange(9), rng.choice((PAGE_SIZE, 1 << 20, 1 << 40)), 0, None, None),
    lambda rng: pool_protocol.Settle(rng.randrange(9), rng.randrange(40), rng.randrange(80) * PAGE_SIZE),
    lambda rng: pool_protocol.Close(rng.randrange(9), rng.randrange(40)),
    lambda rng: pool_protocol.StatisticsRequest(rng.randrange(9)),
]


def _mutated(rng: random.Random) -> bytes:
    """Some valid messages, and perhaps a few bytes changed, cut out or put in."""
    data = bytearray(pool_protocol.encode(_HELLO) if rng.random() < 0.9 else b"")
    for _ in range(rng.randrange(6)):
        data += pool_protocol.encode(rng.choice(_VALID)(rng))
    for _ in range(rng.choice((0, 0, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(4):
            case 0 if at < len(data):
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randrange(5)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(5))
            case 3:
                data[at:] = rng.randbytes(rng.randrange(20))
    return bytes(data)


def _say(path: str, data: bytes, *, read: bool) -> None:
    with raw(path) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            if read:
                while connection.recv(1 << 16):
                    pass
        except ConnectionError:
            pass


def _fuzz(directory: Path, seed: int, rounds: int) -> None:
    rng = random.Random(seed)
    with serving(directory, timeout=5.0, max_members=1 << 16) as (pool, server), neighbour(server.path):
        for _ in range(rounds):
            data = rng.randbytes(rng.randrange(200)) if rng.random() < 0.2 else _mutated(rng)
            _say(server.path, data, read=rng.random() < 0.8)
        # What the fuzzed connections left is charged to this process, which still lives: orphans, all of them.
        statistics = pool.statistics()
        assert all(member.orphaned for member in statistics.members[1:])
        assert statistics.charged == sum(member.charged for member in statistics.members) <= pool.capacity


def test_fuzz(tmp_path: Path, no_leaks: None) -> None:
    _fuzz(tmp_path, 1, 300)


@pytest.mark.stress
@pytest.mark.parametrize("seed", range(4))
def test_fuzz_for_long(tmp_path: Path, no_leaks: None, seed: int) -> None:
    _fuzz(tmp_path, seed, 10_000)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=300))
def test_bytes_are_a_message_or_a_protocol_error(data: bytes) -> None:
    for decode in (pool_protocol.decode_request, pool_protocol.decode_reply):
        try:
            message = decode(data)
        except ProtocolError:
            continue
        assert decode(pool_protocol.encode(message)[4:]) == message


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=600), st.integers(1, 64))
def test_framing_does_not_depend_on_how_it_arrives(data: bytes, step: int) -> None:
    bodies = [data[at : at + 50] for at in range(0, len(data), 50)]
    wire, received, taken = b"".join(map(frame, bodies)), bytearray(), list[bytes]()
    for at in range(0, len(wire), step):
        received += wire[at : at + step]
        while (body := pool_protocol.take_message(received, 64)) is not None:
            taken.append(bytes(body))
    assert taken == bodies
    assert not received
