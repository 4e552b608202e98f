"""Buffers inside a collection: lists, dictionaries, modules, tables, each with its name.

Objects are recognised by their public interface, and no library is imported for that.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, ValuesView
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


def leaves_of(collection: Any) -> list[Leaf] | None:
    """Return all buffers of a collection; None where it is none.

    Args:
        collection: a list, tuple, set or generator; a mapping, such as a state_dict or SafeTensors; an open safetensors
            file; a module with parameters and buffers, as of torch; a table, column or array of Arrow; a data frame or
            series. Inside each other too.

    Raises:
        TypeError: nothing in it has memory, or an item is none of these; the message has its name.
    """
    if _items_of(collection, "") is None:
        return None
    found = list(_leaves("", collection, 0))
    leaves = [leaf for leaf in found if not isinstance(leaf.value, _WITHOUT_MEMORY)]
    if found and not leaves:
        raise TypeError(f"nothing in this {type(collection).__name__} has memory: its items are plain Python objects")
    return leaves


def _leaves(name: str, value: Any, depth: int) -> Iterator[Leaf]:
    items = None if isinstance(value, _WITHOUT_MEMORY) else _items_of(value, name)
    if items is None:
        yield Leaf(name, value)
        return
    if depth == _DEEPEST:
        raise ValueError(f"collections inside each other, {_DEEPEST} deep: one contains itself ({name[:80]}...)")
    for key, item in items:
        yield from _leaves(f"{name}{key}", item, depth + 1)


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
