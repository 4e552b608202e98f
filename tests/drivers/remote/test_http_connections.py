"""Connections to HTTP servers, which the sources of a process share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

from drivers.remote.conftest import QUICK
from prefault.drivers.remote.http_source import HttpSource
from support.http_server import HttpServer

Served = tuple[Path, bytes]


def _sockets(port: int) -> set[str]:
    """Return the inodes of this process's sockets that are connected to a port of this machine."""
    ours = set()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            ours.add(os.readlink(f"/proc/self/fd/{fd}"))
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return {row[9] for row in rows if int(row[2].partition(":")[2], 16) == port and f"socket:[{row[9]}]" in ours}


def test_sources_of_one_server_share_connections(server: HttpServer, content: Callable[[int], bytes]) -> None:
    sources = []
    for number in range(20):
        (server.directory / f"f{number}").write_bytes(content(1000 + number))
        sources.append(HttpSource(server.url(f"f{number}"), {}, QUICK))
    assert [source.read(0, source.length) for source in sources] == [content(1000 + number) for number in range(20)]
    assert len(_sockets(server.port)) == 1
    for source in sources[1:]:
        source.close()
    sources[1].close()  # again
    assert sources[0].read(3, 5) == content(1000)[3:8]
    assert len(_sockets(server.port)) == 1
    sources[0].close()
    assert _sockets(server.port) == set()


def test_a_forked_child_makes_connections_of_its_own(server: HttpServer, file: Served) -> None:
    with contextlib.closing(HttpSource(server.url("file.bin"), {}, QUICK)) as source:
        before = _sockets(server.port)
        pid = os.fork()
        if not pid:
            status = 1
            with (
                contextlib.suppress(BaseException),
                contextlib.closing(HttpSource(server.url("file.bin"), {}, QUICK)) as own,
            ):
                status = 0 if own.read(0, 9) == file[1][:9] and len(_sockets(server.port)) == 2 else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert source.read(0, 9) == file[1][:9]
        assert _sockets(server.port) == before
