"""Warming over a file system whose server counts each byte: nothing is read twice, failures stay with their file."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault import PageRange, RangeSet, WarmInterrupted
from prefault.files import method_choice
from prefault.files.cached_pages import cached_ranges
from prefault.files.open_file import OpenFile
from prefault.files.warm_methods import METHOD_NAMES, WarmMethod
from support import file_beds, fuse_files, needs
from support.file_beds import PAGE, touch
from support.fuse_files import FuseFiles

MIB = 1 << 20

Mount = Callable[..., FuseFiles]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """A function that mounts files by name and size."""
    needs.fuse()
    with ExitStack() as stack:

        def mounted(files: dict[str, int], **options: Any) -> FuseFiles:
            bed: AbstractContextManager[FuseFiles] = fuse_files.mounted(tmp_path / "fuse", files, **options)
            return stack.enter_context(bed)

        yield mounted


def _cached(path: Path) -> RangeSet:
    with OpenFile(path) as file:
        assert file.file_system == "fuse"
        return cached_ranges(file)


def _forget(bed: FuseFiles, *paths: Path) -> None:
    for path in paths:
        file_beds.evict(path)
    bed.forget()


@pytest.mark.parametrize("method", [None, *METHOD_NAMES])
@pytest.mark.parametrize("threads", [None, 1, 5])
def test_every_byte_is_read_once(mount: Mount, method: Any, threads: int | None) -> None:
    bed = mount({"file": 20 * MIB + 5000})
    result = prefault.warm(bed / "file", method=method, threads=threads)
    assert (result.read_bytes, result.failures) == (20 * MIB + 5000, ())
    assert result.bytes == _cached(bed / "file").length == 20 * MIB + 2 * PAGE
    assert bed.read_twice() == []
    assert bed.read_bytes == 20 * MIB + 2 * PAGE
    assert (bed / "file").read_bytes() == fuse_files.content(0, 20 * MIB + 5000)
    assert bed.read_bytes == 20 * MIB + 2 * PAGE


@pytest.mark.parametrize(("slow", "method"), [(60.0, "pread"), (0.001, "populate")])
def test_a_slow_server_is_asked_for_more_at_once(
    mount: Mount, monkeypatch: pytest.MonkeyPatch, slow: float, method: str
) -> None:
    monkeypatch.setattr(method_choice, "_SLOW_SECONDS", slow)
    bed = mount({"file": 48 * MIB, "small": 2 * MIB}, latency_s=0.002)
    result = prefault.warm(bed / "file")
    assert (result.method, result.bytes, bed.read_bytes) == (method, 48 * MIB, 48 * MIB)
    assert bed.read_twice() == []
    assert prefault.warm(bed / "small").method == "pread"  # one more request would take a while


@pytest.mark.parametrize("slow", [60.0, 0.0])
def test_measuring_reads_nothing_twice(mount: Mount, monkeypatch: pytest.MonkeyPatch, slow: float) -> None:
    """Large enough for methods to be measured on it, in the middle of other ranges; each method in front of the others."""
    monkeypatch.setattr(method_choice, "_SLOW_SECONDS", slow)
    monkeypatch.setattr(method_choice, "_WORTH_BYTES", {False: 200 * MIB})
    monkeypatch.setattr(method_choice, "_ROOM_BYTES", 200 * MIB)
    monkeypatch.setattr(method_choice, "_PROBE_BYTES", 8 * MIB)
    chosen: list[list[method_choice.Measurement]] = []
    fastest = method_choice._fastest

    def choose(measured: list[method_choice.Measurement]) -> WarmMethod:
        chosen.append(measured)
        return fastest(measured)

    monkeypatch.setattr(method_choice, "_fastest", choose)
    bed = mount({"file": 280 * MIB, "second": 20 * MIB}, latency_s=0.001)
    spans = [(3 * PAGE, 10 * PAGE), (MIB + PAGE, 240 * MIB + 3 * PAGE), (270 * MIB, None)]
    asked = RangeSet(PageRange.outward(start, stop or 280 * MIB) for start, stop in spans)
    assert prefault.warm(bed / "file", ranges=spans).bytes == asked.length
    assert _cached(bed / "file") == asked
    assert bed.read_bytes == asked.length
    assert bed.read_twice() == []
    ((*measured,),) = chosen
    assert {one.method.name for one in measured} == {"populate", "readahead", "pread"}
    assert 3 <= len(measured) <= 6
    result = prefault.warm([bed / "file", bed / "second"])
    assert (result.bytes, result.failures) == (300 * MIB - asked.length, ())
    assert bed.read_bytes == 300 * MIB
    assert bed.most_in_flight >= 4
    assert len(chosen) == 1  # too little was left


@pytest.mark.parametrize("method", [None, *METHOD_NAMES])
def test_nothing_but_the_missing_pages_of_the_ranges_is_asked_for(mount: Mount, method: Any) -> None:
    seeded = random.Random(9)
    bed = mount({"file": 64 * MIB})
    path = bed / "file"
    pages = seeded.sample(range(64 * MIB // PAGE), 50)
    touch(path, *pages)
    before = _cached(path)
    bed.forget()
    spans = [(3 * MIB + 17, 40 * MIB + 5), (50 * MIB, 50 * MIB + 1), (63 * MIB, 64 * MIB)]
    asked = RangeSet(PageRange.outward(*span) for span in spans)
    result = prefault.warm(path, ranges=spans, method=method)
    assert result.bytes == (asked - before).length
    assert result.present_bytes == (asked & before).length
    assert _cached(path) == asked | before
    read = RangeSet(PageRange.outward(start, start + size) for start, size in bed.asked())
    assert read == asked - before
    assert bed.read_twice() == []


def test_small_files_are_read_side_by_side(mount: Mount) -> None:
    bed = mount({f"{number}": 3 * PAGE for number in range(64)}, latency_s=0.02)
    result = prefault.warm(bed.directory)
    assert (result.files, result.bytes) == (64, 64 * 3 * PAGE)
    assert bed.most_in_flight >= 4
    assert bed.read_bytes == 64 * 3 * PAGE


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_an_error_of_the_server_is_one_files_failure(mount: Mount, method: Any) -> None:
    bed = mount({"bad": 24 * MIB, "good": 9 * MIB, "small": PAGE})
    bed.fail(20 * MIB + PAGE, 20 * MIB + 2 * PAGE)
    result = prefault.warm([bed / "bad", bed / "good", bed / "small"], method=method, threads=2)
    (failure,) = result.failures
    assert (failure.path, failure.errno) == (str(bed / "bad"), 5)
    assert "MiB from its start: EIO" in failure.reason
    assert "server" in failure.remedy
    assert _cached(bed / "good").length >= 9 * MIB - 64 * PAGE  # the kernel may take a page away for other programs
    bad = _cached(bed / "bad")
    assert 20 * MIB + PAGE not in bad
    assert result.bytes <= 9 * MIB + PAGE + bad.length  # the kernel may have read ahead since
    bed.fail(0, 0)
    assert prefault.warm(bed / "bad").failures == ()
    assert _cached(bed / "bad").length == 24 * MIB


def test_a_server_that_hangs_does_not_hold_up_ctrl_c(mount: Mount) -> None:
    bed = mount({"file": 24 * MIB})
    bed.hang(12 * MIB, 13 * MIB)

    def interrupt() -> None:
        end = time.monotonic() + 20
        while not bed.in_flight and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(WarmInterrupted) as caught:
            prefault.warm(bed / "file", method="pread", threads=2)
        assert bed.in_flight  # it did not wait for the server
        assert caught.value.result.bytes < 24 * MIB
        # Pages that the kernel had asked for come later.
        assert caught.value.result.bytes <= _cached(bed / "file").length
    finally:
        thread.join()
        bed.hang(0, 0)


def test_a_file_that_shrinks_on_its_server(mount: Mount) -> None:
    bed = mount({"file": 24 * MIB}, attr_timeout=0)
    path = bed / "file"

    def shrink(done: int, total: int) -> None:
        if done >= 2 * MIB:
            bed.shrink(6 * MIB)
            path.stat()

    result = prefault.warm(path, rate="64 MiB/s", progress=shrink)
    (failure,) = result.failures
    assert failure.path == str(path)
    assert "shrank to 6.0 MiB" in failure.reason or "not in the page cache" in failure.reason
    assert result.bytes == _cached(path).length <= 24 * MIB


def test_a_file_system_without_a_page_cache_is_told(mount: Mount) -> None:
    bed = mount({"file": 4 * MIB}, direct_io=True)
    result = prefault.warm(bed / "file", method="pread")
    assert result.bytes == 0
    (failure,) = result.failures
    assert "not in the page cache" in failure.reason
    assert "direct I/O" in failure.remedy


def test_another_method_has_to_be_faster_each_time() -> None:
    first, other, slow = WarmMethod("pread", 16), WarmMethod("readahead", 4), WarmMethod("populate", 4)

    def choose(*speeds: tuple[WarmMethod, float]) -> WarmMethod:
        return method_choice._fastest([method_choice.Measurement(*speed) for speed in speeds])

    assert choose((first, 10), (other, 12), (slow, 5), (first, 10.5), (other, 13)) == other
    assert choose((first, 10), (other, 14), (slow, 5), (first, 10), (other, 10.5)) == first
    assert choose((first, 10), (other, 14), (slow, 5), (first, 13), (other, 14)) == first
    assert choose((first, 10), (other, 14), (first, 10), (other, 14), (slow, 15)) == slow
