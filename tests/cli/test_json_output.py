"""The objects that --json writes: their form, names that are not UTF-8, and the schemas in docs/schemas."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import pytest

import support
from prefault.cli import main
from prefault.cli.json_output import name_to_json, print_json
from support.json_schemas import FOLDER, check_document, check_output, schema_of

_NOT_UTF8 = os.fsdecode(b"caf\xe9")


class _Colour(Enum):
    RED = "red"


class _Point(NamedTuple):
    x: int
    name: str


def _printed(capsys: pytest.CaptureFixture[str], **content: Any) -> Any:
    print_json("prefault-test", 3, content)
    document = json.loads(capsys.readouterr().out)
    assert list(document)[:2] == ["schema", "kind"]
    assert (document.pop("schema"), document.pop("kind")) == (3, "prefault-test")
    return document


def test_values(capsys: pytest.CaptureFixture[str]) -> None:
    content = {"a": None, "b": True, "c": 2**63, "d": 0.5, "e": "é\n", "f": Path("/x"), "g": _Colour.RED, "h": b"/y"}
    assert _printed(capsys, **content) == {**content, "f": "/x", "g": "red", "h": "/y"}


def test_containers(capsys: pytest.CaptureFixture[str]) -> None:
    found = _printed(capsys, a=[], b=(1, [2, {"c": _Point(1, "p")}]), d={"e": {}}, f=_Point(2, "q"))
    assert found == {"a": [], "b": [1, [2, {"c": {"x": 1, "name": "p"}}]], "d": {"e": {}}, "f": {"x": 2, "name": "q"}}


def test_an_iterator_is_written_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def elements() -> Iterator[dict[str, int]]:
        for number in range(3):
            seen.append(capsys.readouterr().out)
            yield {"number": number}

    print_json("prefault-test", 1, {"elements": elements(), "none": iter(())})
    seen.append(capsys.readouterr().out)
    assert json.loads("".join(seen)) == {
        "schema": 1, "kind": "prefault-test", "elements": [{"number": 0}, {"number": 1}, {"number": 2}], "none": [],
    }  # fmt: skip
    assert '"number": 0' in seen[1]


def test_an_element_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_json("prefault-test", 1, {"files": [{"path": "a\nb"}, {"path": "c"}]})
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line.rstrip(",")) for line in lines if line.startswith("  ")] == [{"path": "a\nb"}, {"path": "c"}]


def test_no_number_that_json_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="JSON"):
        print_json("prefault-test", 1, {"a": float("nan")})


@pytest.mark.parametrize("name", ["", "plain", "żółw", "\U0001f600", "a\nb\x1b"])
def test_a_name_of_unicode_text_is_itself(name: str) -> None:
    assert name_to_json(name) == name


def test_a_name_that_is_not_utf8_keeps_its_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    found = _printed(capsys, files=[{"path": _NOT_UTF8}], one=os.fsencode(_NOT_UTF8))
    expected = {"base64": base64.b64encode(b"caf\xe9").decode(), "text": "caf\ufffd"}
    assert found == {"files": [{"path": expected}], "one": expected}


def test_half_a_surrogate_pair_is_an_object_too() -> None:
    assert isinstance(name_to_json("\ud83d"), dict)


# --- the schemas


@pytest.mark.parametrize("path", sorted(FOLDER.iterdir()), ids=lambda path: path.stem)
def test_a_schema_is_valid_and_names_its_kind(path: Path) -> None:
    schema = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["kind"] == {"const": path.stem}
    assert schema["properties"]["schema"] == {"const": 1}
    assert {"kind", "schema"} <= set(schema["required"])
    assert schema["title"]


def test_an_undocumented_member_is_found() -> None:
    schema = schema_of("prefault-doctor")
    assert "additionalProperties" not in schema  # readers must take what later versions add
    document = json.loads(_run("doctor", "--json"))
    check_document(document, "prefault-doctor")
    document["limits"][0]["extra"] = 1
    with pytest.raises(jsonschema.ValidationError, match="extra"):
        check_document(document, "prefault-doctor")
    del document["limits"][0]["extra"], document["machine"]["kernel"]
    with pytest.raises(jsonschema.ValidationError, match="kernel"):
        check_document(document, "prefault-doctor")


@pytest.mark.parametrize("arguments", [["--quick", "--size", "2 MiB", "--repeats", "2"]], ids=" ".join)
def test_a_grid(arguments: list[str], tmp_path: Path) -> None:
    assert main(["bench", *arguments, "--json", str(tmp_path / "run.json")]) == 0
    check_output((tmp_path / "run.json").read_text(), "prefault-bench")


def test_routes_of_devices(tmp_path: Path) -> None:
    names = [word for name in ("pattern", "enclave", "buffers") for word in ("--device", name)]
    run = tmp_path / "run.json"
    assert main(["bench", "device", *names, "--quick", "--size", "2 MiB", "--repeats", "1", "--json", str(run)]) == 0
    check_output(run.read_text(), "prefault-bench-device")


def test_a_served_device(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9"
    serving = subprocess.Popen(
        [sys.executable, "-m", "prefault", "device", "serve", "support.devices:Pattern", "--arg", "pages=16", "--json",
         "--socket", path],
        env={**os.environ, "PYTHONPATH": str(Path(support.__file__).parent.parent)},
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert serving.stdout is not None
    with serving.stdout:
        output = b"".join(iter(serving.stdout.readline, b"}\n")) + b"}"
        serving.terminate()
        assert serving.wait(30) == 0
    document = check_output(output.decode(), "prefault-device-serve")
    assert document == {
        "schema": 1, "kind": "prefault-device-serve", "socket": name_to_json(os.fsdecode(path)), "device": "Pattern",
        "length": 16 * 4096, "page_size": 4096,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["anon-4gib", "grid-2mib", "grid-4gib", "quick"])
def test_results_of_earlier_versions(name: str) -> None:
    check_output((FOLDER.parent / "results" / f"{name}.json").read_text(), "prefault-bench")


def _run(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "prefault", *arguments], capture_output=True, text=True, check=True, timeout=60
    ).stdout
