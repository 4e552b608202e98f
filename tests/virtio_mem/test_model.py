"""Random requests, good and wild, against a model that was written from the text of the specification.

What is plugged is asked of the file behind the memory and of its bytes, not of the device.
"""

from __future__ import annotations

import errno
from pathlib import Path

import numpy
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import prefault.device
from prefault import PAGE_SIZE, RangeSet
from prefault.errors import PoolFullError
from prefault.sparse import Accounting, SparseMemory
from prefault.virtio_mem import Config, VirtioMem
from support.block_devices import Blocks, frames_of, opened
from support.regions import data_pages

BLOCK = PAGE_SIZE
BLOCKS = 24
ADDR = 1 << 32
EXTENT = 5


class Model:
    """VIRTIO 1.2, section 5.15, over numbers of blocks; a request is raw bytes, and so is the answer."""

    def __init__(self) -> None:
        self.plugged: set[int] = set()
        self.requested = 0
        self.usable = 0
        self.memory = BLOCKS  # for so many blocks there is memory now

    def fitting(self) -> int:
        return min(BLOCKS, self.requested + EXTENT) if self.requested else 0

    def request_size(self, blocks: int) -> None:
        self.requested = blocks
        self.usable = max(self.usable, self.fitting())

    def unplug_all(self) -> None:
        self.plugged.clear()
        self.usable = self.fitting()

    def answer(self, request: bytes) -> tuple[str, int]:
        kind, addr, count = (int.from_bytes(request[at:end], "little") for at, end in ((0, 2), (8, 16), (16, 18)))
        if kind == 2:
            self.unplug_all()
            return "ACK", 0
        first, rest = divmod(addr - ADDR, BLOCK)
        blocks = set(range(first, first + count))
        if kind not in (0, 1, 3) or rest or not count or not blocks <= set(range(self.usable)):
            return "ERROR", 0
        inside = blocks & self.plugged
        if kind == 3:
            return "ACK", 0 if inside == blocks else 2 if inside else 1
        if (kind == 0 and inside) or (kind == 1 and inside != blocks):
            return "ERROR", 0
        if kind == 0 and len(self.plugged) + count > self.requested:
            return "NACK", 0
        if kind == 0 and len(self.plugged) + count > self.memory:
            return "BUSY", 0
        self.plugged ^= blocks
        return "ACK", 0


def request(kind: int, addr: int, count: int, padding: bytes) -> bytes:
    parts = (kind.to_bytes(2, "little"), padding[:6], addr.to_bytes(8, "little"), count.to_bytes(2, "little"), padding[6:])
    return b"".join(parts)


NEAR = st.integers(-2, BLOCKS + 2).map(lambda block: ADDR + block * BLOCK)
WILD = st.one_of(NEAR.map(lambda addr: addr + 1), st.integers(0, 2**64 - 1), st.just(2**64 - BLOCK))
PADDING = st.binary(min_size=12, max_size=12)
SENSIBLE = st.builds(request, st.sampled_from([0, 0, 0, 1, 1, 3, 3]), NEAR, st.integers(1, 6), PADDING)
ODD = st.builds(
    request, st.one_of(st.integers(0, 5), st.just(2**16 - 1)), st.one_of(NEAR, WILD),
    st.one_of(st.integers(0, 3), st.integers(0, 2**16 - 1)), PADDING,
)  # fmt: skip
GARBAGE = st.binary(min_size=24, max_size=24)


