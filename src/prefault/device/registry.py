"""What outlives a server: the frames, the state of each page, and the clients with their descriptors.

The warden has it, and the server is a fork of the warden, so that each new server finds all of it in place. What a server
adds it tells the warden at once (``internal.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prefault.device.driver import Access

if TYPE_CHECKING:
    from prefault.device.frames import Frames


@dataclass(slots=True)
class AreaRecord:
    """A part of the frames that a client has mapped and registered."""

    number: int
    address: int
    offset: int
    length: int
    access: Access
    track_dirty: bool


@dataclass(slots=True)
class ClientRecord:
    """A client process: its connection, its userfaultfd, and what it maps. The descriptors are owned by this record."""

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

    name: str
    length: int
    page_size: int
    writable: bool
    restartable: bool
    timeout_s: float
    frames: Frames
    clients: dict[int, ClientRecord] = field(default_factory=dict)
    generation: int = 0
    """How many servers there were before this one."""
    blamed: dict[int, str] = field(default_factory=dict)
    """Pages that a server died of: its driver did not come back from the call, or ended the process. By page, what to say.

    The next server does not ask the driver for such a page at the first request, which fails with that message as if
    the driver had raised it; then the page is taken out. Otherwise the page would cost one server after the other its life.
    """
