"""Access log of a device: the pages that one run of a program used, in order, to be populated first in the next run."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

_FORMAT = "prefault access log"
_VERSION = 1


class LoggedRun(NamedTuple):
    """A range of the device that was faulted in or populated in one piece, in bytes."""

    offset: int
    length: int


class Content(NamedTuple):
    """Identity of what a device maps.

    Attributes:
        source: URL without its secrets, or path; empty where the content has no name.
        version: changes with the content; empty where that is not known.
    """

    source: str = ""
    version: str = ""


NAMELESS = Content()


@dataclass(frozen=True, slots=True)
class AccessLog:
    """Parts of a device that were faulted in or populated, in the order of the first time.

    Attributes:
        device: name of the device.
        length: length of the device, bytes. A log fits a device of that length only.
        runs: ranges of the *device*, in whole pages.
        content: what the device mapped.
    """

    device: str
    length: int
    runs: tuple[LoggedRun, ...]
    content: Content = NAMELESS

    @property
    def bytes(self) -> int:
        """Total length of all runs, bytes."""
        return sum(run.length for run in self.runs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the log to a file, as JSON."""
        text = json.dumps(
            {
                "format": _FORMAT, "version": _VERSION, "device": self.device, "length": self.length,
                "runs": [list(run) for run in self.runs],
                "source": self.content.source, "content_version": self.content.version,
            }
        )  # fmt: skip
        with open(path, "w", encoding="utf-8") as file:
            file.write(text + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AccessLog:
        """Read a log that :meth:`save` wrote.

        Raises:
            ValueError: the file is not an access log.
            OSError: the file cannot be read.
        """
        with open(path, encoding="utf-8") as file:
            text = file.read()
        try:
            content = json.loads(text)
            return cls._checked(content)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{os.fsdecode(path)} is no access log of prefault: {error}") from None

    @classmethod
    def _checked(cls, content: Any) -> AccessLog:
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"it has no format {_FORMAT!r}")
        if content["version"] != _VERSION:
            raise ValueError(f"version {content['version']} is not known (but {_VERSION})")
        length = _number(content["length"])
        runs = tuple(LoggedRun(_number(offset), _number(count)) for offset, count in content["runs"])
        for run in runs:
            if run.offset + run.length > length + (1 << 21):  # the last page may reach beyond
                raise ValueError(f"{run.length} bytes at {run.offset} are outside the device of {length} bytes")
        # Logs of older versions of this package have neither.
        identity = Content(str(content.get("source", "")), str(content.get("content_version", "")))
        return cls(str(content["device"]), length, runs, identity)


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no number of bytes")
    return value
