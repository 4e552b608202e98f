"""Measure replay: major faults that it removes, bytes that it reads, and how much sooner a program starts.

Each row alternates cold runs and runs after a replay. The files are evicted before each, and are copies that no other
process has mapped. Prints the tables of docs/results/replay.md, and asserts nothing: the reader judges the figures. Needs
root (the trace), and installs scipy and duckdb into a directory of its own where they are missing.

python bench/replay.py [imports] [query] [fuse] [remote] [--rounds 5] [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import prefault
from prefault.recordings.area_replay import CommandLogs, replaying_environment
from prefault.recordings.recorder import record_command
from prefault.sizes import MIB, PAGE_SIZE, format_size

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from support import fuse_files, touching
from support.http_server import HttpServer

_LATENCY_S = 0.005


class _Run(NamedTuple):
    """Seconds, major faults and bytes that came from a disk, of one program."""

    seconds: float
    faults: int
    disk_bytes: int


_MEASURE = """
import os, resource, subprocess, sys, time
began = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(status, time.perf_counter() - began, used.ru_majflt, used.ru_inblock * 512)
"""


def _run(command: list[str], environment: dict[str, str] | None = None) -> _Run:
    done = subprocess.run(
        [sys.executable, "-S", "-c", _MEASURE, *command], capture_output=True, text=True, check=True, env=environment
    )
    status, seconds, faults, disk_bytes = done.stdout.split()
    assert status == "0", done.stderr
    return _Run(float(seconds), int(faults), int(disk_bytes))


def _only(recording: prefault.Recording, directory: Path) -> prefault.Recording:
    """Keep the files below a directory: others are in use by this very program and cannot be evicted."""
    files = [file for file in recording.files if file.path.startswith(os.fsencode(directory) + b"/")]
    return prefault.Recording(recording.way, recording.made_ns, recording.command, recording.complete, [], files, [])


class _Row(NamedTuple):
    """Runs of one program, cold and after a replay, and how many times what was missing the replay brought in."""

    name: str
    cold: list[_Run]
    warm: list[_Run]
    replays: list[float]
    recorded_bytes: int
    over: float


def _median(values: Iterable[float]) -> str:
    return f"{statistics.median(values):.3f}"


def _spread(values: Iterable[float]) -> str:
    found = sorted(values)
    return f"{found[0]:.3f} to {found[-1]:.3f}"


def _print(rows: list[_Row]) -> None:
    print("## Major faults and bytes\n")
    print("| program | recorded | read at replay, times what was missing | major faults, cold | after replay | removed |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        cold, warm = ([run.faults for run in runs] for runs in (row.cold, row.warm))
        before, after = statistics.median(cold), statistics.median(warm)
        removed = f"{100 * (1 - after / before):.1f} %" if before else ""
        print(
            f"| {row.name} | {format_size(row.recorded_bytes)} | {row.over:.2f} | {before:.0f} ({min(cold)} to {max(cold)})"
            f" | {after:.0f} ({min(warm)} to {max(warm)}) | {removed} |"
        )
    print("\n## Time\n")
    print(
        "| program | start cold s | spread s | after replay s | spread s | times faster | replay s | with it, times faster |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cold_s, warm_s = ([run.seconds for run in runs] for runs in (row.cold, row.warm))
        before, after, replaying = statistics.median(cold_s), statistics.median(warm_s), statistics.median(row.replays)
        print(
            f"| {row.name} | {_median(cold_s)} | {_spread(cold_s)} | {_median(warm_s)} | {_spread(warm_s)}"
            f" | {before / after:.1f} | {replaying:.3f} | {before / (after + replaying):.1f} |"
        )


def _measure(name: str, command: list[str], directory: Path, evict: Callable[[], None], rounds: int) -> _Row:
    _run(command)  # bytecode files, and everything that is not measured, into the page cache
    evict()
    recording = _only(record_command(command, way="trace").recording, directory)
    cold, warm, replays = [], [], []
    over = 0.0
    for _ in range(rounds):
        evict()
        cold.append(_run(command))
        evict()
        before = _cached(directory)
        began = time.perf_counter()
        result = prefault.replay(recording)
        replays.append(time.perf_counter() - began)
        assert result.complete, result
        came = _cached(directory) - before
        over = max(over, came / max(1, result.bytes))
        warm.append(_run(command))
    return _Row(name, cold, warm, replays, recording.file_bytes, over)


def _cached(directory: Path) -> int:
    """Bytes of a tree in the page cache."""
    return sum(file.cached_pages or 0 for file in prefault.status(directory).files) * PAGE_SIZE


def _evict_tree(directory: Path) -> Callable[[], None]:
    return lambda: (prefault.evict(directory, sync=True), None)[1]


def _installed(*names: str) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is not None]


def _fetched(name: str, directory: Path) -> bool:
    """Install a package and what it needs into a directory."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--target",
        str(directory),
        name,
    ]
    return subprocess.run(pip, check=False).returncode == 0


def _copied(names: list[str], directory: Path) -> Path:
    """Copy packages, with the libraries beside them."""
    for name in names:
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        source = Path(found.origin).parent
        for each in (source, source.with_name(f"{name}.libs")):
            if each.is_dir():
                shutil.copytree(each, directory / each.name)
    return directory


