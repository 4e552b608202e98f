"""Protecting and locking areas: what changes, what is put back after a failure, and which limit refuses."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import signal
from pathlib import Path
from typing import Any, NoReturn

import pytest

import prefault
import prefault.device
from prefault._kernel import mman
from prefault.device import Area
from prefault.errors import DriverError, PopulateInterrupted, ProtectionError
from prefault.sizes import PAGE_SIZE
from support import needs, oracle
from support.children import in_child
from support.devices import Failing, Pattern, Slow, expected

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_protect() -> None:
    device = Pattern(4, writable=True)
    with prefault.device.map(device) as area:
        result = area.protect("read", populate=True)
        assert result is not None
        assert result.bytes == 4 * PAGE_SIZE
        assert not area.writable
        assert area.memoryview().readonly
        assert "wr" not in oracle.vma_flags(area.address)
        area.protect("none")
        with pytest.raises(ProtectionError):
            area.populate("read")
        area.protect("write")
        area.ndarray()[0] = 3
        assert area.read(0, 1) == b"\3"
        with pytest.raises(ValueError, match="access is"):
            area.protect("all")  # type: ignore[arg-type]
    with prefault.device.map(device, access="read") as area, pytest.raises(ValueError, match="mapped for reading"):
        area.protect("write")


def _protections(area: Area) -> list[str]:
    """Of each page, as /proc/self/maps has it: ``"rw-s"``."""
    found: dict[int, str] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(address, 16) for address in line.split()[0].split("-"))
        for page in range(max(start, area.range.start), min(stop, area.range.stop), PAGE_SIZE):
            found[page] = line.split()[1]
    return [found.get(page, "nothing") for page in range(area.range.start, area.range.stop, PAGE_SIZE)]


@pytest.mark.parametrize("access", ["read", "write"])
@pytest.mark.parametrize("before", ["none", "read", "write"])
def test_a_protection_whose_populate_fails_is_put_back(before: Any, access: Any) -> None:
    with prefault.device.map(Failing(8, bad=(5,), batch_pages=1, writable=True)) as area:
        area.protect(before)
        was, writable = _protections(area), area.writable
        with pytest.raises(DriverError, match="page 5 is worn out") as caught:
            area.protect(access, populate=True)
        assert caught.value.offset == 5 * PAGE_SIZE
        assert _protections(area) == was == [{"none": "---s", "read": "r--s", "write": "rw-s"}[before]] * 8
        assert area.writable == writable
        assert oracle.present(area.address, len(area))[:5] == [True] * 5  # what came stays
        area.protect("write")
        assert area.read(0, PAGE_SIZE) == expected(Pattern(8), 0)


def test_each_part_gets_its_protection_back() -> None:
    with prefault.device.map(Failing(8, bad=(5,), writable=True)) as area:
        mman.mprotect(area.address + PAGE_SIZE, PAGE_SIZE, mman.PROT_READ)
        mman.mprotect(area.address + 4 * PAGE_SIZE, 2 * PAGE_SIZE, mman.PROT_NONE)
        was = _protections(area)
        assert len(set(was)) == 3
        with pytest.raises(DriverError):
            area.protect("read", populate=True)
        assert _protections(area) == was
        assert area.writable


def test_a_protection_whose_populate_is_interrupted_is_put_back() -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with prefault.device.map(Slow(64, delay_s=0.2, writable=True, batch_pages=1)) as area:
        handler = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(PopulateInterrupted):
                area.protect("read", populate=True)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
        assert _protections(area) == ["rw-s"] * 64
        assert area.writable


class _Greedy(Area):
    """Its populate takes all mappings that the process may have, and fails."""

    def populate(self, *_: Any, **__: Any) -> NoReturn:
        for number in itertools.count():
            try:
                mman.mmap(0, PAGE_SIZE, (mman.PROT_NONE, mman.PROT_READ)[number % 2], mman.MAP_PRIVATE | mman.MAP_ANONYMOUS)
            except OSError:
                break
        raise DriverError(errno.EIO, "worn out")


def test_a_protection_that_cannot_be_put_back_is_told() -> None:
    def run() -> tuple[list[str], bool]:
        area = prefault.device.map(Pattern(8, writable=True))
        mman.mprotect(area.address + PAGE_SIZE, PAGE_SIZE, mman.PROT_READ)
        area.__class__ = _Greedy
        with pytest.raises(DriverError, match="worn out") as caught:
            area.protect("read", populate=True)
        return caught.value.__notes__, area.writable

    notes, writable = in_child(run)
    assert notes == ["the protection of the area could not be put back (mprotect: Cannot allocate memory): it is 'read' now"]
    assert not writable


def _locked() -> int:
    """VmLck: the counter in smaps is a share, and the server has the frames mapped as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmLck:")[1].split()[0]) * 1024


def test_lock_and_unlock() -> None:
    before = _locked()
    with prefault.device.map(Pattern(8)) as area:
        result = area.lock(length=4 * PAGE_SIZE)
        assert result.bytes == 4 * PAGE_SIZE
        assert _locked() - before == 4 * PAGE_SIZE
        assert "lo" in oracle.vma_flags(area.address)
        assert area.unlock() == 8 * PAGE_SIZE
        assert _locked() == before


def test_locking_more_than_the_limit_is_refused_before_anything_is_done() -> None:
    def as_nobody() -> tuple[str, bool]:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (2 * PAGE_SIZE, 2 * PAGE_SIZE))
        os.setgid(65534)
        os.setuid(65534)
        with prefault.device.map(Pattern(8)) as area:
            try:
                area.lock()
            except prefault.HeadroomError as error:
                return str(error), area.stats().supplied_pages > 0
        return "", True

    needs.root("become another user")
    message, populated = in_child(as_nobody)
    assert "RLIMIT_MEMLOCK" in message
    assert not populated
