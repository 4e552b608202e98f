"""Buffers inside a collection: lists, dictionaries, modules, tables, each with its name.

Objects are recognised by their public interface, and no library is imported for that.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from types import GeneratorType
from typing import Any, NamedTuple

from prefault.memory.borrowing import borrow
from prefault.memory.columns import columns_of

_DEEPEST = 64
"""Collections inside each other, more than which is a collection that contains itself."""

_WITHOUT_MEMORY = (bool, int, float, complex, type(None))
"""Items that a state_dict has beside its tensors."""


class Leaf(NamedTuple):
    """A buffer, or a path, in a collection.

    Attributes:
        name: its keys and indices from the outside to the inside, as ``['state'][0]['exp_avg']``.
        value: what is to be borrowed.
    """

    name: str
    value: Any


def is_path(value: Any) -> bool:
    """Return whether a value is the path of a file."""
    return isinstance(value, str | os.PathLike)


class Leaves:
    """Buffers, or paths, found in a collection. The name of each is made only when it is asked for.

    Attributes:
        values: what is to be borrowed.
        passed_over: whether there was something that has no memory, such as a number.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.passed_over = False
        self._firsts: list[int] = []
        self._runs: list[tuple[str, Sequence[Any] | None]] = []
        self._plain_types: set[type] = set()

    def name(self, index: int) -> str:
        """Return the keys and indices of a value from the outside to the inside, as ``['state'][0]['exp_avg']``."""
        run = bisect_right(self._firsts, index) - 1
        prefix, keys = self._runs[run]
        at = index - self._firsts[run]
        return f"{prefix}[{at if keys is None else keys[at]!r}]" if keys is None or keys else prefix

    def __iter__(self) -> Iterator[Leaf]:
        return (Leaf(self.name(index), value) for index, value in enumerate(self.values))

    def __len__(self) -> int:
        return len(self.values)

    def collect(self, name: str, value: Any, depth: int = 0) -> bool:
        """Add the buffers of a value; return whether it is a collection."""
        if type(value) in (list, tuple, dict) and self._collect_plain(name, value):
            return True
        if isinstance(value, _WITHOUT_MEMORY):
            self.passed_over = True
            return False
        items = None if self._is_plain(value) else _items_of(value, name)
        if items is None:
            self._add(name, (value,), ())
            return False
        if depth == _DEEPEST:
            raise ValueError(f"collections inside each other, {_DEEPEST} deep: one contains itself ({name[:80]}...)")
        for key, item in items:
            self.collect(f"{name}{key}", item, depth + 1)
        return True

    def _collect_plain(self, name: str, collection: Any) -> bool:
        """Add all items of a list, tuple or dictionary at once, if their types tell that each is a buffer."""
        values, keys = (list(collection.values()), list(collection)) if type(collection) is dict else (collection, None)
        for kind in set(map(type, values)) - self._plain_types:
            if not self._is_plain(next(value for value in values if type(value) is kind)):
                return False
        if values:
            self._add(name, values, keys)
        return True

    def _is_plain(self, value: Any) -> bool:
        """Return whether the type of a value tells that it is no collection: one that gives no attributes of their own."""
        kind = type(value)
        if kind not in self._plain_types:
            if kind.__dictoffset__ or hasattr(kind, "__getattr__") or isinstance(value, _WITHOUT_MEMORY):
                return False
            if _items_of(value, "") is not None:
                return False
            self._plain_types.add(kind)
        return True

    def _add(self, prefix: str, values: Sequence[Any], keys: Sequence[Any] | None) -> None:
        """Add values, named by their keys (None: by their index); without any, the prefix is the whole name."""
        self._firsts.append(len(self.values))
        self._runs.append((prefix, keys))
        self.values.extend(values)


def leaves_of(collection: Any) -> Leaves | None:
    """Return all buffers of a collection; None where it is none.

    Args:
        collection: a list, tuple, set or generator; a mapping, such as a state_dict or SafeTensors; an open safetensors
            file; a module with parameters and buffers, as of torch; a table, column or array of Arrow; a data frame or
            series. Inside each other too.

    Raises:
        TypeError: nothing in it has memory, or an item is none of these; the message has its name.
    """
    leaves = Leaves()
    if not leaves.collect("", collection):
        return None
    if leaves.passed_over and not leaves.values:
        raise TypeError(f"nothing in this {type(collection).__name__} has memory: its items are plain Python objects")
    return leaves


def _items_of(value: Any, name: str) -> Iterable[tuple[str, Any]] | None:
    """Return names and items of one collection; None for anything else, buffers above all."""
    if isinstance(value, Mapping):
        return ((f"[{key!r}]", item) for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset | deque | ValuesView | GeneratorType):
        return ((f"[{index}]", item) for index, item in enumerate(value))
    if is_path(value) or isinstance(value, bytes | bytearray | memoryview):
        return None
    parameters, buffers = (getattr(value, attribute, None) for attribute in ("named_parameters", "named_buffers"))
    if callable(parameters) and callable(buffers):
        return _of_module(parameters, buffers)
    if callable(getattr(value, "get_tensor", None)) and callable(getattr(value, "keys", None)):
        return _of_open_file(value, name)
    return columns_of(value, name)


def _of_module(
    parameters: Callable[[], Iterable[tuple[str, Any]]], buffers: Callable[[], Iterable[tuple[str, Any]]]
) -> Iterator[tuple[str, Any]]:
    """Yield parameters and buffers of a module, each with its dotted name."""
    for named in (parameters, buffers):
        for key, item in named():
            yield f"[{key!r}]", item


def _of_open_file(file: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of an open safetensors file, if they are views of its mapping and no copies.

    The library returns views of one mapping for torch on the CPU, and copies for numpy. Two copies have two addresses.
    """
    keys = list(file.keys())
    for key in keys:
        item = file.get_tensor(key)
        with borrow(item) as one, borrow(file.get_tensor(key)) as other:
            if one.address != other.address:
                raise TypeError(
                    f"{name or type(file).__name__}: its tensors are copies, made anew at each access, so nothing would stay"
                    " populated: give the path of the file, or a mapping of it"
                )
        yield f"[{key!r}]", item
