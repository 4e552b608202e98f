"""Threads that populate, discard, look at, view and close the same mappings at once: documented errors, and never a crash.

The work is done in a process of its own, so that a crash is a failed test; run by hand it is
``python test_threads.py BACKING SECONDS SEED DIRECTORY``.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_THREADS = 4
_SHORT_S = 0.4
_LONG_S = 8.0
_BACKINGS = ("anonymous", "shared anonymous", "memfd", "tmpfs", "file")


# --- in the child process


class _Shared:
    """The mapping that all threads work on; whoever closes it puts another in its place."""

    def __init__(self, backing: str, directory: str) -> None:
        self._backing = backing
        self._directory = directory
        self.mapping = self.fresh()

    def fresh(self) -> Any:
        import prefault

        if self._backing == "file":
            path = Path(self._directory, "file")
            if not path.exists():
                path.write_bytes(bytes(_LENGTH))
            return prefault.Mapping(backing=prefault.File(path))
        name = {"shared anonymous": "anonymous"}.get(self._backing, self._backing)
        shared = True if self._backing == "shared anonymous" else None
        return prefault.Mapping(_LENGTH, backing=name, shared=shared)


_LENGTH = 64 * 4096


def _operations(shared: _Shared, choose: random.Random) -> list[Callable[[], object]]:
    import prefault

    def part() -> dict[str, Any]:
        offset = choose.randrange(_LENGTH)
        return {"offset": offset, "length": choose.randrange(_LENGTH - offset + 1)}

    def write_a_view() -> None:
        view = shared.mapping.memoryview()
        start = choose.randrange(_LENGTH)
        view[start : start + 100] = bytes(len(view[start : start + 100]))
        del view

    def read_an_array() -> int:
        return int(shared.mapping.ndarray("u8")[:: choose.randrange(1, 700)].sum())

    def close() -> None:
        mapping = shared.mapping
        mapping.close()
        shared.mapping = shared.fresh()

    def forget() -> None:
        shared.mapping = shared.fresh()

    return [
        lambda: prefault.populate(shared.mapping, **part()),
        lambda: prefault.populate(shared.mapping, access=choose.choice(["read", "write"]), threads=2),
        lambda: prefault.populate(shared.mapping, rollback=True, **part()),
        lambda: prefault.discard(shared.mapping, **part()),
        lambda: prefault.residency(shared.mapping, **part()).present_bytes,
        lambda: str(prefault.plan(shared.mapping)),
        lambda: repr(shared.mapping),
        lambda: next(shared.mapping.range.chunks(4096)),
        write_a_view,
        read_an_array,
        close,
        forget,
    ]


_EXPECTED = (
    (BufferError, "a view of the mapping is still alive"),
    (BufferError, "the mapping is in use by another thread"),
    (ValueError, "the mapping is closed"),
)


def _work(shared: _Shared, seed: int, until: float, counts: Counter[str], defects: list[str]) -> None:
    choose = random.Random(seed)
    operations = _operations(shared, choose)
    while time.monotonic() < until and not defects:
        try:
            choose.choice(operations)()
            counts["done"] += 1
        except (BufferError, ValueError) as error:
            if not any(isinstance(error, kind) and str(error).startswith(text) for kind, text in _EXPECTED):
                defects.append(f"{type(error).__name__}: {error}")
            counts[str(error)[:30]] += 1
        except BaseException as error:  # noqa: BLE001  whatever it is, the parent is to hear of it
            defects.append(f"{type(error).__name__}: {error}")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _mappings() -> int:
    return Path("/proc/self/maps").read_text().count("\n")


def _run(backing: str, seconds: float, seed: int, directory: str) -> dict[str, Any]:
    import numpy

    import prefault

    shared = _Shared(backing, directory)
    prefault.populate(shared.mapping, threads=2)
    prefault.residency(shared.mapping).pages()
    numpy.zeros(1)
    gc.collect()
    threads_before, descriptors, mappings = threading.active_count(), _descriptors(), _mappings()
    counts: Counter[str] = Counter()
    defects: list[str] = []
    until = time.monotonic() + seconds
    workers = [
        threading.Thread(target=_work, args=(shared, seed * 1000 + number, until, counts, defects))
        for number in range(_THREADS)
    ]
    sys.setswitchinterval(1e-5)  # many more moments at which another thread comes in between
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    gc.collect()
    result = {
        "counts": counts,
        "defects": defects,
        "threads": threading.active_count() - threads_before,
        "descriptors": _descriptors() - descriptors,
        "mappings": _mappings() - mappings,
    }
    shared.mapping.close()
    return result


# --- in the test


def _stress(backing: str, seconds: float, seed: int, directory: Path) -> Counter[str]:
    command = [sys.executable, "-X", "faulthandler", __file__, backing, str(seconds), str(seed), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds * 3 + 60)
    assert done.returncode == 0, f"seed {seed}: exit {done.returncode}\n{done.stderr[-4000:]}"
    result = json.loads(done.stdout)
    assert result["defects"] == [], f"seed {seed}"
    assert result["threads"] == 0
    assert result["descriptors"] == 0
    # The C library keeps an arena and a stack for each thread that it had.
    assert result["mappings"] <= 8 * _THREADS
    counts: Counter[str] = Counter(result["counts"])
    assert counts["done"] > 50
    return counts


@pytest.mark.parametrize("backing", _BACKINGS)
def test_for_a_moment(tmp_path: Path, backing: str) -> None:
    _stress(backing, _SHORT_S, 1, tmp_path)


@pytest.mark.stress
@pytest.mark.parametrize("seed", [2, 3])
@pytest.mark.parametrize("backing", _BACKINGS)
def test_for_long(tmp_path: Path, backing: str, seed: int) -> None:
    counts = _stress(backing, _LONG_S, seed, tmp_path)
    # The collisions did happen.
    assert counts["the mapping is in use by anoth"] > 0
    assert counts["the mapping is closed"] > 0


if __name__ == "__main__":
    faulthandler.dump_traceback_later(float(sys.argv[2]) * 3 + 30, exit=True)
    print(json.dumps(_run(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
