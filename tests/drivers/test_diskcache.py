"""The cache on a disk: it survives, it is checked, and it never gives what is not the source's."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec  # type: ignore[import-untyped]
import pytest
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

from drivers.conftest import QUICK
from prefault.drivers import RemoteFile, SourceChangedError, SourceError
from prefault.drivers.diskcache import BLOCK, DiskCache, WriteWarning, cache_key, make_directory
from prefault.drivers.http import HttpSource
from prefault.sizes import KIB, PAGE_SIZE
from support import needs
from support.children import Child
from support.fake_area import FakeArea
from support.http_server import HttpServer

Content = Callable[[int], bytes]
Served = tuple[Path, bytes]

PAGES = BLOCK // PAGE_SIZE


def _remote(server: HttpServer, cache: Path, name: str = "file.bin") -> RemoteFile:
    return RemoteFile(server.url(name), cache_dir=cache, patience=QUICK)


def _files(cache: Path) -> dict[str, Path]:
    found = [path for path in cache.rglob("*") if path.is_file()]
    assert len({path.parent for path in found}) == 1, found
    return {path.name: path for path in found}


def test_what_was_read_is_not_asked_for_again(server: HttpServer, file: Served, tmp_path: Path) -> None:
    _, expected = file
    with FakeArea(_remote(server, tmp_path)) as area:
        area.fill(range(PAGES, 5 * PAGES))
    with FakeArea(_remote(server, tmp_path)) as area:
        server.requests(clear=True)
        area.fill(range(2 * PAGES, 4 * PAGES))
        assert area.content(2 * BLOCK, 4 * BLOCK) == expected[2 * BLOCK : 4 * BLOCK]
        area.fill(range(2 * PAGES + 3, 2 * PAGES + 4))
        assert server.requests() == []
        area.fill()  # the two gaps around it: one request each
        assert area.content(0, len(expected)) == expected
        asked = [(request.first, request.last + 1) for request in server.requests()]
        assert asked == [(0, BLOCK), (5 * BLOCK, len(expected))]
    server.requests(clear=True)
    with FakeArea(_remote(server, tmp_path)) as area:
        area.fill()
        assert area.content(0, len(expected)) == expected
    assert server.sent() == 1  # whether it is still that version
    data = _files(tmp_path)["data"].stat()
    assert data.st_size == len(expected)


def test_it_is_sparse(server: HttpServer, file: Served, tmp_path: Path) -> None:
    with FakeArea(_remote(server, tmp_path)) as area:
        area.fill(range(PAGES))
    data = _files(tmp_path)["data"].stat()
    assert data.st_size == len(file[1])
    assert data.st_blocks * 512 <= 2 * BLOCK


def test_a_page_alone_brings_its_block(server: HttpServer, file: Served, tmp_path: Path) -> None:
    _, expected = file
    with FakeArea(_remote(server, tmp_path)) as area:
        server.requests(clear=True)
        assert area.get(BLOCK + PAGE_SIZE, BLOCK + 2 * PAGE_SIZE) == expected[BLOCK + PAGE_SIZE : BLOCK + 2 * PAGE_SIZE]
        assert server.sent() == BLOCK
        last = len(expected) // PAGE_SIZE
        assert area.get(last * PAGE_SIZE, len(expected)) == expected[last * PAGE_SIZE :]


def test_another_version_has_a_cache_of_its_own(server: HttpServer, file: Served, tmp_path: Path) -> None:
    path, expected = file
    device = _remote(server, tmp_path)
    with FakeArea(device) as area:
        area.fill()
    path.write_bytes(expected[::-1])
    with FakeArea(_remote(server, tmp_path)) as area:
        area.fill()
        assert area.content(0, len(expected)) == expected[::-1]
    _files(tmp_path)  # that of the old version is gone
    with FakeArea(device) as area, pytest.raises(SourceChangedError):
        area.fill()


def _spoil(path: Path, offset: int, count: int = 1) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        spoilt = bytes(255 - byte for byte in file.read(count))
        file.seek(offset)
        file.write(spoilt)


@pytest.mark.parametrize(
    "damage",
    [
        lambda files: os.truncate(files["data"], 100_000),
        lambda files: os.truncate(files["data"], 0),
        lambda files: os.truncate(files["blocks"], 20),
        lambda files: os.truncate(files["blocks"], 0),
        lambda files: files["data"].unlink(),
        lambda files: files["blocks"].unlink(),
        lambda files: files["source.json"].unlink(),
        lambda files: files["source.json"].write_text("nonsense"),
        lambda files: _spoil(files["data"], 200_000),
        lambda files: _spoil(files["data"], 0, 300 * KIB),
        lambda files: _spoil(files["blocks"], 12, 40),
        lambda files: files["blocks"].write_bytes(os.urandom(1000)),
        lambda files: files["data"].write_bytes(bytes(3 << 20)),
    ],
)
def test_damage_costs_a_download_and_never_a_byte(
    server: HttpServer, file: Served, tmp_path: Path, damage: Callable[[dict[str, Path]], object]
) -> None:
    _, expected = file
    with FakeArea(_remote(server, tmp_path)) as area:
        area.fill()
    damage(_files(tmp_path))
    for _ in range(2):
        with FakeArea(_remote(server, tmp_path)) as area:
            area.fill()
            assert area.content(0, len(expected)) == expected
    server.requests(clear=True)
    with FakeArea(_remote(server, tmp_path)) as area:
        area.fill()
    assert server.sent() == 1  # it is whole again


@pytest.mark.parametrize("name", ["data", "blocks"])
def test_cut_short_while_it_is_used(server: HttpServer, file: Served, tmp_path: Path, name: str) -> None:
    _, expected = file
    with FakeArea(_remote(server, tmp_path)) as area:
        area.fill()
        os.truncate(_files(tmp_path)[name], 0)
        area.fill(range(40))
        assert area.content(0, len(expected)) == expected


def test_a_crash_at_any_moment(server: HttpServer, file: Served, tmp_path: Path) -> None:
    """kill -9 in the middle of writing, at random moments, many times; what is left is right or not there."""
    _, expected = file
    generator = random.Random(7)
    order = list(range(0, len(expected) // PAGE_SIZE, PAGES))

    def fill() -> None:
        with FakeArea(_remote(server, tmp_path)) as area:
            random.Random(os.getpid()).shuffle(order)
            for first in order:
                area.fill(range(first, first + PAGES))

    for _ in range(10):
        with Child(fill) as child:
            child_began = threading.Event()
            child_began.wait(generator.uniform(0.005, 0.04))
            assert child.pid  # killed on leaving
    with FakeArea(_remote(server, tmp_path)) as area:
        area.fill()
        assert area.content(0, len(expected)) == expected


def test_two_processes_at_once(server: HttpServer, file: Served, tmp_path: Path) -> None:
    _, expected = file

    def fill() -> bool:
        with FakeArea(_remote(server, tmp_path)) as area:
            pages = list(area.pages)[::7]
            random.Random(os.getpid()).shuffle(pages)
            for page in pages:
                area.fill(range(page, min(page + 20, len(area.pages))))
            return area.content(0, len(expected)) == expected

    with Child(fill) as one, Child(fill) as two:
        assert one.result()
        assert two.result()
    server.requests(clear=True)
    with FakeArea(_remote(server, tmp_path)) as area:
        area.fill()
        assert area.content(0, len(expected)) == expected
    assert server.sent() == 1


def test_a_disk_that_is_full(
    server: HttpServer, file: Served, small_tmpfs: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = file
    cache = small_tmpfs("1m")
    for _ in range(2):
        with FakeArea(_remote(server, cache)) as area:
            for first in range(0, len(area.pages), 4 * PAGES):
                area.fill(range(first, min(first + 4 * PAGES, len(area.pages))))
            assert area.content(0, len(expected)) == expected
    assert "nothing more is kept there: No space left on device" in caplog.text


# --- a cache that cannot be written


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
    damages: list[Callable[[dict[str, Path]], object]] = [
        lambda files: _spoil(files["data"], BLOCK),
        lambda files: os.truncate(files["data"], 5),
        lambda files: files["source.json"].unlink(),
        lambda files: files["data"].unlink(),
        lambda files: files["blocks"].unlink(),
    ]
    for damage in damages:
        _filled(server, cache)
        damage(_files(cache))
        with _read_only(cache), FakeArea(_remote(server, cache)) as area:
            area.fill()
            assert area.content(0, len(expected)) == expected


def test_a_full_cache_that_has_the_data_is_read_without_a_word(
    server: HttpServer, file: Served, small_tmpfs: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    _, expected = file
    cache = small_tmpfs("8m,nr_inodes=12")
    _filled(server, cache)
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
    _filled(server, cache)
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
def test_a_cache_that_cannot_be_written_is_said_once_by_all_processes(
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
        command = [sys.executable, "-c", _OPEN, server.url(name), str(cache / "deeper" if kind == "empty" else cache), path]
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
def test_what_is_no_file_in_the_place_of_one(
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
def test_what_is_no_directory_in_the_place_of_one(
    server: HttpServer, file: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int, put: Any, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    _remote(server, cache)
    path = (cache, *(found.parent for found in _two_up(cache)))[level]
    shutil.rmtree(path)
    put(path, tmp_path / "missing")
    with pytest.raises(SourceError) as caught:
        _remote(server, cache)
    assert caught.value.strerror == (
        f"{path}: {kind} is in the place of a directory of prefault's cache: remove it, or name another place"
    )
    assert not (tmp_path / "missing").exists()


def _two_up(cache: Path) -> tuple[Path, Path]:
    data = next(cache.rglob("data"))
    return data.parent, data


def test_a_cache_below_a_file(server: HttpServer, file: Served, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(SourceError, match="a file is in the place of a directory of this path: give another cache_dir"):
        _remote(server, tmp_path / "f" / "cache")


def test_versions_that_cannot_be_told_apart_are_not_kept(server: HttpServer, file: Served, tmp_path: Path) -> None:
    server.fail("plain", count=100)
    with pytest.raises(SourceError, match="neither an ETag nor a time of change"):
        _remote(server, tmp_path)
    assert _remote_without(server).length == len(file[1])


def _remote_without(server: HttpServer) -> RemoteFile:
    return RemoteFile(server.url("file.bin"), patience=QUICK)


def _filled(server: HttpServer, cache: Path) -> Path:
    """A cache of the whole file; its data."""
    with FakeArea(_remote(server, cache)) as area:
        area.fill()
    return _files(cache)["data"]


def test_what_others_could_have_planted_is_refused(server: HttpServer, file: Served, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    data = _filled(server, cache)
    for path in (cache, data.parent.parent, data.parent):
        assert path.stat().st_mode & 0o777 == 0o700
        path.chmod(0o777)
        with pytest.raises(SourceError, match="others could put wrong bytes there"):
            _remote(server, cache)
        path.chmod(0o700)
    cache.chmod(0o1777)  # as /tmp: others cannot touch what is ours in it
    _remote(server, cache)
    victim = tmp_path / "victim"
    victim.write_bytes(b"dear")
    data.unlink()
    data.symlink_to(victim)
    with pytest.raises(SourceError, match="a symbolic link is in the place of a file"):
        _remote(server, cache)
    assert victim.read_bytes() == b"dear"


def test_a_cache_of_somebody_else_is_refused(server: HttpServer, file: Served, tmp_path: Path) -> None:
    needs.root("give a directory away")
    cache = tmp_path / "cache"
    data = _filled(server, cache)
    for path in (cache, data.parent.parent, data.parent):
        os.chown(path, 65534, -1)
        with pytest.raises(SourceError, match="belongs to user 65534"):
            _remote(server, cache)
        os.chown(path, 0, -1)


def test_nothing_secret_is_written(server: HttpServer, file: Served, tmp_path: Path) -> None:
    url = server.url("file.bin").replace("://", "://me:hidden@") + "?token=hidden"
    with FakeArea(RemoteFile(url, cache_dir=tmp_path, patience=QUICK)) as area:
        area.fill(range(1))
    files = _files(tmp_path)
    assert "hidden" not in files["source.json"].read_text()
    assert all(path.stat().st_mode & 0o077 == 0 for path in (files["data"], files["data"].parent))


def test_one_cache_for_each_way_to_unpack(tmp_path: Path, content: Content) -> None:
    expected = content(200_000)
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(expected))
    for compression, holds in (("infer", expected), (None, path.read_bytes()), ("infer", expected)):
        device = RemoteFile(path, compression=compression, cache_dir=tmp_path / "cache")  # type: ignore[arg-type]
        with FakeArea(device) as area:
            area.fill()
            assert area.content(0, len(holds)) == holds


# --- which source

_PLACES: list[dict[str, Any]] = [
    {},
    {"endpoint_url": "http://one:9000"},
    {"endpoint_url": "http://two:9000"},
    {"client_kwargs": {"endpoint_url": "http://one:9000"}},
    {"client_kwargs": {"endpoint_url": "http://two:9000"}},
    {"s3": {"profile": "work"}},
    {"account_name": "mine"},
    {"connection_string": "AccountName=mine;AccountKey=secret==;EndpointSuffix=one"},
    {"connection_string": "AccountName=yours;AccountKey=secret==;EndpointSuffix=one"},
    {"username": "me"},
    {"anon": True},
    {"anon": False},
]
_CREDENTIALS: list[dict[str, Any]] = [
    {"key": "AKIA1", "secret": "s3cret", "token": "fresh"},
    {"client_kwargs": {"aws_access_key_id": "AKIA1", "aws_secret_access_key": "s3cret", "aws_session_token": "fresh"}},
    {"password": "s3cret", "passphrase": "s3cret"},
    {"account_key": "s3cret", "sas_token": "fresh", "credential": object()},
    {"headers": {"Authorization": "Bearer fresh", "X-Api-Key": "s3cret", "Cookie": "fresh"}, "auth": ("me", "s3cret")},
]


def _fresh(value: Any) -> Any:
    """With the secrets of another day."""
    if isinstance(value, dict):
        return {name: _fresh(item) for name, item in value.items()}
    return f"{value} anew" if isinstance(value, str) else value


def test_storage_options_that_lead_elsewhere_name_another_source() -> None:
    keys = [cache_key("s3://bucket/f", None, options) for options in _PLACES]
    assert len(set(keys)) == len(keys)
    assert keys[0] == "s3://bucket/f|None"  # what was kept before options counted is found again
    again = [cache_key("s3://bucket/f", None, dict(reversed(options.items()))) for options in _PLACES]
    assert again == keys
    assert cache_key("s3://bucket/f", "gzip", _PLACES[1]) not in keys


@pytest.mark.parametrize("credentials", _CREDENTIALS)
def test_credentials_name_nothing_and_are_nowhere(credentials: dict[str, Any]) -> None:
    for options in _PLACES:
        key = cache_key("s3://bucket/f", None, options | credentials)
        assert key == cache_key("s3://bucket/f", None, options | _fresh(credentials))
        assert not any(secret in key for secret in ("AKIA1", "s3cret", "fresh", "secret=="))


class _Token:
    pass


def test_objects_among_the_options_name_the_same_in_each_process() -> None:
    assert cache_key("x://y", None, {"session": _Token()}) == cache_key("x://y", None, {"session": _Token()})
    assert cache_key("x://y", None, {"session": _Token()}) != cache_key("x://y", None, {"session": object()})


def test_places_of_different_keys_share_nothing(server: HttpServer, file: Served, tmp_path: Path) -> None:
    with contextlib.closing(HttpSource(server.url("file.bin"), {}, QUICK)) as source:
        one, two = (
            make_directory(str(tmp_path), source, cache_key("s3://bucket/f", None, options), WriteWarning())
            for options in _PLACES[1:3]
        )
    assert one != two
    assert os.path.dirname(one) != os.path.dirname(two)  # a new version of one takes nothing of the other away


class _Endpoint(MemoryFileSystem):  # type: ignore[misc]
    """The endpoint is an option, as with S3."""

    protocol = "endpoint"
    store: ClassVar[dict[str, Any]] = {}

    def __init__(self, endpoint_url: str = "", secret: str = "", **options: Any) -> None:
        super().__init__(**options)
        self._url = endpoint_url

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "type": "file", "size": 70_000, "ETag": "same"}

    def cat_file(self, path: str, start: int, end: int, **_: Any) -> bytes:
        return (self._url.encode() * 70_000)[start:end]


def test_two_endpoints_share_no_entries_though_length_and_etag_agree(tmp_path: Path) -> None:
    fsspec.register_implementation("endpoint", _Endpoint, clobber=True)
    for endpoint in ("a", "b", "a"):
        options = {"endpoint_url": endpoint, "secret": "hush"}
        with FakeArea(RemoteFile("endpoint://f", storage_options=options, cache_dir=tmp_path, patience=QUICK)) as area:
            area.fill()
            assert area.content(0, 70_000) == endpoint.encode() * 70_000
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 2
    assert not any(b"hush" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["f.gz", "f.zst"])
def test_a_packed_file_of_no_bytes_is_empty(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match="it is empty: there is nothing to map"):
        RemoteFile(tmp_path / name, cache_dir=tmp_path / "cache")


def test_two_versions_that_are_opened_at_once(server: HttpServer, file: Served, tmp_path: Path) -> None:
    source = HttpSource(server.url("file.bin"), {}, QUICK)
    other = HttpSource(server.url("file.bin"), {}, QUICK, source.version._replace(tag='"other"'))
    failed: list[OSError] = []

    def open_often(which: HttpSource) -> None:
        try:
            for _ in range(200):
                DiskCache(str(tmp_path / "cache"), which, "key", WriteWarning()).close()
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=open_often, args=(which,)) for which in (source, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.close()
    other.close()
    assert not failed


def test_a_password_in_a_url_names_nothing() -> None:
    names = {cache_key(f"zip://a::https://user{secret}@host/f", None, {}) for secret in ("", ":one", ":two")}
    assert names == {"zip://a::https://user@host/f|None"}
