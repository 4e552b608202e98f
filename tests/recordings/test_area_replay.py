"""Device memory and remote files in recordings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest

import prefault.device
from prefault.drivers import area_of, open_remote
from prefault.recordings.own_recording import recording
from prefault.recordings.recorder import record_command
from prefault.recordings.recording_file import Recording, load
from prefault.recordings.replaying import replay
from support import file_beds, touching
from support.file_beds import PAGE
from support.http_server import HttpServer

MIB = 1 << 20

READER = """
import sys
from prefault import open_remote
from prefault.drivers import area_of
array = open_remote(sys.argv[1], fault_around=("4 KiB", "4 KiB"))
print(sum(int(array[int(page) * 4096 + 9]) for page in sys.argv[2:]))
print(area_of(array).stats().missing)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpServer]:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "data.bin").write_bytes(numpy.random.default_rng(1).bytes(4 * MIB))
    with HttpServer(tmp_path / "web") as made:
        yield made


def _command(server: HttpServer, *pages: int) -> list[str]:
    return [sys.executable, "-c", READER, server.url("data.bin") + "?secret=1", *map(str, pages)]


def _pages(found: Recording) -> list[int]:
    return [offset // PAGE for area in found.areas for offset in area.runs[::2]]


@pytest.mark.parametrize("way", ["trace", "residency"])
def test_a_command_with_a_remote_file_is_recorded_and_gets_the_pages_in_one_go(
    way: str, server: HttpServer, tmp_path: Path
) -> None:
    if way == "trace":
        touching.tracing()
    pages = (700, 3, 90, 4, 1000)
    path = tmp_path / "a.rec"
    program = [sys.executable, "-m", "prefault"]
    done = subprocess.run(
        [*program, "record", "-o", path, "--way", way, "--", *_command(server, *pages)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "20.0 KiB of device memory" in done.stderr
    found = load(path)
    assert _pages(found) == list(pages)
    assert found.areas[0].source == server.url("data.bin") + "?..."
    assert b"secret" not in path.read_bytes().replace(b"?secret=1", b"", 1)  # in the command, and nowhere else
    again = subprocess.run(
        [*program, "replay", "--no-progress", path, "--", *_command(server, *pages)], capture_output=True, text=True
    )
    assert again.returncode == 0
    assert done.stdout.splitlines()[1] == "5"
    assert again.stdout.splitlines() == [done.stdout.splitlines()[0], "0"]
    done = subprocess.run([*program, "replay", path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "device memory that is not mapped here" in done.stdout


def test_a_part_of_a_program_is_recorded_and_replayed(server: HttpServer, tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    local = file_beds.make(tmp_path / "local", 64 * PAGE)
    file_beds.evict(local)
    around = ("4 KiB", "4 KiB")
    first, other = (
        open_remote(server.url("data.bin"), fault_around=around),
        open_remote(server.url("data.bin"), fault_around=around),
    )
    assert first[9 * PAGE] is not None  # before the block: not recorded
    with recording(path, way="residency", files=[local]) as recorded:
        assert first[5 * PAGE] == other[5 * PAGE]
        assert other[7 * PAGE] is not None
        del other
        file_beds.touch(local, 3)
    found = load(path)
    assert recorded.result == found
    assert sorted(set(_pages(found))) == [5, 7]
    assert [file.edges for file in found.files if file.path == os.fsencode(local)] == [touching.edges_of(3)]
    file_beds.evict(local)
    fresh = open_remote(server.url("data.bin"), fault_around=around)
    result = replay(path)
    assert result.area_bytes >= 2 * PAGE
    assert result.skipped_areas == ()
    assert file_beds.cached_pages(local) == 1
    before = area_of(fresh).stats().missing
    assert fresh[[5 * PAGE, 7 * PAGE]] is not None
    assert area_of(fresh).stats().missing == before


def test_another_version_of_a_remote_file_is_skipped(server: HttpServer, tmp_path: Path) -> None:
    with recording(way="residency") as recorded:
        array = open_remote(server.url("data.bin"))
        assert array[0] is not None
    assert recorded.result is not None
    assert recorded.result.areas
    (tmp_path / "web" / "data.bin").write_bytes(numpy.random.default_rng(2).bytes(4 * MIB))
    os.utime(tmp_path / "web" / "data.bin", (1, 1))
    changed = open_remote(server.url("data.bin"))
    result = replay(recorded.result, areas=[area_of(changed)])
    assert result.skipped_areas == (server.url("data.bin"),)
    with pytest.raises(ValueError, match="the log is of"):
        area_of(changed).replay(area_of(array).access_log())


@pytest.mark.parametrize("way", ["trace", "residency"])
def test_pages_of_files_that_a_block_touches(way: str, tmp_path: Path) -> None:
    if way == "trace":
        touching.tracing()
    local = file_beds.make(tmp_path / "local", 64 * PAGE)
    file_beds.evict(local)
    with recording(way=way, files=[local]) as recorded:  # type: ignore[arg-type]
        file_beds.touch(local, 3, 9)
    assert recorded.result is not None
    assert recorded.result.way == way
    found = [file.edges for file in recorded.result.files if file.path == os.fsencode(local)]
    assert found == [touching.edges_of(3, 9)]


def test_a_device_that_another_process_serves_gets_its_pages_from_replay(tmp_path: Path) -> None:
    """The recorded pages are supplied in the server, where the next client finds them."""
    socket = tmp_path / "socket"
    program = (
        "import sys, prefault.device\n"
        f"with prefault.device.connect({str(socket)!r}) as client, client.map() as area:\n"
        "    view = area.ndarray(); print(int(view[5 * 4096]) + int(view[60 * 4096])); del view\n"
    )
    serve = [sys.executable, "-m", "prefault", "device", "serve", "support.devices:Pattern", "--socket", str(socket)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    path = tmp_path / "a.rec"

    def served() -> subprocess.Popen[str]:
        process = subprocess.Popen(serve, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        assert "serving" in process.stdout.readline()
        return process

    with served() as server:
        from prefault.recordings.area_replay import CommandLogs

        with CommandLogs() as logs:
            done = record_command(
                [sys.executable, "-c", program], way="residency", environment=logs.environment, areas=logs.areas
            )
        done.recording.save(path)
        server.terminate()
    assert sorted(_pages(done.recording)) == [5, 60]
    with served() as server:
        result = replay(done.recording)
        assert result.skipped_areas == ()
        with prefault.device.connect(socket) as client, client.map() as area:
            view = area.ndarray()
            assert view[[5 * PAGE, 60 * PAGE]] is not None
            del view
            statistics = area.stats()
            assert (statistics.missing, statistics.supplied_pages) == (0, 0)
        server.terminate()
