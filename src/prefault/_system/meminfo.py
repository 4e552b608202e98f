"""Numbers of ``/proc/meminfo``, and of other files of /proc with a name on each line."""

from __future__ import annotations

from prefault._system.kept_files import KeptFile
from prefault.sizes import KIB

_file = KeptFile("/proc/meminfo")


def read_meminfo(*names: str) -> tuple[int, ...]:
    """Read numbers of ``/proc/meminfo``, such as ``"MemTotal"``: sizes in bytes, page counts as they are.

    Raises:
        OSError: the file cannot be read.
        KeyError: it has no such number.
    """
    text = _file.read()
    return tuple(number_in(text, name) for name in names)


def number_in(text: bytes, name: str) -> int:
    """Return the number of a line such as ``MemTotal:   24684096 kB``, sizes in bytes. KeyError without such a line."""
    key = name.encode() + b":"
    at = 0 if text.startswith(key) else text.find(b"\n" + key) + 1
    if not text.startswith(key, at):
        raise KeyError(name)
    number, *unit = text[at + len(key) : text.index(b"\n", at)].split()
    return int(number) * (KIB if unit else 1)
