"""The state that outlives a server: the frames, the state of each page, and the clients with their descriptors.

The warden keeps it, and the server is a fork of the warden, so that each new server finds all of it in place. Areas and the
states of pages lie in memory that both share; the server notifies the warden of each client at once (``handover.py``).
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from prefault.device.device_pool import Access
from prefault.ipc.messages import msgspec

if TYPE_CHECKING:
    import socket

    from prefault.device.driver import Device, Recipe
    from prefault.device.frames import Frames
    from prefault.ipc.socket_path import Place


CLIENT_DESCRIPTORS: Final = ("connection", "pidfd", "userfaultfd", "lifeline_write", "lifeline_read")


class DeviceFacts(msgspec.Struct, frozen=True, array_like=True):
    """Properties of a device that never change; a message hands them over to a fresh warden.

    Attributes:
        name: of the class, for messages and logs.
        length: in bytes.
        page_size: in bytes.
        writable: clients may write.
        restartable: another server may go on with the frames.
        timeout_s: time that one call of the driver may take, in seconds.
        huge: the frames are huge pages of hugetlb.
        notes: how the frames are weaker than asked for.
    """

    name: str
    length: int
    page_size: int
    writable: bool
    restartable: bool
    timeout_s: float
    huge: bool
    notes: tuple[str, ...]

    @classmethod
    def of(cls, device: Device, frames: Frames) -> DeviceFacts:
        """Return the facts of a device with these frames."""
        return cls(
            type(device).__name__, device.length, device.page_size, device.writable, device.restartable, device.timeout_s,
            frames.huge, frames.notes,
        )  # fmt: skip


@dataclass(slots=True)
class AreaRecord:
    """A part of the frames that a client has mapped and registered.

    Attributes:
        number: given by the server, of the device's areas.
        address: in the client.
        offset: into the device, in bytes.
        length: in bytes.
        access: what the client may do with it.
        track_dirty: first writes are noticed.
        of_object: it maps the object that lies there.
        row: of the area in the table.
    """

    number: int
    address: int
    offset: int
    length: int
    access: Access
    track_dirty: bool
    of_object: bool = False
    row: int = field(default=0, compare=False)


@dataclass(slots=True)
class ClientRecord:
    """A client process: its connection, its userfaultfd, and its areas. The record owns the descriptors."""

    number: int
    pid: int
    uid: int
    connection: int = -1
    pidfd: int = -1
    userfaultfd: int = -1
    lifeline_write: int = -1
    lifeline_read: int = -1
    areas: dict[int, AreaRecord] = field(default_factory=dict)

    @property
    def descriptors(self) -> dict[str, int]:
        """Descriptors that are open, by name: the connection may have ended."""
        return {name: fd for name in CLIENT_DESCRIPTORS if (fd := getattr(self, name)) >= 0}

    def close(self) -> None:
        """Close all descriptors."""
        for name, fd in self.descriptors.items():
            os.close(fd)
            setattr(self, name, -1)


ROW_WORDS = 6
"""Words of 8 bytes in a row of the table of areas."""


class AreaTable:
    """Table of the areas of all clients, in memory that the warden and its servers share.

    A row is valid while its number is not 0. The server publishes it by one aligned store of the number after all other
    words, and clears it by a store of 0: killed at any instruction, it leaves each area in the table in whole or not at all.

    Args:
        words: the shared memory, zeros at first. The first word counts the rows that were ever used.
    """

    def __init__(self, words: memoryview[int]) -> None:
        self._words = words
        self._free: list[int] = []

    def reserve(self) -> int:
        """Return a free row; ValueError if there is none."""
        if self._free:
            return self._free.pop()
        most = len(self._words) // ROW_WORDS - 1
        if self._words[0] >= most:
            raise ValueError(f"the device has {most} areas, the maximum")
        self._words[0] += 1
        return self._words[0]

    def publish(self, client: int, area: AreaRecord) -> None:
        """Write an area to its row, before any reply names it."""
        at = ROW_WORDS * area.row
        flags = (area.access == "write") + 2 * area.track_dirty + 4 * area.of_object
        self._words[at + 1 : at + ROW_WORDS] = array("Q", (client, area.address, area.offset, area.length, flags))
        self._words[at] = area.number

    def clear(self, row: int) -> None:
        """Clear a row, published or not; it is free again."""
        self._words[ROW_WORDS * row] = 0
        self._free.append(row)

    def load(self, clients: dict[int, ClientRecord]) -> None:
        """Give the clients the areas that a dead server left in the table, and clear the rows of unknown clients."""
        self._free.clear()
        found: list[tuple[int, AreaRecord]] = []
        for row in range(1, self._words[0] + 1):
            at = ROW_WORDS * row
            number, client, address, offset, length, flags = self._words[at : at + ROW_WORDS]
            if number and client in clients:
                access: Access = "write" if flags & 1 else "read"
                tracks, of_object = flags & 2 != 0, flags & 4 != 0
                found.append((client, AreaRecord(number, address, offset, length, access, tracks, of_object, row)))
            else:
                self.clear(row)
        for record in clients.values():
            record.areas.clear()
        for client, area in sorted(found, key=lambda pair: pair[1].number):  # in the order in which they were mapped
            clients[client].areas[area.number] = area


@dataclass(slots=True)
class Registry:
    """All that a new server, or a new warden, needs besides the driver.

    Attributes:
        facts: about the device.
        frames: the memory of its pages, and their states.
        recipe: makes the device in another process; None: only the process that has the device can serve it.
        listener, listens_at: where clients of a shared server connect.
        first: the connection of a private server's client, until it has said Hello.
        control: connection to the process that started the warden: it sends ``End``, or closes it.
        owner: pidfd of a process with which the device ends; -1: there is none.
        clients: by number.
        generation: number of servers before this one.
        blamed: pages that were being supplied when a driver did not return from the call, or ended its process; with the
            reason. The first request for such a page fails in the next server with that reason, as if the driver had raised
            it; then the page is removed. Otherwise it could end one server after the other.
        area_table: the areas of all clients.
    """

    facts: DeviceFacts
    frames: Frames
    recipe: Recipe | None = None
    listener: socket.socket | None = None
    listens_at: Place | None = None
    first: socket.socket | None = None
    control: socket.socket | None = None
    owner: int = -1
    clients: dict[int, ClientRecord] = field(default_factory=dict)
    generation: int = 0
    blamed: dict[int, str] = field(default_factory=dict)
    area_table: AreaTable = field(init=False)

    def __post_init__(self) -> None:
        self.area_table = AreaTable(self.frames.area_words)
