"""Tensors in model files, by name: their byte ranges, and how much of each is cached.

Formats are recognised by their first bytes: safetensors, GGUF and .npy. Only headers are read.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fnmatch
import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from prefault.drivers.remote.safetensors_header import TensorPlace, read_safetensors_header
from prefault.files.cached_pages import cached_ranges
from prefault.files.failures import CannotTellError, FileError
from prefault.files.formats.gguf_header import MAGIC as _GGUF_MAGIC
from prefault.files.formats.gguf_header import read_gguf_header
from prefault.files.open_file import OpenFile
from prefault.files.selection import Path
from prefault.ranges import PageRange, RangeSet

_NPY_MAGIC = b"\x93NUMPY"
_SUFFIXES = (".safetensors", ".gguf", ".npy")
_KNOWN_FORMATS = "--tensor takes .safetensors, .gguf and .npy files (--include chooses them)"


class TensorStatus(NamedTuple):
    """Pages of one tensor in the page cache.

    Attributes:
        name: name of the tensor; of a .npy file, its name without the suffix.
        start, stop: offsets in the file, in bytes.
        pages: base pages that the tensor touches.
        cached_pages: those that are cached; None where the kernel does not say.
    """

    name: str
    start: int
    stop: int
    pages: int
    cached_pages: int | None


def tensor_ranges(path: Path | OpenFile) -> dict[str, TensorPlace]:
    """Return the places of the tensors of a .safetensors, .gguf or .npy file, by name. Its header is read.

    Raises:
        FileError: it is of none of these formats, damaged, or shorter than its header says.
        OSError: it cannot be opened or read.
    """
    if not isinstance(path, OpenFile):
        with OpenFile(path) as file:
            return tensor_ranges(file)
    file = path

    def read(offset: int, length: int) -> bytes:
        return os.pread(file.fd, length, offset)

    size = file.current_size()
    try:
        first = read(0, 8)
        if first.startswith(_GGUF_MAGIC):
            found = read_gguf_header(read, size)
        elif first.startswith(_NPY_MAGIC):
            found = {os.path.splitext(os.path.basename(file.path))[0]: _npy_place(read, size, file.path)}
        elif read(8, 1) != b"{" and not file.path.endswith(_SUFFIXES):
            raise FileError(errno.EINVAL, "is no model file whose tensors have names", file.path, _KNOWN_FORMATS)
        else:
            found, _ = read_safetensors_header(read, size)
    except (ValueError, OverflowError, MemoryError) as error:
        remedy = "copy or download it again" if file.path.endswith(_SUFFIXES) else _KNOWN_FORMATS
        raise FileError(errno.EINVAL, f"no tensors can be found in it: {_short(error)}", file.path, remedy) from error
    stop = max((place.stop for place in found.values()), default=0)
    if stop > size:
        reason = f"has {size} bytes, and its header says {stop}: it was cut short"
        raise FileError(errno.EIO, reason, file.path, "copy or download it again")
    return found


def _npy_place(read: Callable[[int, int], bytes], size: int, path: str) -> TensorPlace:
    from prefault.drivers.remote.array_formats import read_npy_layout
    from prefault.drivers.remote.source import SourceError

    try:
        layout = read_npy_layout(read, size, "the file")
    except SourceError as error:
        raise FileError(errno.EIO, error.strerror or str(error), path, "copy or download it again") from error
    return TensorPlace(str(layout.dtype), layout.shape, layout.offset, layout.stop)


def named_tensors(patterns: Iterable[str]) -> Callable[[OpenFile], list[tuple[int, int | None]]]:
    """Return a function from an open model file to the byte ranges of its tensors whose names match a shell pattern.

    The verbs on files take it as ``ranges=``. It raises FileError where no tensor matches, or where there are none.
    """
    texts = [patterns] if isinstance(patterns, str) else list(patterns)

    def ranges(file: OpenFile) -> list[tuple[int, int | None]]:
        return [(place.start, place.stop) for place in _matching(file, texts).values()]

    return ranges


def tensor_statuses(file: OpenFile, patterns: Iterable[str]) -> list[TensorStatus]:
    """Return how much of each tensor whose name matches a shell pattern is cached, in the order of the file."""
    chosen = _matching(file, list(patterns))
    cached: RangeSet | None = None
    with contextlib.suppress(CannotTellError):
        cached = cached_ranges(file)
    found = []
    for name, place in sorted(chosen.items(), key=lambda item: item[1].start):
        pages = PageRange.outward(place.start, place.stop)
        count = None if cached is None else (cached & RangeSet([pages])).pages
        found.append(TensorStatus(name, place.start, place.stop, pages.pages, count))
    return found


def _matching(file: OpenFile, patterns: list[str]) -> dict[str, TensorPlace]:
    places = tensor_ranges(file)
    matches = re.compile("|".join(map(fnmatch.translate, patterns))).match
    chosen = {name: place for name, place in places.items() if matches(name)}
    if not chosen:
        nearest = ", ".join(difflib.get_close_matches(patterns[0], places, 3, 0.0)) or "none"
        reason = f"has no tensor that matches {' or '.join(patterns)}, among {len(places)}"
        raise FileError(errno.ENOENT, reason, file.path, f"nearest: {nearest}")
    return chosen


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 200 else f"{text[:200]}..."
