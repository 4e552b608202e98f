"""The warden detects a server that neither works nor ends, and clients do not wait for it for ever."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import pytest

import prefault.device
from prefault.device.device_pool import Access
from prefault.device.driver import DeviceArea, Recipe, Supplied
from prefault.device.process import startup
from prefault.device.warden import supervisor
from prefault.errors import DriverError
from support import processes
from support.children import Child
from support.device_server import ends_by
from support.devices import Pattern, content
from support.raw_clients import page_of
from support.wardens import roles

pytestmark = pytest.mark.usefixtures("no_leaks")


class Harmful(Pattern):
    """Device whose page 3 harms the server. Its log is on stderr."""

    def __init__(self, harm: Callable[[], None], *, workers: int, restartable: bool = False) -> None:
        super().__init__(16, workers=workers, restartable=restartable, timeout_s=1.0)
        self._harm = harm

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        if page == 3:
            self._harm()
        return super().fault(area, page, access)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        for page in pages:
            self.fault(area, page, access)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise SystemExit("there is no text")


def _raise() -> None:
    raise Unspeakable


def _close_descriptors() -> None:
    os.closerange(3, 256)


def _replace_eventfds() -> None:
    """Act as a driver that closes a number twice, and opens something in between: no call fails, and no wake-up arrives."""
    null = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # of the directory that was listed
            continue
        if target == "anon_inode:[eventfd]":
            os.dup2(null, int(name))


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _stop_soon() -> None:
    """Stop the process while no call of the driver runs."""
    threading.Timer(0.1, _stop).start()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", [_close_descriptors, _replace_eventfds, _stop, _stop_soon])
def test_a_client_that_waits_for_a_harmed_server_gets_an_answer(harm: Callable[[], None], workers: int) -> None:
    """A page, or SIGBUS."""

    def client(say: Callable[[str], None]) -> None:
        with prefault.device.map(Harmful(harm, workers=workers)) as area:
            say(f"{page_of(area, 1) == content(1)} ")
            server = roles()["server"]
            page_of(area, 3)
            processes.eventually(lambda: processes.name(server) != "prefault-server", 1.0)
            page_of(area, 5)
            page_of(area, 7)

    said, status = ends_by(client)
    assert said == "True "
    assert status in (0, -signal.SIGBUS)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_that_exits_when_it_is_shown_costs_one_page(workers: int) -> None:
    def client(say: Callable[[str], None]) -> None:
        with prefault.device.map(Harmful(_raise, workers=workers)) as area:
            server = roles()["server"]
            with pytest.raises(DriverError, match="Unspeakable: a Unspeakable that cannot be shown"):
                area.populate("read")
            say(f"{page_of(area, 5) == content(5)} {roles()['server'] == server} ")
            page_of(area, 3)

    said, status = ends_by(client)
    assert said == "True True "
    assert status == -signal.SIGBUS


def _without_a_device() -> str:
    supervisor._START_S = 0.5
    device = Pattern(4, timeout_s=0.5)
    registry = startup.create_registry(device)
    registry.recipe = Recipe("support.wardens:hanging")
    alone = supervisor.Warden(registry, None)
    alone.start_server()
    alone.run()
    return alone.failed


def test_a_device_that_is_never_made_anew_ends_its_server() -> None:
    with Child(_without_a_device) as child:
        assert "did not come back from a call" in child.result()


def test_a_stopped_server_is_replaced() -> None:
    with prefault.device.map(Pattern(16, restartable=True, timeout_s=1.0)) as area:
        server = roles()["server"]
        os.kill(server, signal.SIGSTOP)
        assert page_of(area, 1) == content(1)
        assert roles()["server"] != server
