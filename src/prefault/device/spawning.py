"""Start a fresh Python process that becomes a warden, with a socket and ``sys.path`` of this process and nothing else."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import sysconfig

from prefault.device import limit_messages
from prefault.errors import DeviceError

# The whole sys.path is passed, not only the directory of prefault: the device is imported as it would be here.
_PROGRAM = (
    "import sys; fd, sys.path[:] = int(sys.argv[1]), sys.argv[2:];"
    " from prefault.device.process.startup import main; main(fd)"
)


def spawn(socket_fd: int) -> int:
    """Start the process with ``socket_fd`` and the standard streams open; return its pid, which the caller must reap.

    Raises:
        DeviceError: there is no Python interpreter, or it cannot be executed.
        OSError: a limit is reached (of processes, of descriptors).
    """
    python = interpreter()
    with open(os.devnull, "r+b", buffering=0) as nothing:
        # A driver's print goes to stderr: stdout is the user's, often a pipe that its reader drains to the end of file.
        # In a process that was started without stderr, another file may have descriptor 2.
        errors = nothing.fileno() if sys.__stderr__ is None else 2
        try:
            process = subprocess.Popen(
                [python, "-c", _PROGRAM, str(socket_fd), *search_path()],
                stdin=nothing, stdout=errors, stderr=errors, pass_fds=[socket_fd], start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            if limit_messages.reason(error.errno) is not None:
                raise  # for the caller to explain
            raise DeviceError(
                error.errno or errno.EIO, f"no process can be started for the device: {error.strerror}"
            ) from error
    # From here on only the pid counts: a Popen that is collected warns that its process still runs.
    process.returncode = 0
    return process.pid


def search_path() -> list[str]:
    """Return ``sys.path``, including the directory that prefault was imported from."""
    path = [entry for entry in sys.path if isinstance(entry, str)]
    home = os.path.abspath(__file__)
    for _ in __name__.split("."):
        home = os.path.dirname(home)
    return path if home in map(os.path.abspath, path) else [home, *path]


def interpreter() -> str:
    """Find the Python interpreter of this process, also in a program that embeds Python.

    Such programs leave ``sys.executable`` empty or set it to themselves.

    Raises:
        DeviceError: no interpreter was found.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    beside = [os.path.join(place, version) for place in (sysconfig.get_path("scripts"), sysconfig.get_config_var("BINDIR"))]
    named = [sys.executable] if sys.executable and os.path.basename(sys.executable).startswith("py") else []
    for candidate in (*named, *beside, sys.executable):
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise DeviceError(
        errno.ENOENT,
        f"no Python interpreter was found to start the device's process with (sys.executable is {sys.executable!r},"
        f" there is no {beside[0]}): set sys.executable, or return None from the device's recipe(), for a server by fork",
    )
