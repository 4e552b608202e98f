"""prefault bench device: real routes on a small device, and reports and files from records that nobody measured."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from prefault._system import capabilities, hugetlb
from prefault._system.capabilities import UFFD_KERNEL_FAULTS
from prefault.bench.grid_report import console_for
from prefault.bench.jsonfile import SchemaError
from prefault.bench.machine import BenchMachine
from prefault.bench.results import Status
from prefault.bench.routes import device_json, device_routes, device_runner
from prefault.bench.routes.device_driver import BenchDevice
from prefault.bench.routes.device_report import render
from prefault.bench.routes.device_results import (
    FRAMES,
    PAGE_SIZES,
    Counts,
    DeviceRun,
    Route,
    RouteCell,
    RouteResult,
    cells,
    ratios,
    system_calls,
)
from prefault.device import Area
from support import needs
from support.children import Child

MIB = 1 << 20
SIZE = 2 * MIB
PAGES = SIZE // 4096

MACHINE = BenchMachine(
    kernel="Linux 6.1.0 #1", architecture="x86_64", cpu="A processor", cpus=4, usable_cpus=2, memory_bytes=8 << 30,
    page_bytes=4096, virtual=True, thp={"enabled": "madvise"}, hugetlb_pages={"2097152": 0}, python="3.11.0",
    numpy="2.0.0", prefault="0.1.0",
)  # fmt: skip


def never() -> bool:
    return False


def measure(wanted: list[RouteCell], **options: Any) -> dict[RouteCell, RouteResult]:
    arguments = {"repeats": 1, "colocate": False, "stopping": never, **options}
    events = list(device_runner.run(wanted, **arguments))
    found = [event for event in events if isinstance(event, RouteResult)]
    assert sorted(str(result.cell) for result in found) == sorted(map(str, wanted)), "one result a cell"
    return {result.cell: result for result in found}


@pytest.fixture(scope="module")
def userfaultfd() -> None:
    for each in (capabilities.USERFAULTFD, capabilities.UFFD_MINOR_SHMEM, capabilities.UFFD_POISON):
        needs.capability(each)


# --- for real

real = pytest.mark.usefixtures("userfaultfd")


@pytest.fixture(scope="module")
def results(userfaultfd: None) -> dict[RouteCell, RouteResult]:
    return measure(cells((SIZE,), (4096,), FRAMES), repeats=2)


@pytest.mark.parametrize("frames", FRAMES)
@pytest.mark.parametrize("route", list(Route))
def test_each_route_is_measured_and_does_what_it_is_called(
    results: dict[RouteCell, RouteResult], route: Route, frames: Any
) -> None:
    result = results[RouteCell(SIZE, 4096, frames, route)]
    if route is Route.KERNEL:
        needs.capability(capabilities.UFFD_KERNEL_FAULTS)
        needs.capability(capabilities.MADV_POPULATE)
    assert (result.status, result.reason) == (Status.MEASURED, None)
    assert len(result.values_ns) == len(result.map_ns) == 2
    counts = result.counts
    assert counts is not None
    assert counts.supplied_pages == (PAGES if frames == "cold" else 0)
    if route in (Route.TOUCH, Route.KERNEL):
        assert counts.server_faults == PAGES
        assert counts.populated_pages == 0
        assert counts.system_calls > PAGES
        assert counts.server_reads is None or counts.server_reads > 0
    else:
        assert counts.server_faults == 0
        assert counts.populated_pages == PAGES
        assert counts.system_calls < 16
    if route is Route.TOUCH:
        assert counts.client_faults >= PAGES
    else:
        assert counts.client_faults < PAGES
    if route is Route.LATER:
        assert result.map_ns == (0, 0)
    else:
        assert all(0 < mapped <= total for mapped, total in zip(result.map_ns, result.values_ns, strict=True))


@real
def test_a_route_that_gives_wrong_bytes_fails_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_routes, "CONTENT", 0x5A)
    found = measure(cells((SIZE,), (4096,), ("ready",)))
    if not UFFD_KERNEL_FAULTS.available:
        found = {cell: result for cell, result in found.items() if cell.route is not Route.KERNEL}
    assert {result.status for result in found.values()} == {Status.FAILED}
    assert {result.statistics for result in found.values()} == {None}
    reasons = {result.cell.route: result.reason for result in found.values()}
    assert reasons.pop(Route.TOUCH) == "a page that was touched does not hold what the device does"
    assert set(reasons.values()) == {"the memory does not hold what the device does"}


@real
def test_a_route_that_populates_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Area, "populate", lambda _: None)
    cell = RouteCell(SIZE, 4096, "cold", Route.SECOND_CALL)
    assert measure([cell])[cell].reason == "only 0 bytes of 2.0 MiB were populated"


@real
def test_stopped_before_and_in_between() -> None:
    wanted = cells((SIZE,), (4096,), ("ready",))
    assert {result.status for result in measure(wanted, stopping=lambda: True).values()} == {Status.STOPPED}
    asked: Iterator[bool] = iter([False] * 4)
    found = measure(wanted, repeats=2, stopping=lambda: next(asked, True))
    assert [result.status for result in found.values()] == [Status.STOPPED] * 5
    assert "stopped after 1 of 2 repetitions" in {result.reason for result in found.values()}


def test_no_process_is_left(results: dict[RouteCell, RouteResult]) -> None:
    assert results
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if not children.exists():
        needs.missing("the kernel does not list children (CONFIG_PROC_CHILDREN)")
    names = [Path(f"/proc/{pid}/comm").read_text() for pid in children.read_text().split()]
    assert not [name for name in names if name.startswith("prefault")]


@real
def test_more_memory_than_there_is() -> None:
    cell = RouteCell(1 << 50, 4096, "ready", Route.TOUCH)
    result = measure([cell])[cell]
    assert result.status is Status.UNAVAILABLE
    assert "it takes 1.0 PiB of memory" in (result.reason or "")


def test_without_userfaultfd_every_cell_says_why() -> None:
    from prefault.testing import without

    with without("userfaultfd"):
        found = measure(cells((SIZE,), (4096,), ("ready",)))
    assert {result.status for result in found.values()} == {Status.UNAVAILABLE}
    assert all("userfaultfd" in (result.reason or "") for result in found.values())


@real
def test_as_an_ordinary_user_the_kernels_own_route_is_not_open(monkeypatch: pytest.MonkeyPatch) -> None:
    needs.root("become another user")
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        needs.missing("vm.unprivileged_userfaultfd gives every user the right")

    def ask() -> list[tuple[str, str, str | None]]:
        os.setuid(65534)
        # The interpreter of a test run may lie where others cannot read it: the server is a fork then.
        monkeypatch.setattr(BenchDevice, "recipe", lambda _: None)
        found = measure(cells((SIZE,), (4096,), ("ready",)))
        return [(result.cell.route.value, result.status.value, result.reason) for result in found.values()]

    with Child(ask) as process:
        found = {route: (status, reason) for route, status, reason in process.result()}
    kernel = found.pop(Route.KERNEL.value)
    assert kernel[0] == "unavailable"
    assert "EFAULT" in (kernel[1] or "")
    assert set(found.values()) == {("measured", None)}


@real
def test_two_mib_pages_and_the_pool_is_as_before(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(8)  # or a skip: the machine can have so many
    hugetlb_pool(0)
    before = hugetlb.read_pool(needs.HUGE).total
    found = measure(cells((2 * SIZE,), (needs.HUGE,), ("ready",)))
    touched = found[RouteCell(2 * SIZE, needs.HUGE, "ready", Route.TOUCH)]
    assert touched.status is Status.MEASURED
    assert touched.note == "in hugetlb pages"
    assert touched.counts is not None
    assert touched.counts.server_faults == 2
    assert hugetlb.read_pool(needs.HUGE).total == before


# --- from records


def counts(**changes: Any) -> Counts:
    return replace(Counts(512, 512, 0, 0, 512, 500, 1024), **changes)


def example() -> DeviceRun:
    found = []
    for frames, factor in (("ready", 1), ("cold", 3)):
        for index, cell in enumerate(cells((64 * MIB,), PAGE_SIZES, (frames,))):  # type: ignore[arg-type]
            value = 250_000_000 * factor // (1 + 40 * (index % 5))
            found.append(RouteResult(cell, Status.MEASURED, (value, value + 1000), map_ns=(1000, 2000), counts=counts()))
    found[4] = replace(found[4], status=Status.UNAVAILABLE, values_ns=(), map_ns=(), counts=None, reason="not here")
    found[7] = replace(found[7], note="in hugetlb pages")
    return DeviceRun(
        machine=MACHINE, started="2026-01-02T03:04:05+00:00", seconds=1.5, repeats=2, interrupted=False,
        results=tuple(found), colocate=False, user_mode_only=True,
    )  # fmt: skip


def text_of(run: DeviceRun, width: int) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="utf-8")
    console = console_for(stream)
    console.width = width
    render(run, console)
    stream.flush()
    return raw.getvalue().decode()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table(width: int) -> None:
    text = text_of(example(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "64.0 MiB in 4.0 KiB pages, frames ready" in text
    assert "MADV_POPULATE_READ: unavailable: not here" in text
    assert "user mode only" in text
    row = next(line for line in text.splitlines() if line.startswith("map, then populate"))
    assert row.split()[3:] == ["6.1", "6.1", "0.001", "0.372", "512", "512", "1024", "41x"]
    interrupted = replace(example(), interrupted=True)
    assert "Interrupted: 19 of 20 cells are complete." in text_of(interrupted, width)


def test_json_round_trip_and_document() -> None:
    run = example()
    document = json.loads(json.dumps(device_json.to_json(run)))
    assert device_json.from_json(document) == run
    cell = document["cells"][1]
    assert cell["us_per_page"] == pytest.approx(250_000 / 41 / (64 * MIB // 4096), rel=1e-6)
    assert cell["times_faster_than_touch"] == pytest.approx(41)
    page = (Path(__file__).parents[2] / "docs" / "bench-json.md").read_text().partition("bench device --json")[2]
    named = {*document, *cell, *asdict(counts())} - {"kind", "schema"}
    assert {name for name in named if f"`{name}`" not in page} == set()
    assert {route.value for route in Route if f"`{route.value}`" not in page} == set()


@pytest.mark.parametrize("damage", [{"kind": "prefault-bench"}, {"schema": 2}, {"cells": [{}]}, {"machine": {}}])
def test_another_document_is_refused(damage: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        device_json.from_json({**device_json.to_json(example()), **damage})


def test_ratios_only_where_both_are_measured() -> None:
    run = example()
    found = ratios(run.routes)
    first, kernel = run.routes[0].cell, run.routes[4].cell
    assert kernel not in found
    assert found[first].to_touch == 1
    failed = [replace(result, status=Status.FAILED) for result in run.routes[:1]]
    assert ratios([*failed, *run.routes[1:]])[run.routes[1].cell].to_touch is None


def test_system_calls_by_design() -> None:
    assert system_calls(Route.TOUCH, 512, None, 1, 1) == 1024
    assert system_calls(Route.TOUCH, 512, 100, 1, 1) == 612
    assert system_calls(Route.KERNEL, 512, 512, 1, 4) == 1028
    assert {system_calls(route, 0, 0, 64, 32) for route in (Route.SECOND_CALL, Route.AT_MAP_TIME, Route.LATER)} == {137}


# --- the command


def _prefault(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefault", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@real
def test_the_command_prints_a_table_and_keeps_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    done = _prefault(
        *("bench", "device", "--quick", "--size", "2 MiB", "--page-size", "4 KiB", "--repeats", "1", "--json", str(path))
    )
    assert done.returncode == 0, done.stderr
    assert "2.0 MiB in 4.0 KiB pages, frames ready" in done.stdout
    assert "5 of 5: " in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    run = device_json.from_json(json.loads(path.read_text()))
    assert [result.cell.route for result in run.results] == list(Route)
    assert not run.interrupted
    assert run.machine.kernel.startswith("Linux")


@real
def test_ctrl_c_ends_it_and_what_was_measured_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    options = ("--size", "64 MiB", "--page-size", "4 KiB", "--frames", "ready", "--repeats", "500", "--json", str(path))
    process = subprocess.Popen(
        [sys.executable, "-m", "prefault", "bench", "device", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline().startswith("1 of 5: ")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Interrupted: 0 of 5 cells are complete." in out
    run = device_json.from_json(json.loads(path.read_text()))
    assert run.interrupted
    assert {result.status for result in run.results} == {Status.STOPPED}
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["device", "--page-size", "8 KiB"], "pages of a device are 4 KiB or 2 MiB"),
        (["device", "--size", "1 MiB"], "--size 1 MiB is not a multiple of 2 MiB"),
        (["device", "--size", "much"], "--size"),
        (["--quick", "device"], "options of 'device' come after its name"),
        (["device", "--json", "/proc/nowhere/run.json"], "cannot be written"),
    ],
)
def test_wrong_calls(arguments: list[str], words: str) -> None:
    done = _prefault("bench", *arguments)
    assert done.returncode in (1, 2)
    assert words in done.stderr
    assert "Traceback" not in done.stderr
