"""open_remote on real device memory and a real HTTP server: only touched parts are downloaded."""

from __future__ import annotations

import gc
import gzip
import io
import json
import os
import struct
import sys
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest

import prefault
from drivers.remote.conftest import QUICK
from prefault.drivers import RemoteFile, SafeTensors, SourceError, SourceMissingError, area_of, open_remote
from prefault.drivers.remote.array_formats import ArrayLayout, read_npy_layout
from prefault.sizes import MIB, PAGE_SIZE
from support.http_server import HttpServer

Content = Callable[[int], bytes]


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Collect garbage, so that servers end with the last array of their test, and not during a later test."""
    yield
    gc.collect()


def _open(server: HttpServer, name: str, **options: Any) -> numpy.ndarray[Any, Any]:
    return open_remote(server.url(name), patience=QUICK, **options)


def test_bytes(server: HttpServer, content: Content) -> None:
    expected = content(12 * MIB + 777)
    (server.directory / "f").write_bytes(expected)
    array = _open(server, "f")
    assert array.dtype == numpy.uint8
    assert array.shape == (len(expected),)
    assert not array.flags.writeable
    server.requests(clear=True)
    assert array[5 * MIB + 3] == expected[5 * MIB + 3]
    assert [(request.first, request.last + 1) for request in server.requests()] == [(5 * MIB, 6 * MIB)]
    assert array[5 * MIB : 6 * MIB].tobytes() == expected[5 * MIB : 6 * MIB]
    assert len(server.requests(clear=True)) == 1
    assert array.tobytes() == expected
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1


def test_requests_grow_when_it_is_read_from_front_to_back(server: HttpServer, content: Content) -> None:
    expected = content(24 * MIB)
    (server.directory / "f").write_bytes(expected)
    array = _open(server, "f")
    server.requests(clear=True)
    for at in range(0, len(expected), MIB):
        assert array[at] == expected[at]
    sizes = [request.sent for request in server.requests()]
    assert sum(sizes) == len(expected)
    assert sizes[0] == MIB
    assert max(sizes) == 8 * MIB
    assert len(sizes) < 10


def test_populate_is_parallel_and_in_few_requests(server: HttpServer, content: Content) -> None:
    expected = content(20 * MIB)
    (server.directory / "f").write_bytes(expected)
    array = _open(server, "f", batch=4 * MIB)
    server.requests(clear=True)
    server.set_latency(0.05)
    result = prefault.populate(array)
    assert result.bytes == len(expected)
    assert [request.sent for request in server.requests()] == [4 * MIB] * 5
    assert array.tobytes() == expected
    assert len(server.requests()) == 5


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">i8", "S3", [("a", "<i4"), ("b", "<f8", (2,))]])
def test_npy(server: HttpServer, order: Literal["C", "F"], dtype: Any) -> None:
    kind = numpy.dtype(dtype)
    raw = numpy.random.default_rng(1).integers(0, 128, 60 * 50 * kind.itemsize, numpy.uint8)
    expected = numpy.ndarray((60, 50), kind, raw.tobytes(), order=order)
    numpy.save(server.directory / "a.npy", expected)
    array = _open(server, "a.npy")
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    assert array.flags.f_contiguous == (order == "F")
    assert array.tobytes() == expected.tobytes()


def test_npy_downloads_only_touched_pages(server: HttpServer) -> None:
    expected = numpy.random.default_rng(1).random((16, MIB // 8))
    numpy.save(server.directory / "a.npy", expected)
    array = _open(server, "a.npy")
    assert array.shape == expected.shape
    numpy.testing.assert_array_equal(array[9], expected[9])
    assert server.sent() <= 5 * MIB  # the header's window, and the two that the row lies in, and growth


def _place(content: bytes) -> ArrayLayout:
    return read_npy_layout(lambda offset, length: content[offset : offset + length], len(content), "a.npy")


def _npy(array: numpy.ndarray[Any, Any], version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    numpy.lib.format.write_array(file, array, version=version)
    return file.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_of_all_versions_and_extents(version: tuple[int, int]) -> None:
    named = numpy.zeros(3, [("é" if version > (1, 0) else "e", "<i4")])
    for expected in (numpy.arange(10.0), numpy.array(3), numpy.zeros((0, 5)), numpy.zeros((2, 0)), named):
        content = _npy(expected, version)
        place = _place(content)
        assert place.stop == len(content)
        found: numpy.ndarray[Any, Any] = numpy.ndarray(place.shape, place.dtype, content, place.offset, order=place.order)
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        numpy.testing.assert_array_equal(found, expected)


def test_invalid_npy_is_refused(server: HttpServer) -> None:
    with pytest.raises(ValueError, match="Python objects"):
        _place(_npy(numpy.array([{}, None], object)))
    with pytest.raises(SourceError, match="8120 bytes and its header says 8128"):
        _place(_npy(numpy.arange(1000))[:-8])
    wrong = [b"x", b"nonsense" * 10, b"\x93NUMPY\x09\x00" + bytes(100), b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(100)]
    wrong += [b"\x93NUMPY" + version + b"\x10\x00\x00\x00" + text.ljust(100) for version in (b"\1\0", b"\2\0", b"\3\0")
              for text in (b"[]", b"{", b"{1: 2}", b"\xff\xff")]  # fmt: skip
    for text in wrong:
        with pytest.raises(ValueError, match=r".") as caught:
            _place(text)
        assert not isinstance(caught.value, OSError)
    (server.directory / "a.npy").write_bytes(wrong[1])
    device = RemoteFile(server.url("a.npy"), patience=QUICK)
    with pytest.raises(ValueError, match=r"a\.npy.*not a \.npy file"):
        open_remote(device)
    assert open_remote(device, format="raw").tobytes() == wrong[1]
    with pytest.raises(ValueError, match="dtype and shape"):
        open_remote(device, format="npy", dtype="f8")


def test_npy_of_no_elements(server: HttpServer) -> None:
    numpy.save(server.directory / "a.npy", numpy.zeros((0, 5)))
    array = _open(server, "a.npy")
    assert array.shape == (0, 5)
    assert not array.flags.writeable


def test_dtype_shape_order_and_offset(server: HttpServer, content: Content) -> None:
    expected = content(10_000)
    (server.directory / "f").write_bytes(expected)
    device = RemoteFile(server.url("f"), patience=QUICK)
    array = open_remote(device, dtype="<u2", shape=(30, 40), offset=5)
    numpy.testing.assert_array_equal(array, numpy.frombuffer(expected, "<u2", 1200, 5).reshape(30, 40))
    # From here on by the same server, as it is the same device.
    other = open_remote(device, dtype="<u2", shape=(30, 40), order="F")
    numpy.testing.assert_array_equal(other, numpy.frombuffer(expected, "<u2", 1200).reshape((30, 40), order="F"))
    assert open_remote(device, dtype="<f8", offset=1).shape == (9999 // 8,)
    with pytest.raises(ValueError, match="ends at byte 10001 of 10000"):
        open_remote(device, shape=10_000, offset=1)
    with pytest.raises(TypeError, match="Python objects"):
        open_remote(device, dtype=object)
    with pytest.raises(ValueError, match="format is"):
        open_remote(device, format="csv")  # type: ignore[arg-type]


def test_safetensors(server: HttpServer) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    generator = numpy.random.default_rng(1)
    tensors = {
        "big": generator.random((4 * MIB // 8, 2)),
        "half": generator.random((3, 5)).astype("f2"),
        "flags": numpy.array([True, False]),
        "scalar": numpy.array(7, "i4"),
        "later": generator.integers(0, 9, (1000, 100)),
    }
    safetensors.save_file(tensors, server.directory / "a.safetensors", {"made": "here"})
    found = SafeTensors(_open(server, "a.safetensors"))
    assert set(found) == set(tensors)
    assert found.metadata == {"made": "here"}
    assert ("big" in found, "bug" in found) == (True, False)
    with pytest.raises(KeyError, match="'bug' is none of the 5 tensors of the file; nearest: big"):
        found["bug"]
    server.requests(clear=True)
    for name in ("half", "flags", "scalar", "later"):
        assert found[name].dtype == tensors[name].dtype
        numpy.testing.assert_array_equal(found[name], tensors[name])
    assert server.sent() < 5 * MIB
    numpy.testing.assert_array_equal(found["big"], tensors["big"])
    assert area_of(found["big"]) is area_of(found["half"])
    assert found["big"].base is not None


def test_safetensors_of_kinds_that_numpy_lacks(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    header = json.dumps(
        {
            "a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
            "b": {"dtype": "NEW", "shape": [2], "data_offsets": [4, 8]},
            "c": {"dtype": "F64", "shape": [2], "data_offsets": [0, 8]},
        }
    ).encode()
    (server.directory / "a").write_bytes(struct.pack("<Q", len(header)) + header + b"12345678")
    found = SafeTensors(_open(server, "a"))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="needs ml_dtypes"):
        found["a"]
    with pytest.raises(ValueError, match="'NEW'"):
        found["b"]
    with pytest.raises(ValueError, match="does not have 8 bytes"):
        found["c"]
    assert found.raw("a").tobytes() == b"1234"


def test_safetensors_of_ml_dtypes(server: HttpServer) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kinds = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
    dtypes = {kind: numpy.dtype(getattr(ml_dtypes, name)) for kind, name in kinds.items()}
    header = {
        kind: {"dtype": kind, "shape": [8 // dtype.itemsize], "data_offsets": [0, 8]} for kind, dtype in dtypes.items()
    }
    text = json.dumps(header).encode()
    (server.directory / "a").write_bytes(struct.pack("<Q", len(text)) + text + b"12345678")
    found = SafeTensors(_open(server, "a"))
    assert {kind: array.dtype for kind, array in found.items()} == dtypes
    assert {array.tobytes() for array in found.values()} == {b"12345678"}


def test_invalid_safetensors_are_refused() -> None:
    entry = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    for header in (b"nonsense", b"[]", b"[1]", b'{"a": 1}', json.dumps({"a": entry | {"shape": [-2]}}).encode(),
                   json.dumps({"a": entry | {"data_offsets": [2, 0]}}).encode(), b"\xff\xfe"):  # fmt: skip
        content = numpy.frombuffer(struct.pack("<Q", len(header)) + header + b"xx", numpy.uint8)
        with pytest.raises(ValueError, match="not a safetensors file"):
            SafeTensors(content)
    for raw in (b"", b"1234567", struct.pack("<Q", 1 << 40) + b"{}"):
        with pytest.raises(ValueError, match="not a safetensors file"):
            SafeTensors(numpy.frombuffer(raw, numpy.uint8))
    header = json.dumps({"a": entry}).encode()
    with pytest.raises(SourceError, match="cut short"):
        SafeTensors(numpy.frombuffer(struct.pack("<Q", len(header)) + header + b"x", numpy.uint8))


def test_parquet_moves_its_columns(server: HttpServer) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    generator = numpy.random.default_rng(1)
    table = pyarrow.table({name: generator.random(MIB // 2) for name in "abcd"})
    parquet.write_table(table, server.directory / "t.parquet", use_dictionary=False, compression="none")
    size = (server.directory / "t.parquet").stat().st_size
    assert size > 16 * MIB
    array = _open(server, "t.parquet", fault_around=("256 KiB", "1 MiB"))
    server.requests(clear=True)
    file = parquet.ParquetFile(pyarrow.BufferReader(pyarrow.py_buffer(array)))
    assert file.metadata.num_rows == MIB // 2
    assert server.sent() <= MIB
    assert file.read(["c"]).equals(table.select(["c"]))
    assert server.sent() <= 7 * MIB  # a quarter of the file, and windows at its ends


def test_the_array_keeps_the_area(server: HttpServer, content: Content) -> None:
    expected = content(3 * MIB)
    (server.directory / "f").write_bytes(expected)
    part = _open(server, "f")[MIB + 5 : 2 * MIB].view("u1")[::2]
    gc.collect()
    area = area_of(part)
    assert part.tobytes() == expected[MIB + 5 : 2 * MIB : 2]
    assert area.stats().faults >= 1
    with pytest.raises(BufferError):
        area.close()
    with pytest.raises(TypeError, match="not one of open_remote"):
        area_of(numpy.zeros(3))


def test_record_and_replay(server: HttpServer, content: Content, tmp_path: Path) -> None:
    expected = content(16 * MIB)
    (server.directory / "f").write_bytes(expected)
    plan = tmp_path / "plan"
    around = (64 * 1024, 64 * 1024)
    touched = [11 * MIB + 5, 3 * MIB, 14 * MIB + 9]
    first = _open(server, "f", plan=plan, fault_around=around)
    assert not plan.exists()
    for at in touched:
        assert first[at] == expected[at]
    area_of(first).access_log().save(plan)
    server.requests(clear=True)
    second = _open(server, "f", plan=plan, fault_around=around)
    moved = server.sent()
    assert 0 < moved <= 3 * 64 * 1024 + 1
    faults = area_of(second).stats().faults
    for at in touched:
        assert second[at] == expected[at]
    assert server.sent() == moved
    assert area_of(second).stats().faults == faults
    plan.write_text("nonsense")
    with pytest.raises(ValueError, match="no access log"):
        _open(server, "f", plan=plan)


def test_failures_are_exceptions_of_populate(server: HttpServer, content: Content) -> None:
    path = server.directory / "f"
    expected = content(4 * MIB)
    path.write_bytes(expected)
    array = _open(server, "f")
    assert array[0] == expected[0]
    path.write_bytes(expected[::-1])
    with pytest.raises(prefault.PopulateError, match="changed while it was mapped"):
        prefault.populate(array)
    path.unlink()
    with pytest.raises(prefault.PopulateError, match="HTTP 404"):
        area_of(array).read(2 * MIB, 10)
    with pytest.raises(SourceMissingError):
        _open(server, "f")
    assert array[:PAGE_SIZE].tobytes() == expected[:PAGE_SIZE]  # what is there stays


def test_populate_at_once_and_a_device_of_ones_own(server: HttpServer, content: Content) -> None:
    expected = content(2 * MIB)
    (server.directory / "f").write_bytes(expected)
    array = open_remote(RemoteFile(server.url("f"), patience=QUICK), populate=True)
    moved = server.sent()
    assert array.tobytes() == expected
    assert server.sent() == moved == len(expected) + 1


def test_capacity_bounds_what_stays(server: HttpServer, content: Content) -> None:
    expected = content(12 * MIB)
    (server.directory / "f").write_bytes(expected)
    array = _open(server, "f", capacity=4 * MIB, fault_around=(MIB, MIB), batch=MIB)
    for _ in range(2):
        for at in range(0, len(expected), MIB):
            assert array[at : at + MIB].tobytes() == expected[at : at + MIB]
    frames = Path(f"/proc/self/fd/{area_of(array).fd}").stat()
    assert frames.st_blocks * 512 <= 4 * MIB
    with pytest.raises(prefault.PopulateError, match=r"capacity|full|room"):
        prefault.populate(array)


def test_deeply_nested_headers_are_refused() -> None:
    header = b"-" * 60_000 + b"1"
    npy = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header
    with pytest.raises(ValueError, match="cannot be read"):
        read_npy_layout(lambda offset, length: npy[offset : offset + length], len(npy), "it")
    header = b"[" * 200_000
    with pytest.raises(ValueError, match="cannot be read"):
        SafeTensors(numpy.frombuffer(struct.pack("<Q", len(header)) + header, numpy.uint8))


def test_a_dtype_without_bytes_is_refused(server: HttpServer) -> None:
    (server.directory / "f").write_bytes(b"content")
    with pytest.raises(ValueError, match="have no bytes"):
        _open(server, "f", dtype="S")


# --- names that are no UTF-8


@pytest.fixture
def latin_directory(tmp_path: Path) -> Path:
    """Return a directory whose name is not UTF-8."""
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9"))
    directory.mkdir()
    return directory


def test_a_name_that_is_not_utf8(latin_directory: Path, content: Content) -> None:
    expected = content(MIB)
    raw = os.fsencode(latin_directory) + b"/caf\xe9.dat"
    name = os.fsdecode(raw)
    Path(name).write_bytes(expected)
    url = f"file://{urllib.parse.quote(raw)}"
    assert "%E9" in url
    for source in (name, Path(name), url, f"file://{name}", f"local://{name}"):
        array = open_remote(source)
        prefault.populate(array)
        assert array.tobytes() == expected


def test_index_and_cache_dir_that_are_not_utf8(latin_directory: Path, content: Content) -> None:
    expected = content(MIB)
    path = latin_directory / os.fsdecode(b"\xff.gz")
    path.write_bytes(gzip.compress(expected))
    for option in ("index", "cache_dir"):
        options: dict[str, Any] = {option: latin_directory / option}
        array = open_remote(path, populate=True, **options)
        assert array.tobytes() == expected
    assert {entry.name for entry in latin_directory.iterdir()} == {path.name, "index", "cache_dir"}


def test_errors_name_a_file_whose_name_is_not_utf8(latin_directory: Path, content: Content) -> None:
    path = latin_directory / os.fsdecode(b"caf\xe9.dat")
    path.write_bytes(content(MIB))
    array = open_remote(path, cache_dir=latin_directory / "cache")
    path.write_bytes(content(PAGE_SIZE))
    with pytest.raises(prefault.PopulateError, match=r"/d\\udce9/caf\\udce9\.dat changed while it was mapped"):
        prefault.populate(array)
    path.unlink()
    with pytest.raises(SourceMissingError, match=r"/d\\udce9/caf\\udce9\.dat: there is no such file"):
        open_remote(path)