def _imports(rounds: int, work: Path) -> _Row:
    directory = work / "packages"
    if _installed("torch"):
        names = ["torch", "numpy"]
        _copied(names, directory)
    else:
        names = ["numpy", "scipy.linalg"]
        if not _fetched("scipy", directory):
            names = ["numpy", *_installed("pyarrow")]
            _copied(names, directory)
    program = f"import sys; sys.path.insert(0, {str(directory)!r}); import {', '.join(names)}"
    return _measure(
        f"import {', '.join(names)}", [sys.executable, "-S", "-c", program], directory, _evict_tree(directory), rounds
    )


def _query(rounds: int, work: Path) -> _Row | None:
    """Run a query over one column of four, the database and its library cold."""
    library = work / "duckdb"
    if not _fetched("duckdb", library):
        print("DuckDB cannot be installed: its row is left out", file=sys.stderr)
        return None
    start = f"import sys; sys.path.insert(0, {str(library)!r}); import duckdb\n"
    database = str(work / "data.duckdb")
    program = (
        f"{start}with duckdb.connect(sys.argv[1]) as c:\n"
        "    c.execute('create table t as select range a, random() b, random() c, random() d from range(4000000)')"
    )
    subprocess.run([sys.executable, "-S", "-c", program, database], check=True)
    query = (
        f"{start}with duckdb.connect(sys.argv[1], read_only=True) as c:\n"
        "    c.execute('select sum(b) from t where a % 7 = 1').fetchall()"
    )
    return _measure("DuckDB query", [sys.executable, "-S", "-c", query, database], work, _evict_tree(work), rounds)


def _fuse(rounds: int, work: Path, pages: int) -> _Row:
    """Touch pages here and there in a file on a file system where each request takes 5 ms."""
    directory = work / "fuse"
    with fuse_files.mounted(directory, {"file": 256 * MIB}, latency_s=_LATENCY_S) as bed:
        chosen = random.Random(1).sample(range(256 * MIB // PAGE_SIZE), pages)
        command = touching.command(touching.BY_MAPPING, bed / "file", *chosen)
        name = f"{pages} pages of a file on FUSE, 5 ms for each request"
        return _measure(name, command, directory, lambda: (prefault.evict(bed / "file"), None)[1], rounds)


_READER = """
import sys
from prefault import open_remote
from prefault.drivers import area_of
array = open_remote(sys.argv[1], fault_around=("4 KiB", "4 KiB"))
sum(int(array[int(page) * 4096]) for page in sys.argv[2:])
with open(sys.argv[1].rpartition("/")[2] + ".faults", "a") as file: print(area_of(array).stats().missing, file=file)
"""


def _remote(rounds: int, work: Path, pages: int) -> _Row:
    """Touch pages of a remote array, each request of which takes 5 ms."""
    directory = work / "web"
    directory.mkdir()
    (directory / "data.bin").write_bytes(os.urandom(64 * MIB))
    os.chdir(work)
    faults = work / "data.bin.faults"
    with HttpServer(directory, latency_s=_LATENCY_S) as server:
        chosen = random.Random(2).sample(range(64 * MIB // PAGE_SIZE), pages)
        command = [sys.executable, "-c", _READER, server.url("data.bin"), *map(str, chosen)]
        with CommandLogs() as logs:
            recording = record_command(command, way="residency", environment=logs.environment, areas=logs.areas).recording
        cold, warm = [], []
        sent = 0
        for _ in range(rounds):
            faults.unlink(missing_ok=True)
            run = _run(command)
            cold.append(run._replace(faults=int(faults.read_text())))
            faults.unlink()
            before = server.sent()
            with replaying_environment(recording) as environment:
                run = _run(command, environment)
            sent = max(sent, server.sent() - before)
            warm.append(run._replace(faults=int(faults.read_text())))
        name = f"{pages} pages of a remote array, 5 ms for each request"
        return _Row(name, cold, warm, [0.0], recording.area_bytes, sent / max(1, recording.area_bytes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="imports, query, fuse, remote; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds, fewer pages")
    arguments = parser.parse_args()
    touching.tracing()
    rounds, pages = (2, 100) if arguments.quick else (arguments.rounds, 1000)
    print(f"`python bench/replay.py {' '.join(sys.argv[1:])}".rstrip() + "`", end=", ")
    print(f"{time.strftime('%Y-%m-%d')}, Linux {os.uname().release}, {os.cpu_count()} CPUs, {rounds} rounds,", end=" ")
    print(f"load {os.getloadavg()[0]:.1f} at the beginning", end="", flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="prefault-bench-", dir="/var/tmp") as directory:
        measures: dict[str, Callable[[Path], _Row | None]] = {
            "imports": lambda work: _imports(rounds, work),
            "query": lambda work: _query(rounds, work),
            "fuse": lambda work: _fuse(rounds, work, pages),
            "remote": lambda work: _remote(rounds, work, pages),
        }
        for name in arguments.what or measures:
            work = Path(directory, name)
            work.mkdir()
            row = measures[name](work)
            if row is not None:
                rows.append(row)
    print(f" and {os.getloadavg()[0]:.1f} at the end.\n")
    _print(rows)


if __name__ == "__main__":
    main()
