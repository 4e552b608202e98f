"""The path of a server's socket: only its owner may open it, no client finds it half made, no live server loses it."""

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
_SHOWN = 300
"""The most characters of a path in a message."""
_MAX_NAME = 80  # with /proc/self/fd/N before it, it must fit into the 107 bytes of sockaddr_un


class Place(NamedTuple):
    """A socket in a directory; device and inode tell it from a later one of that name."""

    path: str
    device: int
    inode: int


def listen_at(path: str | os.PathLike[str], kind: socket.SocketKind = socket.SOCK_STREAM) -> tuple[socket.socket, Place]:
    """Make a listening Unix socket at ``path``, mode 0600, of stream or of packets.

    The socket is bound in a directory that only this user may enter, and renamed to its path when it listens: at no moment
    can another user connect, whatever the umask, or a client find a socket without a listener.

    Raises:
        FileExistsError: a server is alive there, or the path is no socket.
        ValueError: its name is too long.
        OSError: no directory, no permission. Every message is a sentence with a remedy.
    """
    where = os.path.abspath(os.fsdecode(path))
    with _explained(where):
        return _listen_at(where, kind)


def _listen_at(where: str, kind: socket.SocketKind) -> tuple[socket.socket, Place]:
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
    """Remove the socket from its path, unless another has taken its place."""
    directory, name = os.path.split(place.path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), _locked(directory) as fd:
        found = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if (found.st_dev, found.st_ino) == (place.device, place.inode):
            os.unlink(name, dir_fd=fd)


def connect_to(connection: socket.socket, path: str | os.PathLike[str], timeout: float) -> None:
    """Call connect(2) with a path of any length; wait ``timeout`` seconds for a server that is behind with accepting."""
    directory, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    deadline = time.monotonic() + timeout
    connection.setblocking(False)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        while True:
            try:
                return connection.connect(f"/proc/self/fd/{fd}/{name}")
            except BlockingIOError:  # the backlog is full: Unix sockets do not connect in the background
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
            time.sleep(0.01)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[int]:
    """Lock the directory and yield its descriptor: of two servers that find a stale socket only one replaces it."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, f"another process holds a lock (flock) on {directory}") from None
                time.sleep(0.01)
        yield fd
    finally:
        os.close(fd)


def _check_free(path: str, directory: int, name: str) -> None:
    count = len(os.fsencode(name))
    if count > _MAX_NAME:
        raise ValueError(
            f"the name of a socket has at most {_MAX_NAME} bytes, and that of {_shortened(path)} has {count}: choose a"
            " shorter one"
        )
    try:
        found = os.stat(name or ".", dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        inside = os.path.join(path, "device.sock")
        raise FileExistsError(errno.EEXIST, f"{path} is a directory: give the path of a socket to make, such as {inside}")
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, f"{path} exists and is not a socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_LOCK_S)
        try:
            probe.connect(f"/proc/self/fd/{directory}/{name}")
        except ConnectionRefusedError:
            return  # a dead server left it
        except (TimeoutError, BlockingIOError):  # alive, and busy
            pass
        except PermissionError:
            raise PermissionError(
                errno.EACCES,
                f"{path} is a socket of user {found.st_uid}, and user {os.geteuid()} may not see whether a server is alive"
                " there: choose another path",
            ) from None
        except OSError as error:
            if error.errno != errno.EPROTOTYPE:  # alive, and of the other kind; a dead one is refused first
                raise
    raise FileExistsError(errno.EADDRINUSE, f"a server is alive at {path}: connect to it, or choose another path")


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Raise errors that carry only the system's text as a sentence about the socket; pass other errors on."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.strerror != os.strerror(error.errno):
            raise
        reason = _reason(error.errno, os.path.dirname(path))
        raise OSError(error.errno, f"no socket can be made at {_shortened(path)}: {reason}") from error


def _reason(number: int, directory: str) -> str:
    """Return why no socket can be made in a directory, and what to do."""
    shown = _shortened(directory)
    match number:
        case errno.ENOENT if not os.path.isdir(directory):
            return f"there is no directory {shown}: make it, or choose another path"
        case errno.ENOTDIR:
            return f"{shown} is not a directory, or a parent of it is none: choose another path"
        case errno.EACCES | errno.EPERM:
            return (
                f"user {os.geteuid()} may not do so in {shown}{_owner(directory)}: choose a directory that this user may"
                " write to"
            )
        case errno.EROFS:
            return f"{shown} is on a read-only file system: choose a path on another"
        case errno.ELOOP:
            return f"{shown} is a symbolic link that leads to itself: choose another path"
        case errno.ENAMETOOLONG:
            return "the path, or a part of it, is too long for the file system: choose a shorter one"
        case errno.ENOSPC | errno.EDQUOT:
            return f"no space is left for a file in {shown}: make room, or choose a path on another file system"
        case errno.EMFILE | errno.ENFILE:
            return "too many files are open: raise the limit (ulimit -n), or close some"
        case _:
            return f"{shown} does not take one ({os.strerror(number)}): choose a path in another directory"


def _owner(directory: str) -> str:
    try:
        found = os.stat(directory)
    except OSError:  # no permission to search its parent
        return ""
    return f", which belongs to user {found.st_uid} and has mode {stat.S_IMODE(found.st_mode):o}"


def _shortened(path: str) -> str:
    return path if len(path) <= _SHOWN else f"{path[: _SHOWN // 2]}...{path[-_SHOWN // 2 :]}"
