"""Measure time and peak memory of GrowableArray and its alternatives, each run in a fresh process, alternating.

    python bench/growable.py [--size "4 GiB"] [--piece "1 MiB"] [--rounds 3] [--appends 2000000]

Prints tables in Markdown for docs/results/sparse.md, and asserts nothing: the reader judges the figures. The candidates need
up to twice ``--size`` of memory, one at a time. Memory is warmed up once before.
"""

from __future__ import annotations

import argparse
import array
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy

import prefault
from prefault.sizes import MIB
from prefault.sparse.growable import GrowableArray

Pieces = tuple[numpy.ndarray[Any, Any], int]
"""A piece of float64, and how many times it is added."""


def growable(pieces: Pieces) -> int:
    piece, count = pieces
    growing = GrowableArray("float64")
    for _ in range(count):
        growing.extend(piece)
    return growing.nbytes


def known(pieces: Pieces) -> int:
    """Fill an array whose final length is known: the lower bound without huge pages of one's own."""
    piece, count = pieces
    whole = numpy.empty(len(piece) * count)
    for at in range(0, len(whole), len(piece)):
        whole[at : at + len(piece)] = piece
    return whole.nbytes


def doubling(pieces: Pieces) -> int:
    """Double the capacity by a larger array and a copy."""
    piece, count = pieces
    whole, length = numpy.empty(len(piece)), 0
    for _ in range(count):
        if length + len(piece) > len(whole):
            larger = numpy.empty(2 * len(whole))
            larger[:length] = whole
            whole = larger
        whole[length : length + len(piece)] = piece
        length += len(piece)
    return whole[:length].nbytes


def doubling_by_concatenate(pieces: Pieces) -> int:
    piece, count = pieces
    whole, length = numpy.empty(len(piece)), 0
    for _ in range(count):
        if length + len(piece) > len(whole):
            whole = numpy.concatenate([whole, numpy.empty_like(whole)])
        whole[length : length + len(piece)] = piece
        length += len(piece)
    return whole[:length].nbytes


def doubling_by_resize(pieces: Pieces) -> int:
    """Double by ``ndarray.resize``: realloc moves page tables, not bytes, and zeros the rest; no view may exist."""
    piece, count = pieces
    whole, length = numpy.empty(len(piece)), 0
    for _ in range(count):
        if length + len(piece) > len(whole):
            whole.resize(2 * len(whole), refcheck=False)
        whole[length : length + len(piece)] = piece
        length += len(piece)
    return whole[:length].nbytes


def list_of_pieces(pieces: Pieces) -> int:
    """Keep all pieces in a list, and concatenate once at the end."""
    piece, count = pieces
    parts = [piece.copy() for _ in range(count)]
    return numpy.concatenate(parts).nbytes


def concatenate_each(pieces: Pieces) -> int:
    """Concatenate for each piece: the obvious loop, which copies all of the data each time."""
    piece, count = pieces
    whole = piece.copy()
    for _ in range(count - 1):
        whole = numpy.concatenate([whole, piece])
    return whole.nbytes


def array_frombytes(pieces: Pieces) -> int:
    content, count = pieces[0].tobytes(), pieces[1]
    whole = array.array("d")
    for _ in range(count):
        whole.frombytes(content)
    return len(whole) * whole.itemsize


def array_extend(pieces: Pieces) -> int:
    piece, count = array.array("d", pieces[0].tobytes()), pieces[1]
    whole = array.array("d")
    for _ in range(count):
        whole.extend(piece)
    return len(whole) * whole.itemsize


CANDIDATES: dict[str, Callable[[Pieces], int]] = {
    "GrowableArray.extend": growable,
    "(numpy.empty of the final size)": known,
    "doubling, copied": doubling,
    "doubling, numpy.concatenate": doubling_by_concatenate,
    "doubling, ndarray.resize": doubling_by_resize,
    "list of pieces, one numpy.concatenate": list_of_pieces,
    "array.array.frombytes": array_frombytes,
    "array.array.extend": array_extend,
    "numpy.concatenate for every piece": concatenate_each,
}

QUADRATIC = "numpy.concatenate for every piece"
_QUADRATIC_AT_MOST = 256 * MIB


