"""Eviction against writers at full speed: each write is in what was saved, or lands in the page that comes back."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault.device
from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea
from prefault.sizes import PAGE_SIZE
from support.children import Child

_PAGES = 8
_WORDS = PAGE_SIZE // 8


class Restless(Device):
    """Evicts pages by chance, all the time, from a thread of its own, and gives them back as they were saved."""

    evicts = True

    def __init__(self, *, by_save: bool = True, workers: int = 0) -> None:
        self.length = (_PAGES + 1) * PAGE_SIZE
        self.workers = workers
        self._by_save = by_save
        self._saved: dict[int, bytes] = {}
        self._evictions = 0
        self._ends = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self, area: DeviceArea) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._evict_all_the_time, args=(area,), daemon=True)
            self._thread.start()

    def _evict_all_the_time(self, area: DeviceArea) -> None:
        chance = random.Random(5)
        while not self._ends.is_set():
            first = chance.randrange(_PAGES)
            pages = range(first, min(first + chance.randint(1, 3), _PAGES))
            if self._by_save:
                area.evict(pages, self._save)
            else:
                self._take(area, pages)
            # The last page says how often; it is never evicted.
            time.sleep(chance.random() * 0.0005)

    def _save(self, run: range, view: memoryview) -> None:
        for index, page in enumerate(run):
            self._saved[page] = bytes(view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
            self._evictions += 1

    def _take(self, area: DeviceArea, pages: range) -> None:
        raise NotImplementedError

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        frame = area.frame(page)
        if page == _PAGES:
            frame[:8] = self._evictions.to_bytes(8, "little")
        elif page in self._saved:
            frame[:] = self._saved[page]

    def discard(self, area: DeviceArea, pages: range) -> None:
        """Discard the last page only, to read the number anew."""


class ForgetsOne(Restless):
    """Saves what the page held a moment before: the proof that the test sees a lost write."""

    def _save(self, run: range, view: memoryview) -> None:
        for index, page in enumerate(run):
            now = bytes(view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
            before = int.from_bytes(now[:8], "little")
            self._saved[page] = max(before - 1, 0).to_bytes(8, "little") + now[8:]
            self._evictions += 1


def _increment(path: str, number: int, threads: int, seconds: float) -> dict[int, int]:
    """Increment words that no other process writes, in every page; return the counts."""
    counts: dict[int, int] = {}
    failed: list[BaseException] = []
    with prefault.device.connect(path) as client, client.map() as area:

        def work(slot: int, array: Any) -> None:
            try:
                chance, reached = random.Random(slot), dict.fromkeys(range(_PAGES), 0)
                end = time.monotonic() + seconds
                ones = numpy.ones(1, numpy.uint64)
                while time.monotonic() < end:
                    for _ in range(50):
                        page = chance.randrange(_PAGES)
                        word = array[page * _WORDS + slot : page * _WORDS + slot + 1]
                        assert int(word[0]) == reached[page], f"page {page} of slot {slot}: {int(word[0])}, {reached[page]}"
                        numpy.add(word, ones, out=word)
                        reached[page] += 1
                counts.update({page * _WORDS + slot: count for page, count in reached.items()})
            except BaseException as error:  # noqa: BLE001  raised again below
                failed.append(error)

        running = [
            threading.Thread(target=work, args=(number * threads + index, area.ndarray("uint64")))
            for index in range(threads)
        ]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    if failed:
        raise failed[0]
    return counts


def _write_while_evicted(path: Path, device: Device, clients: int, threads: int, seconds: float) -> tuple[int, int]:
    """Return the number of writes and of evictions, after finding every write."""
    with prefault.device.serve(device, path) as server:
        wanted: dict[int, int] = {}
        started = [
            Child(lambda number=number: _increment(str(server.path), number, threads, seconds))  # type: ignore[misc]
            for number in range(clients)
        ]
        try:
            for child in started:
                wanted.update(child.result(seconds + 60))
        finally:
            for child in started:
                child.__exit__()
        with prefault.device.connect(server.path) as client, client.map() as area:
            array = area.ndarray("uint64")
            lost = {word: (count, int(array[word])) for word, count in wanted.items() if int(array[word]) != count}
            evictions = int(array[_PAGES * _WORDS])
            del array
        assert not lost
        return sum(wanted.values()), evictions


@pytest.mark.parametrize(("clients", "threads", "workers"), [(1, 1, 0), (2, 2, 0), (3, 1, 2)])
def test_no_write_is_lost(tmp_path: Path, no_leaks: None, clients: int, threads: int, workers: int) -> None:
    writes, evictions = _write_while_evicted(tmp_path / "s", Restless(workers=workers), clients, threads, 0.5)
    assert writes > 100
    assert evictions > 5


def test_a_lost_write_would_be_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        _write_while_evicted(tmp_path / "s", ForgetsOne(), 1, 1, 0.5)


@pytest.mark.stress
@pytest.mark.timeout(600)
def test_no_write_is_lost_for_long(tmp_path: Path, capsys: pytest.CaptureFixture[Any]) -> None:
    writes, evictions = _write_while_evicted(tmp_path / "s", Restless(), 3, 3, 60.0)
    with capsys.disabled():
        print(f"\n{writes} writes in 3 processes with 3 threads each, {evictions} pages evicted meanwhile, none lost")
