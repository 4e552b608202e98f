"""A real HTTP server, in a process of its own, and files on it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from prefault.drivers import Patience
from support.http_server import HttpServer

QUICK = Patience(retries=3, timeout_s=0.5, total_s=5.0, first_pause_s=0.01, longest_pause_s=0.05)


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with HttpServer(tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.fixture
def server(running_server: HttpServer) -> Iterator[HttpServer]:
    """Return the server, without failures and latency, and with an empty log."""
    running_server.heal()
    running_server.set_latency(0)
    running_server.requests(clear=True)
    yield running_server
    for path in running_server.directory.iterdir():
        path.unlink()


@pytest.fixture
def content() -> Callable[[int], bytes]:
    """Return a function from a length to that many random bytes."""
    return lambda length: random.Random(length).randbytes(length)


@pytest.fixture
def file(server: HttpServer, content: Callable[[int], bytes]) -> tuple[Path, bytes]:
    """Return path and content of a file on the server: a little more than 3 MiB, which is not a whole number of pages."""
    expected = content((3 << 20) + 1234)
    path = server.directory / "file.bin"
    path.write_bytes(expected)
    return path, expected