def _append(make: Callable[[], Any]) -> Callable[[Pieces], int]:
    def run(pieces: Pieces) -> int:
        growing = make()
        append = growing.append
        for _ in range(pieces[1]):
            append(1.5)
        return pieces[1] * 8

    return run


APPENDS: dict[str, Callable[[Pieces], int]] = {
    "GrowableArray.append": _append(lambda: GrowableArray("float64")),
    "list.append": _append(list),
    "array.array.append": _append(lambda: array.array("d")),
}


class Run(NamedTuple):
    """Result of one run of one candidate."""

    seconds: float
    peak_bytes: int


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def measure(candidate: Callable[[Pieces], int], pieces: Pieces, expected: int) -> Run:
    """Run a candidate in this process, which does nothing else."""
    candidate((pieces[0], 2))  # so that imports and the first use of numpy do not count
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = _peak()
    began = time.perf_counter()
    size = candidate(pieces)
    seconds = time.perf_counter() - began
    assert size == expected, (size, expected)
    return Run(seconds, _peak() - before)


def in_a_process(name: str, piece: int, count: int) -> Run:
    command = [sys.executable, __file__, "--run", name, str(piece), str(count)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return Run(float(answer[0]), int(answer[1]))


def alternate(names: list[str], piece: int, count: int, rounds: int) -> dict[str, list[Run]]:
    """Run all candidates in turn, in alternating order."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[:: -1 if number % 2 else 1]:
            runs[name].append(in_a_process(name, piece, count))
    return runs


def compare(size: int, piece: int, rounds: int) -> None:
    names = [name for name in CANDIDATES if name != QUADRATIC or size <= _QUADRATIC_AT_MOST]
    runs = alternate(names, piece, size // piece, rounds)
    ours = [run.seconds for run in runs[names[0]]]
    shown = prefault.format_size
    print(f"Growing to {shown(size)} of float64 by pieces of {shown(piece)}; {rounds} runs of each\n")
    print("| way | best | median | median, times ours | best, times ours | peak, times the data |")
    print("|---|---|---|---|---|---|")
    for name in names:
        took = [run.seconds for run in runs[name]]
        peak = max(run.peak_bytes for run in runs[name]) / size
        ratios = f"{statistics.median(took) / statistics.median(ours):.2f} | {min(took) / min(ours):.2f}"
        print(f"| {name} | {min(took):.3f} s | {statistics.median(took):.3f} s | {ratios} | {peak:.3f} |", flush=True)
    print()


def appends(count: int, rounds: int) -> None:
    runs = alternate(list(APPENDS), 8, count, rounds)
    print(f"Appending {count} items one by one, loop included; {rounds} runs of each\n")
    print("| way | best, ns an item | median | peak, bytes an item |\n|---|---|---|---|")
    for name, taken in runs.items():
        took = [run.seconds / count * 1e9 for run in taken]
        peak = max(run.peak_bytes for run in taken) / count
        print(f"| {name} | {min(took):.0f} | {statistics.median(took):.0f} | {peak:.1f} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="4 GiB")
    parser.add_argument("--piece", default="1 MiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--appends", type=int, default=2_000_000)
    parser.add_argument("--run", nargs=3, metavar=("CANDIDATE", "PIECE", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, piece, count = options.run[0], int(options.run[1]), int(options.run[2])
        values = numpy.random.default_rng(1).random(piece // 8)
        print(*measure((CANDIDATES | APPENDS)[name], (values, count), piece * count))
        return
    size, piece = prefault.parse_size(options.size), prefault.parse_size(options.piece)
    print(f"{date.today()}, Linux {platform.release()}, Python {platform.python_version()}, numpy {numpy.__version__}\n")
    with prefault.Mapping(2 * size) as warm:  # afterwards the host has backed this memory: its own page faults are over
        prefault.populate(warm)
    compare(size, piece, options.rounds)
    if size > _QUADRATIC_AT_MOST:
        compare(_QUADRATIC_AT_MOST, piece, options.rounds)
    if options.appends:
        appends(options.appends, options.rounds)


if __name__ == "__main__":
    main()
