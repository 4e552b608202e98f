"""Models of several safetensors files: one mapping of tensors, from a real HTTP server and from a directory."""

from __future__ import annotations

import gc
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from drivers.remote.conftest import QUICK
from prefault.drivers import SafeTensors, ShardedSafeTensors, SourceError, SourceMissingError, area_of, open_remote
from prefault.drivers.remote.locations import sibling
from prefault.sizes import MIB
from support import processes
from support.http_server import HttpServer

_INDEX = "model.safetensors.index.json"
Tensors = dict[str, numpy.ndarray[Any, Any]]


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """Collect garbage, so that servers end with the last array of their test, and not during a later test."""
    yield
    gc.collect()


def _shard(tensors: Tensors) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": tensor.shape, "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensor.tobytes() for tensor in tensors.values())


def _write_model(directory: Path, shards: int = 4, rows: int = 50) -> Tensors:
    """Write a model with three tensors in each shard, and its index; return the tensors."""
    generator = numpy.random.default_rng(1)
    tensors: Tensors = {}
    shard_of: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        inside = {f"layer.{number}.{part}": generator.random((rows, 40 + number), "f4") for part in "abc"}
        (directory / name).write_bytes(_shard(inside))
        tensors |= inside
        shard_of |= dict.fromkeys(inside, name)
    _write_index(directory, shard_of, sum(tensor.nbytes for tensor in tensors.values()))
    return tensors


