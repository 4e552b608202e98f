"""Map an area on a connection: arguments checked, the thread pinned if asked, pages populated; undone on failure."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from prefault._system import fork_hooks
from prefault.device import protocol
from prefault.device.client.area import Area
from prefault.device.client.connection import DeviceConnection
from prefault.device.client.page_provider import AreaPageProvider
from prefault.device.device_pool import Access, DeviceObject
from prefault.sizes import Size, parse_size

PopulateChoice: TypeAlias = bool | Access


class MapOptions(NamedTuple):
    """Arguments of :func:`prefault.device.map`, as they were given."""

    length: Size | None
    offset: Size
    populate: PopulateChoice
    access: Access | None
    track_dirty: bool
    colocate: bool
    object: str | None = None
    stands_for: str | None = None
    """Name of the device that the object stands for."""


_LOOKUPS_MOST = 100
"""Times that an object may be deleted and made anew while it is being mapped."""


def map_area(connection: DeviceConnection, options: MapOptions, release: Callable[[], None]) -> Area:
    """Map an area. ``release`` is called once it is unmapped, or at once if this fails.

    An object is looked up first, as the client has to know which frames to map. The server carries out the Map only if the
    object is the same by then.
    """
    populate, track_dirty = options.populate, options.track_dirty
    memory: AreaPageProvider | None = None
    ends = [release]

    def at_end() -> None:  # idempotent: after Ctrl-C it may be called here and by the memory
        while ends:
            ends.pop()()

    try:
        info = connection.device_info
        if populate not in (False, True, "read", "write"):
            raise ValueError(f"populate is False, True, 'read' or 'write', not {populate!r}")
        chosen = checked_access(info.name, info.writable, options.access)
        if populate == "write" and chosen == "read":
            raise ValueError("an area that is mapped for reading cannot be populated writable")
        if track_dirty and chosen == "read":
            raise ValueError("an area that is mapped for reading has no dirty pages to track")
        cpu = None
        if options.colocate:
            cpu, undo = _pin_thread()
            ends.append(undo)
        for left in reversed(range(_LOOKUPS_MOST)):
            placed, start, count = _place(connection, options)
            memory = AreaPageProvider(
                connection, start, chosen, placed, track_dirty=track_dirty, at_end=at_end, stands_for=options.stands_for
            )
            try:
                memory.attach(count, cpu)
                break
            except protocol.StaleObjectError:
                if not left:
                    raise
                stale, memory = memory, None  # so that at_end is called here, if the object is not found again
                stale.unmap_stale()
        assert memory is not None
        area = Area(memory, count)
        if populate is not False:
            area.populated = area.populate(chosen if populate is True else populate)
        return area
    except BaseException:
        if memory is None:
            at_end()
        else:
            memory.unmap()
        raise


def _place(connection: DeviceConnection, options: MapOptions) -> tuple[DeviceObject | None, int, int]:
    """Return the object to be mapped, if any, with the offset in the device and the length of the area, in bytes."""
    info, name = connection.device_info, options.object
    if name is None:
        return None, *checked_extent(info.name, info.length, info.page_size, options.length, options.offset)
    if not isinstance(name, str):
        raise TypeError(f"an object is mapped by its name, a str, not by {name!r}")
    found = connection.ask(protocol.FindObject(connection.next_id(), name), protocol.ObjectFound).object
    start, count = checked_extent(f"object {name!r}", found.length, info.page_size, options.length, options.offset)
    return found, found.offset + start, count


def checked_extent(name: str, device_length: int, page_size: int, length: Size | None, offset: Size) -> tuple[int, int]:
    """Return the offset and the length in bytes, checked against the device."""
    start = parse_size(offset)
    if start % page_size:
        raise ValueError(f"an offset in {name} is a multiple of its page size, {page_size} bytes, not {start}")
    if start >= device_length:
        raise ValueError(f"offset {start} lies beyond {name}, which has {device_length} bytes")
    count = device_length - start if length is None else parse_size(length)
    if count == 0:
        raise ValueError("an area of 0 bytes is not possible: mmap(2) refuses it")
    if count > device_length - start:
        raise ValueError(
            f"offset {start} and length {count} end at {start + count}, beyond {name}, which has {device_length} bytes"
        )
    return start, count


def checked_access(name: str, writable: bool, access: Access | None) -> Access:
    """Return the access that an area is mapped with, checked against the device."""
    if access not in (None, "read", "write"):
        raise ValueError(f"access is 'read' or 'write', not {access!r}")
    if access == "write" and not writable:
        raise ValueError(f"{name} is read-only: map it with access='read'")
    return access or ("write" if writable else "read")


_pinning = threading.RLock()  # reentrant: a finalizer undoes it
_pinned: dict[int, tuple[set[int], int]] = {}
"""CPUs of a thread before it was pinned, and the number of areas that it is pinned for; by thread id."""


def _pin_thread() -> tuple[int, Callable[[], None]]:
    """Pin the calling thread to the CPU that it runs on; return the CPU and a function that undoes it."""
    thread = threading.get_native_id()
    with _pinning:
        before, count = _pinned.get(thread) or (os.sched_getaffinity(thread), 0)
        _pinned[thread] = before, count + 1
    with open("/proc/thread-self/stat") as file:
        cpu = int(file.read().rpartition(")")[2].split()[36])  # field 39, processor: proc_pid_stat(5)
    now = os.sched_getaffinity(thread)
    if cpu not in now:
        cpu = min(now)
    os.sched_setaffinity(thread, {cpu})

    def undo() -> None:
        with _pinning:
            _, count = _pinned[thread]
            if count > 1:  # still pinned for another area; areas close in any order
                _pinned[thread] = before, count - 1
                return
            del _pinned[thread]
        try:
            os.sched_setaffinity(thread, before)
        except ProcessLookupError:
            return  # the thread has ended
        except OSError as error:
            if error.errno != errno.EINVAL:  # a cpuset took all of these CPUs away
                raise

    return cpu, undo


def _after_fork() -> None:
    global _pinning
    _pinning = threading.RLock()
    _pinned.clear()


fork_hooks.register(in_child=_after_fork)
