"""The state that outlives a server: the frames, the state of each page, and the clients with their descriptors.

The warden keeps it, and the server is a fork of the warden, so that each new server finds all of it in place. The server
notifies the warden of each change at once (``handover.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefault.device.driver import Access
from prefault.ipc.messages import msgspec

if TYPE_CHECKING:
    from prefault.device.driver import Device
    from prefault.device.frames import Frames


class DeviceFacts(msgspec.Struct, frozen=True, array_like=True):
    """Properties of a device that do not change; as they are sent to another warden as well.

    Attributes:
        name: for people.
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


class AreaRecord(msgspec.Struct, array_like=True):
    """A part of the frames that a client has mapped and registered.

    Attributes:
        number: given by the server, of the device's areas.
        address: in the client.
        offset: into the device, in bytes.
        length: in bytes.
        access: what the client may do with it.
        track_dirty: first writes are noticed.
    """

    number: int
    address: int
    offset: int
    length: int
    access: Access
    track_dirty: bool


@dataclass(slots=True)
class ClientRecord:
    """A client process: its connection, its userfaultfd, and its areas. The record owns the descriptors."""

    number: int
    pid: int
    uid: int
    connection: int
    pidfd: int
    userfaultfd: int
    lifeline_write: int
    lifeline_read: int
    areas: dict[int, AreaRecord] = field(default_factory=dict)


@dataclass(slots=True)
class Registry:
    """All that a new server needs besides the driver."""

    facts: DeviceFacts
    frames: Frames
    clients: dict[int, ClientRecord] = field(default_factory=dict)
    generation: int = 0
    """Number of servers before this one."""
    blamed: dict[int, str] = field(default_factory=dict)
    """Pages that were being supplied when a driver did not return from the call, or ended its process; with the reason.

    The first request for such a page fails in the next server with that reason, as if the driver had raised it; then the
    page is removed. Otherwise it could end one server after the other.
    """
