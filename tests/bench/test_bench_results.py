"""Statistics, ratios, and the file a run is kept in."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from prefault.bench import jsonfile
from prefault.bench.grid import Cell
from prefault.bench.jsonfile import SchemaError
from prefault.bench.ratios import DifferentMachinesError, compare, ratios
from prefault.bench.results import BenchRun, CellResult, CellStatistics, Status

Make = Callable[..., BenchRun]
Measured = Callable[..., CellResult]


def test_statistics() -> None:
    figures = CellStatistics.of((40, 10, 20, 30))
    assert (figures.repetitions, figures.best_ns, figures.median_ns, figures.mean_ns, figures.worst_ns) == (
        4,
        10,
        25,
        25,
        40,
    )
    assert figures.stdev_ns == pytest.approx(12.909944)


@pytest.mark.parametrize(
    ("values", "doubtful"),
    [
        ((100, 101, 102), False),
        ((100, 100, 130), True),  # the standard deviation is 16 %
        ((100, 121, 121, 121, 121, 121, 121, 121, 121, 121), True),  # the best is an exception; the spread is small
        ((100,), True),
    ],
)
def test_doubtful_figures_say_so(values: tuple[int, ...], doubtful: bool) -> None:
    assert bool(CellStatistics.of(values).doubts) is doubtful


def test_ratios_are_to_writing_by_hand_in_the_same_group(measured: Measured) -> None:
    results = [
        measured("write", 1000, 1100),
        measured("populate_write", 700, 650),
        measured("populate_write", 10, 11, backing="Anon THP"),
        replace(measured("read", 1), status=Status.FAILED, reason="it broke"),
    ]
    found = ratios(results)
    populate = found[results[1].cell]
    assert populate.ours == 0.65
    assert populate.published == pytest.approx(572.582 / 708.409)
    assert populate.against_published == pytest.approx(0.65 / (572.582 / 708.409))
    assert found[results[2].cell].ours is None  # no "write" in that group
    assert found[results[3].cell].ours is None  # what failed has no time


def test_times_of_different_machines_are_not_compared_silently(make_run: Make, measured: Measured) -> None:
    before, after = make_run(measured("write", 1000)), make_run(measured("write", 500))
    assert list(compare(before, after).values()) == [0.5]
    elsewhere = replace(after, machine=replace(after.machine, cpu="Another processor"))
    with pytest.raises(DifferentMachinesError, match="CPU: A processor and Another processor"):
        compare(before, elsewhere)
    assert list(compare(before, elsewhere, across_machines=True).values()) == [0.5]


def _every_status(measured: Measured) -> list[CellResult]:
    return [
        measured("write", 1000, 1001, 1002),
        measured("populate_write", 700, 600, 800, note="seen"),
        CellResult(Cell(4 << 30, "shared", "hugetlbfs", "read"), Status.UNAVAILABLE, reason="no pool"),
        CellResult(Cell(4 << 30, "shared", "tmpfs", "read"), Status.FAILED, (5,), "killed by SIGBUS"),
        CellResult(Cell(4 << 30, "shared", "file", "read"), Status.STOPPED, (7, 8), "stopped after 2 of 3"),
    ]


def test_a_run_comes_back_from_its_file(make_run: Make, measured: Measured, tmp_path: Path) -> None:
    run = make_run(*_every_status(measured), interrupted=True)
    jsonfile.save(run, tmp_path / "run.json")
    assert jsonfile.load(tmp_path / "run.json") == run
    assert os.listdir(tmp_path) == ["run.json"]


def test_the_document_is_what_the_documentation_says(make_run: Make, measured: Measured) -> None:
    document = json.loads(json.dumps(jsonfile.to_json(make_run(*_every_status(measured)))))
    text = (Path(__file__).parents[2] / "docs" / "bench-json.md").read_text()
    members = {*document, *document["machine"], *(name for cell in document["cells"] for name in cell)}
    assert [name for name in members if f"`{name}`" not in text] == []
    assert document["kind"] == "prefault-bench"
    assert document["schema"] == 1
    written, populated, *others = document["cells"]
    assert written["best_ms"] == 1000
    assert written["doubts"] == []
    assert populated["values_ns"] == [700_000_000, 600_000_000, 800_000_000]
    assert populated["ratio_to_write"] == 0.6
    assert populated["published_ms"] == 572.582
    assert populated["doubts"]
    assert [cell["status"] for cell in others] == ["unavailable", "failed", "stopped"]
    assert all(cell["reason"] for cell in others)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"schema": 2}, "schema 2 is unknown"),
        ({"schema": None}, "schema None is unknown"),
        ({"kind": "prefault-doctor"}, "not a result of prefault bench"),
        ({"cells": [{}]}, "damaged"),
        ({"machine": {}}, "damaged"),
    ],
)
def test_other_documents_are_refused(
    make_run: Make, measured: Measured, tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**jsonfile.to_json(make_run(measured("write", 1))), **change}))
    with pytest.raises(SchemaError, match=complaint):
        jsonfile.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_files_that_are_no_run_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(SchemaError):
        jsonfile.load(path)


def test_a_file_that_cannot_be_replaced_stays_as_it_was(
    make_run: Make, measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    path.write_text("precious")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        jsonfile.save(make_run(measured("write", 1)), path)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_symbolic_link_is_followed(make_run: Make, measured: Measured, tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to("run.json")
    jsonfile.save(make_run(measured("write", 1)), tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert jsonfile.load(tmp_path / "run.json").repeats == 3


@pytest.mark.parametrize("path", ["/dev/null", "/proc/run.json", ".", "missing/run.json", "file/run.json"])
def test_paths_that_cannot_be_written_are_refused_beforehand(tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"."):
        jsonfile.check_writable(tmp_path / path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_path_that_can_be_written_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("precious")
    jsonfile.check_writable(tmp_path / "run.json")
    assert (tmp_path / "run.json").read_text() == "precious"
    assert os.listdir(tmp_path) == ["run.json"]
