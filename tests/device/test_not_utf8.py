"""Text that is not UTF-8, as names of files may be: it ends no process, and what it names is found."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device import protocol
from prefault.device.device_pool import Access
from prefault.device.driver import DeviceArea, Recipe, Supplied
from prefault.errors import DeviceError, DriverError
from prefault.pool.service import pool_protocol as pool_protocol
from prefault.sizes import PAGE_SIZE
from support import processes
from support.devices import Pattern, content
from support.raw_clients import page_of
from support.wardens import Gated, roles

pytestmark = pytest.mark.usefixtures("no_leaks")

NAME = os.fsdecode(b"caf\xe9")
SHOWN = r"caf\\udce9"
"""In a regular expression."""


class NoTile(Pattern):
    """It has no file for page 3, and none to open for a client that maps only a part."""

    def open(self, area: DeviceArea) -> None:
        if area.offset:
            raise ValueError(f"no tile in {NAME}.dat")

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 3:
            raise ValueError(f"no tile in {NAME}.dat")
        return super().fault(area, page, access)

    def discard(self, area: DeviceArea, pages: range) -> None:
        raise ValueError(f"no tile in {NAME}.dat")

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            self.fault(area, page, access)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("restartable", [False, True])
def test_an_exception_that_quotes_such_a_name_costs_one_page(workers: int, restartable: bool) -> None:
    with prefault.device.map(NoTile(8, workers=workers, restartable=restartable)) as area:
        server = roles()["server"]
        with pytest.raises(DriverError, match=rf"no tile in {SHOWN}\.dat"):
            prefault.populate(area)
        with pytest.raises(OSError, match=rf"no tile in {SHOWN}\.dat"):
            prefault.discard(area)
        assert page_of(area, 4) == content(4)
        assert roles()["server"] == server


def test_a_refusal_that_quotes_such_a_name_says_so() -> None:
    with pytest.raises(DeviceError, match=rf"no tile in {SHOWN}\.dat"):
        prefault.device.map(NoTile(8), PAGE_SIZE, offset=PAGE_SIZE)


def no_device() -> Pattern:
    raise DeviceError(5, f"no tiles in {NAME}")


def test_a_device_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=rf"no tiles in {SHOWN}"):
        prefault.device.serve(Recipe(f"{__name__}:no_device"), tmp_path / "s")


def test_a_recipe_may_name_such_a_file(tmp_path: Path) -> None:
    directory = tmp_path / NAME
    directory.mkdir()
    (directory / NAME).touch()
    with prefault.device.map(Gated(str(directory / NAME), by_recipe=True)) as area:
        assert page_of(area, 4) == content(4)
    assert (directory / "asked").exists()


def test_a_socket_may_have_such_a_name_also_for_the_next_warden(tmp_path: Path) -> None:
    directory = tmp_path / NAME
    directory.mkdir()
    path = directory / NAME
    with prefault.device.serve(Recipe("support.devices:Remade", {}), path) as server:
        serving = roles()["server"]
        os.kill(server.pid, signal.SIGKILL)
        assert processes.eventually(lambda: "prefault-warden" in map(processes.name, processes.children(serving)))
        with prefault.device.connect(path).map() as area:
            assert page_of(area, 4) == content(4)
    assert os.listdir(directory) == []


@pytest.mark.parametrize(
    "message",
    [
        protocol.Failed(1, "driver", 5, NAME, 3, ((1, 2),), NAME, 0, 0),
        protocol.Welcome(1, NAME, 1, 1, True, True, False, False, False, (NAME, "a note")),
        protocol.Gone(0, NAME + "\ud800"),
    ],
)
def test_such_text_is_escaped_in_messages(message: Any) -> None:
    arrived = protocol.decode_reply(protocol.encode(message))
    assert repr(arrived).replace("\\\\", "\\") == repr(message)


def test_such_text_is_escaped_in_messages_of_a_pool() -> None:
    frame = pool_protocol.encode(pool_protocol.PoolRefused(1, "value", 22, f"{NAME} is no name"))
    reply = pool_protocol.decode_reply(frame[4:])
    assert isinstance(reply, pool_protocol.PoolRefused)
    assert reply.message == r"caf\udce9 is no name"
