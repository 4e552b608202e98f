"""Compressed sources with random access: the files are written by other libraries."""

from __future__ import annotations

import bz2
import gzip
import io
import random
import struct
import sys
import threading
import zlib
from pathlib import Path

import pytest
import pyzstd

from drivers.remote.conftest import QUICK
from prefault.drivers import RemoteFile, SourceChangedError, SourceError, SourceMissingError
from prefault.sizes import KIB, MIB, PAGE_SIZE
from support.fake_area import FakeArea
from support.http_server import HttpServer


def _text(length: int) -> bytes:
    """Return content that can be compressed to about a half."""
    generator = random.Random(length)
    return bytes(generator.choices(range(20), k=length // 4)) * 4 + b"e" * (length % 4)


def _write_zstd(path: Path, content: bytes, frame: int) -> None:
    options = {int(pyzstd.CParameter.checksumFlag): 1}
    with pyzstd.SeekableZstdFile(path, "w", level_or_option=options, max_frame_content_size=frame) as file:
        file.write(content)


@pytest.mark.parametrize("frame", [10_000, 256 * KIB, 100 * MIB])
def test_seekable_zstd(server: HttpServer, frame: int) -> None:
    expected = _text(1_000_003)
    path = server.directory / "a.zst"
    _write_zstd(path, expected, frame)
    device = RemoteFile(server.url("a.zst"), patience=QUICK)
    assert device.length == len(expected)
    generator = random.Random(frame)
    with FakeArea(device) as area:
        for _ in range(20):
            start, stop = sorted(generator.sample(range(len(expected) + 1), 2))
            assert area.get(start, stop) == expected[start:stop]
        area.fill()
        assert area.content(0, len(expected)) == expected
    made = device.recipe()
    assert made is not None
    assert made.arguments["version"] == list(device.version)


def test_only_the_frames_that_are_touched_come_in_one_request(server: HttpServer) -> None:
    expected = random.Random(1).randbytes(1_000_000)  # cannot be compressed: packed and unpacked are about as long
    _write_zstd(server.directory / "a.zst", expected, 50_000)
    with FakeArea(RemoteFile(server.url("a.zst"), patience=QUICK)) as area:
        server.requests(clear=True)
        start = 120_000 // PAGE_SIZE
        area.fill(range(start, start + 21))  # in three frames
        requests = server.requests(clear=True)
        assert len(requests) == 1
        assert 140_000 < requests[0].sent < 160_000
        area.fill(range(start, start + 1))
        area.fill(range(start + 20, start + 21))
        assert server.requests() == []  # the frames at the ends are kept


def test_threads_on_zstd(server: HttpServer) -> None:
    expected = _text(2_000_000)
    _write_zstd(server.directory / "a.zst", expected, 30_000)
    with FakeArea(RemoteFile(server.url("a.zst"), patience=QUICK)) as area:
        _fill_by_threads(area)
        assert area.content(0, len(expected)) == expected


def _fill_by_threads(area: FakeArea) -> None:
    pieces = [range(first, min(first + 40, len(area.pages))) for first in range(0, len(area.pages), 40)]
    random.Random(1).shuffle(pieces)
    threads = [threading.Thread(target=area.fill, args=(piece,)) for piece in pieces]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_zstd_that_changes_or_goes(server: HttpServer) -> None:
    path = server.directory / "a.zst"
    _write_zstd(path, _text(500_000), 20_000)
    device = RemoteFile(server.url("a.zst"), patience=QUICK)
    with FakeArea(device) as area:
        area.fill(range(2))
        _write_zstd(path, _text(500_001), 20_000)
        with pytest.raises(SourceChangedError):
            area.fill(range(50, 60))
        path.unlink()
        with pytest.raises(SourceMissingError):
            area.fill(range(50, 60))
    _write_zstd(path, _text(500_002), 20_000)
    with pytest.raises(SourceChangedError):
        device.open(FakeArea(device))


def test_zstd_without_a_table_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    path.write_bytes(pyzstd.compress(_text(100_000)))
    with pytest.raises(SourceError, match=r"without a seek table.*seekable format"):
        RemoteFile(path)
    device = RemoteFile(path, compression=None)
    assert device.length == path.stat().st_size


def _cut_footer(packed: bytes) -> bytes:
    return packed[:-9] + struct.pack("<IBI", 1 << 31, 0, 0x8F92EAB1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut_footer, "makes no sense"),
        (lambda packed: packed[:-9] + struct.pack("<IBI", 1, 0, 0x8F92EAB1), "no header"),
        (lambda packed: b"more" + packed, "its frames have"),
        (lambda packed: packed[:5000] + b"spoilt" + packed[5006:], "unpack"),
        (lambda packed: packed[:-13] + b"\1" + packed[-12:], "unpack"),  # the last frame's unpacked size
    ],
)
def test_broken_zstd(tmp_path: Path, spoil: object, message: str) -> None:
    path = tmp_path / "a.zst"
    _write_zstd(path, random.Random(1).randbytes(100_000), 30_000)
    assert callable(spoil)
    path.write_bytes(spoil(path.read_bytes()))

    def read() -> None:
        with FakeArea(RemoteFile(path)) as area:
            area.fill()

    with pytest.raises(SourceError, match=message):
        read()


