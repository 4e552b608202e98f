"""Buffer objects as clients see them. smaps, the bytes and a second process are the witnesses."""

from __future__ import annotations

import errno
import mmap
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefault._kernel import mman
from prefault.device import Area, DeviceClient
from prefault.device import open as open_device
from prefault.drivers.buffers import BufferObjectError, BufferObjects, Buffers
from prefault.drivers.buffers import buffer_messages as _messages
from prefault.drivers.buffers.buffer_manager import Buffer
from prefault.errors import DeviceError, DeviceGoneError, DriverError
from prefault.sizes import MIB, PAGE_SIZE
from support.device_server import ends_by
from support.userfaultfd import Toucher
from support.wardens import roles

_CHUNK = 2 * MIB


@pytest.fixture
def swap_file(tmp_path: Path) -> str:
    return str(tmp_path / "swap")


@pytest.fixture
def client(swap_file: str) -> Iterator[DeviceClient]:
    device = BufferObjects(vram=16 * MIB, system=32 * MIB, swap_file=swap_file, swap=64 * MIB, space="1 GiB")
    with open_device(device) as client:
        yield client


@pytest.fixture
def buffers(client: DeviceClient) -> Buffers:
    return Buffers(client, timeout=30)


def huge_bytes(area: Area) -> int:
    """Return the bytes of an area that are mapped by 2 MiB entries, by smaps."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            inside = int(head[1], 16) < area.address + len(area) and int(head[2], 16) > area.address
        elif inside and line.startswith("ShmemPmdMapped:"):
            found += int(line.split()[1]) * 1024
    return found


def fill(area: Area, seed: int = 1) -> bytes:
    """Write a different word to each page."""
    with area.memoryview() as memory:
        for page in range(0, len(memory), PAGE_SIZE):
            memory[page : page + 8] = (page * 31 + seed).to_bytes(8, "little")
        return bytes(memory)


def content(area: Area) -> bytes:
    with area.memoryview() as memory:
        return bytes(memory)


@pytest.mark.parametrize("setting", ["advise", "never"])
def test_d1_a_fault_on_a_contiguous_object_installs_a_huge_page(
    buffers: Buffers, thp_setting: Callable[[str, str], None], setting: str
) -> None:
    thp_setting("shmem_enabled", setting)
    made = buffers.create("frame", 8 * MIB)
    assert (made.placement, made.huge) == ("vram", 8 * MIB)
    with buffers.map("frame") as area:
        with area.memoryview() as memory:
            memory[3 * PAGE_SIZE] = 7
        assert huge_bytes(area) == _CHUNK
        wanted = fill(area)
        assert huge_bytes(area) == 8 * MIB
        assert area.stats().faults == 4
        assert content(area) == wanted


def test_d1_d2_both_kinds_of_pages_in_one_mapping(buffers: Buffers) -> None:
    made = buffers.create("frame", 5 * MIB + 3 * PAGE_SIZE)
    assert made.huge == 4 * MIB
    with buffers.map("frame") as area:
        wanted = fill(area)
        assert huge_bytes(area) == 4 * MIB
        assert content(area) == wanted
        # One for each chunk, and one for each 16 pages of the rest.
        assert area.stats().faults == 2 + 17


def test_d2_small_pages_where_no_chunk_is_whole(buffers: Buffers) -> None:
    halves = [buffers.create(f"half {number}", MIB, placements=["vram"]) for number in range(16)]
    for half in halves[::2]:
        buffers.delete(half.name)
    assert buffers.statistics().external == 1.0
    made = buffers.create("scattered", 4 * MIB, placements=["vram"])
    assert made.huge == 0
    with buffers.map("scattered") as area:
        wanted = fill(area)
        assert huge_bytes(area) == 0
        assert content(area) == wanted


def test_d3_copy_on_write_mappings_are_refused(buffers: Buffers) -> None:
    buffers.create("frame", MIB)
    with pytest.raises(ValueError, match="'frame' is mapped shared only"):
        buffers.map("frame", shared=False)
    with buffers.map("frame") as area:
        flags = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{area.address:x}-")]
        assert "s" in flags[0].split()[1]


def test_d3_a_mapping_is_of_one_object(buffers: Buffers) -> None:
    for name in "ab":
        buffers.create(name, _CHUNK)
    with pytest.raises(DeviceError, match="map one by its name"):
        buffers.client.map(length=2 * _CHUNK)


def test_d4_an_object_moves_while_it_is_mapped(buffers: Buffers) -> None:
    buffers.create("frame", 4 * MIB + PAGE_SIZE)
    with buffers.map("frame") as area, buffers.map("frame", access="read") as reader:
        wanted = fill(area)
        assert huge_bytes(area) == 4 * MIB
        for place, huge in (("system", 0), ("vram", 4 * MIB), ("system", 0), ("vram", 4 * MIB)):
            buffers.move("frame", place)
            assert buffers.describe("frame").placement == place
            assert huge_bytes(area) == huge_bytes(reader) == 0, "no entry is left after the move"
            assert content(area) == content(reader) == wanted
            assert huge_bytes(area) == huge_bytes(reader) == huge
        found = buffers.statistics()
        assert found.moves == 4
        assert found.moved == 4 * len(area)


def test_d4_protection_is_enforced_for_all_who_see_the_page(buffers: Buffers) -> None:
    buffers.create("frame", 2 * MIB)
    with buffers.map("frame") as area:
        wanted = fill(area)
        buffers.protect("frame", "read")
        assert content(area) == wanted
        assert huge_bytes(area) == 0, "read-only pages have small entries"
        with pytest.raises(OSError, match=r"\[Errno 14\]"), open("/dev/zero", "rb", buffering=0) as zeros:
            zeros.readinto(area.memoryview()[:1])  # a store by the kernel: an error, and no SIGBUS
        buffers.protect("frame", "write")
        area.populate()  # the page of the refused store is poisoned in this process until then
        with area.memoryview() as memory:
            memory[PAGE_SIZE] = 1
        assert content(area)[PAGE_SIZE] == 1


def test_d4_the_caching_attribute_changes_while_no_entry_is_valid(buffers: Buffers) -> None:
    buffers.create("frame", 2 * MIB, caching="write-combined")
    with buffers.map("frame") as area:
        wanted = fill(area)
        assert huge_bytes(area)
        buffers.set_caching("frame", "uncached")
        assert huge_bytes(area) == 0
        assert buffers.describe("frame").caching == "uncached"
        assert content(area) == wanted


def test_d5_no_write_is_lost_and_dirty_tracking_survives_a_move(buffers: Buffers) -> None:
    buffers.create("frame", 4 * MIB)
    with buffers.map("frame") as area, area.memoryview() as memory:
        buffers.track_dirty("frame")
        for page in (0, 5, 6, 600):
            memory[page * PAGE_SIZE] = 1
        buffers.move("frame", "system")
        memory[9 * PAGE_SIZE] = 1
        buffers.move("frame", "vram")
        assert buffers.take_dirty("frame").runs == ((0, 1), (5, 7), (9, 10), (600, 601))
        assert buffers.take_dirty("frame").runs == ()
        memory[6 * PAGE_SIZE] = 2
        found = buffers.take_dirty("frame")
        assert (found.runs, found.method) == (((6, 7),), "page")
        assert [memory[page * PAGE_SIZE] for page in (0, 5, 6, 9, 600)] == [1, 1, 2, 1, 1]


def test_d5_dense_writes_are_tracked_by_chunk(buffers: Buffers) -> None:
    buffers.create("frame", 4 * MIB)
    with buffers.map("frame") as area:
        buffers.track_dirty("frame")
        for _ in range(3):
            fill(area)
            assert buffers.take_dirty("frame").runs == ((0, 1024),)
        assert buffers.describe("frame").tracking == "chunk"
        before = area.stats().faults
        wanted = fill(area, seed=5)
        assert area.stats().faults - before <= 8, "a fault for each chunk"
        assert buffers.take_dirty("frame").runs == ((0, 1024),)
        assert content(area) == wanted
        buffers.track_dirty("frame", False)
        with pytest.raises(BufferObjectError, match=r"is not tracked: begin with track_dirty\(\)"):
            buffers.take_dirty("frame")


def test_writers_lose_nothing_while_the_object_moves(buffers: Buffers) -> None:
    import numpy

    buffers.create("frame", 4 * MIB)
    with buffers.map("frame") as area:
        words = area.ndarray("uint64")
        words[:] = 0
        halves = [words[::2], words[1::2]]
        stop, rounds = threading.Event(), [0, 0]

        def write(which: int) -> None:
            mine = halves[which]
            while not stop.is_set():
                numpy.add(mine, 1, out=mine)
                rounds[which] += 1

        threads = [threading.Thread(target=write, args=(which,)) for which in (0, 1)]
        for thread in threads:
            thread.start()
        for number in range(12):
            buffers.move("frame", ("system", "vram")[number % 2])
            if number % 4 == 3:
                buffers.swap_out("frame")
        stop.set()
        for thread in threads:
            thread.join(60)
        for which in (0, 1):
            assert (halves[which] == rounds[which]).all()
        assert all(rounds)
        halves.clear()
        del words, thread


def test_an_object_that_was_swapped_out_comes_back_with_its_content(buffers: Buffers, swap_file: str) -> None:
    buffers.create("frame", 4 * MIB)
    with buffers.map("frame") as area:
        wanted = fill(area)
        buffers.swap_out("frame")
        assert buffers.describe("frame").placement == "swap"
        assert os.stat(swap_file).st_blocks * 512 >= 4 * MIB
        assert content(area) == wanted
        assert buffers.describe("frame").placement == "vram"
        buffers.evict("frame")
        buffers.evict("frame")
        assert buffers.describe("frame").placement == "swap"
        area.populate()
        assert content(area) == wanted
    buffers.delete("frame")
    assert os.stat(swap_file).st_blocks == 0


def test_two_devices_do_not_share_a_swap_file(buffers: Buffers, swap_file: str) -> None:
    buffers.create("frame", MIB)
    device = BufferObjects(vram=MIB, system=MIB, swap_file=swap_file, swap=MIB, space="64 MiB")
    with pytest.raises(DeviceError, match="belongs to another device: give each device one of its own"):
        open_device(device)


def test_the_least_recently_used_object_makes_room(buffers: Buffers) -> None:
    for name in ("a", "b", "c", "d"):
        buffers.create(name, 4 * MIB)
    with buffers.map("a") as area:
        wanted = fill(area)
        buffers.pin("b")
        buffers.create("e", 8 * MIB, placements=["vram"])
        where = {name: buffers.describe(name).placement for name in "abcde"}
        assert where == {"a": "vram", "b": "vram", "c": "system", "d": "system", "e": "vram"}
        assert content(area) == wanted


def test_c8_what_is_not_needed_is_purged_under_pressure(buffers: Buffers) -> None:
    buffers.create("cache", 8 * MIB, placements=["vram"])
    buffers.create("kept", 4 * MIB, placements=["vram"])
    with buffers.map("cache") as area:
        wanted = fill(area)
        assert buffers.madvise("cache", "dontneed")
        assert content(area) == wanted, "it can be used until it is purged"
        assert buffers.madvise("cache", "willneed")
        buffers.madvise("cache", "dontneed")
        with pytest.raises(BufferObjectError, match="'kept' is needed"):
            buffers.purge("kept")
        buffers.create("new", 8 * MIB, placements=["vram"])
        assert buffers.describe("kept").placement == "vram"
        assert buffers.describe("cache").purged
        assert not buffers.madvise("cache", "willneed"), "the content was not retained"
        with pytest.raises(DriverError, match="was purged: its content was not needed, and memory was short"):
            area.read(0, 1)
        with pytest.raises(BufferObjectError, match="'cache' was purged: delete it") as caught:
            buffers.move("cache", "vram")
        assert caught.value.errno == errno.ENODATA
    buffers.delete("cache")
    buffers.create("cache", 2 * MIB)
    with buffers.map("cache") as area:
        assert content(area) == bytes(2 * MIB)


def test_who_purges_is_said(buffers: Buffers) -> None:
    buffers.create("cache", MIB)
    with buffers.map("cache") as area:
        buffers.madvise("cache", "dontneed")
        buffers.purge("cache")
        with pytest.raises(DriverError, match="was purged: its content was not needed, and a client had it purged"):
            area.read(0, 1)


def test_a_reservation_that_is_not_granted_says_who_has_the_object(buffers: Buffers) -> None:
    for name in ("frame", "other"):
        buffers.create(name, MIB)
    with buffers.reserve("frame") as first:
        message = (
            rf"'frame' was not reserved within 0 s: ticket {first.ticket} has it, and ticket \d+, which asks, has nothing:"
            " end the other reservation, or give a longer timeout"
        )
        with pytest.raises(TimeoutError, match=message), buffers.reserve("frame", timeout=0):
            pass
        with pytest.raises(TimeoutError, match="which asks, has 'other': "), buffers.reserve("other", "frame", timeout=0):
            pass
    assert buffers.describe("other").ticket == 0


def test_a_fault_on_a_reserved_object_waits_and_the_server_does_not(buffers: Buffers) -> None:
    buffers.create("frame", 2 * MIB)
    buffers.create("other", 2 * MIB)
    with buffers.map("frame") as area, buffers.map("other") as other:
        with buffers.reserve("frame") as reservation:
            toucher = Toucher(area.address)
            until = time.monotonic() + 20
            while not buffers.statistics().retries and time.monotonic() < until:
                time.sleep(0.01)
            assert toucher.waits
            fill(other)  # the server answers other faults
            buffers.move("frame", "system", ticket=reservation.ticket)
            assert toucher.waits
        assert toucher.finish() == b"\0"
        assert buffers.describe("frame").placement == "system"


def test_two_reserve_in_opposite_order_and_the_backoff_is_seen(buffers: Buffers) -> None:
    for name in ("a", "b"):
        buffers.create(name, MIB)
    backoffs: list[int] = []
    both = threading.Barrier(2)

    def work(names: tuple[str, str]) -> None:
        own = Buffers(buffers.client, timeout=30)
        both.wait(30)
        for _ in range(30):
            with own.reserve(*names, timeout=60) as found:
                time.sleep(0.0005)
                backoffs.append(found.backoffs)

    threads = [threading.Thread(target=work, args=(names,)) for names in (("a", "b"), ("b", "a"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert len(backoffs) == 60
    assert buffers.describe("a").ticket == buffers.describe("b").ticket == 0
    assert sum(backoffs) == buffers.statistics().backoffs > 0


def test_an_eviction_leaves_reserved_objects_where_they_are() -> None:
    with open_device(BufferObjects(vram=4 * MIB, system=4 * MIB, space="64 MiB")) as client:
        buffers = Buffers(client, timeout=30)
        buffers.create("reserved", 4 * MIB, placements=["system"])
        buffers.create("frame", 4 * MIB)
        buffers.madvise("reserved", "dontneed")
        with buffers.reserve("reserved"), pytest.raises(BufferObjectError, match=r"no room for the 4\.0 MiB of 'frame'"):
            buffers.evict("frame")
        assert buffers.madvise("reserved", "willneed"), "it was not purged"
        assert (buffers.describe("reserved").placement, buffers.describe("frame").placement) == ("system", "vram")


def test_state_survives_the_death_of_the_server(buffers: Buffers) -> None:
    buffers.create("frame", 5 * MIB, caching="encrypted")
    buffers.create("gone", MIB)
    buffers.create("out", MIB)
    with buffers.map("frame") as area, buffers.map("out") as out:
        wanted, second = fill(area), fill(out, seed=9)
        buffers.move("frame", "system")
        buffers.move("frame", "vram")
        buffers.swap_out("out")
        buffers.madvise("gone", "dontneed")
        buffers.purge("gone")
        buffers.pin("frame")
        with buffers.reserve("out") as reservation:
            before = [buffers.describe(name) for name in ("frame", "gone", "out")]
            os.kill(roles()["server"], signal.SIGKILL)
            after = [_again(buffers, name) for name in ("frame", "gone", "out")]
            assert after == before
            assert after[2].ticket == reservation.ticket
        assert buffers.describe("out").ticket == 0
        assert content(area) == wanted
        assert content(out) == second
        assert huge_bytes(area) == 4 * MIB
        with pytest.raises(BufferObjectError, match="pinned"):
            buffers.swap_out("frame")


def test_a_release_that_the_server_dies_of_is_made_at_the_next_one(buffers: Buffers) -> None:
    buffers.create("a", MIB)
    server = roles()["server"]
    with buffers.reserve("a"):
        os.kill(server, signal.SIGSTOP)  # so that the release is on its way when it dies
        killer = threading.Timer(0.3, os.kill, (server, signal.SIGKILL))
        killer.start()
    killer.join(10)
    with buffers.reserve("a", timeout=5) as reservation:
        assert _again(buffers, "a").ticket == reservation.ticket


class DiesOfProtecting(BufferObjects):
    """Buffer objects whose server dies when it has entered a protection into its table, before pages have it."""

    def recipe(self) -> None:  # type: ignore[override]
        return None

    def save(self, buffer: Buffer) -> None:
        super().save(buffer)
        if buffer.access == "read":
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_protection_that_the_server_died_of_is_enforced_by_the_next_one() -> None:
    def store(say: Any) -> None:
        with open_device(DiesOfProtecting(vram=4 * MIB, system=4 * MIB, space="64 MiB")) as client:
            buffers = Buffers(client, timeout=30)
            buffers.create("frame", MIB)
            with buffers.map("frame") as area, area.memoryview() as memory:
                memory[0] = 7
                with pytest.raises(DeviceGoneError):
                    buffers.protect("frame", "read")
                say(f"{_again(buffers, 'frame').access} {memory[0]}")
                memory[0] = 8

    said, status = ends_by(store)
    assert (said, status) == ("read 7", -signal.SIGBUS)


def _again(buffers: Buffers, name: str) -> _messages.Description:
    """Describe an object; a request that the server died of is asked again."""
    until = time.monotonic() + 30
    while True:
        try:
            return buffers.describe(name)
        except DeviceGoneError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def test_unplug_gives_zeros_or_an_error(buffers: Buffers) -> None:
    buffers.create("frame", 2 * MIB)
    with buffers.map("frame") as area:
        fill(area)
        buffers.unplug("dummy")
        assert content(area) == bytes(2 * MIB)
        with pytest.raises(BufferObjectError, match="unplugged") as caught:
            buffers.create("more", MIB)
        assert caught.value.errno == errno.ENODEV
        buffers.unplug("poison")
        with pytest.raises(DriverError, match="unplugged"):
            area.read(0, 1)
    buffers.delete("frame")


def test_d5_writes_beside_foreign_memory_are_tracked(buffers: Buffers) -> None:
    buffers.create("frame", 8 * MIB)
    with buffers.map("frame") as area, open("/proc/self/exe", "rb") as file:
        fill(area)
        assert huge_bytes(area) == 8 * MIB
        # The kernel refuses to register a range for write protection in which a page is of such a file.
        protection, flags = mmap.PROT_READ, mmap.MAP_PRIVATE | mman.MAP_FIXED
        assert mman.mmap(area.address + PAGE_SIZE, PAGE_SIZE, protection, flags, file.fileno()) == area.address + PAGE_SIZE
        buffers.track_dirty("frame")
        with area.memoryview() as memory:
            for page in (700, 2047):
                memory[page * PAGE_SIZE] = 7
            assert buffers.take_dirty("frame").runs == ((700, 701), (2047, 2048))
            memory[2 * PAGE_SIZE] = 7  # of the chunk with the foreign page
        assert buffers.take_dirty("frame").runs == ((2, 3),)


@pytest.mark.parametrize(
    "request_bytes", [b"", b"garbage", b"\x93\xa4move\x01\x02", b"\xff" * 64_000, b"\x91\xa6delete", b"\x90"]
)
def test_garbage_is_refused(buffers: Buffers, request_bytes: bytes) -> None:
    with pytest.raises(DeviceError, match="not a request of buffer objects") as caught:
        buffers.client.control(request_bytes)
    assert caught.value.errno == errno.EBADMSG
    assert buffers.statistics().used == {"vram": 0, "system": 0, "swap": 0}


def test_requests_that_are_refused_change_nothing(buffers: Buffers) -> None:
    buffers.create("a", 4 * MIB, placements=["vram"])
    buffers.create("b", 8 * MIB)
    buffers.pin("a")
    buffers.pin("b")
    before = (buffers.statistics(), buffers.describe("a"), buffers.describe("b"))
    with buffers.map("a") as area, buffers.reserve("b"):
        other = buffers.ask(_messages.BeginTicket(), _messages.TicketState).number
        reserved = buffers.describe("b")
        wrong: list[tuple[Callable[[], object], str, int]] = [
            (lambda: buffers.create("big", 64 * MIB), "more than each placement", errno.ENOSPC),
            (lambda: buffers.create("c", 8 * MIB, placements=["vram"]), "pinned", errno.ENOSPC),
            (lambda: buffers.create("c", MIB, alignment=12288), "power of two", errno.EINVAL),
            (lambda: buffers.create("c", 0), "at least one byte", errno.EINVAL),
            (lambda: buffers.create("a", MIB), "already", errno.EEXIST),
            (lambda: buffers.create("c", MIB, placements=[]), "needs a placement", errno.EINVAL),
            (lambda: buffers.create("c", MIB, priority=9), "priority", errno.EINVAL),
            (lambda: buffers.move("a", "system"), "not a placement of 'a'", errno.EINVAL),
            (lambda: buffers.swap_out("a"), "is pinned", errno.EBUSY),
            (lambda: buffers.purge("a"), "is pinned", errno.EBUSY),
            (lambda: buffers.move("b", "system"), "reserved by ticket", errno.EBUSY),
            (lambda: buffers.delete("a"), "cannot delete 'a'", errno.EBUSY),
            (lambda: buffers.describe("c"), "no buffer object 'c'", errno.ENOENT),
            (lambda: buffers.move("a", "vram", ticket=999), "no ticket 999", errno.EALREADY),
            (lambda: _reserve(buffers, reserved.ticket, "b"), "reserved already", errno.EALREADY),
            (lambda: buffers.ask(_messages.Release(other, "b"), _messages.RequestDone), "does not have b", errno.EALREADY),
        ]
        for call, message, number in wrong:
            with pytest.raises(BufferObjectError, match=message) as caught:
                call()
            assert caught.value.errno == number, message
            assert buffers.describe("b") == reserved
        buffers.ask(_messages.EndTicket(other), _messages.RequestDone)
        assert len(area) == 4 * MIB
    assert (buffers.statistics(), buffers.describe("a"), buffers.describe("b")) == before
    with pytest.raises(BufferObjectError, match="no buffer object"):
        buffers.unpin("c")
    buffers.delete("b")
    with pytest.raises(BufferObjectError, match="no buffer object 'b'"):
        buffers.move("b", "vram")  # after its deletion
    with pytest.raises(DeviceError):
        buffers.map("b")


def test_arguments_that_cannot_be_are_not_sent(buffers: Buffers) -> None:
    buffers.create("frame", MIB)
    before = buffers.describe("frame"), buffers.statistics()
    wrong: Any = buffers  # for arguments of another type
    name = "name of an object"
    for kind, message, call in (
        (TypeError, f"{name} is a str, not NoneType", lambda: wrong.map(None)),  # the whole device, with every object
        (TypeError, f"{name} is a str, not int", lambda: wrong.describe(7)),
        (ValueError, "1 to 200 bytes in UTF-8 and no NUL, not 0", lambda: buffers.create("", MIB)),
        (ValueError, "1 to 200 bytes in UTF-8 and no NUL, not 402", lambda: buffers.create("é" * 201, MIB)),
        (ValueError, "no NUL", lambda: buffers.delete("a\0b")),
        (ValueError, "access is 'read' or 'write', not 'rw'", lambda: wrong.protect("frame", "rw")),
        (ValueError, "advice is 'dontneed' or 'willneed', not 'maybe'", lambda: wrong.madvise("frame", "maybe")),
        (ValueError, "policy is 'dummy' or 'poison', not 'x'", lambda: wrong.unplug("x")),
        (ValueError, "placement is 'vram' or 'system', not 'moon'", lambda: buffers.create("b", MIB, placements=["moon"])),
        (ValueError, "placement is 'vram' or 'system', not 'moon'", lambda: buffers.move("frame", "moon")),
        (TypeError, r"such as \['vram'\], not the str 'vram'", lambda: buffers.create("b", MIB, placements="vram")),
        (TypeError, "priority is an int, 0 to 3, not 'x'", lambda: wrong.create("b", MIB, priority="x")),
        (ValueError, "caching is 'cached', .* or 'encrypted', not 'x'", lambda: buffers.create("b", MIB, caching="x")),
        (ValueError, "caching is 'cached', .* or 'encrypted', not 'x'", lambda: buffers.set_caching("frame", "x")),
        (TypeError, "Buffers takes a DeviceClient, .* not None", lambda: Buffers(None)),  # type: ignore[arg-type]
    ):
        with pytest.raises(kind, match=message):
            call()
    assert (buffers.describe("frame"), buffers.statistics()) == before


def _reserve(buffers: Buffers, ticket: int, name: str) -> object:
    return buffers.ask(_messages.Reserve(ticket, name), _messages.TicketState)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vram": 0, "system": 0}, "both have a capacity of 0"),
        ({"vram": 5, "system": MIB}, "multiple of 4096"),
        ({"vram": MIB, "system": MIB, "swap": MIB}, "takes both"),
    ],
)
def test_capacities_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BufferObjects(**arguments)
