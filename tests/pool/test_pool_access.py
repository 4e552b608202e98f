"""The socket of a pool: which users may connect, and which paths it may have."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import ExitStack
from pathlib import Path

import pytest

from prefault.pool import connect as connect_to_pool
from prefault.pool.service import pool_protocol
from support import needs
from support.children import Child, in_child
from support.raw_pool_clients import neighbour, replies, serving

_NOBODY = 65534


def test_the_socket_is_for_its_owner(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with serving(tmp_path) as (_, server):
            mode = os.stat(server.path).st_mode
            assert stat.S_ISSOCK(mode)
            assert stat.S_IMODE(mode) == 0o600
            assert os.listdir(tmp_path) == ["s"]
    finally:
        os.umask(before)
    assert os.listdir(tmp_path) == []


def _become_nobody(directory: Path) -> None:
    """Another user, who may look into the directory."""
    os.chdir(directory)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)


def test_another_user_is_refused_by_the_mode(tmp_path: Path) -> None:
    needs.root("become another user")
    os.chmod(tmp_path, 0o755)

    def as_nobody() -> None:
        _become_nobody(tmp_path)
        assert stat.S_ISSOCK(os.stat("s").st_mode)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, pytest.raises(PermissionError):
            connection.connect("s")

    with serving(tmp_path):
        in_child(as_nobody)


def test_another_user_is_refused_by_its_credentials(tmp_path: Path) -> None:
    needs.root("become another user")

    os.chmod(tmp_path, 0o755)

    def as_nobody() -> list[pool_protocol.Reply]:
        _become_nobody(tmp_path)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(10)
        connection.connect("s")
        return replies(connection)

    with serving(tmp_path) as (_, server), neighbour(server.path):
        os.chmod(server.path, 0o666)
        (refused,) = in_child(as_nobody)
        assert isinstance(refused, pool_protocol.PoolRefused)
        assert refused.message == f"it serves user {os.geteuid()}, not user {_NOBODY}"


def test_a_server_of_another_user_is_not_trusted(tmp_path: Path) -> None:
    needs.root("become another user")
    os.chmod(tmp_path, 0o777)

    def impostor(ready: int, stop: int) -> None:
        _become_nobody(tmp_path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind("s")
        listener.listen()
        os.write(ready, b"x")
        os.read(stop, 1)

    ready, tell = os.pipe()
    wait, stop = os.pipe()
    with Child(lambda: impostor(tell, wait)) as child:
        os.read(ready, 1)
        # Root may be anybody; what is asked is whether the server is of the user, or root.
        with pytest.raises(PermissionError, match=f"runs as user {_NOBODY}"):
            connect_to_pool(tmp_path / "s")
        os.write(stop, b"x")
        child.result()
    for fd in (ready, tell, wait, stop):
        os.close(fd)


# --- the path


def test_a_path_that_is_taken(tmp_path: Path, no_leaks: None) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("s")
    with serving(tmp_path) as (pool, server):
        with pytest.raises(FileExistsError, match="a server is alive"):
            pool.serve(server.path)
        for name in ("file", "link", "."):
            with pytest.raises((FileExistsError, ValueError)):
                pool.serve(tmp_path / name)
        connect_to_pool(server.path).close()
    assert (tmp_path / "file").read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with ExitStack() as stack:
        directory = os.open(tmp_path, os.O_PATH)
        stack.callback(os.close, directory)
        dead.bind(f"/proc/self/fd/{directory}/s")
    dead.listen()
    dead.close()
    with serving(tmp_path) as (_, server):
        connect_to_pool(server.path).close()
    assert os.listdir(tmp_path) == []


def test_only_its_own_socket_is_removed(tmp_path: Path) -> None:
    with serving(tmp_path) as (_, server):
        os.unlink(server.path)
        Path(server.path).write_text("somebody else's")
    assert os.listdir(tmp_path) == ["s"]


def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    with serving(deep) as (_, server):
        assert len(server.path) > 200
        connect_to_pool(server.path).close()


def test_connecting_without_a_server(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such socket"):
        connect_to_pool(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        connect_to_pool(tmp_path / "no" / "s")
    (tmp_path / "file").touch()
    with pytest.raises(ConnectionRefusedError, match="no server is alive"):
        connect_to_pool(tmp_path / "file")
