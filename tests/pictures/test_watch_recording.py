"""Recordings of `prefault watch`: what is written is read again, and damage is an error that names the line."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path

import jsonschema
import pytest

from prefault.pictures.heat_rows import ALL, HeatRow, Stretch
from prefault.pictures.sampling import Frame, frames
from prefault.pictures.watch_recording import DamagedFramesError, FrameWriter, read_recording
from support.json_schemas import schema_of


def _row(name: str, present: int | None) -> HeatRow:
    if present is None:
        return HeatRow(name, "file", "", 0, 8192, None, None, (), "not told")
    half = bytes([ALL if present >= 4096 else 0, ALL if present == 8192 else 0])
    return HeatRow(name, "file", "", 0, 8192, present, half, (Stretch(0, 8192, 2),))


_STEPS = [
    [_row("a", 0), _row("b\udcff", 4096)],
    [_row("a", 4096), _row("b\udcff", 4096)],
    [_row("a", 8192), _row("c\n<script>", None)],
    [],
    [_row("b\udcff", 8192)],
]


def _record(path: Path) -> list[Frame]:
    steps = iter(_STEPS)
    source = frames(lambda: next(steps))
    taken = [next(source) for _ in _STEPS]
    with path.open("w") as file:
        writer = FrameWriter(file)
        for frame in taken:
            writer.add(frame)
    return taken


def test_frames_are_read_as_they_were(tmp_path: Path) -> None:
    taken = _record(tmp_path / "r")
    found = list(read_recording(tmp_path / "r"))
    assert [sorted(frame.rows.values()) for frame in found] == [sorted(frame.rows) for frame in taken]
    assert [frame.seconds for frame in found] == [round(frame.seconds, 3) for frame in taken]


def test_lines_have_the_form_of_the_schema_and_only_changes(tmp_path: Path) -> None:
    _record(tmp_path / "r")
    lines = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    for line in lines:
        jsonschema.validate(line, schema_of("prefault-watch"))
    assert [len(line["rows"]) for line in lines] == [2, 1, 2, 0, 1]
    assert [len(line["gone"]) for line in lines] == [0, 0, 1, 2, 0]


def test_rates_are_changes_by_time() -> None:
    steps = iter(_STEPS)
    source = frames(lambda: next(steps))
    first, second = next(source), next(source)
    assert first.rate is None
    assert second.rate is not None
    assert second.rate == pytest.approx(4096 / second.seconds, rel=1e-3)
    assert (second.present_bytes, second.size_bytes) == (8192, 16384)


def test_a_recording_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    _record(tmp_path / "r")
    text = (tmp_path / "r").read_text()
    (tmp_path / "r").write_text(text[: text.rindex('"seconds"') + 4])
    assert len(list(read_recording(tmp_path / "r"))) == len(_STEPS) - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("hello\n", "line 1 is not JSON"),
        ("[1]\n", "line 1 is not an object"),
        ('{"kind": "prefault-bench"}\n', "line 1 is no frame of"),
        ('{"kind": "prefault-watch", "schema": 2}\n', "has the form 2"),
        ("null\n", "line 1 is not an object"),
        ('{"kind": "prefault-watch", "schema": 1}\n', "line 1 is damaged"),
        ("[" * 100_000 + "\n", "line 1 is not JSON"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r").write_text(text)
    with pytest.raises(DamagedFramesError, match=message) as caught:
        list(read_recording(tmp_path / "r"))
    assert str(tmp_path / "r") in str(caught.value)


@pytest.mark.parametrize("seed", range(8))
def test_damage_is_an_error_or_other_numbers(tmp_path: Path, seed: int) -> None:
    """Bytes and values of the file are changed at random: it is read, or refused, and no row is impossible."""
    numbers = random.Random(seed)
    _record(tmp_path / "r")
    whole = (tmp_path / "r").read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(numbers.randrange(1, 4)):
            at = numbers.randrange(len(damaged))
            damaged[at : at + numbers.randrange(3)] = numbers.choice(
                [b"", b"-", b"9", b"null", b'"', b"[]", b"1e999", b"\xff", bytes([numbers.randrange(256)])]
            )
        (tmp_path / "r").write_bytes(damaged)
        try:
            for frame in read_recording(tmp_path / "r"):
                for row in frame.rows.values():
                    assert row.present_bytes is None or 0 <= row.present_bytes <= row.size_bytes
        except DamagedFramesError:
            continue


def test_a_writer_writes_whole_lines() -> None:
    file = io.StringIO()
    FrameWriter(file).add(Frame(0.0, [_row("x", 0)], {}, None))
    assert file.getvalue().count("\n") == 1
    assert file.getvalue().endswith("\n")
