"""The path of a server's socket: made for its owner alone, never half made, and never taken from a server that lives."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from typing import NamedTuple

_LOCK_S = 5.0
_BACKLOG = 128
_MAX_NAME = 80  # with /proc/self/fd/N before it, it must fit into the 107 bytes of sockaddr_un


class Place(NamedTuple):
    """A socket in a directory, as it was made."""

    path: str
    device: int
    inode: int


def listen_at(path: str | os.PathLike[str], kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[socket.socket, Place]:
    """A listening Unix socket at ``path``, mode 0600, of stream or of packets.

    It is bound in a directory that only we may enter, and linked to its name when it is ready: there is no moment at which
    another user could connect, whatever the umask, and none at which a client finds a socket that nobody listens on.

    Raises:
        FileExistsError: a server is alive there, or it is something else than a socket.
        OSError: no directory, no permission.
    """
    where = os.path.abspath(os.fsdecode(path))
    directory, name = os.path.split(where)
    with _locked(directory) as fd:
        _check_free(where, fd, name)
        private = f".prefault-socket-{os.getpid()}-{time.monotonic_ns()}"
        os.mkdir(private, 0o700, dir_fd=fd)
        listener = socket.socket(socket.AF_UNIX, kind)
        try:
            # Through the directory's descriptor: a path in sockaddr_un has at most 107 bytes.
            inner = os.open(private, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
            try:
                listener.bind(f"/proc/self/fd/{inner}/s")
                os.chmod(f"/proc/self/fd/{inner}/s", 0o600)
                listener.listen(_BACKLOG)
                listener.setblocking(False)
                os.rename("s", name, src_dir_fd=inner, dst_dir_fd=fd)  # over a stale one, if there is one
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink("s", dir_fd=inner)
                raise
            finally:
                os.close(inner)
            made = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except BaseException:
            listener.close()
            raise
        finally:
            os.rmdir(private, dir_fd=fd)
        return listener, Place(where, made.st_dev, made.st_ino)


def leave(place: Place) -> None:
    """Remove the socket, if it is still the one that was made."""
    directory, name = os.path.split(place.path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), _locked(directory) as fd:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if (found.st_dev, found.st_ino) == (place.device, place.inode):
            os.unlink(name, dir_fd=fd)


def connect_to(connection: socket.socket, path: str | os.PathLike[str], timeout: float) -> None:
    """connect(2), to a path of any length; at a server that is behind with accepting it waits so many seconds."""
    directory, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    give_up = time.monotonic() + timeout
    connection.setblocking(False)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                return connection.connect(f"/proc/self/fd/{fd}/{name}")
            except BlockingIOError:  # the backlog is full: Unix sockets do not connect in the background
                if time.monotonic() > give_up:
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
            time.sleep(0.01)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[int]:
    """A descriptor of the directory, locked: of two servers that find the same stale socket only one replaces it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        give_up = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise TimeoutError(errno.ETIMEDOUT, f"another process holds a lock (flock) on {directory}") from None
                time.sleep(0.01)
        yield fd
    finally:
        os.close(fd)


def _check_free(path: str, directory: int, name: str) -> None:
    if not name or len(os.fsencode(name)) > _MAX_NAME:
        raise ValueError(f"the name of a socket has 1 to {_MAX_NAME} bytes, not {name!r}")
    try:
        mode = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise FileExistsError(errno.EEXIST, f"{path} exists and is not a socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_LOCK_S)
        try:
            probe.connect(f"/proc/self/fd/{directory}/{name}")
        except ConnectionRefusedError:
            return  # a dead server left it
        except (TimeoutError, BlockingIOError):  # alive, and busy
            pass
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # alive, and of the other kind; a dead one is refused first
                raise
    raise FileExistsError(errno.EADDRINUSE, f"a server is alive at {path}: connect to it, or choose another path")
