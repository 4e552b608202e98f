"""The data of a report: rows as columns, the changes of a recording, and the grid of a benchmark, as one JSON document."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefault.pictures.heat_rows import ALL, HeatRow, Stretch, by_missing, level_of, resampled
from prefault.pictures.watch_recording import RecordedFrame

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_"
_TOP = len(_ALPHABET) - 1

MOST_ROWS = 200_000
"""Rows of a report; those of least missing bytes beyond them are one row together."""

_CELLS_BY_ROWS = ((2_000, 256), (20_000, 64), (MOST_ROWS + 1, 32))
"""Cells of a row, by the number of rows up to which that holds."""

# 0 only for nothing, the last letter only for all.
_LETTERS = "".join(
    _ALPHABET[0 if level == 0 else _TOP if level == ALL else 1 + (level - 1) * (_TOP - 1) // (ALL - 1)]
    for level in range(ALL + 1)
)
_TRANSLATION = _LETTERS.encode()

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def visible(name: str) -> str:
    r"""Return a name as a page may show it: control characters, direction marks and bytes that are no UTF-8 as ``\x1b``."""
    return _UNPRINTABLE.sub(_escape, name)


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    if 0xDC80 <= number <= 0xDCFF:  # how Python keeps a byte that is no UTF-8 (PEP 383)
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


def to_script(document: Mapping[str, Any]) -> str:
    """Return JSON that can stand in a script element: no name in it can end that."""
    return json.dumps(document, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")


def rows_to_json(rows: Iterable[HeatRow]) -> dict[str, Any]:
    """Return rows as columns, by missing bytes."""
    return _columns(_bounded(by_missing(rows)))


def recording_to_json(frames: Sequence[RecordedFrame]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the rows of the first frame, with places for those that come later, and the changes of each frame.

    A recording of more rows than a report takes keeps those of the largest size.
    """
    known: dict[int, HeatRow] = {}
    for frame in frames:
        known.update({number: row for number, row in frame.rows.items() if number not in known})
    numbers = sorted(known, key=lambda number: -known[number].size_bytes)[:MOST_ROWS]
    place = {number: at for at, number in enumerate(numbers)}
    first = frames[0].rows if frames else {}
    columns = _columns([first.get(number, known[number]) for number in numbers])
    columns["absent"] = [at for at, number in enumerate(numbers) if number not in first]
    cells = _cells_of(len(numbers))
    changes: list[dict[str, Any]] = []
    before = first
    for frame in frames:
        changed = [
            [place[number], row.size_bytes, -1 if row.present_bytes is None else row.present_bytes, *_drawing(row, cells)]
            for number, row in frame.rows.items()
            if number in place and before.get(number) != row
        ]
        gone = [place[number] for number in before if number in place and number not in frame.rows]
        changes.append({"seconds": frame.seconds, "rows": changed, "gone": gone})
        before = frame.rows
    return columns, changes


def _columns(rows: Sequence[HeatRow]) -> dict[str, Any]:
    groups: dict[str, int] = {}
    kinds: dict[str, int] = {}
    cells = _cells_of(len(rows))
    drawings = [_drawing(row, cells) for row in rows]
    return {
        "names": [visible(row.name) for row in rows],
        "group": _indexes((visible(row.group) for row in rows), groups),
        "kind": _indexes((row.kind for row in rows), kinds),
        "start": {at: row.start for at, row in enumerate(rows) if row.start},
        "sizes": [row.size_bytes for row in rows],
        "present": [-1 if row.present_bytes is None else row.present_bytes for row in rows],
        "cells": [text for text, _ in drawings],
        "parts": {at: parts for at, (_, parts) in enumerate(drawings) if parts is not None},
        "unknown": {at: visible(row.unknown) for at, row in enumerate(rows) if row.unknown},
        "absent": [],
        "groups": list(groups),
        "kinds": list(kinds),
    }


def _indexes(texts: Iterable[str], known: dict[str, int]) -> list[int]:
    """Return a number for each text, and an empty list where all of them are one."""
    found = [known.setdefault(text, len(known)) for text in texts]
    return found if len(known) > 1 else []


def _bounded(rows: list[HeatRow]) -> list[HeatRow]:
    if len(rows) <= MOST_ROWS:
        return rows
    rest = rows[MOST_ROWS - 1 :]
    known = [row for row in rest if row.present_bytes is not None]
    name = f"{len(rest)} more, of which {len(rest) - len(known)} are not known"
    size, present = sum(row.size_bytes for row in known), sum(row.present_bytes or 0 for row in known)
    return [*rows[: MOST_ROWS - 1], HeatRow(name, rest[0].kind, "", 0, size, present, None, ())]


def _cells_of(rows: int) -> int:
    return next(cells for most, cells in _CELLS_BY_ROWS if rows <= most)


def _drawing(row: HeatRow, most: int) -> tuple[str, list[list[int]] | None]:
    """Return the letters of a row's cells, a single one where all are equal, and its stretches where there are gaps."""
    level = level_of(row)
    if level is None:
        return "", None
    whole = len(row.parts) <= 1 and (not row.parts or row.parts[0].stop - row.parts[0].start == row.size_bytes)
    if row.levels is None or (whole and row.levels.count(row.levels[:1]) == len(row.levels)):
        return _LETTERS[level], None
    levels, parts = _reduced(row.levels, row.parts, most)
    text = levels.translate(_TRANSLATION).decode()
    return text, None if whole else [list(part) for part in parts]


def _reduced(levels: bytes, parts: Sequence[Stretch], most: int) -> tuple[bytes, list[Stretch]]:
    """Return at most about so many cells."""
    if len(levels) <= most:
        return levels, list(parts)
    found, first = [], 0
    kept = b""
    for part in parts:
        cells = max(1, most * part.cells // len(levels))
        kept += resampled(levels[first : first + part.cells], cells)
        found.append(Stretch(part.start, part.stop, cells))
        first += part.cells
    return kept, found


def bench_to_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the grid of a run of ``prefault bench`` as tables, one for each size and sharing.

    Args:
        document: the content of its file (docs/bench-json.md), as the reader of that checked it.
    """
    machine = document["machine"]
    cells = document["cells"]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    tables = []
    for size, sharing in dict.fromkeys((cell["size_bytes"], cell["sharing"]) for cell in cells):
        inside = [cell for cell in cells if (cell["size_bytes"], cell["sharing"]) == (size, sharing)]
        backings = list(dict.fromkeys(cell["backing"] for cell in inside))
        by_place = {(cell["backing"], cell["method"]): cell for cell in inside}
        used = [method for method in methods if any((backing, method) in by_place for backing in backings)]
        tables.append(
            {
                "title": f"{size >> 20} MiB, {sharing}",
                "methods": used,
                "rows": [
                    {"name": backing, "cells": [_bench_cell(by_place.get((backing, method))) for method in used]}
                    for backing in backings
                ],
            }
        )
    virtual = ", virtual" if machine["virtual"] else ""
    cpu = f"{machine['cpu']}, {machine['usable_cpus']} of {machine['cpus']} CPUs{virtual}"
    return {"machine": visible(f"{document['started']}: {machine['kernel']}, {cpu}"), "tables": tables}


def _bench_cell(cell: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if cell is None:
        return None
    best = cell.get("best_ms")
    return {
        "status": cell["status"],
        "reason": visible(cell.get("reason") or ""),
        "best": None if best is None else f"{best:.3g}" if best < 1000 else f"{best:.0f}",
        "ratio": cell.get("ratio_to_write"),
        "published": cell.get("published_ratio_to_write"),
        "doubts": "; ".join(cell.get("doubts") or ()),
    }
