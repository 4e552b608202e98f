"""The file format of recordings: pages of files, and parts of device memory, that a program touched.

A line of magic, a MessagePack object and a CRC-32: see ``docs/design/recordings.md``.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import zlib
from typing import Annotated, Literal, TypeAlias

try:
    import msgspec
except ImportError:
    raise ImportError(
        "recordings of pages need msgspec, which is not installed: pip install msgspec", name="msgspec"
    ) from None

from prefault.ranges import PageRange, RangeSet
from prefault.sizes import MAX_SIZE, PAGE_SIZE

_MAGIC = b"prefault recording 1\n"
_ANY_VERSION = b"prefault recording "
_CHECKSUM_BYTES = 4
_MOST_BYTES = 256 << 20
"""Length of the longest file that is written and read, bytes: some 12 million ranges, which take 1 GB of memory."""
_MOST_TEXTS = 1 << 16
_PAGE_SLACK = 2 << 20
"""Bytes by which the last range may reach beyond the end of a file: its last page, which may be a huge one."""

_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_SIZE)]
_Time: TypeAlias = Annotated[int, msgspec.Meta(ge=-MAX_SIZE, le=MAX_SIZE)]
_Name: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=1, max_length=1 << 16)]

Way: TypeAlias = Literal["trace", "residency", "snapshot"]
"""``trace``: by the kernel's tracepoints. ``residency``: the page cache before and after. ``snapshot``: the page cache."""


class RecordingError(ValueError):
    """A file is no recording, or a damaged one; the message names it."""


class RecordedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file of a recording.

    Attributes:
        path: absolute path, or path below the root; bytes, as the kernel has them.
        root: name of the root that the path is below; empty for an absolute path.
        device, inode: identity of the file.
        size: bytes.
        modified_ns: time of the last modification, nanoseconds since 1970.
        edges: start and stop of each range in turn, in bytes, strictly ascending.
    """

    path: _Name
    root: str
    device: _Number
    inode: _Number
    size: _Number
    modified_ns: _Time
    edges: list[_Number]

    @property
    def ranges(self) -> RangeSet:
        """The ranges, rounded outward to whole pages of this machine."""
        return RangeSet.from_edges(self.edges).outward(PAGE_SIZE)

    @property
    def bytes(self) -> int:
        """Total length of the ranges, bytes."""
        return sum(self.edges[1::2]) - sum(self.edges[::2])

    @property
    def shown_path(self) -> str:
        """The path for people: with the name of its root in front."""
        path = os.fsdecode(self.path)
        return f"{self.root}:{path}" if self.root else path


class RecordedArea(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Part of device memory that a program touched.

    Attributes:
        device: name of the device, as its access log has it.
        source: a remote file's URL without user, password and query, or its path; empty for other devices.
        length: length of the device, bytes.
        version: tag and time of the source's version; empty where it has none.
        runs: offset and length of each part in turn, in bytes, in the order of the first touch.
    """

    device: str
    source: str
    length: _Number
    version: str
    runs: list[_Number]

    @property
    def bytes(self) -> int:
        """Total length of the parts, bytes."""
        return sum(self.runs[1::2])


