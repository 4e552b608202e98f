"""The client's half of a connection: connect to a server, or say why not; and check whose server it is."""

from __future__ import annotations

import errno
import os
import socket

from prefault._kernel.peer import Ucred, peer_credentials
from prefault.ipc import socket_path
from prefault.ipc.transport import is_trusted


def connect_to_server(connection: socket.socket, path: str | os.PathLike[str], timeout: float, served: str) -> None:
    """Connect a socket to the server at ``path``, within ``timeout`` seconds.

    Args:
        connection: a new socket of the server's kind.
        path: path of the server's socket.
        timeout: seconds that a server has which is behind with accepting.
        served: the word for what it serves, such as ``"pool"``.

    Raises:
        OSError: no such server; TimeoutError: it does not accept in time. The message is a sentence.
    """
    where = os.fspath(path)
    try:
        socket_path.connect_to(connection, where, timeout)
    except TimeoutError:
        raise TimeoutError(errno.ETIMEDOUT, f"no {served}'s server answers at {where} within {timeout} s") from None
    except OSError as error:
        hint = {
            errno.ENOENT: "there is no such socket",
            errno.ECONNREFUSED: "no server is alive there",
            errno.EPROTOTYPE: f"the socket there is not that of a {served}",
            errno.EACCES: "it belongs to another user",
        }.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, f"no {served} at {where}: {hint}") from error


def check_server(connection: socket.socket, path: str | os.PathLike[str]) -> Ucred:
    """Return the credentials of the server at the other end.

    Raises:
        PermissionError: it runs as another user than this process, and not as root.
    """
    server = peer_credentials(connection)
    if not is_trusted(server.uid):
        raise PermissionError(
            errno.EPERM,
            f"the server at {os.fspath(path)} runs as user {server.uid}: memory is taken only from one's own, or root",
        )
    return server
