"""The answers of the device and its configuration, request by request, over a memory that only takes notes."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from prefault import DiscardError, OutOfMemoryError, PageRange, RangeSet
from prefault.errors import HeadroomError, PoolFullError, PopulateError
from prefault.sizes import GIB, MIB
from prefault.virtio_mem import (
    TRANSPORT_FEATURES,
    VERSION_1,
    BlockState,
    Feature,
    Request,
    RequestType,
    Response,
    ResponseType,
    VirtioMem,
)

PLUG, UNPLUG, UNPLUG_ALL, STATE = RequestType
ACK, NACK, BUSY, ERROR = (Response(kind) for kind in ResponseType)
BLOCK = 2 * MIB
ADDR = 4 * GIB


class Notes:
    """A memory that notes what it is asked for, and refuses when told to."""

    def __init__(self, blocks: int = 16, *, block: int = 4096, unpopulated: str = "zeros") -> None:
        self.size = blocks * BLOCK
        self.block = block
        self.unpopulated = unpopulated
        self.asked: list[tuple[str, int, int]] = []
        self.refuse: dict[str, BaseException] = {}

    def __len__(self) -> int:
        return self.size

    def populate(self, offset: int, length: int) -> None:
        self._do("populate", offset, length)

    def discard(self, offset: int, length: int) -> None:
        self._do("discard", offset, length)

    def _do(self, verb: str, offset: int, length: int) -> None:
        self.asked.append((verb, offset // BLOCK, length // BLOCK))
        if verb in self.refuse:
            raise self.refuse[verb]


def device(memory: Notes | None = None, **options: Any) -> VirtioMem:
    """16 blocks of 2 MiB at 4 GiB, 8 of them requested, all usable."""
    return VirtioMem(memory or Notes(), **({"addr": ADDR, "requested_size": 8 * BLOCK} | options))


def ask(what: VirtioMem, kind: int, first: float = 0, blocks: int = 1) -> Response:
    """Through the wire, both ways."""
    answer = what.handle(Request(kind, int(ADDR + first * BLOCK), blocks).encode())
    return Response.decode(answer, kind)


# --- PLUG, UNPLUG, STATE


def test_a_block_is_populated_before_ack_and_discarded_before_ack() -> None:
    memory = Notes(unpopulated="fault")
    it = device(memory)
    assert ask(it, PLUG, 3, 2) == ACK
    assert memory.asked == [("populate", 3, 2)]
    assert it.config.plugged_size == 2 * BLOCK
    assert it.plugged == RangeSet([PageRange(3 * BLOCK, 5 * BLOCK)])
    assert ask(it, UNPLUG, 4) == ACK
    assert memory.asked == [("populate", 3, 2), ("discard", 4, 1)]
    assert it.config.plugged_size == BLOCK
    assert it.plugged == RangeSet([PageRange(3 * BLOCK, 4 * BLOCK)])


def test_a_block_that_can_be_written_while_unplugged_is_discarded_before_it_is_plugged() -> None:
    memory = Notes(unpopulated="zeros")
    it = device(memory)
    assert ask(it, PLUG, 3, 2) == ACK
    assert memory.asked == [("discard", 3, 2), ("populate", 3, 2)]
    memory.refuse["discard"] = DiscardError(errno.EPERM, "sealed")
    before = it.config
    memory.asked.clear()
    assert ask(it, PLUG, 5) == BUSY  # else the driver would read what it wrote there before
    assert (it.config, memory.asked) == (before, [("discard", 5, 1)])
    assert it.busy_reason is not None
    assert it.busy_reason.startswith("cannot plug 2.0 MiB at ")


def test_states() -> None:
    it = device()
    assert ask(it, PLUG, 1, 2) == ACK
    for first, blocks, state in (
        (0, 1, BlockState.UNPLUGGED), (1, 1, BlockState.PLUGGED), (1, 2, BlockState.PLUGGED), (3, 13, BlockState.UNPLUGGED),
        (0, 2, BlockState.MIXED), (2, 2, BlockState.MIXED), (0, 16, BlockState.MIXED),
    ):  # fmt: skip
        assert ask(it, STATE, first, blocks) == Response(ResponseType.ACK, state), (first, blocks)


@pytest.mark.parametrize("kind", [PLUG, UNPLUG, STATE])
@pytest.mark.parametrize(
    ("first", "blocks"),
    [
        (2.5, 1),  # not aligned
        (2 + 1 / BLOCK, 1),
        (2, 0),  # no block
        (-1, 1),  # before the region
        (-1, 3),  # into it
        (16, 1),  # behind it
        (15, 2),  # out of it
        (0, 17),
        (0, 65535),
    ],
)
def test_errors_of_place(kind: RequestType, first: float, blocks: int) -> None:
    memory = Notes()
    it = device(memory, requested_size=16 * BLOCK)
    if kind is UNPLUG:
        assert ask(it, PLUG, 0, 16) == ACK
    memory.asked.clear()
    before = it.config
    assert ask(it, kind, first, blocks) == ERROR
    assert (it.config, memory.asked) == (before, [])


def test_the_last_addresses_of_all_do_not_wrap() -> None:
    it = VirtioMem(Notes(), addr=2**64 - 16 * BLOCK, requested_size=16 * BLOCK)
    assert it.process(Request(PLUG, 2**64 - BLOCK, 1)) == ACK
    assert it.process(Request(PLUG, 2**64 - 2 * BLOCK, 3)) == ERROR
    assert it.process(Request(STATE, 0, 1)) == ERROR


def test_only_the_usable_region_counts() -> None:
    it = device(requested_size=2 * BLOCK, usable_extent=3 * BLOCK)
    assert it.config.usable_region_size == 5 * BLOCK
    assert ask(it, PLUG, 4) == ACK
    assert ask(it, PLUG, 5) == ERROR
    assert ask(it, STATE, 4, 2) == ERROR
    it.request_size(4 * BLOCK)
    assert ask(it, PLUG, 5) == ACK


def test_any_block_that_is_there_already_is_an_error() -> None:
    memory = Notes()
    it = device(memory)
    assert ask(it, PLUG, 2) == ACK
    memory.asked.clear()
    for first, blocks in ((2, 1), (1, 2), (2, 2), (1, 3)):
        assert ask(it, PLUG, first, blocks) == ERROR
    for first, blocks in ((1, 1), (1, 2), (2, 2), (1, 3), (3, 1)):
        assert ask(it, UNPLUG, first, blocks) == ERROR
    assert memory.asked == []
    assert it.config.plugged_size == BLOCK


def test_more_than_requested_is_denied() -> None:
    memory = Notes(unpopulated="fault")
    it = device(memory)
    assert ask(it, PLUG, 0, 9) == NACK
    assert ask(it, PLUG, 0, 7) == ACK
    assert ask(it, PLUG, 7, 2) == NACK
    assert ask(it, PLUG, 7, 1) == ACK  # exactly
    assert ask(it, PLUG, 8, 1) == NACK
    assert memory.asked == [("populate", 0, 7), ("populate", 7, 1)]


def test_more_plugged_than_requested_may_only_shrink() -> None:
    it = device()
    assert ask(it, PLUG, 0, 8) == ACK
    it.request_size(2 * BLOCK)
    assert (it.config.plugged_size, it.config.requested_size) == (8 * BLOCK, 2 * BLOCK)
    assert ask(it, PLUG, 8) == NACK
    assert ask(it, UNPLUG, 0, 7) == ACK
    assert ask(it, PLUG, 0) == ACK
    assert ask(it, PLUG, 1) == NACK


def test_precedence_of_answers() -> None:
    memory = Notes()
    it = device(memory)
    assert ask(it, PLUG, 0, 8) == ACK
    memory.refuse["populate"] = OutOfMemoryError(errno.ENOMEM, "none")
    # Plugged already, and more than requested, and no memory: the specification's MUST is about the first.
    assert ask(it, PLUG, 7, 2) == ERROR
    assert ask(it, PLUG, 20, 9) == ERROR
    # More than requested and no memory: the memory is not even asked.
    memory.asked.clear()
    assert ask(it, PLUG, 8, 1) == NACK
    assert memory.asked == []
    it.request_size(16 * BLOCK)
    assert ask(it, PLUG, 8, 1) == BUSY


@pytest.mark.parametrize("kind", [4, 5, 255, 2**16 - 1])
def test_an_unknown_type_is_an_error(kind: int) -> None:
    memory = Notes()
    it = device(memory)
    assert ask(it, kind) == ERROR
    assert memory.asked == []


def test_half_a_request_has_no_answer() -> None:
    with pytest.raises(ValueError, match="has 24 bytes, not 23"):
        device().handle(bytes(23))


# --- BUSY


@pytest.mark.parametrize("refusal", [PopulateError, OutOfMemoryError, HeadroomError, PoolFullError])
def test_no_memory_is_busy_and_changes_nothing(refusal: Callable[..., OSError]) -> None:
    memory = Notes()
    it = device(memory)
    assert ask(it, PLUG, 1) == ACK
    before, generation = it.config, it.config_generation
    assert not it.busy_reason
    memory.refuse["populate"] = refusal(errno.ENOMEM, "the shop is closed")
    assert ask(it, PLUG, 2, 3) == BUSY
    assert (it.config, it.config_generation) == (before, generation)
    assert it.busy_reason is not None
    assert it.busy_reason.startswith("cannot plug 6.0 MiB at 0x100400000: the shop is closed")
    assert ask(it, STATE, 2, 3) == Response(ResponseType.ACK, BlockState.UNPLUGGED)
    memory.refuse.clear()
    assert ask(it, PLUG, 2, 3) == ACK


def test_a_discard_that_fails_leaves_the_block_plugged_and_accessible() -> None:
    memory = Notes()
    it = device(memory)
    assert ask(it, PLUG, 1) == ask(it, PLUG, 5, 2) == ACK
    before = it.config
    memory.refuse["discard"] = DiscardError(errno.EINVAL, "locked")
    memory.asked.clear()
    assert ask(it, UNPLUG, 5, 2) == BUSY
    assert it.busy_reason is not None
    assert "locked" in it.busy_reason
    assert ask(it, UNPLUG_ALL) == BUSY
    assert not it.system_reset()
    again = [("discard", 0, 16), ("populate", 1, 1), ("populate", 5, 2)]
    assert memory.asked == [("discard", 5, 2), ("populate", 5, 2), *again, *again]
    assert it.config == before
    memory.refuse["populate"] = OutOfMemoryError(errno.ENOMEM, "none either")
    assert ask(it, UNPLUG_ALL) == BUSY
    assert it.config == before
    memory.refuse.clear()
    assert ask(it, UNPLUG_ALL) == ACK


def test_other_exceptions_of_the_memory_pass_through() -> None:
    memory = Notes()
    it = device(memory)
    for error in (ValueError("the memory is closed"), KeyboardInterrupt()):
        memory.refuse["populate"] = error
        with pytest.raises(type(error)):
            ask(it, PLUG)
        assert it.config.plugged_size == 0
    memory.refuse.clear()
    assert ask(it, PLUG) == ACK


# --- UNPLUG ALL and the resets


def test_unplug_all_discards_the_whole_region_and_fits_the_usable_one() -> None:
    memory = Notes()
    calls: list[int] = []
    it = device(memory, requested_size=8 * BLOCK, usable_extent=4 * BLOCK, on_config_change=lambda: calls.append(1))
    assert ask(it, PLUG, 1, 2) == ACK
    it.request_size(2 * BLOCK)
    assert it.config.usable_region_size == 12 * BLOCK  # never smaller, but now:
    calls.clear()
    assert ask(it, UNPLUG_ALL, 2.5, 0) == ACK  # the rest of the request means nothing
    assert memory.asked[-1:] == [("discard", 0, 16)]
    assert it.config[-3:] == (6 * BLOCK, 0, 2 * BLOCK)
    assert calls == []
    assert ask(it, STATE, 0, 6) == Response(ResponseType.ACK, BlockState.UNPLUGGED)
    assert ask(it, UNPLUG_ALL) == ACK  # as often as one likes
    it.request_size(0)
    assert ask(it, UNPLUG_ALL) == ACK
    assert it.config.usable_region_size == 0
    assert ask(it, STATE) == ERROR


def test_a_device_reset_changes_no_block() -> None:
    memory = Notes(unpopulated="fault")
    it = device(memory)
    assert it.negotiate(Feature.UNPLUGGED_INACCESSIBLE)
    assert ask(it, PLUG, 1, 2) == ACK
    before = it.config
    memory.asked.clear()
    it.device_reset()
    assert (it.config, memory.asked, it.negotiated) == (before, [], Feature(0))
    assert ask(it, STATE, 1, 2) == Response(ResponseType.ACK, BlockState.PLUGGED)


def test_a_system_reset_unplugs_everything() -> None:
    memory = Notes(unpopulated="fault")
    calls: list[int] = []
    it = device(memory, usable_extent=0, on_config_change=lambda: calls.append(1))
    assert it.negotiate(Feature.UNPLUGGED_INACCESSIBLE)
    assert ask(it, PLUG, 1, 2) == ACK
    it.request_size(3 * BLOCK)
    calls.clear()
    memory.asked.clear()
    assert it.system_reset()
    assert memory.asked == [("discard", 0, 16)]
    assert it.config[-3:] == (3 * BLOCK, 0, 3 * BLOCK)
    assert it.negotiated == Feature(0)
    assert calls == []


# --- the configuration


def test_the_initial_configuration() -> None:
    it = device(node_id=7, usable_extent=3 * BLOCK + 5)
    assert it.config == (BLOCK, 7, ADDR, 16 * BLOCK, 11 * BLOCK, 0, 8 * BLOCK)
    assert VirtioMem(Notes(), addr=0).config == (BLOCK, 0, 0, 16 * BLOCK, 0, 0, 0)
    assert device(region_size="8 MiB", requested_size=0, block_size=4096).config[:4] == (4096, 0, ADDR, 8 * MIB)
    assert VirtioMem(Notes(block=4 * MIB), addr=0).config.block_size == 4 * MIB
    assert VirtioMem(Notes(), addr=0, region_size=0).config.region_size == 0


def test_a_device_without_a_region() -> None:
    it = VirtioMem(Notes(), addr=ADDR, region_size=0)
    assert [ask(it, kind) for kind in (PLUG, UNPLUG, STATE, UNPLUG_ALL)] == [ERROR, ERROR, ERROR, ACK]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"block_size": 3 * MIB}, "block_size is a power of two"),
        ({"block_size": 2048}, "is not a multiple of the memory's own block"),
        ({"addr": ADDR + MIB}, "addr .* is not a multiple of the block size"),
        ({"addr": -BLOCK}, "addr is a number of 64 bits"),
        ({"addr": 2**64 - BLOCK}, "ends beyond 64-bit addresses"),
        ({"region_size": 33 * MIB}, "larger than the memory behind it"),
        ({"region_size": 5 * MIB}, "region_size .* is not a multiple"),
        ({"requested_size": 5 * MIB}, "requested_size .* is not a multiple"),
        ({"requested_size": 34 * MIB}, r"requested_size \(35651584\) is more than region_size \(33554432\)"),
        ({"requested_size": -BLOCK}, "a size cannot be negative"),
        ({"usable_extent": -1}, "a size cannot be negative"),
        ({"node_id": 2**16}, "node_id is a number of 16 bits"),
    ],
)
def test_bad_devices(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        device(**options)


def test_a_change_is_notified_once() -> None:
    seen: list[tuple[int, ...]] = []
    it: VirtioMem = device(on_config_change=lambda: seen.append(it.config[-3:]), requested_size=0, usable_extent=2 * BLOCK)
    generation = it.config_generation
    it.request_size("8 MiB")
    assert seen == [(6 * BLOCK, 0, 4 * BLOCK)]  # it sees the new one
    it.request_size(4 * BLOCK)  # nothing new
    assert (len(seen), it.config_generation) == (1, generation + 1)
    assert ask(it, PLUG) == ACK  # plugged_size: a new generation, but no notification
    assert (len(seen), it.config_generation) == (1, generation + 2)
    it.request_size(BLOCK)
    assert seen[1:] == [(6 * BLOCK, BLOCK, BLOCK)]


def test_the_notification_can_be_set_after_construction() -> None:
    it = device(requested_size=0)
    it.request_size(BLOCK)  # not notified
    seen: list[str] = []
    it.on_config_change = lambda: seen.append("first")
    it.request_size(2 * BLOCK)
    it.on_config_change = lambda: seen.append("second")
    it.request_size(3 * BLOCK)
    it.on_config_change = None
    it.request_size(4 * BLOCK)
    assert seen == ["first", "second"]


def test_the_generation_fits_into_32_bits() -> None:
    it = device(requested_size=0)
    it._generation = 2**32 - 2
    seen = [it.config_generation]
    for blocks in (1, 2, 3):
        it.request_size(blocks * BLOCK)
        seen.append(it.config_generation)
    assert seen == [2**32 - 2, 2**32 - 1, 0, 1]


def test_a_refused_size_changes_nothing() -> None:
    calls: list[int] = []
    it = device(on_config_change=lambda: calls.append(1))
    before = it.config
    for size in (BLOCK + 1, 17 * BLOCK, -1, "1 TiB"):
        with pytest.raises(ValueError, match=r"multiple|more than|negative"):
            it.request_size(size)
    assert (it.config, calls) == (before, [])


def test_features() -> None:
    assert device().offered == Feature(0)
    everything = device(Notes(unpopulated="fault"), node_id=0, persistent_suspend=True)
    assert everything.offered == Feature.ACPI_PXM | Feature.UNPLUGGED_INACCESSIBLE | Feature.PERSISTENT_SUSPEND
    assert everything.negotiate(Feature.UNPLUGGED_INACCESSIBLE)
    assert everything.negotiated is Feature.UNPLUGGED_INACCESSIBLE
    assert not everything.negotiate(Feature.ACPI_PXM)  # a driver that insists on reading unplugged memory
    assert everything.negotiated == Feature(0)
    assert not everything.negotiate(everything.offered | 8)
    assert not device().negotiate(Feature.UNPLUGGED_INACCESSIBLE)  # not offered
    assert device().negotiate(0)


def test_features_of_the_transport_are_the_transports() -> None:
    """A driver accepts them in the same number: VERSION_1 always, and packed rings, IOMMU and others."""
    it = device(Notes(unpopulated="fault"))
    assert VERSION_1 & TRANSPORT_FEATURES
    for others in (VERSION_1, TRANSPORT_FEATURES, VERSION_1 | 1 << 24 | 1 << 49):
        assert it.negotiate(others | Feature.UNPLUGGED_INACCESSIBLE)
        assert it.negotiated is Feature.UNPLUGGED_INACCESSIBLE
        assert not it.negotiate(others)
    for bit in (2, 23, 50, 63, 127):  # of the device type
        assert not it.negotiate(VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE | 1 << bit)
    assert not it.negotiate(Feature.UNPLUGGED_INACCESSIBLE | 1 << 128)
