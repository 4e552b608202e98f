"""Accepting: a client that is refused gets the reason, also where it has sent something, and where descriptors ran out."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefault.ipc import accepting, socket_path
from prefault.ipc.accepting import Acceptor
from support.children import in_child


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    made, place = socket_path.listen_at(tmp_path / "s")
    with made:
        yield made
    socket_path.leave(place)


@pytest.fixture
def acceptor() -> Iterator[Acceptor]:
    made = Acceptor(1, str.encode, lambda: "no descriptors")
    yield made
    made.close()


def _client(tmp_path: Path, sent: bytes = b"") -> socket.socket:
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    client.settimeout(10)
    socket_path.connect_to(client, tmp_path / "s", 10)
    client.settimeout(10)
    client.sendall(sent)
    return client


def test_a_peer_is_identified(tmp_path: Path, listener: socket.socket, acceptor: Acceptor) -> None:
    assert acceptor.accept(listener, 0) is None
    with _client(tmp_path):
        connection = acceptor.accept(listener, 0)
        assert connection is not None
        with connection:
            assert not connection.getblocking()
            peer = acceptor.identify(connection)
            assert peer is not None
            assert peer[:2] == (os.getpid(), os.geteuid())
            os.close(peer.pidfd)


def test_one_too_many_reads_why_although_it_has_sent_something(
    tmp_path: Path, listener: socket.socket, acceptor: Acceptor
) -> None:
    with _client(tmp_path, b"unread" * 1000) as client:
        assert acceptor.accept(listener, 1) is None
        assert client.recv(1000) == b"it has 1 connections, the most that it takes"
        assert client.recv(1000) == b""


def test_another_user_is_refused(
    tmp_path: Path, listener: socket.socket, acceptor: Acceptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "is_trusted", lambda uid: False)
    with _client(tmp_path) as client:
        connection = acceptor.accept(listener, 0)
        assert connection is not None
        assert acceptor.identify(connection) is None
        assert client.recv(1000).startswith(b"it serves user ")


def test_without_descriptors_a_client_reads_why_and_the_reserve_comes_back(
    tmp_path: Path, listener: socket.socket, acceptor: Acceptor
) -> None:
    def exhausted() -> list[bytes]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        answers = []
        for _ in range(2):
            client = _client(tmp_path)
            held = []
            try:
                while True:
                    held.append(os.dup(0))
            except OSError:
                pass
            assert acceptor.accept(listener, 0) is None
            answers.append(client.recv(1000))
            for fd in held:
                os.close(fd)
            client.close()
        return answers

    assert in_child(exhausted) == [b"no descriptors"] * 2
