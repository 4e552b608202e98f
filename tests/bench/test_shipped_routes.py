"""prefault bench device on devices that ship: real routes on 2 MiB, reports and files from records, and the command."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault._system import capabilities
from prefault.bench.grid_report import console_for
from prefault.bench.jsonfile import SchemaError
from prefault.bench.machine import this_machine
from prefault.bench.results import Status
from prefault.bench.routes import buffer_routes, device_json, shipped_runner
from prefault.bench.routes.device_processes import helpers
from prefault.bench.routes.device_report import render
from prefault.bench.routes.device_results import DeviceRun
from prefault.bench.routes.shipped_results import (
    BufferRoute,
    EnclaveRoute,
    Shipped,
    ShippedCell,
    ShippedResult,
    shipped_cells,
    times_faster,
)
from prefault.device import Area
from prefault.drivers.buffers import Buffers
from support import needs, oracle

MIB = 1 << 20
SIZE = 2 * MIB
PAGES = SIZE // 4096
RECLAIMING = (
    EnclaveRoute.FAULTS_RECLAIM, EnclaveRoute.POPULATE_RECLAIM, EnclaveRoute.SCATTERED_RECLAIM, EnclaveRoute.LOAD
)  # fmt: skip


@pytest.fixture
def userfaultfd() -> None:
    for each in (capabilities.USERFAULTFD, capabilities.UFFD_MINOR_SHMEM, capabilities.UFFD_POISON):
        needs.capability(each)


def never() -> bool:
    return False


def measure(
    cells: list[ShippedCell], repeats: int = 1, stopping: Callable[[], bool] = never
) -> dict[Any, ShippedResult]:  # fmt: skip
    events = list(shipped_runner.run(cells, repeats=repeats, stopping=stopping))
    found = [event for event in events if isinstance(event, ShippedResult)]
    assert [result.cell for result in found] == cells, "one result a cell"
    return {result.cell.route: result for result in found}


# --- for real

real = pytest.mark.usefixtures("userfaultfd")


@real
def test_pages_of_an_enclave_come_in_by_each_route() -> None:
    found = measure(shipped_cells("enclave", (SIZE,)), repeats=2)
    assert {(result.status, result.reason) for result in found.values()} == {(Status.MEASURED, None)}
    assert {len(result.values_ns) for result in found.values()} == {2}, "enclaves of one repetition are gone in the next"
    by_faults = {EnclaveRoute.FAULTS, EnclaveRoute.INSTRUCTIONS, EnclaveRoute.FAULTS_RECLAIM}
    for route, result in found.items():
        assert result.pages == PAGES
        assert result.faults == (PAGES if route in by_faults else 0)
        assert result.evicted_bytes == (SIZE if route in RECLAIMING else 0)
        assert result.bookkeeping_bytes is None
        assert all(result.server_cpu_ns)
    assert helpers() == {}


@real
def test_a_buffer_object_comes_in_and_moves_by_each_route(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    mapped: list[Area] = []
    move, of = Buffers.move, Buffers.map

    def remember(buffers: Buffers, name: str, **options: Any) -> Area:
        mapped.append(of(buffers, name, **options))
        return mapped[-1]

    def count(buffers: Buffers, name: str, placement: str) -> None:
        area = mapped[-1]
        moved.append((placement, oracle.present_bytes(area.address, len(area)), buffers.describe(name).placement))
        move(buffers, name, placement)

    monkeypatch.setattr(Buffers, "map", remember)
    monkeypatch.setattr(Buffers, "move", count)
    found = measure(shipped_cells("buffers", (SIZE,)))
    assert {(result.status, result.reason) for result in found.values()} == {(Status.MEASURED, None)}
    assert {result.pages for result in found.values()} == {PAGES}
    faults = {route: result.faults for route, result in found.items() if result.faults}
    assert faults == {
        BufferRoute.FAULTS: PAGES, BufferRoute.FAULT_AROUND: PAGES // 16, BufferRoute.HUGE_FAULTS: 1,
        BufferRoute.BOOKKEEPING: PAGES // 16,
    }  # fmt: skip
    assert moved == [
        ("system", 0, "vram"), ("system", SIZE, "vram"), ("vram", 0, "system"), ("vram", SIZE, "system")
    ], "with and without page-table entries"  # fmt: skip
    taken = {route: result.bookkeeping_bytes for route, result in found.items()}
    assert taken.pop(BufferRoute.BOOKKEEPING) is not None
    assert set(taken.values()) == {None}
    assert helpers() == {}


@real
@pytest.mark.parametrize("route", [EnclaveRoute.POPULATE, BufferRoute.HUGE_FAULTS])
def test_a_route_that_brings_nothing_in_fails(route: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "populate", lambda _: None)
    monkeypatch.setattr(buffer_routes, "touch", lambda *_: None)
    device: Shipped = "enclave" if isinstance(route, EnclaveRoute) else "buffers"
    result = measure([ShippedCell(device, SIZE, route)])[route]
    assert (result.status, result.reason) == (Status.FAILED, "only 0 bytes of 2.0 MiB came in")
    assert (result.us_per_page, result.mb_per_second, result.statistics) == (None, None, None)


@real
def test_stopped_before_and_within_a_repetition() -> None:
    wanted = [ShippedCell("buffers", SIZE, BufferRoute.FAULTS), ShippedCell("enclave", SIZE, EnclaveRoute.FAULTS)]
    found = measure(wanted, stopping=lambda: True)
    assert {result.reason for result in found.values()} == {"stopped before its turn"}
    for cell in wanted:
        # The group, the repetition, then the loop that touches.
        answers = iter([False, False])
        result = measure([cell], stopping=lambda answers=answers: next(answers, True))[cell.route]  # type: ignore[misc]
        assert (result.status, result.reason) == (Status.STOPPED, "stopped after 0 of 1 repetitions")
    assert helpers() == {}


@pytest.mark.parametrize("device", ["enclave", "buffers"])
def test_more_memory_than_there_is(device: Shipped) -> None:
    found = measure(shipped_cells(device, (1 << 50,)))
    assert {result.status for result in found.values()} == {Status.UNAVAILABLE}
    assert all("it takes" in (result.reason or "") and "are available" in (result.reason or "") for result in found.values())


@pytest.mark.parametrize("device", ["enclave", "buffers"])
def test_without_userfaultfd_every_cell_says_why(device: Shipped) -> None:
    from prefault.testing import without

    with without("userfaultfd"):
        found = measure(shipped_cells(device, (SIZE,)))
    assert not {result.status for result in found.values()} & {Status.MEASURED, Status.STOPPED}
    assert all("userfaultfd" in (result.reason or "") for result in found.values())


# --- from records


def example() -> DeviceRun:
    found = []
    for cell in [*shipped_cells("enclave", (64 * MIB,)), *shipped_cells("buffers", (64 * MIB,))]:
        value = 400_000_000 if "aults" in cell.route else 10_000_000
        found.append(ShippedResult(cell, Status.MEASURED, (value, value + 1000), None, None, (5, 6), 16384, 3, 4096))
    found[2] = replace(found[2], status=Status.FAILED, values_ns=(), reason="not here")
    found[-1] = replace(found[-1], bookkeeping_bytes=32 * 1024)
    return DeviceRun(
        machine=this_machine(), started="2026-01-02T03:04:05+00:00", seconds=1.5, repeats=2, interrupted=False,
        results=tuple(found), colocate=False, user_mode_only=False,
    )  # fmt: skip


def text_of(run: DeviceRun, width: int) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8")
    console = console_for(stream)
    console.width = width
    render(run, console)
    stream.flush()
    return raw.getvalue().decode()


@pytest.mark.parametrize("width", [80, 100])
def test_the_table(width: int) -> None:
    text = text_of(example(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "enclave page cache of 64.0 MiB, an enclave of the same size" in text
    assert "EAUG, EACCEPT, touch: failed: not here" in text
    row = next(line for line in text.splitlines() if line.startswith("populate, reclaim"))
    assert row.split()[2:] == ["10", "10", "0.61", "6400", "3", "40x"]
    assert "0.5 bytes of bookkeeping for each KiB" in text


def test_json_round_trip_and_document() -> None:
    run = example()
    document = json.loads(json.dumps(device_json.to_json(run)))
    assert device_json.from_json(document) == run
    page = (Path(__file__).parents[2] / "docs" / "bench-json.md").read_text().partition("A cell with another `device`")[2]
    named = {*document["cells"][0], *EnclaveRoute, *BufferRoute, "enclave", "buffers"}
    assert {name for name in named if f"`{name}`" not in page} == set()
    document["cells"][0]["device"] = "another"
    with pytest.raises(SchemaError, match="damaged"):
        device_json.from_json(document)


def test_a_route_is_compared_page_for_page_and_with_what_was_measured() -> None:
    faults = ShippedResult(ShippedCell("enclave", SIZE, EnclaveRoute.FAULTS), Status.MEASURED, (2000,), pages=10)
    other = ShippedResult(ShippedCell("enclave", SIZE, EnclaveRoute.INSTRUCTIONS), Status.MEASURED, (500,), pages=5)
    assert times_faster([faults, other]) == {other.cell: 2}
    assert times_faster([other, replace(faults, status=Status.FAILED)]) == {}


# --- the command


def _prefault(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60, check=False)


@real
def test_the_command_prints_tables_and_keeps_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    names = ("--device", "enclave", "--device", "buffers", "--device", "enclave")
    done = _prefault("-m", "prefault", "bench", "device", *names, "--size", "2MiB", "--repeats", "1", "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "17 of 17: buffer object of 2.0 MiB: bookkeeping by page" in done.stderr
    assert "bytes of bookkeeping for each KiB" in done.stdout
    run = device_json.from_json(json.loads(path.read_text()))
    assert [result.cell.route for result in run.shipped] == [*EnclaveRoute, *BufferRoute]
    assert run.routes == ()


def test_a_missing_package_names_the_extra_before_anything_is_measured() -> None:
    script = "import sys; sys.modules['cryptography'] = None; from prefault.cli import main; sys.exit(main(sys.argv[1:]))"
    done = _prefault("-c", script, *("bench", "device", "--device", "buffers", "--device", "enclave", "--size", "2 MiB"))
    assert done.returncode == 1
    assert "1 of 17" not in done.stderr
    assert "pip install 'prefault[enclave]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["enclave", "--size", "1 MiB"], "--size 1 MiB is not a multiple of 2 MiB"),
        (["buffers", "--frames", "cold"], "are for --device pattern"),
        (["another"], "is not one of 'pattern', 'enclave', 'buffers'"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str) -> None:
    done = _prefault("-m", "prefault", "bench", "device", "--device", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
