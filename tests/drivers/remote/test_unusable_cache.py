"""A cache directory that cannot be written, or that has something else in the place of its files."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from drivers.remote.conftest import QUICK
from prefault.drivers import RemoteFile, SourceError
from prefault.drivers.remote.disk_cache import BLOCK
from prefault.sizes import PAGE_SIZE
from support.fake_area import FakeArea
from support.http_server import HttpServer

Served = tuple[Path, bytes]

PAGES = BLOCK // PAGE_SIZE


def _remote(server: HttpServer, cache: Path, name: str = "file.bin") -> RemoteFile:
    return RemoteFile(server.url(name), cache_dir=cache, patience=QUICK)


def _fill_cache(server: HttpServer, cache: Path) -> None:
    with FakeArea(_remote(server, cache)) as area:
        area.fill()


@contextlib.contextmanager
def _read_only(directory: Path) -> Iterator[None]:
    """Remount a tmpfs read-only, and writable again afterwards, so that it can be unmounted."""
    subprocess.run(["mount", "-o", "remount,ro", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", directory], check=True)


def _use_up(directory: Path) -> None:
    """Leave no inode, and no byte, of a file system."""
    with contextlib.suppress(OSError), open(directory / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(PAGE_SIZE))
    with contextlib.suppress(OSError):
        for number in itertools.count():
            (directory / f"empty{number}").touch()


def test_a_read_only_cache_is_read_and_the_rest_is_downloaded(
    server: HttpServer, file: Served, small_tmpfs: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = file
    cache = small_tmpfs("8m")
    with FakeArea(_remote(server, cache)) as area:
        area.fill(range(20 * PAGES))
    with _read_only(cache):
        server.requests(clear=True)
        with FakeArea(_remote(server, cache)) as area:
            area.fill(range(20 * PAGES))
            assert area.content(0, 20 * BLOCK) == expected[: 20 * BLOCK]
            assert server.sent() == 1  # whether it is still that version
            assert not caplog.messages  # nothing was to be written
            for _ in range(2):
                area.fill()
                assert area.content(0, len(expected)) == expected
            assert server.sent() == 1 + 2 * (len(expected) - 20 * BLOCK)
    (said,) = caplog.messages
    assert said.startswith(str(cache))
    assert "nothing more is kept there: Read-only file system; what is not there is downloaded each time" in said


def test_a_read_only_cache_that_lacks_a_file_or_is_damaged(
    server: HttpServer, file: Served, small_tmpfs: Callable[[str], Path]
) -> None:
    _, expected = file
    cache = small_tmpfs("8m")
    damages: list[tuple[str, Callable[[Path], object]]] = [
        ("data", lambda path: path.write_bytes(bytes(len(expected)))),
        ("data", lambda path: os.truncate(path, 5)),
        ("source.json", Path.unlink),
        ("data", Path.unlink),
        ("blocks", Path.unlink),
    ]
    for name, damage in damages:
        _fill_cache(server, cache)
        damage(next(cache.rglob(name)))
        with _read_only(cache), FakeArea(_remote(server, cache)) as area:
            area.fill()
            assert area.content(0, len(expected)) == expected


def test_a_full_cache_that_has_the_data_is_read_without_a_warning(
    server: HttpServer, file: Served, small_tmpfs: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = file
    cache = small_tmpfs("8m,nr_inodes=12")
    _fill_cache(server, cache)
    _use_up(cache)
    server.requests(clear=True)
    with FakeArea(_remote(server, cache)) as area:
        area.fill()
        assert area.content(0, len(expected)) == expected
    assert server.sent() == 1
    assert not caplog.messages


def test_a_full_cache_has_room_again_when_the_old_version_is_removed(
    server: HttpServer, file: Served, small_tmpfs: Callable[[str], Path]
) -> None:
    path, expected = file
    cache = small_tmpfs("8m,nr_inodes=12")
    _fill_cache(server, cache)
    _use_up(cache)
    path.write_bytes(expected[::-1])
    for _ in range(2):
        server.requests(clear=True)
        with FakeArea(_remote(server, cache)) as area:
            area.fill()
            assert area.content(0, len(expected)) == expected[::-1]
    assert server.sent() == 1


@pytest.mark.parametrize("options", ["8m,nr_inodes=1", "8m,nr_inodes=2", "8m,nr_inodes=3", "8m,nr_inodes=5"])
def test_a_cache_without_inodes(
    server: HttpServer, file: Served, small_tmpfs: Callable[[str], Path], caplog: pytest.LogCaptureFixture, options: str
) -> None:
    _, expected = file
    cache = small_tmpfs(options)
    with FakeArea(_remote(server, cache)) as area:
        for _ in range(2):
            area.fill()
            assert area.content(0, len(expected)) == expected
    (said,) = caplog.messages
    assert "nothing more is kept there: No space left on device" in said


_OPEN = """
import sys, prefault
array = prefault.open_remote(sys.argv[1], cache_dir=sys.argv[2])
for at in range(0, len(array), 300_000):
    array[at]
