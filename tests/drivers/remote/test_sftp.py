"""Files of an SSH server, by fsspec and paramiko: one connection, which threads cannot share, and which may be lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import prefault
from drivers.remote.conftest import QUICK
from prefault.drivers import Patience, RemoteFile, SourceError, SourceMissingError, area_of, open_remote
from prefault.errors import DriverError
from prefault.sizes import MIB
from support.sftp_server import SftpServer

Content = Callable[[int], bytes]
# paramiko leaves the socket of a connection that could not be made to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
PATIENT = Patience(retries=3, first_pause_s=0.01, longest_pause_s=0.05)


@pytest.fixture
def sftp(tmp_path: Path) -> Iterator[SftpServer]:
    with SftpServer(tmp_path) as server:
        yield server


def test_many_threads_read_by_one_connection(sftp: SftpServer, content: Content) -> None:
    expected = content(20 * MIB + 77)
    (sftp.directory / "f").write_bytes(expected)
    array = open_remote("sftp://127.0.0.1/f", storage_options=sftp.options(), patience=PATIENT, batch=MIB)
    assert array[5] == expected[5]
    prefault.populate(array)
    assert array.tobytes() == expected


def test_a_file_that_changes_or_goes(sftp: SftpServer, content: Content) -> None:
    path = sftp.directory / "f"
    expected = content(MIB)
    path.write_bytes(expected)
    array = open_remote("sftp://127.0.0.1/f", storage_options=sftp.options(), patience=PATIENT, fault_around=(4096, 4096))
    assert array[0] == expected[0]
    path.write_bytes(expected[::-1])
    os.utime(path, (1, 1))
    with pytest.raises(DriverError, match=r"changed while it was mapped: it was of mtime=.* open it again"):
        prefault.populate(array)
    path.unlink()
    with pytest.raises(DriverError, match="there is no such file, or no longer"):
        area_of(array).read(MIB // 2, 1)
    with pytest.raises(SourceMissingError):
        RemoteFile("sftp://127.0.0.1/f", storage_options=sftp.options(), patience=PATIENT)


def test_a_connection_that_was_lost_is_made_anew(sftp: SftpServer, content: Content) -> None:
    expected = content(MIB)
    (sftp.directory / "f").write_bytes(expected)
    array = open_remote("sftp://127.0.0.1/f", storage_options=sftp.options(), patience=PATIENT, fault_around=(4096, 4096))
    sftp.stop()
    with pytest.raises(DriverError, match="given up after 4 tries"):
        prefault.populate(array)
    sftp.start()
    prefault.populate(array)
    assert array.tobytes() == expected
    # And in this process, whose own connection fsspec keeps.
    assert RemoteFile("sftp://127.0.0.1/f", storage_options=sftp.options(), patience=PATIENT).length == MIB


def test_a_wrong_password_fails_at_once(sftp: SftpServer) -> None:
    with pytest.raises(SourceError, match=r"Authentication failed.*given by storage_options") as caught:
        RemoteFile("sftp://127.0.0.1/f", storage_options=sftp.options(password="guess"), patience=QUICK)
    assert "guess" not in str(caught.value)
    assert "tries" not in str(caught.value)


def test_a_server_that_does_not_listen(sftp: SftpServer) -> None:
    sftp.stop()
    with pytest.raises(SourceError, match="given up after 4 tries: NoValidConnectionsError"):
        RemoteFile("sftp://127.0.0.1/f", storage_options=sftp.options(), patience=QUICK)
