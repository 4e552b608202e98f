"""Failures of TensorRT-LLM's host memory, as reported, and with one call of prefault."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from pathlib import Path

import numpy

import prefault
from prefault import engines
from prefault._system import thp
from prefault._system.cpus import usable_cpus
from support import needs, oracle
from support.cgroups import groups
from support.children import in_child
from support.ended_children import exit_code

# --- TensorRT-LLM#15430

_POOL = 256 << 20


def _host_cache_pool() -> mmap.mmap:
    return mmap.mmap(-1, _POOL, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def test_15430_as_reported() -> None:
    """TensorRT-LLM#15430: the pool is advised MADV_HUGEPAGE, and one thread faults all of it in, page by page.

    There cuMemHostRegister does so, here a store to each page. That each fault waits for compaction shows in fragmented
    memory only: the tests of huge="auto" make some in the emulated machine of `make numa`.
    """
    with _host_cache_pool() as pool:
        pool.madvise(mmap.MADV_NOHUGEPAGE)  # the end that is reported: compaction fails, and pages are small
        view = numpy.frombuffer(pool, "uint8")
        before = oracle.minor_faults()
        view[:: oracle.PAGE] = 0
        assert oracle.minor_faults() - before >= _POOL // oracle.PAGE  # all in this thread
        del view


def test_15430_with_prefault() -> None:
    """One call takes all CPUs, and huge pages until compaction makes them slow (a note of the result says that)."""
    if thp.read_setting("enabled") != "madvise":
        needs.missing("transparent huge pages are not given by advice (transparent_hugepage/enabled)")
    with _host_cache_pool() as pool:
        result = engines.populate(pool, huge="auto")
        assert result.bytes == _POOL
        assert result.threads == min(8, usable_cpus(), _POOL >> 25)
        address = int(numpy.frombuffer(pool, "uint8").ctypes.data)
        assert all(oracle.present(address, _POOL))
        before = oracle.minor_faults()
        numpy.frombuffer(pool, "uint8")[:: oracle.PAGE] = 0
        assert oracle.minor_faults() - before < 64


# --- TensorRT-LLM#17430

_SHARDS, _SHARD = 4, 8 << 20
_LIMIT = 20 << 20


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


def test_17430_with_warm(tmp_path: Path) -> None:
    """The files are larger than the container: warm() brings in what fits, and says what does not."""
    paths = _shards(tmp_path)
    with groups() as make:
        group = make(_LIMIT)
        result = in_child(group.inside(lambda: prefault.warm(paths)))
        assert group.killed == 0
    assert 0 < result.bytes <= _LIMIT
    assert result.stopped


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
