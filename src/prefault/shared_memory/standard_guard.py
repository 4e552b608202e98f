"""protect_shared_memory: have other code's shared memory fail by an exception, as far as that is possible from outside."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import sys
import threading
from collections.abc import Callable
from multiprocessing import shared_memory
from types import TracebackType
from typing import Any, NamedTuple, Self

from prefault.engine.execution import deferring_ctrl_c
from prefault.errors import PopulateError
from prefault.limits.limit import Shortfall
from prefault.limits.memory_use import MemoryUse
from prefault.limits.table import ask_for_memory, shortfall_of
from prefault.memory.vma import Backing
from prefault.shared_memory.nameless_files import DIRECTORY, allocate
from prefault.sizes import format_size


class SharedMemoryProtection:
    """Protection that :func:`protect_shared_memory` began; :meth:`end`, or the end of a ``with`` block, undoes it.

    Attributes:
        protects: names of the classes whose shared memory is protected now.
    """

    def __init__(self, protects: tuple[str, ...]) -> None:
        self.protects = protects
        self._ended = False

    def end(self) -> None:
        """End the protection; the last one that ends puts the original methods back. Idempotent."""
        with _lock:
            deferring_ctrl_c(self._end)

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            _leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None) -> None:
        self.end()

    def __repr__(self) -> str:
        return f"<SharedMemoryProtection of {', '.join(self.protects)}{', ended' if self._ended else ''}>"


def protect_shared_memory() -> SharedMemoryProtection:
    """Have shared memory that other code makes in this process fail when it is made, and not by SIGBUS when it is used.

    ::

        with prefault.protect_shared_memory():  # or without `with`, for the rest of the program
            memory = multiprocessing.shared_memory.SharedMemory(create=True, size=size)  # HeadroomError if it does not fit

    It replaces methods of other modules (monkey patching), and puts them back at the end:

    - ``multiprocessing.shared_memory.SharedMemory``, and with it ``ShareableList``, managers and subclasses: new memory is
      allocated by fallocate(2), with all limits checked, and removed if that fails.
    - ``numpy.memmap`` with ``mode="w+"``, by which users of joblib share results: the new file is allocated in the same way,
      and removed if that fails; a file system without fallocate (ext2, NFS before 4.2) leaves it as it was. joblib's own
      files are written by write(2), which fails cleanly by itself.
    - torch before 2.10, if it is imported by now: the limits are checked just before it makes shared memory
      (``share_memory_``, queues, workers of a DataLoader). Two processes that do so at once can still meet SIGBUS. Later
      ones allocate by themselves.

    It holds in this process and in those that it forks from now on; spawned ones call it themselves. Memory is taken as a
    whole where the original leaves it to the first touch.

    Raises, in the code that makes shared memory:
        HeadroomError: a limit leaves less than is needed.
        BackingFullError: the kernel found no memory, though the limits had room.
    """
    with _lock:
        protection = SharedMemoryProtection(())
        try:
            deferring_ctrl_c(lambda: _enter(protection))
        except BaseException:  # Ctrl-C: nobody gets the protection, and so could end it
            protection.end()
            raise
        return protection


class _Patch(NamedTuple):
    """Method of another module that a wrapper replaces."""

    owner: type
    name: str
    original: Any
    was_own: bool
    wrapper: Any


_lock = threading.RLock()
_patches: list[_Patch] = []
_active = 0


def _enter(protection: SharedMemoryProtection) -> None:
    global _active
    _active += 1
    protects = ["multiprocessing.shared_memory.SharedMemory"]
    _wrap(shared_memory.SharedMemory, "__init__", _allocated_at_creation)
    if "numpy" in sys.modules:
        protects.append("numpy.memmap")
        _wrap(sys.modules["numpy"].memmap, "__new__", _allocated_memmap)
    torch = sys.modules.get("torch")
    if torch is not None and _is_before_2_10(str(torch.__version__)):
        storage = torch.UntypedStorage
        protects.append("torch.UntypedStorage")
        for name in ("_new_using_fd_cpu", "_new_using_filename_cpu"):
            if hasattr(storage, name):
                _wrap(storage, name, _checked_size)
        for name in ("_share_fd_cpu_", "_share_filename_cpu_"):
            if hasattr(storage, name):
                _wrap(storage, name, _checked_storage)
    protection.protects = tuple(protects)


def _leave() -> None:
    global _active
    _active -= 1
    if _active:
        return
    for patch in reversed(_patches.copy()):
        if vars(patch.owner).get(patch.name) is not patch.wrapper:
            continue  # other code has wrapped it since: ours stays inside, and does nothing
        if patch.was_own:
            setattr(patch.owner, patch.name, patch.original)
        else:
            delattr(patch.owner, patch.name)
        _patches.remove(patch)


def _wrap(owner: type, name: str, make: Callable[[Any], Any]) -> None:
    if any(patch.owner is owner and patch.name == name for patch in _patches):
        return
    original = vars(owner).get(name)
    wrapper = make(getattr(owner, name))
    _patches.append(_Patch(owner, name, original, name in vars(owner), wrapper))
    setattr(owner, name, wrapper)


def _allocated_at_creation(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: Any, name: str | None = None, create: bool = False, size: int = 0, **options: Any) -> None:
        if not (create and _active):
            original(self, name, create, size, **options)
            return
        if isinstance(size, int):
            _ensure_room(size)
        original(self, name, create, size, **options)
        try:
            allocate(self._fd)
        except BaseException:
            self.close()
            self.unlink()
            raise

    return init


def _allocated_memmap(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def new(subtype: Any, filename: Any, *arguments: Any, **options: Any) -> Any:
        mode = arguments[1] if len(arguments) > 1 else options.get("mode", "r+")
        if not _active or mode not in ("w+", "write"):
            return original(subtype, filename, *arguments, **options)
        array = original(subtype, filename, *arguments, **options)
        with contextlib.ExitStack() as stack:
            if hasattr(filename, "fileno"):
                fd = filename.fileno()
            else:
                fd = os.open(filename, os.O_RDWR | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                stack.push(lambda kind, *_: os.unlink(filename) if kind is not None else None)
            try:
                allocate(fd)
            except PopulateError as error:
                if error.errno != errno.EOPNOTSUPP:  # a file system without fallocate(2): as without protection
                    raise
        return array

    return staticmethod(new)


def _checked_size(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def new(size: int, *arguments: Any, **options: Any) -> Any:
        _ensure_room(size)
        return original(size, *arguments, **options)

    return staticmethod(new)


def _checked_storage(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def share(self: Any, *arguments: Any, **options: Any) -> Any:
        if not self.is_shared():
            _ensure_room(self.nbytes())
        return original(self, *arguments, **options)

    return share


def _ensure_room(size: int) -> None:
    """Raise HeadroomError unless /dev/shm, the memory cgroups and the machine have room for ``size`` bytes."""
    if not _active or size <= 0:
        return
    use = MemoryUse(backing=Backing.TMPFS, shared=True, directory=DIRECTORY)
    short = shortfall_of(use, size, "tmpfs space")
    if short is None:
        limit, left_bytes = ask_for_memory(size)
        short = None if limit is None else Shortfall(limit, size, left_bytes)
    if short is not None:
        raise short.error(f"shared memory of {format_size(size)} cannot be made: {short.limit.advice}")


def _is_before_2_10(version: str) -> bool:
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and (int(found[1]), int(found[2])) < (2, 10)
