"""RemoteFile on files, fsspec's file systems, archives and callables."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import fsspec  # type: ignore[import-untyped]
import pytest

from drivers.remote.conftest import QUICK
from prefault.drivers import RemoteFile, SourceChangedError, SourceError, SourceMissingError
from prefault.drivers.remote.file_sources import FsspecSource
from prefault.drivers.remote.source import Attempts, Patience, time_limit
from prefault.sizes import PAGE_SIZE
from support.fake_area import FakeArea
from support.http_server import HttpServer

Content = Callable[[int], bytes]
Served = tuple[Path, bytes]


def _remote(source: Any, **options: Any) -> RemoteFile:
    return RemoteFile(source, patience=QUICK, **options)


def _assert_holds(device: RemoteFile, expected: bytes) -> None:
    assert device.length == len(expected)
    with FakeArea(device) as area:
        for start, stop in ((len(expected) - 5000, len(expected)), (0, 10), (12_345, 60_000)):
            assert area.get(max(0, start), stop) == expected[max(0, start) : stop]
        area.fill()
        assert area.content(0, len(expected)) == expected


# --- files of this machine


def test_a_path_and_a_file_url(tmp_path: Path, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = content(100_001)
    (tmp_path / "f").write_bytes(expected)
    monkeypatch.chdir(tmp_path)
    for source in (tmp_path / "f", str(tmp_path / "f"), "f", f"file://{tmp_path}/f", f"local://{tmp_path}/f"):
        device = _remote(source)
        _assert_holds(device, expected)
        assert device.restartable
        assert device.recipe() is not None
    made = _remote("f").recipe()
    assert made is not None
    assert made.arguments["source"] == str(tmp_path / "f")  # a server has another working directory


@pytest.mark.parametrize("name", ["a b%20.bin", "100%.bin", "café.bin", "a::b?c#d.bin"])
def test_a_file_url_is_percent_decoded_and_a_path_is_not(tmp_path: Path, content: Content, name: str) -> None:
    expected = content(100_001)
    path = tmp_path / name
    path.write_bytes(expected)
    for source in (str(path), f"local://{path}", path.as_uri(), f"file://localhost{path.as_uri()[7:]}"):
        _assert_holds(_remote(source), expected)
    if "::" not in name:
        _zip(path, expected, zipfile.ZIP_STORED)
        _assert_holds(_remote(f"zip://dir/a.bin::{path.as_uri()}"), expected)
        _tar(path, expected)
        _assert_holds(_remote(f"tar://a.bin::{path.as_uri()}"), expected)


def test_a_file_url_of_another_machine_is_refused() -> None:
    for url in ("file://tmp/f", "file://f", "file://"):
        with pytest.raises(ValueError, match="three slashes"):
            _remote(url)


@pytest.mark.parametrize("how", ["written", "replaced", "cut", "removed"])
def test_a_local_file_that_changes(tmp_path: Path, content: Content, how: str) -> None:
    path = tmp_path / "f"
    expected = content(100_001)
    path.write_bytes(expected)
    device = _remote(path)
    with FakeArea(device) as area:
        assert area.get(0, 10) == expected[:10]
        if how == "written":
            path.write_bytes(expected[::-1])
        elif how == "replaced":
            (tmp_path / "g").write_bytes(expected[::-1])
            (tmp_path / "g").rename(path)
        elif how == "cut":
            os.truncate(path, 5000)
        else:
            path.unlink()
        kind = SourceMissingError if how == "removed" else SourceChangedError
        with pytest.raises(kind):
            area.fill(range(3, 5))


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError) as caught:
        _remote(tmp_path / "none")
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(SourceError, match="not a regular file"):
        _remote(tmp_path)


# --- fsspec


@pytest.fixture
def memory() -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    yield found
    found.store.clear()


def test_the_memory_file_system(memory: Any, content: Content) -> None:
    expected = content(200_001)
    memory.pipe("/dir/f", expected)
    device = _remote("memory://dir/f")
    _assert_holds(device, expected)
    assert device.recipe() is None  # it is in this process only: the server must be a fork
    with FakeArea(device) as area:
        memory.pipe("/dir/f", expected[::-1])
        with pytest.raises(SourceChangedError):
            area.fill()
    device = _remote("memory://dir/f")
    with FakeArea(device) as area:
        memory.rm("/dir/f")
        with pytest.raises(SourceMissingError):
            area.fill()
    with pytest.raises(SourceMissingError):
        _remote("memory://dir/f")
    memory.mkdir("/empty")
    with pytest.raises(SourceError, match="not a file"):
        _remote("memory://empty")


class _Flaky:
    """Replaces ``cat_file`` of a file system: it follows a script first, and works afterwards."""

    def __init__(self, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real = memory.cat_file
        self.script: list[Any] = []
        self.calls = 0
        monkeypatch.setattr(memory, "cat_file", self._cat)

    def _cat(self, path: str, start: int, end: int) -> bytes:
        self.calls += 1
        what = self.script.pop(0) if self.script else None
        if isinstance(what, Exception):
            raise what
        content: bytes = self._real(path, start=start, end=end)
        return content if what is None else what(content)


def test_errors_of_a_file_system_are_translated(memory: Any, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    class HttpError(Exception):
        def __init__(self, status: int) -> None:
            self.status = status

    expected = content(50_000)
    memory.pipe("/f", expected)
    flaky = _Flaky(memory, monkeypatch)
    with FakeArea(_remote("memory://f")) as area:
        flaky.script = [ConnectionResetError("gone"), TimeoutError(), HttpError(503)]
        assert area.get(0, 50_000) == expected
        for error in (PermissionError(13, "no"), HttpError(403), NotImplementedError("never"), ValueError("bad")):
            flaky.calls = 0
            flaky.script = [error]
            with pytest.raises(SourceError):
                area.fill()
            assert flaky.calls == 1
        flaky.script = [lambda content: content[:1000]]
        assert area.get(0, 50_000) == expected
        flaky.script = [lambda content: content + b"more"]
        with pytest.raises(SourceError, match="got 50004"):
            area.fill()
        flaky.script = [lambda _: b""] * 10
        with pytest.raises(SourceError, match="given up after 4 tries"):
            area.fill()


@pytest.mark.parametrize(
    "name", ["NoCredentialsError", "ProfileNotFound", "AuthenticationException", "DefaultCredentialsError"]
)
def test_missing_credentials_fail_at_once(memory: Any, content: Content, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Recognize the errors of the libraries of s3, gs and ssh by name: these libraries need not be installed."""
    memory.pipe("/f", content(5000))
    flaky = _Flaky(memory, monkeypatch)
    flaky.script = [type(name, (Exception,), {})("no keys found")] * 9
    with FakeArea(_remote("memory://f")) as area:
        with pytest.raises(SourceError, match=f"{name}: no keys found; .*storage_options") as caught:
            area.fill()
        assert caught.value.errno == errno.EACCES
        assert flaky.calls == 1