class Shop(Accounting):
    """Where the memory is drawn from: as much as the model says."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sold = RangeSet()

    def charge(self, blocks: RangeSet) -> RangeSet:
        new = blocks - self.sold
        if (self.sold | new).length > self.model.memory * BLOCK:
            raise PoolFullError(errno.ENOSPC, "sold out")
        self.sold |= new
        return new

    def refund(self, blocks: RangeSet) -> None:
        self.sold -= blocks

    def close(self) -> None:
        self.sold = RangeSet()


class Device(RuleBasedStateMachine):
    backings: tuple[str, ...] = ("memfd",)

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.told = 0
        self.written: dict[int, int] = {}

    @initialize(data=st.data(), unpopulated=st.sampled_from(["zeros", "fault"]), requested=st.integers(0, BLOCKS))
    def start(self, data: st.DataObject, unpopulated: str, requested: int) -> None:
        self.shop = Shop(self.model)
        self.memory = self.make_memory(data, unpopulated)
        self.device = VirtioMem(
            self.memory, addr=ADDR, block_size=BLOCK, requested_size=requested * BLOCK, usable_extent=EXTENT * BLOCK,
            on_config_change=self.tell,
        )  # fmt: skip
        self.model.request_size(requested)

    def make_memory(self, data: st.DataObject, unpopulated: str) -> SparseMemory:
        backing = data.draw(st.sampled_from(self.backings))
        return SparseMemory(
            BLOCKS * BLOCK, backing=backing, block=BLOCK, unpopulated=unpopulated, huge="never", accounting=self.shop,  # type: ignore[arg-type]
        )  # fmt: skip

    def file(self) -> int:
        """Return a descriptor of the file behind the memory."""
        assert self.memory.fd is not None
        return self.memory.fd

    def tell(self) -> None:
        self.told += 1

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()

    def ask(self, raw: bytes) -> None:
        told = self.told
        name, state = self.model.answer(raw)
        number = ("ACK", "NACK", "BUSY", "ERROR").index(name)
        assert self.device.handle(raw) == number.to_bytes(2, "little") + bytes(6) + state.to_bytes(2, "little")
        assert self.told == told  # no request makes the device send an update

    # Random requests are mostly errors: these two are not.
    @rule(pick=st.integers(0, BLOCKS), count=st.integers(1, 4))
    def plug_what_is_free(self, pick: int, count: int) -> None:
        free = sorted(set(range(self.model.usable)) - self.model.plugged)
        if free:
            self.ask(request(0, ADDR + free[pick % len(free)] * BLOCK, count, bytes(12)))

    @rule(pick=st.integers(0, BLOCKS), count=st.integers(1, 4), kind=st.sampled_from([1, 1, 3]))
    def unplug_what_is_plugged(self, pick: int, count: int, kind: int) -> None:
        plugged = sorted(self.model.plugged)
        if plugged:
            self.ask(request(kind, ADDR + plugged[pick % len(plugged)] * BLOCK, count, bytes(12)))

    @rule(raw=SENSIBLE)
    def sensible(self, raw: bytes) -> None:
        self.ask(raw)

    @rule(raw=st.one_of(ODD, GARBAGE))
    def odd(self, raw: bytes) -> None:
        self.ask(raw)

    @rule(raw=st.binary(max_size=60).filter(lambda raw: len(raw) != 24))
    def of_another_length(self, raw: bytes) -> None:
        with pytest.raises(ValueError, match="has 24 bytes"):
            self.device.handle(raw)

    @rule(blocks=st.integers(0, BLOCKS))
    def request_size(self, blocks: int) -> None:
        told, before = self.told, (self.model.requested, self.model.usable)
        self.model.request_size(blocks)
        self.device.request_size(blocks * BLOCK)
        assert self.told - told == ((self.model.requested, self.model.usable) != before)

    @rule(size=st.one_of(st.integers(1, BLOCKS * BLOCK).filter(lambda size: size % BLOCK), st.just((BLOCKS + 1) * BLOCK)))
    def request_an_impossible_size(self, size: int) -> None:
        with pytest.raises(ValueError, match=r"multiple|more than"):
            self.device.request_size(size)

    @rule(blocks=st.integers(0, BLOCKS))
    def there_is_less_memory_or_more(self, blocks: int) -> None:
        self.model.memory = blocks

    @rule(system=st.booleans())
    def reset(self, system: bool) -> None:
        if system:
            self.model.unplug_all()
            assert self.device.system_reset()
        else:
            self.device.device_reset()

    @rule(value=st.integers(1, 255))
    def write(self, value: int) -> None:
        array = self.memory.ndarray("uint8", (BLOCKS, BLOCK))
        for block in self.model.plugged:
            array[block, -1] = value
            self.written[block] = value

    @invariant()
    def the_driver_sees_the_model(self) -> None:
        if not hasattr(self, "device"):
            return
        model = self.model
        sizes = (BLOCKS * BLOCK, model.usable * BLOCK, len(model.plugged) * BLOCK, model.requested * BLOCK)
        assert Config.decode(self.device.config.encode()) == (BLOCK, 0, ADDR, *sizes)

    @invariant()
    def there_is_memory_behind_what_is_plugged_and_no_other(self) -> None:
        if not hasattr(self, "device"):
            return
        assert set(data_pages(self.file())) == self.model.plugged
        assert self.device.plugged == self.shop.sold
        # The bytes of a plugged block stay; after an unplug they are gone.
        self.written = {block: value for block, value in self.written.items() if block in self.model.plugged}
        array = self.memory.ndarray("uint8", (BLOCKS, BLOCK))
        for block in self.model.plugged:
            assert array[block, -1] == self.written.get(block, 0)
            assert numpy.count_nonzero(array[block, :-1]) == 0


class LongDevice(Device):
    backings = ("memfd", "tmpfs")


class DeviceOverDeviceMemory(Device):
    """The blocks come from the pool of a device (requirement B5)."""

    client: prefault.device.DeviceClient

    def make_memory(self, data: st.DataObject, unpopulated: str) -> SparseMemory:
        return SparseMemory(
            BLOCKS * BLOCK, device=self.client, block=BLOCK, unpopulated=unpopulated, accounting=self.shop  # type: ignore[arg-type]
        )  # fmt: skip

    def file(self) -> int:
        return frames_of(self.client)

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.discard()
        super().teardown()


_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
TestDevice = Device.TestCase
TestDevice.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=_CHECKS)
TestLongDevice = pytest.mark.stress(LongDevice.TestCase)
TestLongDevice.settings = settings(max_examples=1000, stateful_step_count=60, deadline=None, suppress_health_check=_CHECKS)


def test_over_device_memory(tmp_path: Path) -> None:
    with opened(Blocks(BLOCKS), tmp_path) as client:
        DeviceOverDeviceMemory.client = client
        run_state_machine_as_test(
            DeviceOverDeviceMemory,
            settings=settings(max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=_CHECKS),
        )
