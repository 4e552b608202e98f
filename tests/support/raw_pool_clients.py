"""Clients of a pool that can send anything, and one of good conduct beside them."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefault import PAGE_SIZE
from prefault.ipc import socket_path
from prefault.pool import Pool
from prefault.pool.service import pool_protocol
from prefault.pool.service.pool_connection import PoolConnection
from prefault.pool.service.pool_server import PoolServer


@contextmanager
def serving(directory: Path, *, timeout: float = 30.0, **options: Any) -> Iterator[tuple[Pool, PoolServer]]:
    with Pool("1 MiB", block=PAGE_SIZE) as pool, pool.serve(directory / "s", timeout=timeout, **options) as server:
        yield pool, server


def raw(path: str | Path, *messages: pool_protocol.Request) -> socket.socket:
    """A connection on which anything can be said; ``messages`` are said at once."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    socket_path.connect_to(connection, path, 10)
    connection.settimeout(10)
    for message in messages:
        connection.sendall(pool_protocol.encode(message))
    return connection


def replies(connection: socket.socket, count: int | None = None) -> list[pool_protocol.Reply]:
    """So many replies; None: all until the server hangs up."""
    received, replies = bytearray(), list[pool_protocol.Reply]()
    while len(replies) != count:
        body = pool_protocol.take_message(received, pool_protocol.MAX_REPLY)
        if body is not None:
            replies.append(pool_protocol.decode_reply(body))
            continue
        try:
            data = connection.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        if not data:
            assert not received, "the server hung up in the middle of a message"
            break
        received += data
    return replies


def create_member(link: PoolConnection) -> tuple[int, int]:
    created, fd = link.call(pool_protocol.Create(0, 64 * PAGE_SIZE, 0, None, None), pool_protocol.Created)
    assert fd is not None
    return created.member, fd


@contextmanager
def neighbour(path: str | Path) -> Iterator[None]:
    """A client of good conduct, who is served before and after, and has what it had."""
    link = PoolConnection(path, 10.0)
    link.greet(events=False)
    member, fd = create_member(link)
    link.call(pool_protocol.Settle(0, member, 2 * PAGE_SIZE), pool_protocol.PoolDone)
    os.pwrite(fd, b"mine" * 1024, 0)
    yield
    link.call(pool_protocol.Settle(0, member, 3 * PAGE_SIZE), pool_protocol.PoolDone)
    statistics = link.call(pool_protocol.StatisticsRequest(0), pool_protocol.StatisticsReply)[0].statistics
    mine = [found for found in statistics.members if found.pid == os.getpid()]
    assert [found.charged for found in mine if found.allocated_bytes] == [3 * PAGE_SIZE]
    assert os.pread(fd, 8, 0) == b"minemine"
    link.call(pool_protocol.Close(0, member), pool_protocol.PoolDone)
    os.close(fd)
    link.close()


def frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body
