"""Choice of a server for a remote file: one for all files of this process that have the same options of the process."""

from __future__ import annotations

import os
import resource
import threading
import weakref

from prefault.device.driver import Device, SharedObject
from prefault.drivers.remote.file_records import SLOT_BYTES, CloseFile, OpenFile, decode, encode
from prefault.drivers.remote.remote_files import RemoteFiles
from prefault.ipc.messages import msgspec
from prefault.sizes import GIB, PAGE_SIZE

_LONGEST = 1024 * GIB
"""Bytes of a file that shares its server: the address space of a server has room for 64 of them."""
_SHOWN_BYTES = 150
"""Bytes of a file's name in the name of its object, which has at most 200."""

_PATHS = ("source", "cache_dir", "index")

_servers: weakref.WeakValueDictionary[tuple[object, ...], RemoteFiles] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def share(file: Device, token: str, group: int | None) -> SharedObject | None:
    """Return the object that a file is on a server that it shares; None if it needs a server of its own.

    Files share a server if all that is the same for a whole server is the same: the number of workers, the size of batches,
    read-ahead, the limit of time, the environment, and the user with its groups. The server inherits environment, user and
    groups from this process when it starts, and reads files and finds credentials by them.

    Args:
        file: a :class:`RemoteFile`.
        token: tells this file from all others, also from another of the same URL.
        group: files with a capacity share it, and a server, within a group. None: each has its own.
    """
    recipe = file.recipe()
    if (
        recipe is None
        or file.page_size != PAGE_SIZE
        or file.length > _LONGEST
        or (file.capacity is not None and group is None)
    ):
        return None
    if any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)):
        return None  # the address space of the shared server would exceed the limit
    shown = str(file).encode()[:_SHOWN_BYTES].decode(errors="ignore")
    try:
        paths = {name: os.fsencode(recipe.arguments[name]) for name in _PATHS if recipe.arguments[name] is not None}
        request = OpenFile(f"{shown} {token}", **(recipe.arguments | paths))
        opening = encode(request)
        decode(opening)  # headers that are no text, say
    except (msgspec.MsgspecError, UnicodeEncodeError, OverflowError, TypeError):
        return None
    if len(opening) > SLOT_BYTES - 8:
        return None
    around = None if file.fault_around is None else tuple(file.fault_around)
    options = (file.workers, file.batch, around, file.timeout_s, file.capacity)
    key = (
        *options,
        group if file.capacity is not None else None,
        tuple(sorted(os.environb.items())),
        os.geteuid(),
        os.getegid(),
        tuple(sorted(os.getgroups())),
    )
    with _lock:
        server = _servers.get(key)
        if server is None:
            server = _servers[key] = RemoteFiles(*options)
        return SharedObject(server, request.name, opening, encode(CloseFile(request.name)))
