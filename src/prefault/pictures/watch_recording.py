"""The file of ``prefault watch --record``: JSON lines, one object for each frame."""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple, TextIO, get_args

from prefault.pictures.heat_rows import HeatRow, RowKind, Stretch
from prefault.pictures.sampling import Frame

KIND = "prefault-watch"
SCHEMA = 1

_KINDS = get_args(RowKind)
_LONGEST_LINE = 1 << 28
_MAX_BYTES = 1 << 62


class DamagedFramesError(ValueError):
    """A file that is no recording of ``prefault watch``, or is damaged. The message names the file and the line."""


class RecordedFrame(NamedTuple):
    """A frame of a recording: all rows as they were then.

    Attributes:
        seconds: time since the first frame.
        rows: rows by their number in the recording; a row that vanished is not among them.
    """

    seconds: float
    rows: dict[int, HeatRow]


class FrameWriter:
    """Writes frames to a file, each as one line with the rows that changed."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._numbers: dict[tuple[str, str, str, int], int] = {}
        self._written: dict[int, HeatRow] = {}
        self._started = datetime.now(UTC).astimezone().isoformat(timespec="seconds")

    def add(self, frame: Frame) -> None:
        """Write a frame."""
        now = {self._numbers.setdefault(row.key, len(self._numbers)): row for row in frame.rows}
        line = {
            "schema": SCHEMA,
            "kind": KIND,
            "started": self._started,
            "seconds": round(frame.seconds, 3),
            "rows": [_to_json(number, row) for number, row in now.items() if self._written.get(number) != row],
            "gone": [number for number in self._written if number not in now],
        }
        # One write, flushed: a recording that is cut off ends with a whole line, or with one that is seen to be cut off.
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()
        self._written = now


def _to_json(number: int, row: HeatRow) -> dict[str, Any]:
    return {
        "row": number,
        "name": row.name,
        "kind": row.kind,
        "group": row.group,
        "start": row.start,
        "size_bytes": row.size_bytes,
        "present_bytes": row.present_bytes,
        "levels": None if row.levels is None else base64.b64encode(row.levels).decode(),
        "parts": [list(part) for part in row.parts],
        "unknown": row.unknown,
    }


def read_recording(path: str | os.PathLike[str]) -> Iterator[RecordedFrame]:
    """Yield the frames of a recording. A last line that was cut off (the writer was killed) ends it without an error.

    Raises:
        OSError: the file cannot be read.
        DamagedFramesError: it is something else, or damaged.
    """
    name = os.fsdecode(path)
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        rows: dict[int, HeatRow] = {}
        last, number = 0.0, 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            document = _parsed(line, name, number)
            if document is None:
                return
            if document.get("kind") != KIND:
                raise DamagedFramesError(f"{name}: line {number} is no frame of `prefault watch --record`")
            if document.get("schema") != SCHEMA:
                form = document.get("schema")
                raise DamagedFramesError(f"{name} has the form {form!r}, and this version reads only {SCHEMA}")
            try:
                last = _apply(document, rows, last)
            except (KeyError, TypeError, ValueError, binascii.Error) as error:
                raise DamagedFramesError(f"{name}: line {number} is damaged: {error!r}") from error
            yield RecordedFrame(last, dict(rows))
        if not number:
            raise DamagedFramesError(f"{name} is empty: no recording of `prefault watch --record`")


def _parsed(line: str, name: str, number: int) -> dict[str, Any] | None:
    """Return the object of a line; None for the last line if it was cut off."""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        if number > 1 and not line.endswith("\n"):
            return None
        raise DamagedFramesError(
            f"{name}: line {number} is not JSON, so that it is none of 'prefault watch --record', or a damaged one"
        ) from error
    if not isinstance(document, dict):
        raise DamagedFramesError(f"{name}: line {number} is not an object")
    return document


def _apply(document: dict[str, Any], rows: dict[int, HeatRow], last: float) -> float:
    """Change the rows as a frame says, and return its time."""
    seconds = document["seconds"]
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not last <= seconds < 1e12:
        raise ValueError(f"a time of {seconds!r} after {last}")
    for number in document["gone"]:
        del rows[_count(number)]
    for entry in document["rows"]:
        rows[_count(entry["row"])] = _row(entry)
    return float(seconds)


def _row(entry: dict[str, Any]) -> HeatRow:
    size, present = _count(entry["size_bytes"]), entry["present_bytes"]
    if present is not None and _count(present) > size:
        raise ValueError(f"{present} bytes of {size} are present")
    kind = entry["kind"]
    if kind not in _KINDS:
        raise ValueError(f"a row of the kind {kind!r}")
    levels = None if entry["levels"] is None else base64.b64decode(_text(entry["levels"]), validate=True)
    parts = tuple(Stretch(*map(_count, part)) for part in entry["parts"])
    if levels is not None and sum(part.cells for part in parts) != len(levels):
        raise ValueError(f"{len(levels)} cells, and parts of {sum(part.cells for part in parts)}")
    at = 0
    for part in parts:
        if not at <= part.start <= part.stop <= size:
            raise ValueError(f"a part from {part.start} to {part.stop} of {size} bytes")
        at = part.stop
    return HeatRow(
        _text(entry["name"]), kind, _text(entry["group"]), _count(entry["start"]), size, present, levels, parts,
        _text(entry["unknown"]),
    )  # fmt: skip


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _MAX_BYTES:
        raise ValueError(f"{value!r} is not a count")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value
