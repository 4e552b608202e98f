"""The cache on a disk: it survives, it is checked, and it never returns other bytes than the source."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import fsspec  # type: ignore[import-untyped]
import pytest
from fsspec.implementations.memory import MemoryFileSystem  # type: ignore[import-untyped]

from drivers.remote.conftest import QUICK
from prefault.drivers import RemoteFile, SourceChangedError, SourceError
from prefault.drivers.remote import disk_cache
from prefault.drivers.remote.disk_cache import BLOCK, DiskCache, WriteWarning, cache_key, make_directory
from prefault.drivers.remote.http_source import HttpSource
from prefault.sizes import KIB, PAGE_SIZE
from support import needs
from support.children import Child
from support.fake_area import FakeArea
from support.http_server import HttpServer
from support.interrupts import strike_at

Content = Callable[[int], bytes]
Served = tuple[Path, bytes]

PAGES = BLOCK // PAGE_SIZE


def _remote(server: HttpServer, cache: Path, name: str = "file.bin") -> RemoteFile:
    return RemoteFile(server.url(name), cache_dir=cache, patience=QUICK)


def _files(cache: Path) -> dict[str, Path]:
    found = [path for path in cache.rglob("*") if path.is_file()]
    assert len({path.parent for path in found}) == 1, found
    return {path.name: path for path in found}


def test_cached_blocks_are_not_requested_again(server: HttpServer, file: Served, tmp_path: Path) -> None:
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


def test_the_data_file_is_sparse(server: HttpServer, file: Served, tmp_path: Path) -> None:
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
    """Kill writers at random moments, many times; every block that is left is right."""
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


def test_ctrl_c_at_any_line_leaves_no_unfinished_file(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(b"old")
    for count in itertools.count(1):
        before = sys.gettrace()
        sys.settrace(strike_at(count, [str(disk_cache.__file__)], spared=["os.unlink(unfinished)", "with open("]))
        try:
            disk_cache.write_whole(str(path), b"new")
            break
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert os.listdir(tmp_path) == ["index"]
        assert path.read_bytes() in (b"old", b"new")
    assert count > 4, "the trace saw the module"


def test_two_processes_share_a_cache(server: HttpServer, file: Served, tmp_path: Path) -> None:
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


def test_versions_that_cannot_be_told_apart_are_not_kept(server: HttpServer, file: Served, tmp_path: Path) -> None:
    server.fail("plain", count=100)
    with pytest.raises(SourceError, match="neither an ETag nor a time of change"):
        _remote(server, tmp_path)
    assert _remote_without(server).length == len(file[1])


def _remote_without(server: HttpServer) -> RemoteFile:
    return RemoteFile(server.url("file.bin"), patience=QUICK)


def _filled(server: HttpServer, cache: Path) -> Path:
    """Cache the whole file; return the path of the data."""
    with FakeArea(_remote(server, cache)) as area:
        area.fill()
    return _files(cache)["data"]


def test_a_cache_that_others_can_write_to_is_refused(server: HttpServer, file: Served, tmp_path: Path) -> None:
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


def test_a_cache_of_another_user_is_refused(server: HttpServer, file: Served, tmp_path: Path) -> None:
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


def test_each_compression_has_its_own_cache(tmp_path: Path, content: Content) -> None:
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
    """Return an option's value with other secrets."""
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


def test_different_keys_have_different_directories(server: HttpServer, file: Served, tmp_path: Path) -> None:
    with contextlib.closing(HttpSource(server.url("file.bin"), {}, QUICK)) as source:
        one, two = (
            make_directory(str(tmp_path), source, cache_key("s3://bucket/f", None, options), WriteWarning())
            for options in _PLACES[1:3]
        )
    assert one != two
    assert os.path.dirname(one) != os.path.dirname(two)  # a new version of one takes nothing of the other away


class _Endpoint(MemoryFileSystem):  # type: ignore[misc]
    """File system whose endpoint is an option, as with S3."""

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


def test_two_versions_can_be_opened_at_once(server: HttpServer, file: Served, tmp_path: Path) -> None:
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
