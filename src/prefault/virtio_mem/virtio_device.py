"""The device: the plugged blocks, the responses to requests, and the notifications of a changed configuration."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Protocol

from prefault.errors import DiscardError, PopulateError
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MIB, Size, format_size, parse_size
from prefault.virtio_mem.wire import (
    MAX_BLOCKS,
    TRANSPORT_FEATURES,
    BlockState,
    Bytes,
    Config,
    Feature,
    Request,
    RequestType,
    Response,
    ResponseType,
)

_UNPLUGGED, _PLUGGED = 0, 1

_ACK = Response(ResponseType.ACK)
_NACK = Response(ResponseType.NACK)
_BUSY = Response(ResponseType.BUSY)
_ERROR = Response(ResponseType.ERROR)

_REFUSALS = (PopulateError, DiscardError)
"""Errors of a memory that can neither be plugged nor unplugged at the moment."""


class BlockMemory(Protocol):
    """The interface of the memory behind the device's region; :class:`~prefault.SparseMemory` implements it.

    Both calls work on whole blocks of the device; populate brings in all of them or raises and changes nothing.
    """

    def __len__(self) -> int:
        """Return the length in bytes."""

    @property
    def block(self) -> int:
        """The granularity of populate and discard, in bytes."""

    @property
    def unpopulated(self) -> str:
        """``"fault"`` where touching unpopulated memory is a SIGSEGV, else ``"zeros"``."""

    def populate(self, offset: int, length: int) -> object:
        """Make a range present and accessible."""

    def discard(self, offset: int, length: int) -> object:
        """Give the memory of a range back."""


class VirtioMem:
    """A virtio-mem device over sparse memory: requests in, responses out, by the rules of VIRTIO 1.2, section 5.15.

    ::

        memory = prefault.SparseMemory("64 GiB", backing="memfd", block="2 MiB", unpopulated="fault")
        device = VirtioMem(memory, addr=4 << 30, on_config_change=interrupt_the_guest)
        device.request_size("8 GiB")            # the owner: the driver is asked to plug or unplug
        answer = device.handle(request)         # the transport: 24 bytes in, 10 bytes out

    The device has no virtqueue. A block is plugged when its memory is populated, and not before; it is unplugged when its
    memory is given back. A block that was just plugged reads as zeros: with ``unpopulated="zeros"`` the device discards what
    the guest wrote to it while it was unplugged, and with ``"fault"`` the guest cannot write there. Requests are handled one
    after the other; several threads may call. The configuration can be read at any time, also while a request is worked on.

    Args:
        memory: behind the region, offset 0 being ``addr``; all of it counts as unplugged, so nothing may be populated.
            It stays the caller's, and is to be closed after the device's last request. Where its unpopulated parts fault,
            the device offers the feature ``UNPLUGGED_INACCESSIBLE``.
        addr: guest-physical address of the region, a multiple of the block size.
        block_size: bytes in a block of the device, a power of two and a multiple of the memory's own; default: that, but at
            least 2 MiB, so that a huge page is never shared by a plugged and an unplugged block.
        region_size: the most that can be plugged; default: all of the memory.
        requested_size: the requested size at the start, bytes.
        node_id: the ACPI proximity domain, which offers the feature ``ACPI_PXM``.
        usable_extent: bytes by which the usable region exceeds the requested size, to leave the driver a choice: Linux adds
            memory in sections of 128 MiB, and only those that fit. With a requested size of 0 nothing is usable.
        persistent_suspend: the platform can suspend with plugged memory, which offers ``PERSISTENT_SUSPEND``. The device
            takes no part in that: suspending and waking up are no resets.
        on_config_change: called without arguments where the specification wants a configuration update notification: in the
            thread that called :meth:`request_size`, which passes its exceptions on. The change is made by then.

    Attributes:
        offered: the features that the device offers. The transport adds its own, :data:`~prefault.virtio_mem.VERSION_1` at
            least.
        negotiated: those that the driver has accepted; none after a reset.
        on_config_change: the argument of this name. It can be replaced at any time, as the transport that sends the
            notification is often made after the device; None sends nothing.
        busy_reason: the cause of the last BUSY response, for the device's owner: the driver does not receive it.

    Raises:
        ValueError: a size or an address that the specification does not allow, or that exceeds the memory.
    """

    def __init__(
        self,
        memory: BlockMemory,
        *,
        addr: int,
        block_size: Size | None = None,
        region_size: Size | None = None,
        requested_size: Size = 0,
        node_id: int | None = None,
        usable_extent: Size = 256 * MIB,
        persistent_suspend: bool = False,
        on_config_change: Callable[[], object] | None = None,
    ) -> None:
        block = max(2 * MIB, memory.block) if block_size is None else parse_size(block_size)
        region = len(memory) if region_size is None else parse_size(region_size)
        if region > len(memory):
            raise ValueError(f"a region of {region} bytes is larger than the memory behind it ({len(memory)} bytes)")
        requested = parse_size(requested_size)
        self._extent = parse_size(usable_extent)
        self._config = Config(block, node_id or 0, addr, region, 0, 0, 0).check()
        if block % memory.block:
            raise ValueError(f"block_size ({block}) is not a multiple of the memory's own block ({memory.block})")
        self._config = self._resized(requested, may_shrink=False)
        self._memory = memory
        self._states = bytearray(region // block)  # one byte a block: 512 KiB for a TiB of 2 MiB blocks
        self.on_config_change = on_config_change
        self._generation = 0
        # Reentrant: a signal handler may come by in this very thread.
        self._lock = threading.RLock()
        self.offered = (
            (Feature.ACPI_PXM if node_id is not None else Feature(0))
            | (Feature.UNPLUGGED_INACCESSIBLE if memory.unpopulated == "fault" else Feature(0))
            | (Feature.PERSISTENT_SUSPEND if persistent_suspend else Feature(0))
        )
        self.negotiated = Feature(0)
        self.busy_reason: str | None = None

    # --- for the device's owner

    @property
    def config(self) -> Config:
        """The configuration at this moment."""
        return self._config

    @property
    def config_generation(self) -> int:
        """Number of changes of the configuration, modulo 2**32: the content of virtio-mmio's register ``ConfigGeneration``.

        A driver that read the configuration in parts can tell by it whether they belong together. virtio-pci shows
        the low 8 bits of it: VIRTIO 1.2, sections 4.1.4.3 and 4.2.2.
        """
        return self._generation & 0xFFFF_FFFF

    @property
    def plugged(self) -> RangeSet:
        """The plugged memory, as offsets from the start of the region."""
        with self._lock:
            return RangeSet(self._plugged_ranges())

    def request_size(self, size: Size) -> None:
        """Ask the driver to plug or unplug until ``size`` bytes are plugged. The driver may do so late, or never.

        The usable region grows to fit. It does not shrink before the driver unplugs everything, or a system reset.

        Raises:
            ValueError: not a multiple of the block size, or more than the region.
        """
        with self._lock:
            wanted = self._resized(parse_size(size), may_shrink=False)
            changed = wanted != self._config
            self._set_config(wanted)
        notify = self.on_config_change
        if changed and notify is not None:
            notify()

    # --- for the transport

    def handle(self, request: Bytes) -> bytes:
        """Execute a request of 24 bytes, and return the 10 bytes of the response.

        Raises:
            ValueError: not 24 bytes: a broken driver, to which there is no answer.
        """
        return self.process(Request.decode(request)).encode()

    def process(self, request: Request) -> Response:
        """Execute a request, and return the response. An unknown type is an ERROR.

        Where several answers would fit, ERROR goes before NACK, and NACK before BUSY. After BUSY no block has changed its
        state, and :attr:`busy_reason` holds the cause.

        Raises:
            ValueError: the memory is closed.
            PopulateInterrupted: Ctrl-C in the middle of a PLUG; nothing has changed.
        """
        with self._lock:
            if request.type == RequestType.UNPLUG_ALL:
                return _ACK if self._unplug_all() else _BUSY
            blocks = self._blocks(request)
            if blocks is None:
                return _ERROR
            if request.type == RequestType.STATE:
                return Response(ResponseType.ACK, self._state(blocks))
            if request.type == RequestType.PLUG:
                return self._plug(blocks)
            if request.type == RequestType.UNPLUG:
                return self._unplug(blocks)
            return _ERROR

    def negotiate(self, features: int) -> bool:
        """Accept the features that the driver chose; return whether the device can work with them (FEATURES_OK).

        Bits of :data:`~prefault.virtio_mem.TRANSPORT_FEATURES` are the transport's to check, ``VIRTIO_F_VERSION_1`` among
        them; they are ignored here, so that the number can be passed on as the driver wrote it.

        False where the driver chose a feature that was not offered, or insists on reading unplugged memory that faults.
        """
        self.negotiated = Feature(0)
        features &= ~TRANSPORT_FEATURES
        if features & ~int(self.offered) or (self.offered & ~features) & Feature.UNPLUGGED_INACCESSIBLE:
            return False
        self.negotiated = Feature(features)
        return True

    def device_reset(self) -> None:
        """Reset the device on request of the driver (status 0): features are negotiated anew, blocks and memory stay."""
        self.negotiated = Feature(0)

    def system_reset(self) -> bool:
        """Reset with the whole machine: unplug everything, and fit the usable region to the requested size again.

        Returns:
            False: the memory could not be given back, see :attr:`busy_reason`. All blocks are plugged as before, and the
            driver finds them when it starts, as the specification allows.
        """
        with self._lock:
            self.device_reset()
            return self._unplug_all()

    # --- the rules

    def _blocks(self, request: Request) -> slice | None:
        """Return the numbers of the requested blocks; None where one lies outside the usable region, or there is none."""
        config = self._config
        offset = request.addr - config.addr
        if request.addr % config.block_size or not 0 < request.nb_blocks <= MAX_BLOCKS:
            return None
        if offset < 0 or offset + request.nb_blocks * config.block_size > config.usable_region_size:
            return None
        first = offset // config.block_size
        return slice(first, first + request.nb_blocks)

    def _state(self, blocks: slice) -> BlockState:
        if self._states.find(_UNPLUGGED, blocks.start, blocks.stop) < 0:
            return BlockState.PLUGGED
        if self._states.find(_PLUGGED, blocks.start, blocks.stop) < 0:
            return BlockState.UNPLUGGED
        return BlockState.MIXED

    def _plug(self, blocks: slice) -> Response:
        config = self._config
        # ERROR goes before NACK: the specification says MUST of the first, and only "will be rejected" of the second.
        if self._state(blocks) is not BlockState.UNPLUGGED:
            return _ERROR
        offset, length = self._bytes(blocks)
        if config.plugged_size + length > config.requested_size:
            return _NACK
        try:
            if self._memory.unpopulated == "zeros":
                # The guest could write to unplugged blocks, and populate keeps what is there.
                self._memory.discard(offset, length)
            self._memory.populate(offset, length)
        except _REFUSALS as error:
            return self._busy("plug", blocks, error)
        self._mark(blocks, _PLUGGED)
        return _ACK

    def _unplug(self, blocks: slice) -> Response:
        if self._state(blocks) is not BlockState.PLUGGED:
            return _ERROR
        offset, length = self._bytes(blocks)
        try:
            self._memory.discard(offset, length)
        except _REFUSALS as error:
            self._restore([PageRange(offset, offset + length)])
            return self._busy("unplug", blocks, error)
        self._mark(blocks, _UNPLUGGED)
        return _ACK

    def _unplug_all(self) -> bool:
        everything = slice(0, len(self._states))
        offset, length = self._bytes(everything)
        try:
            # All of the region: where unplugged memory may be read, reading it may have allocated some.
            self._memory.discard(offset, length)
        except _REFUSALS as error:
            self._restore(self._plugged_ranges())
            self._busy("unplug", everything, error)
            return False
        self._mark(everything, _UNPLUGGED)
        self._set_config(self._resized(self._config.requested_size, may_shrink=True))
        return True

    def _restore(self, ranges: list[PageRange]) -> None:
        """Make blocks accessible again that stay plugged because discarding failed half-way."""
        for item in ranges:
            with contextlib.suppress(*_REFUSALS):  # as much as there is memory for; the answer is BUSY in any case
                self._memory.populate(item.start, item.length)

    def _busy(self, verb: str, blocks: slice, error: OSError) -> Response:
        # The text, not the error, which would keep the frames of this call alive, and they the memory.
        where = f"{format_size(self._bytes(blocks)[1])} at {self._config.addr + self._bytes(blocks)[0]:#x}"
        self.busy_reason = f"cannot {verb} {where}: {error}"
        return _BUSY

    # --- the state of the blocks

    def _bytes(self, blocks: slice) -> tuple[int, int]:
        """Return offset and length of blocks in the memory."""
        size = self._config.block_size
        return blocks.start * size, (blocks.stop - blocks.start) * size

    def _plugged_ranges(self) -> list[PageRange]:
        size = self._config.block_size
        found = []
        start = self._states.find(_PLUGGED)
        while start >= 0:
            stop = self._states.find(_UNPLUGGED, start)
            stop = len(self._states) if stop < 0 else stop
            found.append(PageRange(start * size, stop * size))
            start = self._states.find(_PLUGGED, stop)
        return found

    def _mark(self, blocks: slice, state: int) -> None:
        before = self._states.count(_PLUGGED, blocks.start, blocks.stop)
        after = blocks.stop - blocks.start if state == _PLUGGED else 0
        self._states[blocks] = bytes((state,)) * (blocks.stop - blocks.start)
        plugged = self._config.plugged_size + (after - before) * self._config.block_size
        self._set_config(self._config._replace(plugged_size=plugged))

    def _resized(self, requested: int, *, may_shrink: bool) -> Config:
        config = self._config
        if requested > config.region_size:
            raise ValueError(f"requested_size ({requested}) is more than region_size ({config.region_size})")
        extent = self._extent - self._extent % config.block_size
        usable = min(config.region_size, requested + extent) if requested else 0
        if not may_shrink:
            usable = max(usable, config.usable_region_size)
        return config._replace(usable_region_size=usable, requested_size=requested).check()

    def _set_config(self, config: Config) -> None:
        if config != self._config:
            self._config = config
            self._generation += 1
