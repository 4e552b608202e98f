"""An SFTP server on loopback, for one user with a password: ``python -m support.sftp_server DIRECTORY PORT``."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import paramiko  # type: ignore[import-untyped, unused-ignore]

USER, PASSWORD = "reader", "secret"


class SftpServer:
    """The server, as a process: a page fault holds the GIL of who meets it. A context manager; it serves a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = 0
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """At the port of before, if there was one."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.sftp_server", self.directory, str(self.port)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def stop(self) -> None:
        """All its connections are lost."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def options(self, **changed: object) -> dict[str, object]:
        """For fsspec."""
        return {"username": USER, "password": PASSWORD, "port": self.port} | changed

    def __enter__(self) -> SftpServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class _Login(paramiko.ServerInterface):  # type: ignore[misc, unused-ignore]
    def check_auth_password(self, username: str, password: str) -> Any:
        return paramiko.AUTH_SUCCESSFUL if (username, password) == (USER, PASSWORD) else paramiko.AUTH_FAILED

    def get_allowed_auths(self, username: str) -> str:
        return "password"

    def check_channel_request(self, kind: str, chanid: int) -> Any:
        return paramiko.OPEN_SUCCEEDED


def _files(root: str) -> type[paramiko.SFTPServerInterface]:
    class Files(paramiko.SFTPServerInterface):  # type: ignore[misc, unused-ignore]
        def stat(self, path: str) -> Any:
            try:
                return paramiko.SFTPAttributes.from_stat(os.stat(root + self.canonicalize(path)))
            except OSError as error:
                return paramiko.SFTPServer.convert_errno(error.errno or 0)

        def open(self, path: str, flags: int, attr: Any) -> Any:
            try:
                file = open(root + self.canonicalize(path), "rb")  # noqa: SIM115  the handle closes it
            except OSError as error:
                return paramiko.SFTPServer.convert_errno(error.errno or 0)
            handle = paramiko.SFTPHandle(flags)
            handle.readfile = file
            return handle

    return Files


def main(root: str, port: int) -> None:
    """Serve until the process is ended."""
    key = paramiko.RSAKey.generate(2048)
    listener = socket.create_server(("127.0.0.1", port))
    print(listener.getsockname()[1], flush=True)
    connections = []
    while True:
        connection = paramiko.Transport(listener.accept()[0])
        connection.add_server_key(key)
        connection.set_subsystem_handler("sftp", paramiko.SFTPServer, _files(root))
        connection.start_server(server=_Login())
        connections.append(connection)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