def test_a_directory_of_a_file_system_that_is_not_asynchronous(memory: Any, content: Content) -> None:
    """Read through ``dir``, which claims to be asynchronous."""
    expected = content(70_001)
    memory.pipe("/dir/f", expected)
    _assert_holds(_remote("dir://f::memory://dir"), expected)


def test_a_request_that_shows_no_progress_has_half_of_the_time_that_is_left() -> None:
    patience = Patience(timeout_s=1.0, total_s=20.0)
    assert 9 < Attempts(patience, "f").long_timeout_s <= 10
    with time_limit(1.5):
        assert 0.5 < Attempts(patience, "f").long_timeout_s <= 1.0
    with time_limit(0.0), pytest.raises(SourceError, match="took longer than 20 s"):
        _ = Attempts(patience, "f").long_timeout_s


def test_errors_of_a_file_system_are_redacted(memory: Any, content: Content, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/f", content(5000))
    flaky = _Flaky(memory, monkeypatch)
    said = "403, url='https://me:secret@host/f?X-Amz-Signature=secret'"
    with FakeArea(_remote("memory://f")) as area:
        for error in (ValueError(said), RuntimeError(said), PermissionError(13, said), ConnectionError(said)):
            flaky.script = [error] * 9
            with pytest.raises(SourceError, match=r"url='https://host/f\?\.\.\.'") as caught:
                area.fill()
            assert "secret" not in str(caught.value)


def test_a_file_system_that_is_asynchronous(server: HttpServer, content: Content) -> None:
    """Read by the http of fsspec, which http URLs do not use: it is built like s3 and gs."""
    expected = content(300_001)
    path = server.directory / "f"
    path.write_bytes(expected)
    url = server.url("f")
    source = FsspecSource(url, {"skip_instance_cache": True}, url, QUICK, None)
    assert source.read(1000, 5000) == expected[1000:6000]
    server.fail("status", status=503, skip=1, count=2)
    assert source.read(1000, 5000) == expected[1000:6000]
    server.fail("ignore", count=100)
    with pytest.raises(SourceError, match="ignores ranges"):
        source.read(1000, 5000)
    server.fail("stall", bytes=0, seconds=1.0, count=100)
    began = time.monotonic()
    with time_limit(1.0), pytest.raises(SourceError):
        source.read(1000, 5000)
    assert time.monotonic() - began < 10
    server.heal()
    path.write_bytes(expected[::-1])
    with pytest.raises(SourceChangedError):
        source.read(1000, 5000)
    path.unlink()
    with pytest.raises(SourceMissingError):
        source.read(1000, 5000)


@pytest.mark.parametrize(("url", "package"), [("s3://b/k", "s3fs"), ("gs://b/k", "gcsfs"), ("az://c/k", "adlfs")])
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs the package {package}.*pip install {package}"):
        _remote(url)


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ImportError, match=r"needs fsspec.*prefault\[remote\]"):
        _remote("memory://f")