def _write_index(directory: Path, shard_of: Any, total: Any = None) -> None:
    metadata = {} if total is None else {"total_size": total}
    (directory / _INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": shard_of}))


def _open(server: HttpServer, **options: Any) -> ShardedSafeTensors:
    model = open_remote(server.url(_INDEX), patience=QUICK, **options)
    assert isinstance(model, ShardedSafeTensors)
    return model


def _check(model: Any, tensors: Tensors) -> None:
    assert set(model) == set(tensors)
    for name, expected in tensors.items():
        numpy.testing.assert_array_equal(model[name], expected)


def _assert_nothing_is_open() -> None:
    """Check that no device is mapped and no process left, without the help of garbage collection."""
    assert "prefault-frames" not in Path("/proc/self/maps").read_text()
    until = time.monotonic() + 10
    while left := [pid for pid in processes.descendants(os.getpid()) if processes.name(pid).startswith("prefault")]:
        assert time.monotonic() < until, left
        time.sleep(0.02)


def test_all_shards_are_one_mapping_of_tensors(server: HttpServer) -> None:
    tensors = _write_model(server.directory)
    model = _open(server)
    assert isinstance(model, SafeTensors)
    assert len(model) == len(tensors) == 12
    assert len(model.shards) == 4
    assert model.metadata["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    _check(model, tensors)
    assert model.raw("layer.3.c").tobytes() == tensors["layer.3.c"].tobytes()
    assert "12 tensors in 4 shards" in repr(model)
    with pytest.raises(KeyError, match=r"none of the 12 tensors of the model; nearest: layer\.3\.c"):
        model["layer.3.d"]


@pytest.mark.parametrize("kind", ["path", "pathlike", "file url", "relative", "zip"])
def test_a_local_model_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    directory = tmp_path / "a model#1"
    directory.mkdir()
    tensors = _write_model(directory, 2)
    path = directory / _INDEX
    source: Any = {"path": str(path), "pathlike": path, "file url": path.as_uri(), "relative": _INDEX}.get(kind)
    if kind == "relative":
        monkeypatch.chdir(directory)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
            for file in directory.iterdir():
                archive.write(file, f"m/{file.name}")
        source = f"zip://m/{_INDEX}::{tmp_path / 'm.zip'}"
    _check(open_remote(source), tensors)


def test_shards_are_found_beside_the_index() -> None:
    shard = "sub/a b%2e.safetensors"
    for index, expected in {
        "https://user:key@host:8/m/i.json?token=1#x": "https://user:key@host:8/m/sub/a%20b%252e.safetensors?token=1",
        "http://host/i.json": "http://host/sub/a%20b%252e.safetensors",
        "file:///a%20d/i.json": "file:///a%20d/sub/a%20b%252e.safetensors",
        "/a%20d/i.json": "/a%20d/sub/a b%2e.safetensors",
        "i.json": "sub/a b%2e.safetensors",
        "s3://bucket/m/i.json": "s3://bucket/m/sub/a b%2e.safetensors",
        "zip://i.json::https://host/a.zip": "zip://sub/a b%2e.safetensors::https://host/a.zip",
    }.items():
        assert sibling(index, shard) == expected


def test_the_shards_are_opened_at_the_same_time(server: HttpServer) -> None:
    """A server that answers each request after 0.3 s has requests for several shards in its log before it answers one."""
    tensors = _write_model(server.directory, 8)
    server.requests(clear=True)
    server.set_latency(0.3)
    model = _open(server)
    server.set_latency(0)
    log = server.requests()
    assert log[0].path == log[1].path == f"/{_INDEX}"  # its version, and its content
    assert len({request.path for request in log[2:10]}) == 8  # one by one, the second would be of the first shard again
    _check(model, tensors)


def test_only_the_shards_that_are_touched_are_downloaded(server: HttpServer) -> None:
    tensors = _write_model(server.directory, 4, rows=20_000)
    model = _open(server)
    server.requests(clear=True)
    numpy.testing.assert_array_equal(model["layer.2.b"], tensors["layer.2.b"])
    assert {request.path for request in server.requests()} == {"/model-00003-of-00004.safetensors"}


def test_the_whole_model_is_populated(server: HttpServer) -> None:
    tensors = _write_model(server.directory, 3)
    model = _open(server, populate=True)
    server.requests(clear=True)
    _check(model, tensors)
    assert server.requests() == []
    assert all(prefault.residency(content).present_bytes >= content.nbytes for content in model.shards.values())


def test_the_shards_of_a_model_share_a_server_and_a_capacity(server: HttpServer) -> None:
    tensors = _write_model(server.directory, 4, rows=5000)
    model = _open(server, capacity=MIB, fault_around=("64 KiB", "64 KiB"))
    assert len([pid for pid in processes.descendants(os.getpid()) if processes.name(pid) == "prefault-server"]) == 1
    _check(model, tensors)
    (area, *others) = map(area_of, model.shards.values())
    assert {other.fd for other in others} == {area.fd}
    assert os.stat(f"/proc/self/fd/{area.fd}").st_blocks * 512 <= MIB < sum(map(len, model.shards.values()))


def test_tensors_keep_their_shard_mapped(server: HttpServer) -> None:
    tensors = _write_model(server.directory, 3)
    model = _open(server)
    tensor = model["layer.1.a"]
    area = area_of(tensor)
    assert area is area_of(model.shards["model-00002-of-00003.safetensors"])
    del model
    numpy.testing.assert_array_equal(tensor, tensors["layer.1.a"])
    del tensor, area
    _assert_nothing_is_open()


def test_one_safetensors_file_by_its_format(server: HttpServer) -> None:
    tensors = _write_model(server.directory, 1)
    url = server.url("model-00001-of-00001.safetensors")
    file = open_remote(url, format="safetensors", patience=QUICK)
    assert type(file) is SafeTensors
    numpy.testing.assert_array_equal(file["layer.0.b"], tensors["layer.0.b"])
    with pytest.raises(ValueError, match="read from the safetensors file"):
        open_remote(url, format="safetensors", dtype="f4")


def test_an_index_is_mapped_as_bytes_on_request(server: HttpServer) -> None:
    _write_model(server.directory, 1)
    expected = (server.directory / _INDEX).read_bytes()
    assert open_remote(server.url(_INDEX), format="raw", patience=QUICK).tobytes() == expected
    assert open_remote(server.url(_INDEX), dtype="S1", patience=QUICK).tobytes() == expected


# --- what is wrong with a model is told, and nothing stays open


def _missing_shard(directory: Path, _: Tensors) -> None:
    (directory / "model-00003-of-00004.safetensors").unlink()


def _cut_short(directory: Path, _: Tensors) -> None:
    path = directory / "model-00002-of-00004.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _no_safetensors(directory: Path, _: Tensors) -> None:
    (directory / "model-00002-of-00004.safetensors").write_bytes(b"<html>")


def _tensor_elsewhere(directory: Path, _: Tensors) -> None:
    index = json.loads((directory / _INDEX).read_text())
    index["weight_map"]["layer.3.a"] = "model-00001-of-00004.safetensors"
    (directory / _INDEX).write_text(json.dumps(index))


def _other_size(directory: Path, tensors: Tensors) -> None:
    changed = {name: tensor[:-1] for name, tensor in tensors.items() if name.startswith("layer.3.")}
    (directory / "model-00004-of-00004.safetensors").write_bytes(_shard(changed))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_missing_shard, SourceMissingError, r"model-00003-of-00004\.safetensors: HTTP 404"),
        (_cut_short, SourceError, r"model-00002-of-00004\.safetensors: the file has .* it was cut short"),
        (_no_safetensors, ValueError, r"index\.json: model-00002-of-00004\.safetensors: not a safetensors file"),
        (_tensor_elsewhere, SourceError, r"the tensor 'layer\.3\.a' is not in model-00001-of-00004\.safetensors"),
        (_other_size, SourceError, r"its tensors have \d+ bytes, and its total_size is \d+: a shard is of another version"),
    ],
)
def test_a_damaged_model_is_an_error_and_nothing_stays_open(
    server: HttpServer, damage: Callable[[Path, Tensors], None], error: type[Exception], message: str
) -> None:
    damage(server.directory, _write_model(server.directory))
    with pytest.raises(error, match=message) as caught:
        _open(server)
    _assert_nothing_is_open()  # while the exception and its traceback are alive
    assert caught.value is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not an index of safetensors: Expecting value"),
        ("\x00\xff", "not an index"),
        ("[" * 200_000, "not an index"),
        ("[1]", "not an index"),
        ("7", "not an index"),
        ("{}", "it has no 'weight_map'"),
        ('{"weight_map": []}', "weight_map and metadata are objects"),
        ('{"weight_map": {}, "metadata": 3}', "weight_map and metadata are objects"),
        ('{"weight_map": {}}', "its weight_map is empty"),
        ('{"weight_map": {"a": 1}}', "the name of a shard is a text, not 1"),
        ('{"weight_map": {"a": "x.bin"}}', "'x.bin' is not named .safetensors"),
        ('{"weight_map": {"a": "x.safetensors", "b": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs 2 times"),
    ],
)
def test_a_file_that_is_no_index_is_refused(server: HttpServer, text: str, message: str) -> None:
    (server.directory / _INDEX).write_text(text, "latin-1")
    with pytest.raises(ValueError, match=message):
        _open(server)
    _assert_nothing_is_open()


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/x", "//host/x", "http://host/x", "file:///x", "a//x", "./x", "zip://x::a", "..\\x", "a\nx",
     "\ud800x", "C:x", "\0"],
)  # fmt: skip
def test_shards_outside_of_the_directory_are_refused_before_any_request(server: HttpServer, name: str) -> None:
    _write_index(server.directory, {"a": f"{name}.safetensors"})
    server.requests(clear=True)
    with pytest.raises(ValueError, match="does not lie in the directory of the index"):
        _open(server)
    assert {request.path for request in server.requests()} == {f"/{_INDEX}"}


