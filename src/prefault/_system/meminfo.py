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
    _, found, rest = (b"\n" + text).partition(b"\n%b:" % name.encode())
    if not found:
        raise KeyError(name)
    number, _, unit = rest.partition(b"\n")[0].strip().partition(b" ")
    return int(number) * (KIB if unit == b"kB" else 1)
