"""The device over real memory: what is behind a block, and what happens when there is none."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prefault import BackingSource, RangeSet, TemporaryFile
from prefault.errors import NotPopulatedError, PoolFullError
from prefault.memory.backings import Descriptor
from prefault.sizes import GIB, MIB
from prefault.sparse import Accounting, SparseMemory
from prefault.virtio_mem import BlockState, Feature, Request, RequestType, Response, ResponseType, VirtioMem
from support import oracle
from support.block_devices import Blocks, frames_of, opened

pytestmark = pytest.mark.usefixtures("no_leaks")

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, NACK, BUSY, ERROR = (Response(kind) for kind in ResponseType)
BLOCK = 2 * MIB
ADDR = 4 * GIB

_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1, linux/fcntl.h; not in Python's fcntl module


def ask(device: VirtioMem, kind: int, first: int = 0, blocks: int = 1) -> Response:
    return device.process(Request(kind, ADDR + first * device.config.block_size, blocks))


def file_of(memory: SparseMemory) -> int | None:
    """The file behind the memory, which for a device is that of its frames."""
    return memory.fd if memory.device is None else frames_of(memory.device)


def allocated(memory: SparseMemory) -> int:
    fd = file_of(memory)
    assert fd is not None
    return os.fstat(fd).st_blocks * 512


@contextmanager
def sparse_memory(kind: str, unpopulated: str, directory: Path) -> Iterator[SparseMemory]:
    """64 MiB of a backing, or of a device that has four blocks."""
    if kind != "device":
        with SparseMemory("64 MiB", backing=kind, block=BLOCK, unpopulated=unpopulated) as memory:  # type: ignore[arg-type]
            yield memory
        return
    device = Blocks(32, page_size=BLOCK, capacity_blocks=4)
    with opened(device, directory) as client, SparseMemory(None, device=client, unpopulated=unpopulated) as memory:  # type: ignore[arg-type]
        yield memory


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "tmpfs", "device"])
@pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
def test_memory_comes_and_goes_with_the_blocks(kind: str, unpopulated: str, tmp_path: Path) -> None:
    with sparse_memory(kind, unpopulated, tmp_path) as memory:
        device = VirtioMem(memory, addr=ADDR, requested_size="32 MiB")
        start = memory.range.start
        assert bool(device.offered & Feature.UNPLUGGED_INACCESSIBLE) == (unpopulated == "fault")
        assert ask(device, PLUG, 3, 4) == ACK
        assert oracle.present_bytes(start, 64 * MIB) == oracle.present_bytes(start + 3 * BLOCK, 4 * BLOCK) == 8 * MIB
        content = b"x" * MIB
        before = oracle.minor_faults()
        with memory.view(3 * BLOCK, MIB) as view:
            view[:] = content
        # A device's server is a fork of this process here, whose first writes to its own memory are faults since.
        assert oracle.minor_faults() - before < (10 if memory.device is None else MIB // oracle.PAGE // 2)
        assert ask(device, UNPLUG, 3, 2) == ACK
        assert oracle.present_bytes(start, 64 * MIB) == oracle.present_bytes(start + 5 * BLOCK, 2 * BLOCK) == 4 * MIB
        assert ask(device, PLUG, 3) == ACK
        assert memory.read(3 * BLOCK, MIB) == bytes(MIB)
        if file_of(memory) is not None:
            assert allocated(memory) == device.config.plugged_size
        device.device_reset()
        assert oracle.present_bytes(start, 64 * MIB) == 6 * MIB
        assert device.system_reset()
        assert oracle.present_bytes(start, 64 * MIB) == 0
        if file_of(memory) is not None:
            assert allocated(memory) == 0


@pytest.mark.parametrize("kind", ["memfd", "device"])
def test_unplugged_memory_is_out_of_reach(kind: str, tmp_path: Path) -> None:
    with sparse_memory(kind, "fault", tmp_path) as memory:
        device = VirtioMem(memory, addr=ADDR, requested_size="64 MiB")
        assert ask(device, PLUG, 1) == ACK
        memory.write(BLOCK, b"x")
        for offset in (0, BLOCK - 1, 2 * BLOCK):
            with pytest.raises(NotPopulatedError):
                memory.read(offset, 1)
        assert ask(device, UNPLUG, 1) == ACK
        with pytest.raises(NotPopulatedError):
            memory.write(BLOCK, b"x")


@pytest.mark.parametrize("backing", ["anonymous", "memfd", "tmpfs"])
def test_a_plugged_block_reads_zeros_though_it_was_written_while_unplugged(backing: str) -> None:
    """A driver must not write there, but nothing stops it. A plug drops those bytes, and none around them."""
    with SparseMemory("16 MiB", backing=backing, block=BLOCK, unpopulated="zeros") as memory:
        device = VirtioMem(memory, addr=ADDR, requested_size="16 MiB")
        assert ask(device, PLUG, 0) == ACK
        array = memory.ndarray("uint8", (8, BLOCK))
        for block in (0, 1, 2, 3):
            array[block, ::4096] = 7
        assert ask(device, PLUG, 1, 2) == ACK
        assert not array[1:3].any()
        assert array[0, ::4096].all()  # plugged before
        assert array[3, ::4096].all()  # still unplugged: the device leaves it alone until then
        assert oracle.present_bytes(memory.range.start + BLOCK, 2 * BLOCK) == 2 * BLOCK
        array[1] = 9
        assert ask(device, UNPLUG, 1) == ACK
        array[1, 5] = 9
        assert ask(device, PLUG, 1) == ACK
        assert not array[1].any()
        del array


def test_unplug_all_takes_what_reading_has_allocated() -> None:
    with SparseMemory("16 MiB", backing="memfd", block=BLOCK, unpopulated="zeros", huge="never") as memory:
        device = VirtioMem(memory, addr=ADDR, requested_size="8 MiB")
        assert ask(device, PLUG) == ACK
        assert not any(memory.view(4 * BLOCK, BLOCK))  # a dump of unplugged memory: it allocates in a memory file
        assert allocated(memory) == 2 * BLOCK
        assert ask(device, UNPLUG_ALL) == ACK
        assert allocated(memory) == 0


def run_out(device: VirtioMem, memory: SparseMemory, fitting: int) -> None:
    """Memory for ``fitting`` blocks; the device is asked for more."""
    assert ask(device, PLUG, 1, fitting - 1) == ACK
    memory.write(BLOCK, b"kept")
    before, taken = device.config, allocated(memory)
    assert ask(device, PLUG, fitting, 2) == BUSY
    assert device.busy_reason is not None
    assert device.busy_reason.startswith("cannot plug 4.0 MiB at 0x1")
    assert (device.config, allocated(memory)) == (before, taken)
    assert ask(device, STATE, fitting, 2) == Response(ResponseType.ACK, BlockState.UNPLUGGED)
    assert ask(device, PLUG, fitting) == ACK  # one does fit
    assert ask(device, PLUG, 0) == BUSY
    assert ask(device, UNPLUG, 2) == ACK
    assert ask(device, PLUG, 0) == ACK
    assert memory.read(BLOCK, 4) == b"kept"
    assert allocated(memory) == device.config.plugged_size == fitting * BLOCK


@pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
def test_a_full_tmpfs_is_busy(small_tmpfs: Callable[[str], Path], unpopulated: str) -> None:
    backing: BackingSource = TemporaryFile(small_tmpfs("8m"))
    with SparseMemory("64 MiB", backing=backing, block=BLOCK, unpopulated=unpopulated) as memory:  # type: ignore[arg-type]
        run_out(VirtioMem(memory, addr=ADDR, requested_size="64 MiB"), memory, 4)


@pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
def test_an_empty_pool_of_huge_pages_is_busy(hugetlb_pool: Callable[[int], None], unpopulated: str) -> None:
    hugetlb_pool(3)
    with SparseMemory("64 MiB", backing="memfd-hugetlb", unpopulated=unpopulated) as memory:  # type: ignore[arg-type]
        run_out(VirtioMem(memory, addr=ADDR, requested_size="64 MiB"), memory, 3)


@pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
def test_an_exhausted_device_is_busy(unpopulated: str, tmp_path: Path) -> None:
    with sparse_memory("device", unpopulated, tmp_path) as memory:
        run_out(VirtioMem(memory, addr=ADDR, requested_size="64 MiB"), memory, 4)


class FourBlocks(Accounting):
    """A pool that has four blocks."""

    def __init__(self) -> None:
        self.charged = RangeSet()

    def charge(self, blocks: RangeSet) -> RangeSet:
        new = blocks - self.charged
        if (self.charged | new).length > 4 * BLOCK:
            raise PoolFullError(errno.ENOSPC, "the pool is empty")
        self.charged |= new
        return new

    def refund(self, blocks: RangeSet) -> None:
        self.charged -= blocks

    def close(self) -> None:
        pass


@pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
def test_an_exhausted_pool_is_busy(unpopulated: str) -> None:
    accounting = FourBlocks()
    with SparseMemory("64 MiB", backing="memfd", block=BLOCK, unpopulated=unpopulated, accounting=accounting) as memory:  # type: ignore[arg-type]
        device = VirtioMem(memory, addr=ADDR, requested_size="64 MiB")
        run_out(device, memory, 4)
        assert accounting.charged == device.plugged
        assert ask(device, UNPLUG_ALL) == ACK
        assert not accounting.charged


@pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
def test_memory_that_cannot_be_given_back_is_busy(unpopulated: str) -> None:
    """The file is sealed after the blocks were plugged: no hole can be punched any more. They stay, with their bytes."""
    fd = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 16 * MIB)
        with SparseMemory("16 MiB", backing=Descriptor(fd), block=BLOCK, unpopulated=unpopulated) as memory:  # type: ignore[arg-type]
            device = VirtioMem(memory, addr=ADDR, requested_size="16 MiB")
            assert ask(device, PLUG, 1, 3) == ACK
            memory.write(BLOCK, b"kept")
            before = device.config
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
            for answer in (ask(device, UNPLUG, 1, 2), ask(device, UNPLUG_ALL), ask(device, UNPLUG, 3)):
                assert answer == BUSY
            assert not device.system_reset()
            assert device.config == before
            memory.write(2 * BLOCK - 1, b"both")  # the driver goes on using it
            assert (memory.read(BLOCK, 4), memory.read(2 * BLOCK - 1, 4)) == (b"kept", b"both")
            assert allocated(memory) == 3 * BLOCK
    finally:
        os.close(fd)


def test_a_closed_memory_is_the_owners_mistake() -> None:
    memory = SparseMemory("16 MiB", backing="memfd", block=BLOCK)
    device = VirtioMem(memory, addr=ADDR, requested_size="8 MiB")
    assert ask(device, PLUG) == ACK
    memory.close()
    for kind in (PLUG, UNPLUG, UNPLUG_ALL):
        with pytest.raises(ValueError, match="closed"):
            ask(device, kind, 0 if kind is not PLUG else 1)
