"""Failures of TensorRT-LLM's host memory, as reported, and with one call of prefault."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from pathlib import Path

from prefault import engines
from support.cgroups import groups
from support.children import in_child
from support.ended_children import exit_code

_SHARDS, _SHARD = 4, 32 << 20
_LIMIT = 80 << 20


def _shards(directory: Path) -> list[Path]:
    """Write the files of a checkpoint, and take them out of the page cache."""
    paths = [directory / f"model-{number}.safetensors" for number in range(_SHARDS)]
    for path in paths:
        with open(path, "wb") as file:
            file.write(bytes(_SHARD))
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return paths


def test_17430_as_reported(tmp_path: Path) -> None:
    """TensorRT-LLM#17430: shards are warmed by f.read() in many threads, each into a bytes object of a whole shard.

    On slow storage all objects live at once: anonymous memory beside the page cache, and the OOM killer ends the rank. The
    barrier stands for the slow storage.
    """
    paths = _shards(tmp_path)

    def prefetch() -> None:
        everyone_has_read = threading.Barrier(_SHARDS, timeout=20)

        def prefetch_one_file(path: Path) -> None:
            with open(path, "rb") as file:
                data = file.read()
            everyone_has_read.wait()
            del data

        threads = [threading.Thread(target=prefetch_one_file, args=(path,)) for path in paths]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with groups() as make:
        group = make(_LIMIT)
        assert exit_code(group.inside(prefetch)) == -signal.SIGKILL
        assert group.killed >= 1


def test_17430_with_prefault(tmp_path: Path) -> None:
    paths = _shards(tmp_path)

    def prefetch() -> int:
        total = 0
        for path in paths:
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                total += engines.populate(mapped).bytes
        return total

    with groups() as make:
        group = make(_LIMIT)
        assert in_child(group.inside(prefetch)) == _SHARDS * _SHARD
        assert group.killed == 0