def test_an_unknown_protocol() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        _remote("nosuch://host/f")


# --- archives


def _zip(path: Path, expected: bytes, compression: int) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("other.txt", b"x" * 10_000)
        archive.writestr("dir/a.bin", expected)


def _tar(path: Path, expected: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a.bin")
        info.size = len(expected)
        archive.addfile(info, io.BytesIO(expected))


def test_a_stored_member_is_read_in_ranges(server: HttpServer, content: Content) -> None:
    expected = content(400_001)
    path = server.directory / "a.zip"
    _zip(path, expected, zipfile.ZIP_STORED)
    device = _remote(f"zip://dir/a.bin::{server.url('a.zip')}")
    _assert_holds(device, expected)
    with FakeArea(device) as area:
        server.requests(clear=True)
        area.fill(range(5, 7))
        assert [request.sent for request in server.requests()] == [2 * PAGE_SIZE]
        _zip(path, expected[::-1], zipfile.ZIP_STORED)
        with pytest.raises(SourceChangedError):
            area.fill(range(5, 7))
    with pytest.raises(SourceMissingError, match="no member"):
        _remote(f"zip://dir/none::{server.url('a.zip')}")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_packed_member(server: HttpServer, compression: int) -> None:
    expected = bytes(range(256)) * 1000
    path = server.directory / "a.zip"
    _zip(path, expected, compression)
    device = _remote(f"zip://dir/a.bin::{server.url('a.zip')}")
    _assert_holds(device, expected)
    with FakeArea(device) as area:
        server.fail("status", status=404, count=100)
        with pytest.raises(SourceMissingError, match="404"):
            area.fill()


def test_an_archive_in_memory_and_one_of_tar(memory: Any, content: Content, tmp_path: Path) -> None:
    expected = content(100_001)
    _zip(tmp_path / "a.zip", expected, zipfile.ZIP_STORED)
    memory.pipe("/a.zip", (tmp_path / "a.zip").read_bytes())
    _assert_holds(_remote("zip://dir/a.bin::memory://a.zip"), expected)
    _assert_holds(_remote(f"zip://dir/a.bin::file://{tmp_path}/a.zip"), expected)
    _tar(tmp_path / "a.tar", expected)
    device = _remote(f"tar://a.bin::file://{tmp_path}/a.tar")
    _assert_holds(device, expected)


def test_broken_archives(server: HttpServer, content: Content) -> None:
    path = server.directory / "a.zip"
    path.write_bytes(content(5000))
    with pytest.raises(SourceError, match="not a zip file"):
        _remote(f"zip://a::{server.url('a.zip')}")
    _zip(path, content(5000), zipfile.ZIP_STORED)
    server.fail("status", status=403, count=100, skip=1)
    with pytest.raises(SourceError, match="403"):
        _remote(f"zip://dir/a.bin::{server.url('a.zip')}")


# --- callables


class _Shy(io.BytesIO):
    """File object whose reads are short."""

    def readinto(self, buffer: Any) -> int:
        with memoryview(buffer) as view:
            return super().readinto(view[:1000])


def test_a_callable(tmp_path: Path, content: Content) -> None:
    expected = content(100_001)
    path = tmp_path / "f"
    path.write_bytes(expected)
    device = _remote(partial(open, path, "rb"))
    _assert_holds(device, expected)
    assert device.recipe() is None
    assert not device.restartable
    _assert_holds(_remote(lambda: _Shy(expected)), expected)
    with FakeArea(device) as area:
        path.write_bytes(expected[::-1])
        with pytest.raises(SourceChangedError):
            area.fill()
    with pytest.raises(ValueError, match="cache_dir"):
        _remote(partial(open, path, "rb"), cache_dir=tmp_path)


def test_each_thread_has_its_own_file_object(content: Content) -> None:
    expected = content(1_000_001)
    opened: list[BinaryIO] = []

    def opener() -> BinaryIO:
        opened.append(_Shy(expected))
        return opened[-1]

    device = _remote(opener)
    with FakeArea(device) as area:
        pieces = [range(first, min(first + 32, len(area.pages))) for first in range(0, len(area.pages), 32)]
        threads = [threading.Thread(target=area.fill, args=(piece,)) for piece in pieces]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert area.content(0, len(expected)) == expected
    assert all(file.closed for file in opened)


@pytest.mark.parametrize("length", [0, 5000, 60_000])
def test_a_callable_whose_file_is_shorter_than_it_said(length: int) -> None:
    class Lying(io.BytesIO):
        def seek(self, offset: int, whence: int = 0) -> int:
            super().seek(offset, whence)
            return 100_000 if whence == os.SEEK_END else offset

    device = _remote(lambda: Lying(b"x" * length))
    with FakeArea(device) as area, pytest.raises(SourceError, match=f"ends at byte {length} of 100000"):
        area.fill()


def test_a_stream_that_broke_is_not_used_again(content: Content) -> None:
    expected = content(50_000)
    made: list[BinaryIO] = []

    class Breaking(io.BytesIO):
        broken = False

        def readinto(self, buffer: Any) -> int:
            if self is made[0]:
                self.broken = True
            if self.broken:
                raise ConnectionResetError(errno.ECONNRESET, "the peer is gone")
            return super().readinto(buffer)

    def opener() -> BinaryIO:
        made.append(Breaking(expected))
        return made[-1]

    with FakeArea(_remote(opener)) as area:
        made[:] = []
        area.device.stop()
        area.device.open(area)
        assert area.get(0, len(expected)) == expected
    assert all(stream.closed for stream in made)


def test_a_fifo_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="not a regular file"):
        _remote(tmp_path / "pipe")


