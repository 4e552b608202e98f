"""Servers of a pool that do not keep to the protocol: their clients neither hang nor crash, and leak nothing."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefault import PAGE_SIZE
from prefault.errors import PoolGoneError
from prefault.pool import Pool
from prefault.pool import connect as connect_to_pool
from prefault.pool.service import pool_protocol
from support import oracle
from support.children import in_child
from support.raw_pool_clients import frame


@contextmanager
def _impostor(path: Path, *said: bytes, fds: tuple[int, ...] = ()) -> Iterator[None]:
    """Answers a connection with these bytes, one after each message, whatever is asked, and then nothing."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = os.open(path.parent, os.O_PATH)
    listener.bind(f"/proc/self/fd/{directory}/{path.name}")
    os.close(directory)
    listener.listen()
    done = threading.Event()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            for data in said:
                connection.recv(4096)
                socket.send_fds(connection, [data], fds) if fds else connection.sendall(data)
            done.wait(10)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        listener.close()


_WELCOME = pool_protocol.encode(pool_protocol.PoolWelcome(1, 1 << 20, PAGE_SIZE, ()))


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ((), "did not answer within 0.5 s"),
        ((_WELCOME[:-3],), "did not answer within 0.5 s"),
        ((_WELCOME,), "did not answer within 0.5 s"),
        ((b"\xff\xff\xff\xff",), "is no answer of a pool: a message of 4294967295 bytes"),
        ((frame(b"\xc1"),), "is no answer of a pool"),
        ((pool_protocol.encode(pool_protocol.PoolDone(1)),), "answered a PoolHello with a PoolDone"),
        ((_WELCOME, pool_protocol.encode(pool_protocol.PoolDone(2))), "answered a StatisticsRequest with a PoolDone"),
    ],
)
def test_a_client_of_an_impostor_does_not_wait_for_ever(
    tmp_path: Path, no_descriptors: None, said: tuple[bytes, ...], complaint: str
) -> None:
    def ask() -> None:
        with connect_to_pool(tmp_path / "s", timeout=0.5) as client:
            with pytest.raises(PoolGoneError, match=complaint):
                client.statistics()
            client.statistics()  # and says it again, at once

    with _impostor(tmp_path / "s", *said), pytest.raises(PoolGoneError, match=complaint):
        ask()


def test_descriptors_that_a_server_sends_unasked_are_closed(tmp_path: Path, no_leaks: None) -> None:
    reader, writer = os.pipe()
    with _impostor(tmp_path / "s", _WELCOME, fds=(writer, writer, writer)):
        os.set_blocking(reader, False)
        client = connect_to_pool(tmp_path / "s", timeout=5)
        os.close(writer)
        assert os.read(reader, 1) == b""
        client.close()
    os.close(reader)


def test_without_msgspec_the_error_names_what_to_install(tmp_path: Path) -> None:
    def without() -> str:
        import sys

        for name in [name for name in sys.modules if name.startswith(("msgspec", "prefault"))]:
            del sys.modules[name]
        sys.modules["msgspec"] = None  # type: ignore[assignment]
        from prefault.pool import Pool, connect

        with Pool("1 MiB", block=PAGE_SIZE) as pool:
            for share in (lambda: pool.serve(tmp_path / "s"), lambda: connect(tmp_path / "s")):
                with pytest.raises(ImportError, match="pip install msgspec"):
                    share()
            return str(pool)

    assert in_child(without).startswith("<Pool")


def test_closing_a_server(tmp_path: Path, no_leaks: None) -> None:
    with Pool("1 MiB", block=PAGE_SIZE) as pool:
        for _ in range(3):  # the same path, again and again
            server = pool.serve(tmp_path / "s")
            client = connect_to_pool(server.path)
            server.close()
            server.close()
            with pytest.raises(PoolGoneError, match="is gone"):
                client.statistics()
            client.close()
        server = pool.serve(tmp_path / "s")
    assert os.listdir(tmp_path) == []  # the pool closed it
    assert "closed" in repr(server)
    gc.collect()
    assert oracle.descriptors()
