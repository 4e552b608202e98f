"""Tensors by name: the bytes at their ranges are the tensors', as safetensors and numpy wrote them; damaged headers."""

from __future__ import annotations

import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault.cli import main
from prefault.files.failures import FileError
from prefault.files.formats.tensor_ranges import named_tensors, tensor_ranges, tensor_statuses
from prefault.files.open_file import OpenFile
from support import file_beds
from support.file_beds import PAGE
from support.json_schemas import check_output

_TENSORS = {
    "layers.0.weight": numpy.arange(5 * PAGE // 4, dtype="<f4"),
    "layers.0.bias": numpy.arange(7, dtype="<i8"),
    "layers.1.weight": numpy.full((3, PAGE), 9, "u1"),
    "head": numpy.arange(2 * PAGE // 2, dtype="<i2"),
}


def _string(text: bytes, order: str) -> bytes:
    return struct.pack(f"{order}Q", len(text)) + text


def gguf(tensors: dict[str, Any], order: str = "<", version: int = 3, alignment: int = 64) -> bytes:
    """Write a GGUF file, with metadata of every kind."""
    pairs = [
        (b"general.alignment", struct.pack(f"{order}II", 4, alignment)),
        (b"name", struct.pack(f"{order}I", 8) + _string("żółw".encode(), order)),
        (b"words", struct.pack(f"{order}IIQ", 9, 8, 3) + b"".join(_string(word, order) for word in (b"a", b"", b"ccc"))),
        (b"scores", struct.pack(f"{order}IIQ3f", 9, 6, 3, 1, 2, 3)),
        *((f"n{kind}".encode(), struct.pack(f"{order}I", kind) + bytes(size))
          for kind, size in {0: 1, 1: 1, 2: 2, 3: 2, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}.items()),
    ]  # fmt: skip
    head = b"GGUF" + struct.pack(f"{order}IQQ", version, len(tensors), len(pairs))
    head += b"".join(_string(key, order) + value for key, value in pairs)
    data = b""
    for name, array in tensors.items():
        data += bytes(-len(data) % alignment)
        shape = struct.pack(f"{order}{array.ndim}Q", *array.shape)
        head += _string(name.encode(), order) + struct.pack(f"{order}I", array.ndim) + shape
        head += struct.pack(f"{order}IQ", 0, len(data))
        data += array.tobytes()
    return head + bytes(-len(head) % alignment) + data


def _model(path: Path) -> Path:
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(_TENSORS, path, {"format": "np"})
    elif path.suffix == ".gguf":
        path.write_bytes(gguf(_TENSORS))
    else:
        numpy.save(path, _TENSORS["head"])
    return path


@pytest.fixture(params=[".safetensors", ".gguf", ".npy"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return _model(tmp_path / f"head{request.param}")


def test_the_bytes_at_the_ranges_are_the_tensors(model: Path) -> None:
    content = model.read_bytes()
    found = tensor_ranges(model)
    expected = {"head": _TENSORS["head"]} if model.suffix == ".npy" else _TENSORS
    assert found.keys() == expected.keys()
    for name, place in found.items():
        wanted = expected[name].tobytes()
        assert content[place.start : place.start + len(wanted)] == wanted
        assert place.shape == expected[name].shape
        padding = place.stop - place.start - len(wanted)
        assert 0 <= padding < 64 if model.suffix == ".gguf" else padding == 0


@pytest.mark.parametrize(("order", "version", "alignment"), [("<", 2, 32), (">", 3, 32), ("<", 3, 4096)])
def test_kinds_of_gguf(order: str, version: int, alignment: int, tmp_path: Path) -> None:
    path = tmp_path / "file"  # the format is seen by the content
    path.write_bytes(gguf(_TENSORS, order, version, alignment))
    content = path.read_bytes()
    found = tensor_ranges(path)
    assert found.keys() == _TENSORS.keys()
    for name, place in found.items():
        assert content[place.start :].startswith(_TENSORS[name].tobytes())


def test_verbs_take_tensors_as_ranges(tmp_path: Path) -> None:
    model = _model(tmp_path / "model.safetensors")
    place = tensor_ranges(model)["layers.0.weight"]
    file_beds.evict(model)
    with prefault.lock(prefault.select(model), ranges=named_tensors("layers.0.weight")) as locked:
        assert locked.bytes == -(-place.stop // PAGE) * PAGE - place.start // PAGE * PAGE
    (file,) = prefault.status(model, ranges=named_tensors(["layers.0.*"])).files
    assert file.pages == file.cached_pages
    result = prefault.evict(model, ranges=named_tensors(["layers.0.weight"]), sync=True)
    assert result.pages == place.stop // PAGE - -(-place.start // PAGE)


def test_status_of_each_tensor(tmp_path: Path) -> None:
    model = _model(tmp_path / "model.safetensors")
    with OpenFile(model) as file:
        place = tensor_ranges(file)["layers.1.weight"]
        file_beds.evict(model)
        file_beds.touch(model, place.start // PAGE)
        found = {tensor.name: tensor for tensor in tensor_statuses(file, ["layers.*"])}
    assert found.keys() == {"layers.0.weight", "layers.0.bias", "layers.1.weight"}
    assert found["layers.1.weight"].cached_pages == 1
    assert found["layers.1.weight"].pages in (3, 4)


def test_a_name_that_matches_nothing_is_a_failure_with_the_nearest(model: Path) -> None:
    (failure,) = prefault.status(model, ranges=named_tensors(["haed"])).failures
    assert failure.path == str(model)
    assert "no tensor that matches haed" in failure.reason
    assert failure.remedy.startswith("nearest: head")


@pytest.mark.parametrize("content", [b"", b"x", b"hello, world, this is text", b"GGUF", b"\x93NUMPY", b"{" * 100])
def test_other_files_are_failures(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FileError, match=r"tensors .*: --tensor takes \.safetensors, \.gguf and \.npy files"):
        tensor_ranges(tmp_path / "file")


def test_a_file_of_another_kind_is_told_which_are_known(tmp_path: Path) -> None:
    (tmp_path / "serve.py").write_text("import os\n")
    with pytest.raises(FileError) as caught:
        tensor_ranges(tmp_path / "serve.py")
    assert str(caught.value) == (
        f"{tmp_path}/serve.py: is no model file whose tensors have names:"
        " --tensor takes .safetensors, .gguf and .npy files (--include chooses them)"
    )


def test_a_damaged_model_file_is_told_its_damage(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"hello, world")
    with pytest.raises(FileError, match=r"not a safetensors file: .*: copy or download it again"):
        tensor_ranges(tmp_path / "model.safetensors")


def test_a_file_that_was_cut_short(model: Path) -> None:
    size = model.stat().st_size
    with model.open("r+b") as file:
        file.truncate(size - min(3 * PAGE, size // 2))
    with pytest.raises(FileError, match=r"cut short|no tensors"):
        tensor_ranges(model)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_headers_are_failures_and_take_no_memory(seed: int, model: Path) -> None:
    """Flipped, cut, and inflated: places inside of the file, or an error that names the file."""
    chosen = random.Random(seed)
    whole = bytearray(model.read_bytes())
    header = min(len(whole), 700)
    tracemalloc.start()
    try:
        for _ in range(120):
            content = bytearray(whole)
            for _ in range(chosen.choice([1, 2, 8])):
                at = chosen.randrange(header)
                damage = chosen.choice(["flip", "large", "zero", "cut"])
                if damage == "flip":
                    content[min(at, len(content) - 1)] ^= 1 << chosen.randrange(8)
                elif damage == "large":
                    content[at : at + 8] = b"\xff" * chosen.choice([4, 7, 8])
                elif damage == "zero":
                    content[at : at + 8] = bytes(8)
                else:
                    del content[at + 1 :]
                if len(content) < 2:
                    break
            model.write_bytes(content)
            found, told = {}, str(model)
            try:
                found = tensor_ranges(model)
            except FileError as error:
                told = str(error)
            assert all(0 <= place.start <= place.stop <= len(content) for place in found.values())
            assert str(model) in told
            assert "\n" not in told
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_a_huge_claim_in_a_huge_sparse_file_reads_no_more_than_a_header(tmp_path: Path) -> None:
    path = tmp_path / "file.gguf"
    strings = struct.pack("<IQQ", 3, 1, 1) + _string(b"words", "<") + struct.pack("<IIQ", 9, 8, 1 << 40)
    for head in (b"GGUF" + strings, b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), struct.pack("<Q", 1 << 36)):
        path.write_bytes(head)
        with path.open("r+b") as file:
            file.truncate(1 << 40)
        with pytest.raises(FileError, match=r"reach beyond|would have"):
            tensor_ranges(path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = _model(tmp_path / "model.safetensors")
    assert main(["status", "-v", "--tensor", "layers.1.*", str(model)]) == 0
    assert "  layers.1.weight: " in capsys.readouterr().out
    assert main(["status", "--json", "--tensor", "head", str(model)]) == 0
    (file,) = check_output(capsys.readouterr().out, "prefault-status")["files"]
    assert [tensor["name"] for tensor in file["tensors"]] == ["head"]
    assert main(["evict", "--tensor", "nothing", str(model)]) == 1
    assert "nearest" in capsys.readouterr().err
    assert main(["status", "--tensor", "head", "-p", "1-2", str(model)]) == 2
