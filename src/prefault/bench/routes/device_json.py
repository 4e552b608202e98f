"""The file format of a run of ``prefault bench device``, described in docs/bench-json.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefault.bench import jsonfile
from prefault.bench.routes.device_results import PATTERN, Counts, DeviceRun, Ratio, Route, RouteCell, RouteResult, ratios
from prefault.bench.routes.shipped_results import ROUTES, ShippedCell, ShippedResult, times_faster

_FIGURES = ("pages", "faults", "evicted_bytes", "bookkeeping_bytes")

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
    compared, faster = ratios(run.routes), times_faster(run.shipped)
    return {
        **jsonfile.run_to_json(run, KIND, SCHEMA),
        "counting": COUNTING,
        "cells": [
            *(_to_json(result, compared.get(result.cell, Ratio(None, None))) for result in run.routes),
            *(_shipped_to_json(result, faster.get(result.cell)) for result in run.shipped),
        ],
    }


def from_json(document: Any) -> DeviceRun:
    """Read the run in a document. SchemaError: the document is something else, or of another version."""
    return jsonfile.read_run(document, KIND, SCHEMA, "prefault bench device", DeviceRun, _from_json)


def _to_json(result: RouteResult, compared: Ratio) -> dict[str, Any]:
    return {
        "device": PATTERN,
        **result.cell._asdict(),
        "pages": result.cell.pages,
        **jsonfile.times_to_json(result),
        **({} if result.us_per_page is None else {"us_per_page": result.us_per_page}),
        "map_ns": list(result.map_ns),
        "counts": None if result.counts is None else dataclasses.asdict(result.counts),
        "times_faster_than_touch": compared.to_touch,
        "times_of_map_time": compared.to_map_time,
    }


def _shipped_to_json(result: ShippedResult, faster: float | None) -> dict[str, Any]:
    return {
        **result.cell._asdict(),
        **jsonfile.times_to_json(result),
        **({} if result.us_per_page is None else {"us_per_page": result.us_per_page}),
        **({} if result.mb_per_second is None else {"mb_per_second": result.mb_per_second}),
        "server_cpu_ns": list(result.server_cpu_ns),
        **{name: getattr(result, name) for name in _FIGURES},
        "times_faster_than_faults": faster,
    }


def _from_json(entry: Mapping[str, Any]) -> RouteResult | ShippedResult:
    if entry.get("device", PATTERN) != PATTERN:  # files of earlier versions do not name it
        device = entry["device"]
        return ShippedResult(
            ShippedCell(device, entry["size_bytes"], ROUTES[device](entry["route"])),
            **jsonfile.read_times(entry),
            server_cpu_ns=tuple(map(int, entry["server_cpu_ns"])),
            **{name: entry[name] for name in _FIGURES},
        )
    counts = entry["counts"]
    if counts is not None:
        counts = Counts(**{field.name: counts[field.name] for field in dataclasses.fields(Counts)})
    cell = RouteCell(entry["size_bytes"], entry["page_size"], entry["frames"], Route(entry["route"]))
    return RouteResult(cell, **jsonfile.read_times(entry), map_ns=tuple(map(int, entry["map_ns"])), counts=counts)