def test_random_damage_never_gives_wrong_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    expected = _text(60_000)
    _write_zstd(path, expected, 9000)
    packed = path.read_bytes()
    generator = random.Random(5)
    for _ in range(100):
        spoilt = bytearray(packed)
        spoilt[generator.randrange(len(packed))] ^= 1 << generator.randrange(8)
        path.write_bytes(spoilt)
        try:
            device = RemoteFile(path)
            with FakeArea(device) as area:
                area.fill()
                # A bit that has no meaning, in the table, or in a frame's header.
                assert area.content(0, device.length) == expected
        except SourceError:
            pass


# --- gzip


@pytest.mark.parametrize("members", [1, 3])
def test_gzip_through_an_index_that_is_built_once(server: HttpServer, tmp_path: Path, members: int) -> None:
    expected = random.Random(1).randbytes(100_000) + _text(9 * MIB)
    piece = -(-len(expected) // members)
    path = server.directory / "a.gz"
    path.write_bytes(b"".join(gzip.compress(expected[at : at + piece], 1) for at in range(0, len(expected), piece)))
    index = tmp_path / "a.index"
    device = RemoteFile(server.url("a.gz"), index=index, patience=QUICK)
    assert device.length == len(expected)
    assert server.sent() >= path.stat().st_size  # read once, to build it
    server.requests(clear=True)
    again = RemoteFile(server.url("a.gz"), index=index, patience=QUICK)
    assert again.version == device.version
    assert server.sent() == 1
    with FakeArea(again) as area:
        generator = random.Random(members)
        for _ in range(10):
            start = generator.randrange(len(expected))
            stop = min(len(expected), start + 30_000)
            assert area.get(start, stop) == expected[start:stop]
        _fill_by_threads(area)
        assert area.content(0, len(expected)) == expected
        server.fail("status", status=410, count=100)
        with pytest.raises(SourceMissingError, match="410"):
            area.fill()


def test_random_access_to_gzip_does_not_read_it_all(server: HttpServer, tmp_path: Path) -> None:
    expected = random.Random(1).randbytes(20 * MIB)
    path = server.directory / "a.gz"
    path.write_bytes(gzip.compress(expected, 1))
    device = RemoteFile(server.url("a.gz"), cache_dir=tmp_path / "cache", patience=QUICK)
    server.requests(clear=True)
    with FakeArea(device) as area:
        at = 17 * MIB
        assert area.get(at, at + 5000) == expected[at : at + 5000]
        assert server.sent() < 6 * MIB  # at most the 4 MiB between two places to start from, and what is read ahead


def test_an_index_of_another_version_is_built_anew(tmp_path: Path) -> None:
    path, index = tmp_path / "a.gz", tmp_path / "index"
    built = set()
    for seed in (1, 2):
        expected = random.Random(seed).randbytes(50_000)
        path.write_bytes(gzip.compress(expected))
        RemoteFile(path, index=index)
        built.add(index.read_bytes())
        assert len(built) == seed
        with FakeArea(RemoteFile(path, index=index)) as area:
            area.fill()
            assert area.content(0, len(expected)) == expected
    for spoilt in (b"", b"nonsense", index.read_bytes()[:-10], index.read_bytes()[:30]):
        index.write_bytes(spoilt)
        with FakeArea(RemoteFile(path, index=index)) as area:
            area.fill()
            assert area.content(0, len(expected)) == expected
    index.write_bytes(b"GZIDX and so on")
    with pytest.raises(SourceError, match="is an index of indexed_gzip"):
        RemoteFile(path, index=index)
    assert not [name for name in tmp_path.iterdir() if name.name.startswith(".prefault")]


def test_a_cache_keeps_the_index_of_one_version(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.gz", tmp_path / "cache"
    kept = set()
    for seed in (1, 2, 3):
        path.write_bytes(gzip.compress(random.Random(seed).randbytes(50_000)))
        RemoteFile(path, cache_dir=cache)
        (index,) = cache.rglob("gzip.index")
        kept.add(index.read_bytes())
    assert len(kept) == 3


def test_an_index_lies_where_it_was_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.gz"
    expected = _text(50_000)
    path.write_bytes(gzip.compress(expected))
    with pytest.raises(SourceMissingError, match="no directory to keep the index in"):
        RemoteFile(path, index=tmp_path / "missing" / "index")
    with pytest.raises(SourceError, match="a directory is in the place of a file"):
        RemoteFile(path, index=tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "index")
    RemoteFile(path, index=tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "index").stat().st_size
    with FakeArea(RemoteFile(path, index="/proc/index")) as area:  # where no file can be made
        area.fill()
        assert area.content(0, len(expected)) == expected
    (said,) = caplog.messages
    assert said.startswith("/proc/index: nothing more is kept there")


def test_gzip_errors_tell_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"x" * 10_000))
    with pytest.raises(SourceError, match="no random access without an index: give index="):
        RemoteFile(path)
    assert RemoteFile(path, compression=None).length == path.stat().st_size
    packed = path.read_bytes()
    path.write_bytes(packed[:-12])
    with pytest.raises(SourceError, match=r"cannot be unpacked.*cut short"):
        RemoteFile(path, index=tmp_path / "index")
    path.write_bytes(packed[:-6] + b"spoilt")
    with pytest.raises(SourceError, match="cannot be unpacked"):
        RemoteFile(path, index=tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_compressions_without_random_access_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bz2"
    path.write_bytes(bz2.compress(b"x" * 10_000))
    with pytest.raises(ValueError, match=r"\.bz2 files have no random access"):
        RemoteFile(path)
    with pytest.raises(ValueError, match="compression is"):
        RemoteFile(path, compression="bz2")  # type: ignore[arg-type]


@pytest.mark.parametrize(("suffix", "module", "extra"), [("gz", "indexed_gzip", "gzip"), ("zst", "backports", "zstd")])
def test_missing_libraries_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str, extra: str
) -> None:
    if suffix == "zst" and sys.version_info >= (3, 14):
        pytest.skip("zstd belongs to Python itself since 3.14")
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"x" * 1000)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"not installed: pip install 'prefault\[{extra}\]'"):
        RemoteFile(path, index=tmp_path / "index")


