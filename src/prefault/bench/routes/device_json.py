"""The file format of a run of ``prefault bench device``, described in docs/bench-json.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefault.bench import jsonfile
from prefault.bench.routes.device_results import Counts, DeviceRun, Ratio, Route, RouteCell, RouteResult, ratios

KIND = "prefault-bench-device"
SCHEMA = 1
"""The version of the format. It changes when an older reader would misread a file; members may be added without."""

COUNTING = (
    "client_faults: getrusage(RUSAGE_THREAD); server_faults, populated_pages, supplied_pages: statistics of the server;"
    " server_reads: /proc/PID/io; system_calls: by design, not traced, without those of mapping"
)


def save(run: DeviceRun, path: Path) -> None:
    """Write the run to a file, whole or not at all. OSError: the file cannot be written."""
    jsonfile.write(to_json(run), path)


def to_json(run: DeviceRun) -> dict[str, Any]:
    """Convert a run to a document. It has derived figures for other readers; :func:`from_json` reads the raw values."""
    compared = ratios(run.results)
    return {
        **jsonfile.run_to_json(run, KIND, SCHEMA),
        "counting": COUNTING,
        "cells": [_to_json(result, compared.get(result.cell, Ratio(None, None))) for result in run.results],
    }


def from_json(document: Any) -> DeviceRun:
    """Read the run in a document. SchemaError: the document is something else, or of another version."""
    return jsonfile.read_run(document, KIND, SCHEMA, "prefault bench device", DeviceRun, _from_json)


def _to_json(result: RouteResult, compared: Ratio) -> dict[str, Any]:
    return {
        **result.cell._asdict(),
        "pages": result.cell.pages,
        **jsonfile.times_to_json(result),
        **({} if result.us_per_page is None else {"us_per_page": result.us_per_page}),
        "map_ns": list(result.map_ns),
        "counts": None if result.counts is None else dataclasses.asdict(result.counts),
        "times_faster_than_touch": compared.to_touch,
        "times_of_map_time": compared.to_map_time,
    }


def _from_json(entry: Mapping[str, Any]) -> RouteResult:
    counts = entry["counts"]
    if counts is not None:
        counts = Counts(**{field.name: counts[field.name] for field in dataclasses.fields(Counts)})
    cell = RouteCell(entry["size_bytes"], entry["page_size"], entry["frames"], Route(entry["route"]))
    return RouteResult(cell, **jsonfile.read_times(entry), map_ns=tuple(map(int, entry["map_ns"])), counts=counts)
