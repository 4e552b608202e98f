"""Streams: the bytes are right, each is read once, memory stays constant, and nothing is evicted before it is used."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault import PageRange, RangeSet
from prefault.files.cached_pages import cached_ranges
from prefault.files.failures import FileError
from prefault.files.open_file import OpenFile
from support import file_beds, fuse_files, needs
from support.cgroups import Group
from support.children import Child
from support.file_beds import PAGE
from support.fuse_files import FuseFiles, content

MIB = 1 << 20


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., FuseFiles]]:
    needs.fuse()
    with ExitStack() as stack:
        yield lambda files, **options: stack.enter_context(fuse_files.mounted(tmp_path / "fuse", files, **options))


def _numbered(path: Path, size: int) -> Path:
    """Write a file of the words of :func:`content`, and evict it."""
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(content(start, min(MIB, size - start)))
    file_beds.evict(path)
    return path


def _cached(path: Path) -> RangeSet:
    with OpenFile(path) as file:
        return cached_ranges(file)


def _all(file: prefault.FileStream) -> bytes:
    return b"".join(bytes(view) for view in file)


@pytest.mark.parametrize("window", ["4 MiB", "48 MiB", "1 GiB"])
@pytest.mark.parametrize("method", [None, "populate", "readahead", "pread"])
def test_the_bytes_are_those_of_the_file_and_nothing_stays(tmp_path: Path, window: str, method: Any) -> None:
    size = 100 * MIB + 12345
    path = _numbered(tmp_path / "file", size)
    most = 0
    with prefault.stream(path, window, chunk="3 MiB", method=method) as file:
        at = 0
        for number, view in enumerate(file):
            assert view.readonly
            assert view == content(at, len(view))
            at += len(view)
            assert file.position == at
            if number % 8 == 0:
                most = max(most, _cached(path).length)
        assert at == size
    assert most <= prefault.parse_size(window)
    assert _cached(path) == RangeSet()
    assert file.evicted_bytes == size + -size % PAGE


@pytest.mark.parametrize("window", ["4 MiB", "64 MiB"])
@pytest.mark.parametrize("latency", [0, 0.002])
def test_every_byte_is_read_once(mount: Callable[..., FuseFiles], window: str, latency: float) -> None:
    bed = mount({"file": 40 * MIB + 100}, latency_s=latency)
    with prefault.stream(bed / "file", window) as file:
        for view in file:
            assert view == content(file.position - len(view), len(view))
    assert bed.read_twice() == []
    assert bed.read_bytes == 40 * MIB + PAGE
    assert _cached(bed / "file") == RangeSet()


def test_pages_that_were_cached_before_stay_and_are_not_read(mount: Callable[..., FuseFiles]) -> None:
    bed = mount({"file": 40 * MIB})
    pages = random.Random(3).sample(range(40 * MIB // PAGE), 200)
    file_beds.touch(bed / "file", *pages)
    before = _cached(bed / "file")
    bed.forget()
    with prefault.stream(bed / "file", "16 MiB") as file:
        assert _all(file) == content(0, 40 * MIB)
    assert bed.read_bytes == 40 * MIB - before.length
    assert _cached(bed / "file") == before


def test_as_a_file(tmp_path: Path) -> None:
    """The calls that readers of model files make: a header, then places of their own."""
    path = _numbered(tmp_path / "file", 30 * MIB)
    seeded = random.Random(4)
    with prefault.stream(path, "8 MiB") as file:
        assert file.read(10) == content(0, 10)
        assert file.tell() == file.position == 10
        for _ in range(20):
            offset, size = seeded.randrange(30 * MIB), seeded.randrange(3 * MIB)
            assert file.seek(offset) == offset
            buffer = bytearray(size)
            count = file.readinto(buffer)
            assert count == min(size, 30 * MIB - offset)
            assert buffer[:count] == content(offset, count)
        assert file.seek(-5, os.SEEK_END) == 30 * MIB - 5
        assert file.read() == content(30 * MIB - 5, 5)
        assert file.read(1) == b""
        assert file.seek(0) == 0
        assert file.seek(1 << 50) == 30 * MIB
        with pytest.raises(ValueError, match="byte -1"):
            file.seek(-1)
        file.seek(17)
        buffered = io.BufferedReader(file)
        assert buffered.read(100) == content(17, 100)
        buffered.detach()
        assert (file.readable(), file.seekable(), file.writable(), file.closed) == (True, True, False, False)
    assert file.closed
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    assert _cached(path) == RangeSet()


def test_a_part_of_a_file(mount: Callable[..., FuseFiles]) -> None:
    bed = mount({"file": 40 * MIB})
    start, stop = 3 * MIB + 17, 30 * MIB + 4097
    with prefault.stream(bed / "file", "64 MiB", start=start, stop=stop) as file:
        assert _all(file) == content(start, stop - start)
        asked = PageRange.outward(start, stop)
    assert bed.read_bytes == asked.length
    assert all(asked.start <= at and at + size <= asked.stop for at, size in bed.asked())


def test_empty_and_sparse_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with prefault.stream(empty) as file:
        assert list(file) == []
    with empty.open("r+b") as made:
        made.truncate(5 * MIB)
        os.pwrite(made.fileno(), b"x", 3 * MIB)
    with prefault.stream(empty) as file:
        assert _all(file) == empty.read_bytes()


def test_a_file_that_shrinks_is_told(tmp_path: Path) -> None:
    path = _numbered(tmp_path / "file", 30 * MIB)
    with prefault.stream(path, "4 MiB") as file:
        assert file.read(3 * MIB) == content(0, 3 * MIB)
        os.truncate(path, 9 * MIB)
        with pytest.raises(FileError, match=r"shrank to 9\.0 MiB") as caught:
            _all(file)
    assert caught.value.errno == errno.ENODATA
    assert str(path) in str(caught.value)


def test_an_error_of_the_server_names_the_file(mount: Callable[..., FuseFiles]) -> None:
    bed = mount({"file": 20 * MIB})
    bed.fail(9 * MIB, 10 * MIB)
    with prefault.stream(bed / "file", "8 MiB", chunk="1 MiB") as file, pytest.raises(OSError, match="file") as caught:
        _all(file)
    assert caught.value.errno == errno.EIO
    assert 8 * MIB <= file.position <= 9 * MIB


def test_ctrl_c_while_the_server_hangs(mount: Callable[..., FuseFiles]) -> None:
    bed = mount({"file": 20 * MIB})
    bed.hang(9 * MIB, 20 * MIB)

    def interrupt() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(1.0, interrupt)
    timer.start()
    try:
        with prefault.stream(bed / "file", "8 MiB") as file, pytest.raises(KeyboardInterrupt):
            _all(file)
        assert file.closed
    finally:
        timer.join()
        bed.hang(0, 0)


def _stream_in_group(path: Path, seed: int) -> tuple[int, int]:
    seeded = random.Random(seed)
    read = most = 0
    window = seeded.choice(["8 MiB", "40 MiB", "2 GiB"])
    with prefault.stream(path, window, chunk=seeded.randrange(1, 9 * MIB)) as file:
        for view in file:
            at = file.position - len(view)
            assert view[:100] == content(at, min(100, len(view)))
            read += len(view)
            if seeded.random() < 0.1:
                most = max(most, _cached(path).length)
    return read, most


@pytest.mark.parametrize("seed", range(3))
def test_four_times_the_limit_of_a_memory_cgroup(
    tmp_path: Path, make_group: Callable[..., Group], mount: Callable[..., FuseFiles], seed: int
) -> None:
    group = make_group(64 * MIB)
    bed = mount({"file": 256 * MIB})
    with Child(group.inside(partial(_stream_in_group, bed / "file", seed))) as child:
        read, most = child.result()
    assert group.killed == 0
    assert read == 256 * MIB
    assert most < 64 * MIB
    # Nothing was evicted before it was used, but for a page here and there that the kernel takes without any limit, too.
    assert 256 * MIB <= bed.read_bytes <= 256 * MIB + 64 * PAGE
    assert sum(stop - start for start, stop in bed.read_twice()) <= 64 * PAGE


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_two_hundred_runs_in_a_memory_cgroup(tmp_path: Path, make_group: Callable[..., Group]) -> None:
    path = _numbered(tmp_path / "file", 256 * MIB)
    for seed in range(200):
        group = make_group(64 * MIB)
        with Child(group.inside(partial(_stream_in_group, path, seed))) as child:
            read, most = child.result(60)
        assert (read, group.killed) == (256 * MIB, 0)
        assert most < 64 * MIB


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"window": "x"}, "not a size"),
        ({"chunk": 0}, "at least 1 byte"),
        ({"start": 11}, "behind its end"),
        ({"budget": -1}, "negative"),
        ({"budget": 0}, r"takes 4\.0 MiB of page cache at least, and budget= is 0 bytes: raise it"),
        ({"window": "1 MiB"}, r"window= is 1\.0 MiB: raise it"),
        ({"threads": 0}, "threads is a number from 1 to 1024, not 0"),
        ({"method": "foo"}, "method is one of populate, readahead, pread, not 'foo'"),
        ({"rate": 0}, "rate of 0"),
    ],
)
def test_wrong_arguments(tmp_path: Path, no_leaks: None, arguments: dict[str, Any], word: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    with pytest.raises(ValueError, match=word):
        prefault.stream(path, **arguments)
    with pytest.raises(FileError, match="is a directory"):
        prefault.stream(tmp_path)


def test_a_budget_and_a_rate(tmp_path: Path) -> None:
    path = _numbered(tmp_path / "file", 20 * MIB)
    with prefault.stream(path, budget="6 MiB", chunk="1 MiB", rate="200 MiB/s") as file:
        read = 0
        for view in file:
            assert view == content(file.position - len(view), len(view))
            assert _cached(path).length <= 6 * MIB
            read += len(view)
    assert read == 20 * MIB


def test_nothing_is_left_behind(tmp_path: Path, no_leaks: None) -> None:
    path = _numbered(tmp_path / "file", 20 * MIB)
    for _ in range(3):
        with prefault.stream(path, "8 MiB") as file:
            file.read(5 * MIB)
            file.seek(15 * MIB)
            file.read(MIB)
    assert _cached(path) == RangeSet()


def test_a_wrong_seek_is_refused(tmp_path: Path) -> None:
    path = file_beds.make(tmp_path / "file", PAGE)
    with prefault.stream(path) as stream, pytest.raises(ValueError, match="whence"):
        stream.seek(0, 9)
    with pytest.raises(ValueError, match="closed"):
        stream.seek(0)