def _words(seed: int) -> bytes:
    generator = random.Random(seed)
    words = [bytes(generator.choices(range(97, 117), k=6)) for _ in range(2000)]
    return b"".join(generator.choices(words, k=900_000))


def test_an_index_that_a_disk_damaged_gives_no_wrong_bytes(tmp_path: Path) -> None:
    path, index = tmp_path / "a.gz", tmp_path / "index"
    expected = _words(1)
    path.write_bytes(gzip.compress(expected))
    RemoteFile(path, index=index)
    built = index.read_bytes()
    # Behind the points come their windows, of 32 KiB each; the last is that of the end.
    for back in range(32 * KIB + 100, 64 * KIB, 4 * KIB):
        index.write_bytes(built[:-back] + bytes((built[-back] ^ 1,)) + built[1 - back :])
        with FakeArea(RemoteFile(path, index=index)) as area:
            for start in range(4 * MIB, len(expected) - 64 * KIB, 64 * KIB):
                assert area.get(start, start + PAGE_SIZE) == expected[start : start + PAGE_SIZE]
        assert index.read_bytes() == built


def test_an_index_is_not_that_of_another_content_which_cannot_be_told_apart(tmp_path: Path) -> None:
    first = _words(1)
    second = first.translate(bytes(byte + (97 <= byte < 120) for byte in range(256)))
    packed = []
    for content in (first, second):
        packer = zlib.compressobj(6, zlib.DEFLATED, 31, 8, zlib.Z_FIXED)  # the same matches, in the same places
        packed.append(packer.compress(content) + packer.flush())
    assert len(packed[0]) == len(packed[1])
    RemoteFile(lambda: io.BytesIO(packed[0]), compression="gzip", index=tmp_path / "index")
    device = RemoteFile(lambda: io.BytesIO(packed[1]), compression="gzip", index=tmp_path / "index")
    for start in range(4 * MIB, len(second) - 64 * KIB, 64 * KIB):
        with FakeArea(device) as area:
            assert area.get(start, start + PAGE_SIZE) == second[start : start + PAGE_SIZE]


def test_a_frame_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    table = struct.pack("<II", 4, (1 << 30) + 1) + struct.pack("<IBI", 1, 0, 0x8F92EAB1)
    (tmp_path / "a.zst").write_bytes(bytes(4) + struct.pack("<II", 0x184D2A5E, len(table)) + table)
    with pytest.raises(SourceError, match="smaller frames"):
        RemoteFile(tmp_path / "a.zst")
