"""Limits, placement and size: huge pages, memory limits, many areas, one CPU."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefault._kernel import mman
from prefault.device import handover, protocol
from prefault.device.device_pool import Access
from prefault.device.driver import Device, DeviceArea, FaultAround, Supplied
from prefault.device.registry import Registry
from prefault.sizes import MIB
from support import oracle
from support.cgroups import groups
from support.children import Child
from support.device_server import ForgetfulLink, Handmade, Running, listening, served

PAGE = mmap.PAGESIZE
HUGE = 2 * MIB


class Huge(Device):
    """The first bytes of each page are its number; page 0, when populated, evicts pages 4 and 5."""

    page_size = HUGE
    evicts = True

    def __init__(self, pages: int = 8) -> None:
        self.length = pages * HUGE - 100
        self.store = mmap.mmap(-1, pages * PAGE)

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        kept = self.store[page * PAGE : (page + 1) * PAGE]
        area.frame(page)[:PAGE] = kept if any(kept) else b"%04d" % page + bytes(PAGE - 4)
        area.frame(page)[-200:] = b"x" * 200
        return None

    def save(self, pages: range, content: memoryview) -> None:
        for index, page in enumerate(pages):
            self.store[page * PAGE : (page + 1) * PAGE] = content[index * HUGE : index * HUGE + PAGE]

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        if pages.start == 0:
            area.evict(range(4, 6), self.save)
        super().populate(area, pages, access)


@pytest.mark.parametrize("pool", [0, 8], ids=["ordinary pages", "hugetlb"])
def test_pages_of_2_mib(hugetlb_pool: Callable[[int], None], pool: int) -> None:
    hugetlb_pool(pool)
    with served(Huge()) as (running, client):
        assert client.welcome.huge is bool(pool)
        assert bool(client.welcome.notes) is not bool(pool)
        area = client.map(8 * HUGE)
        assert area.view[3 * HUGE + HUGE // 2] == 0
        assert bytes(area.view[3 * HUGE : 3 * HUGE + 4]) == b"0003"
        assert oracle.present_bytes(area.address, 8 * HUGE) == HUGE
        area.view[5 * HUGE + 10] = 55
        assert area.populate((0, 1)).mapped == 1
        assert oracle.present_bytes(area.address, 8 * HUGE) == 2 * HUGE
        assert bytes(area.view[5 * HUGE : 5 * HUGE + 11]) == b"0005" + bytes(6) + b"7"
        assert area.view[7 * HUGE :][-200:] == b"x" * 100 + bytes(100)
        assert area.populate((0, 8)).mapped == 4
        assert area.discard(2, 6) == 4
        assert os.fstat(running.frames.fd).st_blocks * 512 == 4 * HUGE
        assert bytes(area.view[4 * HUGE : 4 * HUGE + 4]) == b"0004"


def test_an_empty_hugetlb_pool_is_an_error_before_the_start(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(8)
    with served(Huge()) as (_, client):
        hugetlb_pool(3)  # the frames' mapping reserves none
        area = client.map(8 * HUGE)
        failed = area.populate((0, 8), kind=protocol.Failed)
        assert (failed.kind, failed.number) == ("headroom", errno.ENOMEM)
        assert "hugetlb pool" in failed.limit
        assert failed.needed_bytes == 8 * HUGE
        failed = area.populate((0, 8), check_headroom=False, kind=protocol.Failed)
        assert (failed.kind, failed.number) == ("full", errno.ENOSPC)
        assert "no huge pages" in failed.message


class Filled(Device):
    """Every page is written; nothing is kept."""

    def __init__(self, pages: int) -> None:
        self.length = pages * PAGE

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[:] = bytes((page % 255 + 1,)) * PAGE
        return None


def test_a_memory_limit_stops_a_populate_before_the_oom_killer() -> None:
    with groups() as make:
        group = make(64 * MIB)

        def run() -> tuple[protocol.Failed, int]:
            with served(Filled(64 * MIB // PAGE)) as (_, client):
                area = client.map(64 * MIB)
                failed = area.populate((0, 64 * MIB // PAGE), kind=protocol.Failed)
                assert area.populate((0, 100)).mapped == 100
                return failed, oracle.present_bytes(area.address, 64 * MIB)

        with Child(group.inside(run)) as child:
            failed, present = child.result()
        assert group.killed == 0
    assert (failed.kind, failed.number) == ("headroom", errno.ENOMEM)
    assert failed.needed_bytes >= 64 * MIB
    assert present == 100 * PAGE


def test_a_thousand_areas_in_one_client() -> None:
    with served(Filled(1000)) as (_, client):
        areas = [client.map(PAGE, page * PAGE) for page in range(1000)]
        for page in (999, 0, 500, 3, 731):
            assert areas[page].view[0] == page % 255 + 1
        for area in areas[::2]:
            area.unmap()
        assert [area.view[0] for area in areas[1::2]] == [page % 255 + 1 for page in range(1, 1000, 2)]


def test_the_server_runs_where_the_client_asks() -> None:
    cpus = sorted(os.sched_getaffinity(0))
    with served(Filled(8)) as (running, client):
        one, two = client.map(PAGE, cpu=cpus[-1]), client.map(PAGE, cpu=cpus[0])
        assert os.sched_getaffinity(running.pid) == {cpus[0]}
        two.unmap()
        assert os.sched_getaffinity(running.pid) == {cpus[-1]}
        one.unmap()
        assert os.sched_getaffinity(running.pid) == set(cpus)
        nowhere = client.map(PAGE, cpu=100_000)  # a CPU that there is not
        assert nowhere.view[0] == 1
        assert os.sched_getaffinity(running.pid) == set(cpus)


def test_an_idle_server_uses_no_cpu() -> None:
    def used(pid: int) -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    with served(Filled(64)) as (running, client):
        area = client.map(64 * PAGE)
        assert [area.view[page * PAGE] for page in range(64)] == list(range(1, 65))
        before = used(running.pid)
        time.sleep(0.3)
        assert used(running.pid) - before <= 2  # ticks of 10 ms; one that never sleeps uses 30


def test_a_server_whose_warden_is_gone_asks_for_another() -> None:
    class Broken(ForgetfulLink):
        def __init__(self) -> None:
            super().__init__()
            self.seen = memoryview(mmap.mmap(-1, PAGE))

        def notify(self, message: handover.Message, descriptors: list[int] | None = None) -> None:
            if isinstance(message, handover.Admitted):
                raise BrokenPipeError(errno.EPIPE, "the warden is gone")

        def replace_warden(self, registry: Registry) -> None:
            self.seen[0] += 1
            self.seen[1] = len(registry.clients)

    warden_link = Broken()
    with served(Filled(8), warden_link=warden_link) as (_, client):
        area = client.map(8 * PAGE)
        assert area.view[0] == 1
        assert (warden_link.seen[0], warden_link.seen[1]) == (1, 1)


def test_windows_of_a_device_with_a_small_capacity() -> None:
    class Small(Filled):
        writable = False
        capacity = 8 * PAGE
        fault_around = FaultAround(64 * PAGE, 64 * PAGE)

    with served(Small(256)) as (running, client):
        area = client.map(256 * PAGE, access="read")
        for page in range(0, 256, 3):
            assert area.view[page * PAGE] == page % 255 + 1
            assert os.fstat(running.frames.fd).st_blocks * 512 <= 8 * PAGE


@pytest.mark.parametrize("writable", [False, True])
def test_a_fill_without_room_waits_for_pages_that_others_are_filling(tmp_path: Path, writable: bool) -> None:
    class Small(Filled):
        capacity = 8 * PAGE
        batch = 6 * PAGE
        workers = 4
        evicts = True

        def reclaim(self, area: DeviceArea, pages: int) -> None:
            for run in area.ready(range(self.length // PAGE)):
                area.evict(run)

        def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
            time.sleep(0.02)
            super().populate(area, pages, access)

    device = Small(64)
    device.writable = writable
    with listening(device, tmp_path) as connect:

        def use(number: int) -> int:
            with connect() as client:
                area = client.map(64 * PAGE, access="read")
                for round_ in range(12):
                    first = 20 * number + 6 * (round_ % 3)
                    area.populate((first, first + 6))
                    assert area.view[first * PAGE] == first % 255 + 1
                return 1

        with Child(lambda: use(0)) as one, Child(lambda: use(1)) as two, Child(lambda: use(2)) as three:
            assert sum(child.result() for child in (one, two, three)) == 3


def test_many_clients_at_once(tmp_path: Path) -> None:
    with listening(Filled(16), tmp_path) as connect:
        clients = [connect() for _ in range(20)]
        areas = [client.map(16 * PAGE) for client in clients]
        for number, area in enumerate(areas):
            area.view[number % 16 * PAGE + 1 + number] = number
        for number in range(20):
            assert areas[-1].view[number % 16 * PAGE + 1 + number] == number
        for client in clients:
            client.close()


def test_a_device_of_a_tebibyte_costs_nothing_until_it_is_touched() -> None:
    device = Filled(1 << 28)
    with served(device) as (running, client):
        area = client.map(MIB, (1 << 40) - MIB)
        assert area.view[0] == ((1 << 40) - MIB) // PAGE % 255 + 1
        whole = client.map(1 << 40, 0, track_dirty=True)
        failed = whole.populate((0, 1 << 28), kind=protocol.Failed, check_headroom=True)
        assert failed.kind == "headroom"
        assert whole.discard(0, 1 << 28) == 1
        assert whole.dirty() == []
        allocated = sum(os.fstat(fd).st_blocks * 512 for fd in (running.frames.fd, running.frames.states_fd))
        assert allocated < MIB


def test_a_mapping_in_thousands_of_parts() -> None:
    device = Filled(4096)
    with served(device) as (_, client):
        client.map(4096 * PAGE).populate((0, 4096))
        area = client.map(4096 * PAGE)
        for page in range(0, 4096, 2):
            mman.mprotect(area.address + page * PAGE, PAGE, mmap.PROT_READ)
        assert area.populate((0, 4096)).mapped == 4096


def test_nothing_is_left_when_a_private_server_ends() -> None:
    before = oracle.descriptors()
    running = Running(Filled(8))
    client = Handmade(running.connection)
    area = client.map(8 * PAGE)
    area.unmap()
    client.close()
    assert running.wait() == 0
    running.__exit__()
    assert oracle.descriptors() == before
