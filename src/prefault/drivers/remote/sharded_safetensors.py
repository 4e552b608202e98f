"""Models of several safetensors files: ``model.safetensors.index.json`` and the shards that it names, as one mapping."""

from __future__ import annotations

import contextlib
import errno
import json
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from prefault.drivers.remote.locations import open_plain, sibling
from prefault.drivers.remote.safetensors_files import SafeTensors
from prefault.drivers.remote.source import Patience, SourceError, printable

if TYPE_CHECKING:
    import numpy

SUFFIX = ".safetensors.index.json"
"""Ending of the name of an index, in lower case."""

_MOST_INDEX = 100_000_000
"""Bytes of an index: the limit of a header of safetensors."""
_MOST_THREADS = 32
"""Shards that are opened at a time."""


class ShardIndex(NamedTuple):
    """Content of an index.

    Attributes:
        name: of the index in messages, without secrets.
        shard_of: name of the shard of each tensor, relative to the directory of the index.
        metadata: as the index has it; ``total_size``: bytes of all tensors.
    """

    name: str
    shard_of: dict[str, str]
    metadata: dict[str, Any]


class ShardedSafeTensors(SafeTensors):
    """The tensors of a model that consists of several safetensors files, by name; see :class:`SafeTensors`.

    Args:
        index: names the shard of each tensor.
        shards: the content of each shard, by its name.

    Attributes:
        metadata: ``metadata`` of the index.
        shards: the content of each shard, by its name: an array of bytes, for :func:`prefault.drivers.area_of`.

    Raises:
        ValueError: a shard is not a safetensors file.
        SourceError: a tensor is not in its shard, or all tensors together have another size than the index says.
    """

    _kind = "model"

    def __init__(self, index: ShardIndex, shards: dict[str, SafeTensors]) -> None:  # not the __init__ of a single file
        self.metadata = index.metadata
        self.shards = {name: shard.content for name, shard in shards.items()}
        self._tensors = {}
        for tensor, name in index.shard_of.items():
            if tensor not in shards[name]:
                raise SourceError(
                    errno.EIO,
                    f"{index.name}: the tensor {tensor!r} is not in {name}, as the index says: one of them is of another"
                    f" version of the model; {name} has {len(shards[name])} tensors",
                )
            self._tensors[tensor] = shards[name].layout(tensor)
        found = sum(layout.stop - layout.start for layout in self._tensors.values())
        expected = index.metadata.get("total_size")
        if expected is not None and found != expected:
            raise SourceError(
                errno.EIO,
                f"{index.name}: its tensors have {found} bytes, and its total_size is {expected}: a shard is of another"
                " version of the model. If the index is known to be wrong, map the shards one by one, by"
                " format='safetensors'",
            )

    def __repr__(self) -> str:
        size = sum(map(len, self.shards.values()))
        return f"<ShardedSafeTensors: {len(self)} tensors in {len(self.shards)} shards of {size} bytes>"


def open_sharded(
    url: str,
    open_shard: Callable[[str], numpy.ndarray[Any, Any]],
    headers: dict[str, str],
    options: dict[str, Any],
    patience: Patience,
) -> ShardedSafeTensors:
    """Read the index at a URL or path, and open all of its shards, some at a time; if one fails, none stays open.

    Args:
        url: of the index.
        open_shard: map a shard, by its URL or path, as an array of bytes.
        headers: for reading the index over HTTP.
        options: for reading the index through fsspec.
        patience: for reading the index.
    """
    index = _read_index(url, headers, options, patience)
    names = sorted(set(index.shard_of.values()))
    shards: dict[str, SafeTensors] = {}

    def open_one(name: str) -> None:
        content = open_shard(sibling(url, name))
        try:
            shards[name] = SafeTensors(content)  # not a future's result: futures live as long as a traceback
        except ValueError as error:
            raise ValueError(f"{index.name}: {name}: {error}") from error
        except SourceError as error:
            raise SourceError(error.errno, f"{index.name}: {name}: {error.strerror}") from error

    try:
        with ThreadPoolExecutor(min(_MOST_THREADS, len(names)), "prefault-shard") as threads:
            list(threads.map(open_one, names))  # raises the first error, and begins no further shard
        return ShardedSafeTensors(index, shards)
    except BaseException as error:
        _release(error)
        raise
    finally:
        shards.clear()


def _release(error: BaseException | None) -> None:
    """Clear the variables in an exception's traceback: they would keep shards mapped for as long as the exception lives."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _read_index(url: str, headers: dict[str, str], options: dict[str, Any], patience: Patience) -> ShardIndex:
    with contextlib.closing(open_plain(url, headers, options, patience)) as source:
        name = printable(source.name)
        if source.length > _MOST_INDEX:
            raise ValueError(
                f"{name}: an index of safetensors has at most {_MOST_INDEX} bytes, and this has {source.length}"
            )
        text = source.read(0, source.length)
    try:
        index = json.loads(text, object_pairs_hook=_without_duplicates)
        shard_of, metadata = index["weight_map"], index.get("metadata", {})
        if not isinstance(shard_of, dict) or not isinstance(metadata, dict):
            raise TypeError("weight_map and metadata are objects, with a name for each value")
        if not shard_of:
            raise ValueError("its weight_map is empty")
        for shard in set(map(_checked_name, shard_of.values())):
            if not shard.endswith(".safetensors"):
                raise ValueError(f"the shard {shard!r} is not named .safetensors")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        missing = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{name}: not an index of safetensors: {missing}") from error
    return ShardIndex(name, shard_of, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, count),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} occurs {count} times")
    return found


def _checked_name(shard: object) -> str:
    """Return the name of a shard, if it is that of a file in the directory of the index or below it; else raise."""
    if not isinstance(shard, str):
        raise TypeError(f"the name of a shard is a text, not {shard!r}")
    inside = all(part not in ("", ".", "..") for part in shard.split("/"))
    if not inside or "\\" in shard or ":" in shard or not shard.isprintable():
        raise ValueError(f"the shard {shard[:200]!r} does not lie in the directory of the index")
    return shard
