"""Enclaves that share a page cache: added, sealed, evicted and loaded pages, and what the server's death leaves of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device import DeviceClient
from prefault.drivers.enclave import Enclave, EnclavePageCache, PageType, statistics
from prefault.errors import DriverError
from prefault.sizes import MIB, PAGE_SIZE
from prefault.testing import check_device
from support import oracle, processes
from support.enclaves import OrdinaryMemory, cache_at, dies, kill_server

_EPC = 256  # pages: 1 MiB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def client(path: Path, no_leaks: None) -> Iterator[DeviceClient]:
    with cache_at(path) as connected:
        yield connected


def _page(number: int, version: int = 0) -> bytes:
    """A page that describes itself."""
    return random.Random(number << 20 | version).randbytes(PAGE_SIZE - 16) + struct.pack("<QQ", number, version)


def _fill(area: prefault.device.Area, pages: range, version: int = 0) -> None:
    with area.memoryview() as memory:
        for page in pages:
            memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = _page(page, version)


def _wrong(area: prefault.device.Area, pages: Iterable[int], version: int = 0) -> list[int]:
    with area.memoryview() as memory:
        return [page for page in pages if memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != _page(page, version)]


# --- adding


def test_c5_a_touch_adds_a_zeroed_page_and_populate_adds_many(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "2 MiB")
    assert enclave.pages() == []
    with enclave.map() as area:
        with area.memoryview() as memory:
            assert memory[5 * PAGE_SIZE : 6 * PAGE_SIZE] == bytes(PAGE_SIZE)
        assert [(found.offset, found.length) for found in enclave.pages()] == [(5 * PAGE_SIZE, PAGE_SIZE)]
        assert area.stats().faults == 1
        prefault.populate(area, length="256 KiB")
        ((offset, length, info),) = enclave.pages()
        assert (offset, length) == (0, 64 * PAGE_SIZE)
        assert info == (PageType.REG, "rw", False, False, False)
        with area.memoryview() as memory:
            assert memory[: 64 * PAGE_SIZE] == bytes(64 * PAGE_SIZE)
            assert oracle.present_bytes(area.address, 64 * PAGE_SIZE) == 64 * PAGE_SIZE
        assert area.stats().faults == 1
    found = statistics(client)
    assert (found.frames, found.augmented, found.evicted) == (64, 64, 0)


def test_c5_a_tebibyte_enclave_costs_nothing_until_it_is_touched(tmp_path: Path, no_leaks: None) -> None:
    space = 4 << 40
    with cache_at(tmp_path / "socket", space=space) as client:
        small = Enclave.create(client, "small", PAGE_SIZE)
        before = OrdinaryMemory(space).allocated()
        enclave = Enclave.create(client, "large", "1 TiB")
        with enclave.map() as area, area.memoryview() as memory:
            for at in (0, 1 << 39, (1 << 40) - PAGE_SIZE):
                memory[at] = 1
            assert len(enclave.pages()) == 3
            assert OrdinaryMemory(space).allocated() - before < 2 * MIB
        enclave.delete()
        assert OrdinaryMemory(space).allocated() - before < 2 * MIB
        small.delete()


# --- outgrowing the page cache


def test_c5_an_enclave_outgrows_the_page_cache_and_lies_encrypted(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "8 MiB")
    everything = range(8 * MIB // PAGE_SIZE)
    with enclave.map() as area:
        _fill(area, everything)
        found = statistics(client)
        assert found.frames <= found.capacity == _EPC
        assert found.evicted >= len(everything) - _EPC
        assert oracle.present_bytes(area.address, 8 * MIB) <= MIB
        memory = OrdinaryMemory()
        assert len({memory.read(page) for page in range(1000)}) == 1000
        for page in (0, 77, 1000):
            assert not memory.contains(_page(page)[100:132], 8 * MIB)
        assert _wrong(area, everything) == []
        _fill(area, range(0, 2048, 7), version=1)
        assert _wrong(area, range(0, 2048, 7), version=1) == []
        assert _wrong(area, range(1, 2048, 7)) == []
    assert statistics(client).rejected == 0


def test_c5_enclaves_share_the_frames_and_nothing_else(client: DeviceClient) -> None:
    enclaves = [Enclave.create(client, name, "2 MiB") for name in "abc"]
    areas = [enclave.map() for enclave in enclaves]
    chance = random.Random(3)
    versions: dict[tuple[int, int], int] = {}
    for step in range(3000):
        which, page = chance.randrange(3), chance.randrange(512)
        _fill(areas[which], range(page, page + 1), which << 16 | step)
        versions[which, page] = which << 16 | step
    for (which, page), version in versions.items():
        assert _wrong(areas[which], range(page, page + 1), version) == []
    assert statistics(client).evicted > 1000
    for area in areas:
        area.close()


def test_c5_pages_that_came_in_first_are_evicted_first(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "4 MiB")
    with enclave.map() as area, area.memoryview() as memory:
        order = list(range(1024))
        random.Random(1).shuffle(order)
        for page in order[:_EPC]:
            memory[page * PAGE_SIZE] = 1
        memory[order[_EPC] * PAGE_SIZE] = 1
        there = {page for page, present in enumerate(oracle.present(area.address, 4 * MIB)) if present}
        assert there == set(order[64 : _EPC + 1])


def test_c5_populate_fails_where_the_page_cache_is_full_unless_it_may_overcommit(client: DeviceClient) -> None:
    first, second, third = (
        Enclave.create(client, name, "2 MiB", overcommit=overcommit)
        for name, overcommit in (("first", False), ("second", False), ("third", True))
    )
    with first.map() as one, second.map() as two, third.map() as three:
        prefault.populate(one, length="768 KiB")
        _fill(one, range(192))
        with pytest.raises(
            DriverError, match=r"the EPC of 1\.0 MiB has no room for 128 more pages, and populating enclave 'second'"
        ) as caught:
            prefault.populate(two, length="512 KiB")
        assert "overcommit=True" in str(caught.value)
        assert second.pages() == []
        prefault.populate(two, length="256 KiB")  # as much as there is room for
        with pytest.raises(DriverError):
            prefault.populate(two, offset="256 KiB", length=PAGE_SIZE)  # also a single page
        assert statistics(client).evicted == 0
        with two.memoryview() as memory:
            memory[256 << 10] = 1  # a touch evicts
        prefault.populate(three, length="1 MiB")
        assert oracle.present_bytes(three.address, MIB) == MIB  # none of its own pages was evicted for the others
        assert statistics(client).frames == _EPC
        assert _wrong(one, range(192)) == []


def test_c5_a_populate_of_more_than_the_page_cache_is_refused(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "2 MiB", overcommit=True)
    with enclave.map() as area, pytest.raises(prefault.PopulateError, match="capacity is 256"):
        prefault.populate(area)
    assert enclave.pages() == []


def test_c5_populate_brings_sealed_pages_back(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "2 MiB", overcommit=True)
    with enclave.map() as area:
        _fill(area, range(512))
        prefault.populate(area, offset="100 KiB", length="900 KiB")
        before = area.stats().faults
        assert _wrong(area, range(25, 250)) == []
        assert area.stats().faults == before
        assert _wrong(area, range(512)) == []


def test_c5_discard_removes_pages(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "2 MiB", overcommit=True)
    with enclave.map() as area:
        _fill(area, range(512))
        memory = OrdinaryMemory()
        sealed = memory.read(3)
        prefault.discard(area, length="400 KiB")
        assert memory.read(3) == bytes(PAGE_SIZE + 16) != sealed
        assert [(found.offset, found.length) for found in enclave.pages()] == [(400 << 10, (2048 - 400) << 10)]
        assert area.read(0, "400 KiB") == bytes(400 << 10)
        assert _wrong(area, range(100, 512)) == []


# --- tampering


def _evict_everything(client: DeviceClient) -> None:
    filler = Enclave.create(client, "filler", "1 MiB", overcommit=True)
    with filler.map() as area:
        prefault.populate(area)
    filler.delete()


def test_c5_a_tampered_page_is_poisoned_and_reported_and_never_served(path: Path, capfd: Any) -> None:
    with cache_at(path) as client:  # now: its log goes where stderr leads at its start
        enclave = Enclave.create(client, "a", "64 KiB")
        with enclave.map() as area:
            _fill(area, range(16))
            _evict_everything(client)
            memory = OrdinaryMemory()
            good = memory.read(5)
            memory.write(5, bytes([good[0] ^ 1]) + good[1:])
            with pytest.raises(DriverError, match="page 5: its sealed copy fails the authentication"):
                area.read(5 * PAGE_SIZE, PAGE_SIZE)
            assert statistics(client).rejected == 1
            said = ""

            def reported() -> bool:  # by the server's process, in its own time
                nonlocal said
                said += capfd.readouterr().err
                return "enclave 'a': page 5: its sealed copy fails" in said

            assert processes.eventually(reported)
            memory.write(5, good)  # too late
            for touch in (lambda view: view[5 * PAGE_SIZE], lambda view: view.__setitem__(5 * PAGE_SIZE, 1)):
                assert dies(path, "a", touch)
            assert statistics(client).rejected == 1
            assert not dies(path, "a", lambda view: view[6 * PAGE_SIZE])
            kill_server(client)
            assert dies(path, "a", lambda view: view[5 * PAGE_SIZE])
            with pytest.raises(DriverError):
                prefault.populate(area)
            assert _wrong(area, [page for page in range(16) if page != 5]) == []
            prefault.discard(area, offset=5 * PAGE_SIZE, length=PAGE_SIZE)
            assert area.read(5 * PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_c5_a_replayed_page_is_detected(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "64 KiB")
    with enclave.map() as area:
        _fill(area, range(16), version=1)
        _evict_everything(client)
        memory = OrdinaryMemory()
        old = memory.read(5)
        _fill(area, range(16), version=2)
        _evict_everything(client)
        assert memory.read(5) != old
        memory.write(5, old)
        with pytest.raises(DriverError, match="replayed"):
            area.read(5 * PAGE_SIZE, PAGE_SIZE)
        one, other = memory.read(6), memory.read(7)
        memory.write(6, other)
        memory.write(7, one)
        for page in (6, 7):
            with pytest.raises(DriverError, match="exchanged"):
                area.read(page * PAGE_SIZE, PAGE_SIZE)
        assert _wrong(area, range(5), version=2) == []


def test_c5_pages_of_a_deleted_enclave_do_not_come_back_in_the_next_one(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "2 MiB")
    with enclave.map() as area:
        _fill(area, range(512))
    memory = OrdinaryMemory()
    old = memory.read(3)
    enclave.delete()
    again = Enclave.create(client, "a", "2 MiB")
    with again.map() as area:
        assert area.read(0, "1 MiB") == bytes(MIB)
        _evict_everything(client)
        memory.write(3, old)
        with pytest.raises(DriverError):
            area.read(3 * PAGE_SIZE, PAGE_SIZE)


# --- the death of the server


def test_c5_pages_and_versions_survive_kill_9_of_the_server(client: DeviceClient) -> None:
    enclaves = {name: Enclave.create(client, name, "2 MiB") for name in "ab"}
    areas = {name: enclave.map() for name, enclave in enclaves.items()}
    for version, name in enumerate("abab"):
        _fill(areas[name], range(512), version)
        before = enclaves[name].pages()
        kill_server(client)
        assert enclaves[name].pages() == before
        assert _wrong(areas[name], range(512), version) == []
    memory = OrdinaryMemory()
    found = statistics(client)
    assert found.enclaves == 2
    assert found.frames <= _EPC
    old = memory.read(7)
    _fill(areas["a"], range(512), 9)
    _evict_everything(client)
    kill_server(client)
    memory.write(7, old)  # from before: the version counter has gone on
    with pytest.raises(DriverError):
        areas["a"].read(7 * PAGE_SIZE, PAGE_SIZE)
    for area in areas.values():
        area.close()


def test_c5_the_framework_checks_the_driver() -> None:
    def make() -> EnclavePageCache:
        return EnclavePageCache("96 KiB", address_space="256 KiB", enclaves={"all": "256 KiB"}, overcommit=True)

    check_device(make, expected=lambda page: bytes(PAGE_SIZE), after_discard="zeros")


def test_c5_enclaves_come_with_the_device_and_stay_deleted(tmp_path: Path, no_leaks: None) -> None:
    device = EnclavePageCache("1 MiB", address_space="64 MiB", enclaves={"a": "1 MiB", "b": 4096})
    with prefault.device.open(device) as client:
        assert Enclave(client, "a").length == MIB
        Enclave(client, "b").delete()
        kill_server(client)
        assert statistics(client).enclaves == 1