def test_characters_of_urls_in_the_name_of_a_shard_have_no_meaning(server: HttpServer) -> None:
    _write_index(server.directory, {"a": "%2e%2e/x?y#z.safetensors"})
    server.requests(clear=True)
    with pytest.raises(SourceMissingError, match="404"):
        _open(server)
    assert server.requests()[-1].path == "/%252e%252e/x%3Fy%23z.safetensors"


def test_options_of_one_array_are_refused_for_a_model(server: HttpServer) -> None:
    _write_model(server.directory, 1)
    for options in ({"shape": 3}, {"plan": "p"}, {"index": "i"}, {"offset": 8}):
        with pytest.raises(ValueError, match="not of a model of several shards"):
            _open(server, **options)


def test_secrets_of_the_index_are_in_no_message(server: HttpServer) -> None:
    (server.directory / _INDEX).write_text("no json")
    url = server.url(_INDEX).replace("://", "://user:secret1@") + "?signature=secret2"
    with pytest.raises(ValueError, match="not an index") as caught:
        open_remote(url, patience=QUICK)
    _write_index(server.directory, {"a": "a.safetensors"})
    with pytest.raises(SourceMissingError) as missing:
        open_remote(url, patience=QUICK)
    assert "secret" not in f"{caught.value}{missing.value}"
