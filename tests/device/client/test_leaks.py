"""Areas opened and closed leave nothing, in the client, the server and the warden; and there may be many at once."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

import prefault.device
from prefault.sizes import PAGE_SIZE
from support import oracle, processes
from support.devices import Pattern, content

_PAGES = 256


def _first(area: prefault.device.Area) -> bytes:
    view = area.memoryview()
    found = bytes(view[:8])
    view.release()
    return found


def _held() -> dict[int, tuple[list[str], int]]:
    """Descriptors and mappings of the server and the warden, by process."""
    gc.collect()
    return {
        pid: (processes.descriptors(pid), processes.mappings(pid))
        for pid in processes.descendants(os.getpid())
        if processes.name(pid).startswith("prefault-")
    }


def _open_and_close(path: str, times: int, seed: int) -> None:
    chance = random.Random(seed)
    with prefault.device.connect(path) as client:
        for _ in range(times):
            first = chance.randrange(_PAGES)
            area = client.map(PAGE_SIZE, first * PAGE_SIZE, populate=chance.random() < 0.3)
            if chance.random() < 0.5:
                assert _first(area) == content(first)[:8]
            if chance.random() < 0.2:
                del area  # to the garbage collector
            else:
                area.close()


def _check(path: Path, times: int) -> None:
    with prefault.device.serve(Pattern(_PAGES), path) as server:
        _open_and_close(str(server.path), 20, 1)
        before, mine = _held(), oracle.descriptors()
        assert len(before) == 2  # a server and a warden
        _open_and_close(str(server.path), times, 2)

        def as_before() -> bool:
            now = _held()
            return now.keys() == before.keys() and all(
                now[pid][0] == before[pid][0] and now[pid][1] <= before[pid][1] + 8 for pid in now
            )

        assert processes.eventually(as_before), (before, _held())
        assert oracle.descriptors() == mine
    assert processes.eventually(lambda: not _held())
    assert os.listdir(path.parent) == []


def test_areas_opened_and_closed(tmp_path: Path, no_leaks: None) -> None:
    _check(tmp_path / "s", 300)


@pytest.mark.stress
@pytest.mark.timeout(1200)
def test_ten_thousand_areas_opened_and_closed(tmp_path: Path, no_leaks: None) -> None:
    _check(tmp_path / "s", 10_000)


def test_private_servers_come_and_go(no_leaks: None) -> None:
    for index in range(5):
        area = prefault.device.map(Pattern(8))
        assert _first(area) == content(0)[:8]
        if index % 2:
            del area
            gc.collect()
        else:
            area.close()
    assert processes.eventually(lambda: not _held())


def test_connections_opened_and_dropped(tmp_path: Path, no_leaks: None) -> None:
    with prefault.device.serve(Pattern(_PAGES), tmp_path / "s") as server:
        _open_and_close(str(server.path), 5, 0)
        before = _held()
        for _ in range(30):
            client = prefault.device.connect(server.path)
            area = client.map()
            assert _first(area) == content(0)[:8]
            del area, client
            gc.collect()

        def as_before() -> bool:
            now = _held()
            # Less is fine: at first the server may not yet have closed the descriptors of the last client.
            return now.keys() == before.keys() and all(now[pid][0] <= before[pid][0] for pid in now)

        assert processes.eventually(as_before), (before, _held())


def _check_at_once(path: Path, count: int) -> None:
    chance = random.Random(3)
    with prefault.device.serve(Pattern(_PAGES), path) as server, prefault.device.connect(server.path) as client:
        areas = {}
        for number in range(count):
            first = chance.randrange(_PAGES)
            areas[number] = first, client.map(PAGE_SIZE, first * PAGE_SIZE)
        for number in chance.sample(range(count), count):
            first, area = areas[number]
            assert _first(area) == content(first)[:8]
        for number in chance.sample(range(count), count):
            areas.pop(number)[1].close()


def test_a_hundred_areas_at_once(tmp_path: Path, no_leaks: None) -> None:
    _check_at_once(tmp_path / "s", 100)


@pytest.mark.stress
def test_a_thousand_areas_at_once(tmp_path: Path, no_leaks: None) -> None:
    _check_at_once(tmp_path / "s", 1000)


_ENDS_WITH_ARRAYS = """
import sys
import prefault.device
from support.devices import Pattern

own = prefault.device.map(Pattern(4)).ndarray("uint8")
with prefault.device.serve(Pattern(4), sys.argv[1]) as server:
    served = prefault.device.connect(server.path).map(populate=True).ndarray("uint8")
print(own[0], served[0])
"""


def test_a_program_that_ends_with_arrays_open_is_not_warned_of_forgotten_sockets(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", _ENDS_WITH_ARRAYS, tmp_path / "s"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{content(0)[0]} {content(0)[0]}\n"
