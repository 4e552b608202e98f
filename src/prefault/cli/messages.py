"""Errors on stderr: each is one line, ``prefault: SENTENCE``, which names the file and the remedy."""

from __future__ import annotations

import errno
import os
import re

import click


def complain(sentence: str) -> None:
    """Print an error on stderr, on one line."""
    click.echo(f"prefault: {printable(_one_line(sentence))}", err=True)


def complain_of(error: OSError) -> None:
    """Print an OSError on stderr: the file that it names, and its message without the errno."""
    complain(sentence(error))


def printable(name: str) -> str:
    r"""Return a name for people: control characters and bytes that are no UTF-8 as ``\x1b``, all others as they are.

    A name can hold any byte but NUL. Raw, a line feed would look like another name, the terminal would obey an escape
    sequence, and a mark of direction (U+202E) would reverse what follows it.
    """
    return re.sub(_UNPRINTABLE, _escape, name)


_UNPRINTABLE = "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"


def _escape(found: re.Match[str]) -> str:
    number = ord(found[0])
    if 0xDC80 <= number <= 0xDCFF:  # how Python keeps a byte that is no UTF-8 (PEP 383)
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"


_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def sentence(error: OSError) -> str:
    """Return the error's message, without the errno where the message says more than the errno's name."""
    text = error.strerror or str(error)
    if error.filename is not None:
        if not error.filename:
            from prefault.files.failures import FileFailure

            return str(FileFailure.of("", error))
        remedy = getattr(error, "remedy", "") or _remedy(error)  # the former: of a FileError
        return f"{printable(os.fsdecode(error.filename))}: {text}" + (f": {remedy}" if remedy else "")
    if error.errno is not None and text == os.strerror(error.errno):
        # Python names no file where writing to an open one fails; commands name all files that they write but their output.
        return f"the output cannot be written: {text}" if error.errno in _OF_WRITING else str(error)
    return text


def _remedy(error: OSError) -> str:
    """Return the step that helps after the kernel has refused a path; empty where none is known."""
    directory = os.path.dirname(os.fsdecode(error.filename)) or "."
    if error.errno == errno.ENOENT and not os.path.isdir(directory):
        return f"there is no directory {printable(directory)}: make it, or name another"
    return _REMEDIES.get(error.errno or 0, "")


_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.EACCES: "run as its owner or as root, or change its permissions (chmod)",
    errno.EISDIR: "name a file in it",
    errno.ENOTDIR: "check the path",
    errno.EROFS: "name a file on another file system",
    errno.ENOSPC: "free space on the disk, or name another",
}


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