prefault.populate(array)
with open(sys.argv[3], "rb") as file:
    assert array.tobytes() == file.read()
"""


@pytest.mark.parametrize("kind", ["empty", "half", "packed"])
def test_a_cache_that_cannot_be_written_is_logged_once_by_all_processes(
    server: HttpServer, file: Served, small_tmpfs: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    path, expected = file
    cache = small_tmpfs("8m")
    name = "file.bin"
    if kind == "half":
        with FakeArea(_remote(server, cache)) as area:
            area.fill(range(len(area.pages) // 2))
    elif kind == "packed":
        name = "file.gz"
        (server.directory / name).write_bytes(gzip.compress(expected, 1))
    with _read_only(cache):
        cache_dir = cache / "deeper" if kind == "empty" else cache
        command = [sys.executable, "-c", _OPEN, server.url(name), str(cache_dir), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (said,) = done.stderr.splitlines()
    assert said.startswith(str(cache))
    assert "nothing more is kept there: Read-only file system; what is not there is downloaded each time" in said


# --- something else in the place of the cache


def _put_directory(path: Path, victim: Path) -> None:
    path.mkdir()


def _put_link(path: Path, victim: Path) -> None:
    path.symlink_to(victim)


def _put_fifo(path: Path, victim: Path) -> None:
    os.mkfifo(path)


def _put_socket(path: Path, victim: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


_IN_THE_WAY = [
    (_put_directory, "a directory"), (_put_link, "a symbolic link"), (_put_fifo, "a special file"),
    (_put_socket, "a special file"),
]  # fmt: skip


@pytest.mark.parametrize(("put", "kind"), _IN_THE_WAY)
@pytest.mark.parametrize("name", ["data", "blocks", "source.json", "gzip.index"])
def test_something_else_in_the_place_of_a_file_is_refused(
    server: HttpServer, file: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, put: Any, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "file.bin"
    if name == "gzip.index":
        source = "file.gz"
        (server.directory / source).write_bytes(gzip.compress(file[1], 1))
    cache = tmp_path / "cache"
    _remote(server, cache, source)
    path = next(cache.rglob(name))
    path.unlink()
    victim = tmp_path / "victim"
    victim.write_bytes(b"dear")
    put(path, victim)
    with pytest.raises(SourceError) as caught:
        _remote(server, cache, source)
    assert caught.value.strerror == (
        f"{path}: {kind} is in the place of a file of prefault's cache: remove it, or name another place"
    )
    assert victim.read_bytes() == b"dear"


@pytest.mark.parametrize(("put", "kind"), [*_IN_THE_WAY[1:], (lambda path, _: path.touch(), "a regular file")])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_something_else_in_the_place_of_a_directory_is_refused(
    server: HttpServer, file: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int, put: Any, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    _remote(server, cache)
    version = next(cache.rglob("data")).parent
    path = (cache, version.parent, version)[level]
    shutil.rmtree(path)
    put(path, tmp_path / "missing")
    with pytest.raises(SourceError) as caught:
        _remote(server, cache)
    assert caught.value.strerror == (
        f"{path}: {kind} is in the place of a directory of prefault's cache: remove it, or name another place"
    )
    assert not (tmp_path / "missing").exists()


def test_a_cache_below_a_file(server: HttpServer, file: Served, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(SourceError, match="a file is in the place of a directory of this path: give another cache_dir"):
        _remote(server, tmp_path / "f" / "cache")