def test_a_source_that_comes_back_after_it_could_not_be_opened(tmp_path: Path, content: Content) -> None:
    expected = content(50_000)
    path = tmp_path / "f"
    path.write_bytes(expected)
    device = _remote(path)
    path.rename(tmp_path / "away")
    first, second = FakeArea(device), FakeArea(device)
    with pytest.raises(SourceMissingError):
        device.open(first)  # as a new server asks for it, which goes on all the same
    (tmp_path / "away").rename(path)
    device.open(second)
    device.close(first)
    assert second.get(0, len(expected)) == expected
    device.stop()
    with first as area:
        assert area.get(0, len(expected)) == expected


def test_a_callable_that_raises() -> None:
    def opener() -> BinaryIO:
        raise FileNotFoundError(errno.ENOENT, "no")

    with pytest.raises(SourceMissingError):
        _remote(opener)


# --- what looks like something else


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_two_colons_in_a_path_are_part_of_it(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "a").write_bytes(b"another")
    (tmp_path / "a::b.bin").write_bytes(bytes(60_001))
    _assert_holds(_remote(f"{prefix}{tmp_path}/a::b.bin"), bytes(60_001))


def test_two_colons_in_a_query_do_not_reveal_it(server: HttpServer) -> None:
    (server.directory / "f").write_bytes(bytes(60_001))
    device = _remote(server.url("f") + "?signature=a::secret")
    _assert_holds(device, bytes(60_001))
    assert "secret" not in str(device)


@pytest.mark.parametrize("kind", ["simplecache", "filecache"])
def test_file_systems_that_keep_copies_of_any_version_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "f").write_bytes(b"content")
    with pytest.raises(ValueError, match="give cache_dir="):
        _remote(f"{kind}::file://{tmp_path}/f")


@pytest.mark.parametrize("name", ["modify", "modificationTime", "sha", "hex"])
def test_names_of_the_version_in_file_systems(memory: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    memory.pipe("/f", b"old" * 1000)
    said = {"type": "file", "size": 3000, name: "1"}
    monkeypatch.setattr(type(memory), "info", lambda *_: dict(said))
    with FakeArea(_remote("memory://f")) as area:
        memory.pipe("/f", b"new" * 1000)
        said[name] = "2"
        with pytest.raises(SourceChangedError):
            area.fill()


@pytest.mark.parametrize("lie", ["longer", "packed", "another"])
def test_a_member_of_which_an_archive_says_two_things(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "a.zip"
    _zip(path, bytes(500), zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    if lie == "longer":  # the unpacked size in the directory
        at = content.rindex(b"PK\1\2")
        content[at + 24 : at + 28] = (900).to_bytes(4, "little")
    elif lie == "packed":  # the method in the local header
        content[content.rindex(b"PK\3\4") + 8] = 8
    else:
        content[content.rindex(b"PK\3\4") + 30] ^= 1
    path.write_bytes(content)
    with pytest.raises(SourceError, match="do not agree"):
        _remote(f"zip://dir/a.bin::{path}")


def test_a_member_that_unpacks_to_more_than_it_says_does_not_take_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive, archive.open("a", "w") as member:
        for _ in range(160):
            member.write(bytes(1 << 20))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2")
    content[at + 24 : at + 28] = (5000).to_bytes(4, "little")
    path.write_bytes(content)
    device = _remote(f"zip://a::{path}")
    tracemalloc.start()
    try:
        with FakeArea(device) as area, contextlib.suppress(SourceError):
            area.fill()
        assert tracemalloc.get_traced_memory()[1] < 130 << 20  # 90 MiB were seen
    finally:
        tracemalloc.stop()
