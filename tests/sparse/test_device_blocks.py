"""Requirement B5: sparse memory whose blocks come from a pool that a device driver manages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.errors import (
    BackingFullError,
    DeviceGoneError,
    DiscardError,
    DriverError,
    NotPopulatedError,
    PoolFullError,
    PopulateError,
)
from prefault.ranges import RangeSet
from prefault.sizes import GIB, MIB
from prefault.sizes import PAGE_SIZE as PAGE
from prefault.sparse import Accounting, SparseMemory
from support import oracle, processes
from support.block_devices import Blocks, opened
from support.devices import Pattern
from support.sparse import faults, mappings, present, present_blocks, signal_of

pytestmark = pytest.mark.usefixtures("no_leaks")

BLOCK = 4 * PAGE
BOTH = pytest.mark.parametrize("unpopulated", ["zeros", "fault"])


@BOTH
def test_one_call_of_the_driver_supplies_a_block_and_discard_gives_it_back(tmp_path: Path, unpopulated: str) -> None:
    device = Blocks()
    with opened(device, tmp_path) as client, SparseMemory(
        16 * BLOCK, device=client, block=BLOCK, unpopulated=unpopulated  # type: ignore[arg-type]
    ) as memory:  # fmt: skip
        assert (memory.page_size, memory.block, memory.shared, memory.fd) == (PAGE, BLOCK, True, None)
        assert not any(present(memory))
        assert device.counts == (0, 0, 0, 0), "what is not plugged costs nothing"
        result = memory.populate(BLOCK + 1, BLOCK)
        assert (result.bytes, result.method) == (2 * BLOCK, "device")
        assert device.counts == (0, 1, 8, 0)
        assert present_blocks(memory) == [1, 2]
        memory.write(BLOCK, b"x" * BLOCK)
        assert memory.read(BLOCK, 2 * BLOCK) == b"x" * BLOCK + bytes(BLOCK)
        assert memory.populated.length == 2 * BLOCK
        gone = memory.discard(BLOCK, BLOCK)
        assert (gone.bytes, gone.freed_bytes, gone.method) == (BLOCK, BLOCK, "device")
        assert device.counts == (0, 1, 8, 4)
        assert present_blocks(memory) == [2]
        memory.populate(BLOCK, BLOCK)
        assert memory.read(BLOCK, BLOCK) == bytes(BLOCK)
        assert device.counts == (0, 2, 12, 4)


def test_touching_an_unpopulated_block_asks_the_driver_or_is_a_segmentation_fault(tmp_path: Path) -> None:
    device = Blocks()
    with opened(device, tmp_path) as client:
        with SparseMemory(4 * BLOCK, device=client, block=BLOCK) as memory, memory.view() as view:
            assert view[5] == 0
            assert device.counts == (1, 0, 0, 0)
        with (
            SparseMemory(4 * BLOCK, device=client, block=BLOCK, unpopulated="fault") as memory,
            pytest.raises(NotPopulatedError),
        ):
            memory.read(0, 1)
        assert client.path is not None
        # In a process of its own, since a child of fork has no such memory anyway.
        for offset, number in ((BLOCK, 0), (0, signal.SIGSEGV), (2 * BLOCK, signal.SIGSEGV), (3 * BLOCK, signal.SIGSEGV)):
            done = subprocess.run([sys.executable, "-c", _TOUCH, str(client.path), str(BLOCK), str(offset)], check=False)
            assert done.returncode == -number, offset


_TOUCH = """
import ctypes, resource, sys
import prefault, prefault.device

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
path, block, offset = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with prefault.device.connect(path) as client:
    with prefault.SparseMemory(4 * block, device=client, block=block, unpopulated="fault") as memory:
        memory.populate(0, 2 * block)
        memory.discard(0, block)  # protected again
        ctypes.string_at(memory.range.start + offset, 1)
