"""Trees of many files: time and memory for each file, and `status` beside vmtouch(8) and a program in C.

    python bench/trees.py            100 000 small files, and 1 000 files of 2 MiB
    python bench/trees.py --quick    a tenth of both

Each figure of a comparison is the median of alternating runs. Time is that of the work, without the start of the program;
the start is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import prefault

_COUNT = """
import json, resource, sys, time
import prefault
prefault.status, prefault.warm, prefault.evict
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.perf_counter()
result = {call}
took = time.perf_counter() - began
print(json.dumps([took, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""

_CALLS = {
    "select": "sum(1 for _ in prefault.select(sys.argv[1]))",
    "status": "prefault.status(sys.argv[1])",
    "warm": "prefault.warm(sys.argv[1])",
    "evict": "prefault.evict(sys.argv[1])",
}


_FEWEST_CALLS = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static double now(void) { struct timespec at; clock_gettime(CLOCK_MONOTONIC, &at); return at.tv_sec + at.tv_nsec / 1e9; }

int main(int count, char **names)
{
    unsigned long cached = 0;
    double began = now();
    for (int number = 1; number < count; number++) {
        DIR *directory = opendir(names[number]);
        for (struct dirent *entry; (entry = readdir(directory));) {
            char path[4096];
            struct stat facts;
            if (entry->d_type != DT_REG) continue;
            snprintf(path, sizeof(path), "%s/%s", names[number], entry->d_name);
            int file = open(path, O_RDONLY | O_CLOEXEC | O_NOATIME);
            fstat(file, &facts);
            unsigned long range[2] = {0, facts.st_size}, answer[5] = {0};
            syscall(451, file, range, answer, 0);
            close(file);
            cached += answer[0];
        }
        closedir(directory);
    }
    printf("%g %lu\n", now() - began, cached);
}
"""
"""A program that asks what status asks, by the same four system calls a file, and does nothing with the answers."""


def _make(top: Path, count: int, size: int) -> None:
    """Make files of a size, 1 000 in a directory."""
    content = os.urandom(size)
    for number in range(count):
        if number % 1000 == 0:
            directory = top / f"{number // 1000:04}"
            directory.mkdir(parents=True)
        (directory / f"{number % 1000:04}.bin").write_bytes(content)
    os.sync()


def _in_a_process(call: str, top: Path) -> tuple[float, int, int]:
    code = _COUNT.format(call=_CALLS[call])
    done = subprocess.run([sys.executable, "-c", code, str(top)], capture_output=True, text=True, check=True)
    took, before, most = json.loads(done.stdout)
    return took, before, most


def small_files(directory: Path, most: int) -> None:
    print(f"\n| verb | {'files':>7} | us a file | MiB at its start | MiB at most |\n|---|---|---|---|---|")
    for count in (most // 100, most // 10, most):
        top = directory / f"small-{count}"
        _make(top, count, 1000)
        for call in ("select", "status", "evict", "warm", "status"):
            took, before, peak = _in_a_process(call, top)
            print(f"| {call} | {count:7} | {took / count * 1e6:.1f} | {before / 1024:.0f} | {peak / 1024:.0f} |")
        shutil.rmtree(top)


def _vmtouch(top: Path) -> float:
    done = subprocess.run(["vmtouch", str(top)], capture_output=True, text=True, check=True)
    found = re.search(r"Elapsed: (\S+) seconds", done.stdout)
    assert found is not None
    return float(found[1])


def _fewest_calls(directory: Path) -> Callable[[Path], float] | None:
    if shutil.which("gcc") is None:
        return None
    program = directory / "fewest-calls"
    subprocess.run(["gcc", "-O2", "-o", program, "-x", "c", "-"], input=_FEWEST_CALLS, text=True, check=True)

    def ask(top: Path) -> float:
        done = subprocess.run([program, *sorted(top.iterdir())], capture_output=True, text=True, check=True)
        return float(done.stdout.split()[0])

    return ask


def _command(*words: str) -> float:
    began = time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def beside_vmtouch(directory: Path, count: int, repeats: int) -> None:
    if shutil.which("vmtouch") is None:
        print("\nvmtouch is not installed: no comparison")
        return
    top = directory / "large"
    _make(top, count, 2 << 20)

    def cold() -> None:
        prefault.evict(top, sync=True)

    def read() -> None:
        for path in top.rglob("*.bin"):
            path.read_bytes()

    states: dict[str, list[Callable[[], None]]] = {
        "as written": [], "read back": [cold, read], "evicted": [cold],
        "touched page by page (vmtouch -t)": [cold, lambda: _vmtouch_touch(top)],
    }  # fmt: skip
    fewest = _fewest_calls(directory)
    print(
        f"\n| {count} files of 2 MiB | vmtouch, us a file | status, us a file | ratio | C, the same calls, us a file |"
        "\n|---|---|---|---|---|"
    )
    for name, steps in states.items():
        for step in steps:
            step()
        theirs, ours, least = [], [], []
        for _ in range(repeats):
            theirs.append(_vmtouch(top))
            ours.append(prefault.status(top).seconds)
            least.append(fewest(top) if fewest is not None else 0.0)
        his, mine, floor = (statistics.median(seconds) / count * 1e6 for seconds in (theirs, ours, least))
        print(f"| {name} | {his:.1f} | {mine:.1f} | {his / mine:.2f} | {floor:.1f} |")
    commands = [_command("vmtouch", str(top)) for _ in range(repeats)]
    prefaults = [_command(sys.executable, "-m", "prefault", "status", str(top)) for _ in range(repeats)]
    print(
        f"\nAs commands, with their start: vmtouch {statistics.median(commands) * 1e3:.0f} ms,"
        f" prefault status {statistics.median(prefaults) * 1e3:.0f} ms"
    )


def _vmtouch_touch(top: Path) -> None:
    subprocess.run(["vmtouch", "-q", "-t", str(top)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the files, and fewer runs")
    parser.add_argument("--directory", help="where the files are made; default: the directory of temporary files")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        print(f"{os.uname().release}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
        small_files(Path(directory), 10_000 if arguments.quick else 100_000)
        beside_vmtouch(Path(directory), 100 if arguments.quick else 1000, 3 if arguments.quick else 9)


if __name__ == "__main__":
    main()