class Recording(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pages of files, and parts of device memory, that a program touched.

    Attributes:
        way: how the pages were found out.
        made_ns: time when the recording ended, nanoseconds since 1970.
        command: the command and its arguments; empty for a snapshot, and for a part of a program.
        complete: False if some files could not be looked at, or events were lost.
        notes: sentences on what is missing, and what to do about that.
        files: the files, in the order of their paths.
        areas: the parts of device memory.
    """

    way: Way
    made_ns: _Time
    command: Annotated[list[bytes], msgspec.Meta(max_length=_MOST_TEXTS)]
    complete: bool
    notes: Annotated[list[str], msgspec.Meta(max_length=_MOST_TEXTS)]
    files: list[RecordedFile]
    areas: list[RecordedArea]

    @property
    def file_bytes(self) -> int:
        """Total length of all ranges of files, bytes."""
        return sum(file.bytes for file in self.files)

    @property
    def area_bytes(self) -> int:
        """Total length of all parts of device memory, bytes."""
        return sum(area.bytes for area in self.areas)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a recording from a file.

        Raises:
            RecordingError: the file is no recording, a damaged one, or one of another version.
            OSError: the file cannot be read.
        """
        return load(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording to a file, which is replaced at once or not at all; to a device or a FIFO, in place.

        Raises:
            OSError: the file cannot be written; the one that was there stays. EFBIG: the recording has too many ranges.
        """
        content = _MAGIC + msgspec.msgpack.encode(self)
        content += zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little")
        name = os.path.abspath(os.fsdecode(path))
        if len(content) > _MOST_BYTES:
            reason = f"the recording has {len(content)} bytes, more than the limit of {_MOST_BYTES}: record fewer files"
            raise OSError(errno.EFBIG, reason, name)
        try:
            if can_be_replaced(name):
                _replace(os.path.realpath(name), content)
            else:
                with open(name, "wb") as file:
                    file.write(content)
        except OSError as error:  # which names no file, or a temporary one that the caller has never heard of
            raise OSError(error.errno, error.strerror, name) from None


def can_be_replaced(path: str) -> bool:
    """Tell whether a path is free, or that of a regular file; others, such as /dev/null, must stay what they are."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except FileNotFoundError:
        return True


def _replace(name: str, content: bytes) -> None:
    directory = os.path.dirname(name)
    temporary = os.path.join(directory, f".prefault-{os.urandom(8).hex()}")
    unnamed = True
    try:
        # Without a name until it is whole: a process that is killed leaves nothing behind.
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):  # NFS and FUSE have none
            raise
        fd, unnamed = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666), False
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(fd)
            if unnamed:
                # With a directory, which an absolute path ignores: else Python calls link(2), which follows no link.
                os.link(f"/proc/self/fd/{fd}", temporary, src_dir_fd=fd, follow_symlinks=True)
        os.replace(temporary, name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load(path: str | os.PathLike[str]) -> Recording:
    """Read a recording from a file.

    Raises:
        RecordingError: the file is no recording, a damaged one, or one of another version.
        OSError: the file cannot be read.
    """
    name = os.fsdecode(path)
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    try:
        return _decode(content)
    except RecordingError as error:
        shown = name.encode(errors="backslashreplace").decode()
        raise RecordingError(
            f"{shown}: {error}: record it again with 'prefault record' or 'prefault snapshot save'"
        ) from None


def _decode(content: bytes) -> Recording:
    if len(content) > _MOST_BYTES:
        raise RecordingError(f"it is longer than any recording, {_MOST_BYTES} bytes")
    if content.startswith(b"{"):
        raise RecordingError("it may be one of 'prefault watch', for 'prefault report --watch', but none of a page cache")
    if not content.startswith(_ANY_VERSION):
        raise RecordingError("it is no recording of prefault")
    if not content.startswith(_MAGIC):
        version = content[len(_ANY_VERSION) :].split(b"\n", 1)[0][:20].decode(errors="replace")
        raise RecordingError(f"it is a recording of version {version!r}, and this prefault reads version 1")
    body, checksum = memoryview(content)[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if len(body) < len(_MAGIC) or zlib.crc32(body).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
        raise RecordingError("the recording is damaged or cut off: its checksum is wrong")
    try:
        recording = msgspec.msgpack.decode(body[len(_MAGIC) :], type=Recording)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise RecordingError(f"the recording is damaged: {error}") from None
    for file in recording.files:
        _check_file(file)
    for area in recording.areas:
        _check_area(area)
    return recording


def _check_file(file: RecordedFile) -> None:
    if b"\0" in file.path:
        raise RecordingError("the recording is damaged: a path has a NUL byte")
    if file.root:
        if file.path.startswith(b"/") or b".." in file.path.split(b"/"):
            raise RecordingError(f"the recording is damaged: {file.shown_path!r} is not below its root")
    elif not file.path.startswith(b"/"):
        raise RecordingError(f"the recording is damaged: {file.shown_path!r} is not an absolute path")
    edges = file.edges
    if len(edges) % 2 or not all(one < other for one, other in itertools.pairwise(edges)):
        raise RecordingError(f"the recording is damaged: the ranges of {file.shown_path!r} do not ascend")
    if edges and edges[-1] > file.size + _PAGE_SLACK:
        raise RecordingError(
            f"the recording is damaged: the ranges of {file.shown_path!r} end at byte {edges[-1]} of {file.size}"
        )


def _check_area(area: RecordedArea) -> None:
    offsets, lengths = area.runs[::2], area.runs[1::2]
    if len(area.runs) % 2 or any(
        offset + length > area.length + _PAGE_SLACK for offset, length in zip(offsets, lengths, strict=True)
    ):
        raise RecordingError(f"the recording is damaged: parts of {area.device!r} lie outside its {area.length} bytes")


def plain(text: str) -> str:
    """Return a text without surrogates, which MessagePack cannot have."""
    return os.fsencode(text).decode(errors="backslashreplace")


def clip(ranges: RangeSet, size: int) -> list[int]:
    """Return the edges of the ranges inside a file of ``size`` bytes, its last page whole."""
    return ranges.clipped(0, PageRange.outward(0, size).stop).edges.tolist()
