"""Selection of files: paths, trees and lists of paths become regular files, each once, with what could not be selected.

A directory is read while its files are used, so memory does not grow with the number of files, except by 100 bytes or so for
each file that could be reached a second time.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, NamedTuple, TypeAlias

from prefault.files.failures import FileFailure
from prefault.files.file_systems import KernelMade, made_by_kernel
from prefault.memory.file_verbs import FileNames
from prefault.sizes import Size, format_size, parse_size

Path: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_MOST_PATH_BYTES = 1 << 16
"""Bytes of one entry of a list. PATH_MAX is 4096; a list without separators shall not be read into memory whole."""


class SelectedFile(NamedTuple):
    """A regular file, or a block device that was named.

    Attributes:
        path: its path; bytes that are not UTF-8 are surrogate escapes, as os.fsdecode(3) makes them.
        stat: the answer of stat(2) when it was selected. The file may have changed since.
    """

    path: str
    stat: os.stat_result

    @property
    def size(self) -> int:
        """Bytes of the file; 0 for a block device."""
        return self.stat.st_size


class SkippedFile(NamedTuple):
    """A path that was left out on purpose, which is no failure: a socket in a tree, a link, a file that is too large.

    Attributes:
        path: the path.
        reason: the cause, in a few words.
        remedy: the option that would include it; empty where none would.
    """

    path: str
    reason: str
    remedy: str = ""

    def __str__(self) -> str:
        text = f"{self.path}: {self.reason}"
        return f"{text}: {self.remedy}" if self.remedy else text


class Selection(FileNames, Iterable["SelectedFile | FileFailure"]):
    """Files that are selected while they are iterated over, once.

    Attributes:
        directories: directories that were read so far.
        skipped: paths that were left out on purpose so far; ``on_skip`` of :func:`select` was called with each.
    """

    directories = 0
    skipped = 0

    of_directory: Callable[[Iterable[os.DirEntry[str]], int], Iterator[Any]] | None = None
    """Function of a verb that is given the entries of a directory, and its device. It yields what the verb found out about
    an entry, which this yields as well, or the entry itself, which this looks at. Called only where no rule leaves files out
    and only hard links can be found twice: an entry with several links is to be yielded itself."""

    def __init__(self, walk: Callable[[Selection], Iterator[SelectedFile | FileFailure]]) -> None:
        self._found = walk(self)

    def __iter__(self) -> Iterator[SelectedFile | FileFailure]:
        return self._found


class _Directory(NamedTuple):
    """A directory to be read: its device, that of the path that was given, and the directories that lead to it."""

    path: str
    device: int
    top_device: int
    chain: _Chain | None


class _Chain(NamedTuple):
    identity: int
    parent: _Chain | None


def select(
    paths: Path | Iterable[Path], *, follow_links: bool = False, same_file_system: bool = False,
    include: Iterable[str] = (), exclude: Iterable[str] = (),
    min_size: Size = 0, max_size: Size | None = None, each_link: bool = False,
    on_skip: Callable[[SkippedFile], object] | None = None,
) -> Selection:  # fmt: skip
    """Yield the files that ``paths`` stand for, and a :class:`FileFailure` for each path that cannot be looked at.

    Directories are walked in the order in which the file system lists them, their files before their subdirectories. No file
    is opened. File systems whose files the kernel makes at each read (proc, sysfs, tracefs) are left out inside of
    directories, and are failures where they are named.

    Args:
        paths: a path, or any iterable of paths, which is read as the files are used. Symbolic links among them are followed.
        follow_links: follow symbolic links inside of directories as well. Loops end.
        same_file_system: do not enter directories of another device than that of the path that they were reached from.
        include: shell patterns; only files that match one are selected. A pattern with a slash is compared with the whole
            path, another with the name.
        exclude: shell patterns; files and directories that match one are left out, the latter with all that is in them.
        min_size: bytes; smaller files are left out.
        max_size: bytes; larger files are left out, each with a reason.
        each_link: select a file as often as it is found. Otherwise once, by device and inode, whatever its names.
        on_skip: called with each path that is left out on purpose, except by patterns and ``min_size``.

    Raises:
        ValueError, TypeError: a size that is none.

    Sources: readdir(3), stat(2), fnmatch(3); patterns know no backslash, and negate by ``[!a]``.
    """
    single = isinstance(paths, str | bytes | os.PathLike)
    one = single or (isinstance(paths, list | tuple) and len(paths) == 1)
    if not single and not isinstance(paths, Iterable):
        raise TypeError(f"paths are a str, bytes or os.PathLike, or an iterable of them, not {type(paths).__name__}")
    smallest, largest = parse_size(min_size), None if max_size is None else parse_size(max_size)
    walk = _Walk(
        follow_links, same_file_system, _matcher(include), _matcher(exclude), smallest, largest,
        None if each_link else set(), one and not follow_links, on_skip,
    )  # fmt: skip
    return Selection(lambda selection: walk.files([paths] if single else paths, selection))  # type: ignore[list-item, arg-type]


def as_selection(paths: Path | Iterable[Path] | Selection) -> Selection:
    """Return a selection as it is, and select paths by the defaults of :func:`select`."""
    return paths if isinstance(paths, Selection) else select(paths)


def read_list(file: IO[bytes], *, nul: bool = False) -> Iterator[str]:
    """Yield the paths of a list, as ``find`` prints them: one a line, or each ended by a NUL byte. Empty ones are left out.

    Raises:
        ValueError: an entry of more than 64 KiB: the list has another separator.
    """
    separator, rest = b"\0" if nul else b"\n", b""
    while block := file.read1(_MOST_PATH_BYTES) if hasattr(file, "read1") else file.read(_MOST_PATH_BYTES):
        *whole, rest = (rest + block).split(separator)
        yield from (os.fsdecode(entry) for entry in whole if entry)
        if len(rest) > _MOST_PATH_BYTES:
            other = "--nul ends them by NUL" if not nul else "without --nul they end with the line"
            raise ValueError(f"the list has an entry of more than {_MOST_PATH_BYTES} bytes, which is no path: {other}")
    if rest:
        yield os.fsdecode(rest)


def _matcher(patterns: Iterable[str]) -> Callable[[str], bool] | None:
    """Return a function that tells whether a path matches one of the patterns; None without any."""
    if isinstance(patterns, str):
        patterns = (patterns,)
    names: list[str] = []
    whole: list[str] = []
    for pattern in patterns:
        (whole if "/" in pattern else names).append(fnmatch.translate(pattern))
    if not names and not whole:
        return None
    of_name = re.compile("|".join(names)).match if names else None
    of_path = re.compile("|".join(whole)).match if whole else None

    def matches(path: str) -> bool:
        if of_name is not None and of_name(path[path.rfind("/") + 1 :]):
            return True
        return of_path is not None and of_path(path) is not None

    return matches


class _Walk:
    """One selection: its rules, and the files that it has yielded."""

    def __init__(
        self, follow_links: bool, same_file_system: bool,
        include: Callable[[str], bool] | None, exclude: Callable[[str], bool] | None,
        min_size: int, max_size: int | None, seen: set[int] | None, each_name_once: bool,
        on_skip: Callable[[SkippedFile], object] | None,
    ) -> None:  # fmt: skip
        self._follow_links = follow_links
        self._same_file_system = same_file_system
        self._include = include
        self._exclude = exclude
        self._min_size = min_size
        self._max_size = max_size
        self._seen = seen
        self._each_name_once = each_name_once
        """Whether a walk finds each name only once, so that files of one link need not be remembered."""
        self._takes_all = each_name_once and include is None and exclude is None and not min_size and max_size is None
        self._on_skip = on_skip
        self._kernel_made = KernelMade()
        self._selection: Selection

    def files(self, paths: Iterable[Path], selection: Selection) -> Iterator[SelectedFile | FileFailure]:
        self._selection = selection
        for given in paths:
            path = os.fsdecode(given)
            path = path.rstrip("/") or path[:1]  # "dir/" and "dir" are one; "/" stays
            if self._exclude is not None and self._exclude(path):
                continue
            try:
                found = os.stat(path)
            except OSError as error:
                yield FileFailure.of(path, error)
                continue
            except ValueError as error:  # a NUL in it
                yield FileFailure(path, str(error), errno=errno.EINVAL)
                continue
            if kernel_made := self._kernel_made.name(found.st_dev, path):
                yield FileFailure(path, made_by_kernel(kernel_made), "leave it out")
            elif stat.S_ISDIR(found.st_mode):
                yield from self._tree(path, found)
            elif stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode):
                if self._is_wanted(path, found):
                    yield SelectedFile(path, found)
            else:
                yield FileFailure(path, f"is {_kind(found.st_mode)}, which has no page cache", "name a file or a directory")

    def _tree(self, top: str, found: os.stat_result) -> Iterator[SelectedFile | FileFailure]:
        # A stack, not recursion: one directory is open at a time, and no depth is too deep.
        pending = [_Directory(top, found.st_dev, found.st_dev, _Chain(_identity(found), None))]
        of_directory = self._selection.of_directory if self._takes_all else None
        while pending:
            directory = pending.pop()
            device = directory.device
            below: list[_Directory] = []
            try:
                with os.scandir(directory.path) as entries:
                    self._selection.directories += 1
                    for entry in entries if of_directory is None else of_directory(entries, device):
                        if type(entry) is not os.DirEntry:
                            yield entry
                            continue
                        path = entry.path
                        if self._exclude is not None and self._exclude(path):
                            continue
                        try:
                            found = entry.stat(follow_symlinks=self._follow_links)
                        except OSError as error:
                            yield FileFailure.of(path, error)
                            continue
                        if not stat.S_ISREG(found.st_mode):
                            self._other(path, found, directory, below)
                        elif found.st_dev != device and self._is_kernel_made(path, found):
                            continue
                        elif self._is_wanted(path, found):
                            yield SelectedFile(path, found)
            except OSError as error:
                yield FileFailure.of(directory.path, error)
            pending += reversed(below)

    def _other(self, path: str, found: os.stat_result, directory: _Directory, below: list[_Directory]) -> None:
        """Note a directory that is to be read, and skip all else."""
        mode = found.st_mode
        if stat.S_ISLNK(mode):
            self._skip(path, "is a symbolic link", "--follow-links follows it")
        elif not stat.S_ISDIR(mode):
            self._skip(path, f"is {_kind(mode)}, which is not opened in a tree")
        elif self._same_file_system and found.st_dev != directory.top_device:
            self._skip(path, "is on another file system")
        elif found.st_dev != directory.device and self._is_kernel_made(path, found):
            return
        elif self._is_loop(identity := _identity(found), directory.chain):
            self._skip(path, "leads back to a directory that it lies in, a loop")
        else:
            below.append(_Directory(path, found.st_dev, directory.top_device, _Chain(identity, directory.chain)))

    def _is_kernel_made(self, path: str, found: os.stat_result) -> bool:
        """Skip a path on a file system whose files the kernel makes; return whether it is on one."""
        name = self._kernel_made.name(found.st_dev, path)
        if name:
            self._skip(path, made_by_kernel(name))
        return bool(name)

    def _is_wanted(self, path: str, found: os.stat_result) -> bool:
        if self._include is not None and not self._include(path):
            return False
        if found.st_size < self._min_size:
            return False
        if self._max_size is not None and found.st_size > self._max_size:
            limit = format_size(self._max_size)
            self._skip(path, f"has {format_size(found.st_size)}, more than the limit of {limit}")
            return False
        if self._seen is not None and not (self._each_name_once and found.st_nlink == 1):
            identity = _identity(found)
            if identity in self._seen:
                return False
            self._seen.add(identity)
        return True

    def _skip(self, path: str, reason: str, remedy: str = "") -> None:
        self._selection.skipped += 1
        if self._on_skip is not None:
            self._on_skip(SkippedFile(path, reason, remedy))

    @staticmethod
    def _is_loop(identity: int, chain: _Chain | None) -> bool:
        while chain is not None:
            if chain.identity == identity:
                return True
            chain = chain.parent
        return False


def _identity(found: os.stat_result) -> int:
    """Return device and inode as one number, which takes less memory than a pair."""
    return found.st_dev << 64 | found.st_ino


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
    )
    return next((name for is_kind, name in kinds if is_kind(mode)), "neither a file nor a directory")