"""


@BOTH
def test_many_blocks_are_one_request(tmp_path: Path, unpopulated: str) -> None:
    device = Blocks(4096)
    with opened(device, tmp_path) as client, SparseMemory(
        1024 * BLOCK, device=client, block=BLOCK, unpopulated=unpopulated  # type: ignore[arg-type]
    ) as memory:  # fmt: skip
        ranges = [(number * BLOCK, BLOCK) for number in range(0, 1024, 3)]
        result = memory.populate_many(ranges)
        assert result.bytes == len(ranges) * BLOCK
        assert device.counts[2] == len(ranges) * 4
        assert present_blocks(memory) == list(range(0, 1024, 3))
        assert mappings(memory) <= 2 * 8192
        gone = memory.discard_many(ranges[::2])
        assert (gone.bytes, gone.freed_bytes) == (len(ranges[::2]) * BLOCK, len(ranges[::2]) * BLOCK)
        assert present_blocks(memory) == [number for number in range(0, 1024, 3) if number % 6]
        assert device.counts[3] == len(ranges[::2]) * 4


@BOTH
def test_a_populate_that_the_driver_fails_changes_nothing(tmp_path: Path, unpopulated: str) -> None:
    device = Blocks(bad=(30,))
    device.batch = PAGE
    with opened(device, tmp_path) as client, SparseMemory(
        device=client, block=BLOCK, unpopulated=unpopulated, size=None  # type: ignore[arg-type]
    ) as memory:  # fmt: skip
        assert len(memory) == 64 * PAGE
        memory.populate(0, BLOCK)
        memory.write(0, b"kept")
        for ranges in ([(0, 16 * BLOCK)], [(0, 2 * BLOCK), (6 * BLOCK, 4 * BLOCK)]):
            with pytest.raises(DriverError, match="block 30 is worn out") as caught:
                memory.populate_many(ranges) if len(ranges) > 1 else memory.populate()
            assert (caught.value.offset, caught.value.populated_bytes) == (30 * PAGE, 0)
            assert present_blocks(memory) == [0]
            assert memory.read(0, 4) == b"kept"
        asked = device.counts[2]
        memory.populate(BLOCK, BLOCK)
        assert device.counts[2] == asked + 4, "blocks of the calls that failed stayed with the server"


def test_several_machines_share_one_pool_until_it_is_full(tmp_path: Path) -> None:
    device = Blocks(64, page_size=PAGE, capacity_blocks=24)
    with (
        opened(device, tmp_path) as client,
        SparseMemory(32 * PAGE, device=client, unpopulated="fault") as one,
        SparseMemory(32 * PAGE, device=client, offset=32 * PAGE, unpopulated="fault") as other,
    ):
        one.populate(0, 16 * PAGE)
        one.write(0, b"1" * PAGE)
        other.populate(0, 8 * PAGE)
        with pytest.raises(BackingFullError, match="capacity of 24 pages has no room for 1 more: 24 are taken") as caught:
            other.populate(8 * PAGE, PAGE)
        assert isinstance(caught.value, PopulateError)
        assert caught.value.offset == 8 * PAGE
        assert other.read(0, 8 * PAGE) == bytes(8 * PAGE), "the pages of the other machine"
        one.discard(0, 4 * PAGE)
        other.populate(8 * PAGE, 4 * PAGE)
        assert other.read(8 * PAGE, 4 * PAGE) == bytes(4 * PAGE), "the block came with the bytes of another machine"
        with pytest.raises(BackingFullError):
            one.populate(0, PAGE)
        assert (one.populated.length, other.populated.length) == (12 * PAGE, 12 * PAGE)


class _Account(Accounting):
    def __init__(self, most: int) -> None:
        self.most, self.charged, self.closed = most, RangeSet(), 0

    def charge(self, blocks: RangeSet) -> RangeSet:
        new = blocks - self.charged
        if self.charged.length + new.length > self.most:
            raise PoolFullError(28, f"{self.charged.length + new.length} of {self.most}")
        self.charged |= new
        return new

    def refund(self, blocks: RangeSet) -> None:
        self.charged -= blocks

    def close(self) -> None:
        self.closed += 1


@BOTH
def test_accounting(tmp_path: Path, unpopulated: str) -> None:
    device = Blocks(bad=(9,))
    account = _Account(4 * BLOCK)
    with opened(device, tmp_path) as client:
        with SparseMemory(
            16 * BLOCK, device=client, block=BLOCK, unpopulated=unpopulated, accounting=account  # type: ignore[arg-type]
        ) as memory:  # fmt: skip
            memory.populate(0, 2 * BLOCK)
            assert account.charged.length == 2 * BLOCK
            with pytest.raises(PoolFullError):
                memory.populate(0, 5 * BLOCK)
            assert device.counts[2] == 8
            with pytest.raises(DriverError):
                memory.populate(BLOCK, 2 * BLOCK)
            assert account.charged.length == 2 * BLOCK
            memory.discard(0, BLOCK)
            assert account.charged.length == BLOCK
        assert account.closed == 1


def test_a_child_of_fork_has_no_such_memory(tmp_path: Path) -> None:
    device = Blocks()
    with opened(device, tmp_path) as client, SparseMemory(4 * BLOCK, device=client, unpopulated="fault") as memory:
        memory.populate()
        memory.write(0, b"parent")

        def in_child() -> None:
            try:
                for call in (
                    memory.populate,
                    memory.discard,
                    memory.view,
                    lambda: memory.read(0, 1),
                    lambda: memory.populated,
                ):
                    with pytest.raises(DeviceGoneError):
                        call()
                assert "SparseMemory" in repr(memory)
                memory.close()
            except BaseException:  # noqa: BLE001  the exit status is all that the parent sees
                os.kill(os.getpid(), signal.SIGKILL)

        assert signal_of(in_child) == 0
        assert faults(memory, 0), "the child has the pages"
        assert memory.read(0, 6) == b"parent"
        assert device.counts[3] == 0


def test_a_fork_while_another_thread_populates(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)  # pytest keeps what it reports to itself
    device = Blocks(1024)
    with opened(device, tmp_path) as client, SparseMemory(1024 * PAGE, device=client, unpopulated="fault") as memory:
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                memory.populate()
                memory.discard()

        thread = threading.Thread(target=work)
        thread.start()
        try:
            for _ in range(20):
                assert signal_of(lambda: None) == 0
        finally:
            stop.set()
            thread.join()
    assert "Exception ignored" not in capfd.readouterr().err


def test_the_server_is_killed_and_blocks_stay(tmp_path: Path) -> None:
    device = Blocks()
    with (
        prefault.device.serve(device, tmp_path / "s") as server,
        prefault.device.connect(server.path) as client,
        SparseMemory(16 * BLOCK, device=client, block=BLOCK, unpopulated="fault") as memory,
    ):
        memory.populate(0, 4 * BLOCK)
        memory.write(0, b"before")
        (pid,) = processes.children(server.pid)
        os.kill(pid, signal.SIGKILL)
        memory.populate(4 * BLOCK, BLOCK)
        assert memory.read(0, 6) == b"before"
        assert memory.discard(0, BLOCK).freed_bytes == BLOCK
        assert present_blocks(memory) == [1, 2, 3, 4]


def test_without_a_server_plugging_and_unplugging_are_errors_and_blocks_stay(tmp_path: Path) -> None:
    device = Blocks()
    device.restartable = False
    with (
        prefault.device.serve(device, tmp_path / "s") as server,
        prefault.device.connect(server.path) as client,
        SparseMemory(4 * BLOCK, device=client, block=BLOCK, unpopulated="fault") as memory,
    ):
        memory.populate(0, BLOCK)
        memory.write(0, b"stays")
        (pid,) = processes.children(server.pid)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DeviceGoneError):
            memory.populate(BLOCK, BLOCK)
        with pytest.raises(DiscardError):
            memory.discard(0, BLOCK)
        assert memory.read(0, 5) == b"stays"
        assert present_blocks(memory) == [0]
        with pytest.raises(NotPopulatedError):
            memory.read(BLOCK, 1)


def test_a_large_range_with_scattered_blocks_has_few_mappings(tmp_path: Path) -> None:
    device = Blocks((64 * GIB) // (2 * MIB), page_size=2 * MIB, capacity_blocks=64)
    with opened(device, tmp_path) as client, SparseMemory("64 GiB", device=client, unpopulated="fault") as memory:
        blocks = range(0, len(memory) // memory.block, 1031)
        memory.populate_many([(number * memory.block, memory.block) for number in blocks])
        assert memory.populated.length == len(blocks) * memory.block
        assert mappings(memory) <= 4 * len(blocks)
        for number in blocks:
            memory.write(number * memory.block, number.to_bytes(4, "little"))
        memory.discard(0, 32 * GIB)
        for number in blocks:
            if number * memory.block < 32 * GIB:
                with pytest.raises(NotPopulatedError):
                    memory.read(number * memory.block, 4)
            else:
                assert memory.read(number * memory.block, 4) == number.to_bytes(4, "little")


def test_huge_frames(tmp_path: Path, hugetlb_pool: object) -> None:
    hugetlb_pool(8)  # type: ignore[operator]
    device = Blocks(32, page_size=2 * MIB, capacity_blocks=6)
    with opened(device, tmp_path) as client, SparseMemory(None, device=client, unpopulated="fault") as memory:
        memory.populate(2 * MIB, 4 * MIB)
        assert oracle.smaps(memory.range.start + 2 * MIB)["KernelPageSize"] == 2 * MIB
        assert memory.populated.length == 4 * MIB
        memory.write(2 * MIB, b"huge")
        memory.discard(2 * MIB, 2 * MIB)
        memory.populate(2 * MIB, 2 * MIB)
        assert memory.read(2 * MIB, 4) == bytes(4)


def test_growing(tmp_path: Path) -> None:
    with opened(Blocks(), tmp_path) as client, SparseMemory(4 * PAGE, reservation=64 * PAGE, device=client) as memory:
        memory.resize(32 * PAGE)
        memory.populate()
        memory.write(31 * PAGE, b"grown")
        assert oracle.present(memory.range.start, 64 * PAGE) == [True] * 32 + [False] * 32
        with pytest.raises(ValueError, match="reservation"):
            memory.resize(65 * PAGE)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"size": 65 * PAGE}, "beyond Blocks, which has 262144 bytes"),
        ({"size": PAGE, "offset": 64 * PAGE}, "beyond"),
        ({"size": PAGE, "offset": 5}, "multiple of its page size"),
        ({"size": PAGE, "block": PAGE // 2}, "multiple of the page size"),
        ({"size": PAGE, "backing": "memfd"}, "leave backing"),
        ({"size": PAGE, "shared": False}, "leave backing"),
        ({"size": PAGE, "huge": "advise"}, "leave backing"),
    ],
)
def test_options_that_a_device_does_not_allow(tmp_path: Path, options: dict[str, object], complaint: str) -> None:
    with opened(Blocks(), tmp_path) as client, pytest.raises(ValueError, match=complaint):
        SparseMemory(device=client, **options)  # type: ignore[arg-type]


def test_what_is_no_connected_device(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"prefault.device.open or prefault.device.connect\), not Blocks"):
        SparseMemory(PAGE, device=Blocks())  # type: ignore[arg-type]
    with opened(Pattern(), tmp_path) as client, pytest.raises(ValueError, match="read-only"):
        SparseMemory(PAGE, device=client)


def test_blocks_of_a_private_server() -> None:
    device = Blocks()
    with prefault.device.open(device) as client, SparseMemory(None, device=client, unpopulated="fault") as memory:
        memory.populate(PAGE, PAGE)
        assert device.counts == (0, 1, 1, 0)
        assert present_blocks(memory) == [1]


def test_the_connection_stays_open_as_long_as_the_memory(tmp_path: Path) -> None:
    with opened(Blocks(), tmp_path) as client:
        memory = SparseMemory(PAGE, device=client)
        view = memory.view()
        with pytest.raises(BufferError):
            client.close()
        del memory
        assert view[0] == 0
        view.release()
