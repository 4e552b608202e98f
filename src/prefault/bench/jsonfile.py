"""The file format of a run of ``prefault bench``, described in docs/bench-json.md."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from prefault.bench import published
from prefault.bench.grid import Cell
from prefault.bench.machine import BenchMachine
from prefault.bench.ratios import Ratios, ratios
from prefault.bench.results import BenchRun, CellResult, Run, Status, Timed

AnyRun = TypeVar("AnyRun", bound=Run[Any])

KIND = "prefault-bench"
SCHEMA = 1
"""The version of the format. It changes when an older reader would misread a file; members may be added without."""


class SchemaError(ValueError):
    """The file is not a run of ``prefault bench``, or one of a version that this reader does not know."""


def check_writable(path: Path) -> None:
    """Check that :func:`save` can write the file, before an hour is spent on measuring.

    Raises:
        OSError: no file can be made there, or there is one that is not a regular file.
    """
    target = path.resolve()  # what a symbolic link points to is replaced, not the link
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        # The file is replaced, which must not happen to /dev/stdout or a directory.
        raise FileExistsError(f"{path} is not a regular file")
    trial = _beside(target)
    trial.touch(exist_ok=False)
    trial.unlink()


def save(run: BenchRun, path: Path) -> None:
    """Write the run to a file, whole or not at all.

    Raises:
        OSError: the file cannot be written; an earlier file is unchanged.
    """
    write(to_json(run), path)


def write(document: Mapping[str, Any], path: Path) -> None:
    """Write a document to a file, whole or not at all."""
    target = path.resolve()
    draft = _beside(target)
    try:
        with draft.open("x", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")  # no fsync: it could wait for gigabytes that a "file" row has left to write back
        draft.replace(target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        if isinstance(error, OSError) and error.filename is None:  # writing to an open file names none
            error.filename = str(path)
        raise


def load(path: Path) -> BenchRun:
    """Read a file that :func:`save` wrote.

    Raises:
        SchemaError: the file is something else, or of another version.
        OSError: the file cannot be read.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SchemaError(f"{path}: not a file that prefault bench --json wrote, as it is no JSON: {error}") from error
    try:
        return from_json(document)
    except SchemaError as error:
        raise SchemaError(f"{path}: {error}") from error


def to_json(run: BenchRun) -> dict[str, Any]:
    """Convert a run to a document. It has derived figures for other readers; :func:`from_json` reads the raw values."""
    beside = ratios(run.results)
    return {
        **run_to_json(run, KIND, SCHEMA),
        "published_source": published.SOURCE,
        "cells": [_cell_to_json(result, beside[result.cell]) for result in run.results],
    }


def from_json(document: Any) -> BenchRun:
    """Read the run in a document.

    Raises:
        SchemaError: the document is something else, or of another version.
    """
    return read_run(document, KIND, SCHEMA, "prefault bench", BenchRun, _cell_from_json)


def run_to_json(run: Run[Any], kind: str, schema: int) -> dict[str, Any]:
    """Convert a run to a document of ``kind``, all but its results; :func:`read_run` reads it."""
    plain = _plain_fields(type(run))
    return {
        "kind": kind,
        "schema": schema,
        **{name: getattr(run, name) for name in plain},
        "machine": dataclasses.asdict(run.machine),
    }


def _plain_fields(run: type[Run[Any]]) -> list[str]:
    return [field.name for field in dataclasses.fields(run) if field.name not in ("machine", "results")]


def read_run(
    document: Any, kind: str, schema: int, command: str, run: type[AnyRun], read_result: Callable[[Any], Any]
) -> AnyRun:  # fmt: skip
    """Read a run from a document of ``kind``: a dataclass of its plain fields, a ``machine`` and ``results``."""
    if not isinstance(document, Mapping) or document.get("kind") != kind:
        raise SchemaError(f'not a result of {command} (its "kind" would be {kind!r})')
    if document.get("schema") != schema:
        raise SchemaError(f"schema {document.get('schema')!r} is unknown: this version of prefault reads schema {schema}")
    try:
        head = {name: document[name] for name in _plain_fields(run)}
        machine = {field.name: document["machine"][field.name] for field in dataclasses.fields(BenchMachine)}
        head["machine"] = BenchMachine(**machine)
        head["results"] = tuple(read_result(entry) for entry in document["cells"])
    except (KeyError, TypeError, ValueError) as error:
        raise SchemaError(f"damaged: {type(error).__name__}: {error}") from error
    return run(**head)


def times_to_json(result: Timed[Any]) -> dict[str, Any]:
    """Convert the fields that all results share to plain values; :func:`read_times` reads the raw ones."""
    figures = result.statistics
    return {
        "status": result.status.value,
        "reason": result.reason,
        "note": result.note,
        "values_ns": list(result.values_ns),
        **({} if figures is None else {**figures.milliseconds, "doubts": list(figures.doubts)}),
    }


def read_times(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields that all results have, except for the cell."""
    values_ns = tuple(map(int, entry["values_ns"]))
    return {"status": Status(entry["status"]), "values_ns": values_ns, "reason": entry["reason"], "note": entry["note"]}


def _cell_to_json(result: CellResult, beside: Ratios) -> dict[str, Any]:
    cell = result.cell
    return {
        **dataclasses.asdict(cell),
        **times_to_json(result),
        "ratio_to_write": beside.ours,
        "published_ms": published.figure_ms(cell),
        "published_ratio_size_bytes": None if beside.published is None else published.reference_size(cell.size_bytes),
        "published_ratio_to_write": beside.published,
        "ratio_against_published": beside.against_published,
    }


def _cell_from_json(entry: Mapping[str, Any]) -> CellResult:
    return CellResult(Cell(**{field.name: entry[field.name] for field in dataclasses.fields(Cell)}), **read_times(entry))


def _beside(target: Path) -> Path:
    """Return a name in the same directory, so that the draft can be moved into place."""
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")
