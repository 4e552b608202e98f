"""Device.start and Device.stop: once in each server, before the first area and after the last one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.device.device_pool import Access, DevicePool
from prefault.device.driver import Device, DeviceArea, Recipe, Supplied
from prefault.errors import DeviceError
from prefault.sizes import PAGE_SIZE
from support import processes
from support.lifecycle_devices import Lifecycle, calls
from support.wardens import peek, roles

pytestmark = pytest.mark.usefixtures("no_leaks")


def _left_nothing() -> bool:
    return processes.eventually(lambda: not roles())


@pytest.mark.parametrize("by_recipe", [False, True], ids=["fork", "recipe"])
@pytest.mark.parametrize("workers", [0, 2])
def test_they_are_called_once_for_a_server(tmp_path: Path, by_recipe: bool, workers: int) -> None:
    log = tmp_path / "log"
    device = Lifecycle(str(log), by_recipe=by_recipe, workers=workers)
    with prefault.device.map(device), prefault.device.map(device):
        assert calls(log) == ["start", "open", "open"]
    assert _left_nothing()
    assert calls(log) == ["start", "open", "open", "close", "close", "stop"]


def test_a_served_device_is_stopped_with_clients_that_are_left(tmp_path: Path) -> None:
    log, socket = tmp_path / "log", str(tmp_path / "socket")
    with prefault.device.serve(Lifecycle(str(log)), socket):
        assert calls(log) == ["start"]
        with prefault.device.connect(socket) as client:
            client.map().close()
        area = (other := prefault.device.connect(socket)).map()
        assert peek(area, 3) == b"\4" * 512
    assert calls(log) == ["start", "open", "close", "open", "close", "stop"]
    assert peek(area, 3) == b"\4" * 512
    area.close()
    other.close()


def test_the_server_after_a_crash_starts_before_it_opens_the_areas_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with prefault.device.map(Lifecycle(str(log))) as area:
        prefault.populate(area, length=4 * PAGE_SIZE)
        os.kill(roles()["server"], signal.SIGKILL)
        assert peek(area, 9) == bytes((10,)) * 512
        assert calls(log) == ["start", "open", "start", "open"]
    assert _left_nothing()
    assert calls(log) == ["start", "open", "start", "open", "close", "stop"]


@pytest.mark.parametrize("by_recipe", [False, True], ids=["fork", "recipe"])
def test_a_start_that_raises_refuses_the_device(tmp_path: Path, by_recipe: bool) -> None:
    log = tmp_path / "log"
    with pytest.raises(DeviceError, match=r"driver raised in start\(\): ValueError: there is no start today \(lifec"):
        prefault.device.map(Lifecycle(str(log), fails="start", by_recipe=by_recipe))
    assert _left_nothing()
    assert calls(log) == ["start"]


def test_a_start_that_raises_leaves_no_socket(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="there is no start today"):
        prefault.device.serve(Lifecycle(str(tmp_path / "log"), fails="start"), tmp_path / "socket")
    assert not (tmp_path / "socket").exists()
    assert _left_nothing()


@pytest.mark.parametrize("by_recipe", [False, True], ids=["fork", "recipe"])
def test_a_start_that_does_not_return_is_ended(tmp_path: Path, by_recipe: bool) -> None:
    device = Lifecycle(str(tmp_path / "log"), hangs="start", timeout_s=0.5, by_recipe=by_recipe)
    with pytest.raises(DeviceError, match=r"did not come back from a call within 0\.5 s"):
        prefault.device.map(device)
    assert _left_nothing()


def test_a_stop_that_raises_or_does_not_return_is_the_end_all_the_same(tmp_path: Path) -> None:
    for wrong in ({"fails": "stop"}, {"hangs": "stop"}):
        with prefault.device.map(Lifecycle(str(tmp_path / "log"), timeout_s=0.5, **wrong)) as area:  # type: ignore[arg-type]
            assert peek(area, 0) == b"\1" * 512
        assert _left_nothing()


class _RefusesToStartAgain(Lifecycle):
    def start(self, pool: DevicePool) -> None:
        super().start(pool)
        if pool.ready(pool.pages):
            raise ValueError(f"{pool.ready(pool.pages)} were supplied by another")


def test_a_start_that_raises_in_the_next_server_ends_the_device(tmp_path: Path) -> None:
    with prefault.device.map(_RefusesToStartAgain(str(tmp_path / "log"))) as area:
        prefault.populate(area, length=4 * PAGE_SIZE)
        os.kill(roles()["server"], signal.SIGKILL)
        assert peek(area, 9) is None
        assert peek(area, 2) == b"\3" * 512
        with pytest.raises(prefault.DeviceGoneError, match=r"range\(0, 4\)\] were supplied by another"):
            prefault.populate(area)


class _SavesAtItsEnd(Device):
    """Writable, with a file as its store, to which it saves at its end; pages are evicted at a restart as well."""

    evicts = True
    restartable = True

    def __init__(self, path: str) -> None:
        self.length = 8 * PAGE_SIZE
        self._path = path

    def recipe(self) -> Recipe | None:
        return None

    def start(self, pool: DevicePool) -> None:
        self._pool = pool
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, self.length)
        assert pool.evict(pool.pages, self._save) == b""

    def _save(self, run: range, content: memoryview) -> None:
        os.pwrite(self._fd, content, run.start * PAGE_SIZE)

    def stop(self) -> None:
        self._pool.evict(self._pool.pages, self._save)
        os.close(self._fd)

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        assert os.preadv(self._fd, [area.frame(page)], page * PAGE_SIZE) == PAGE_SIZE
        return None


def test_pages_can_be_saved_at_the_end_and_at_a_start_with_clients(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with prefault.device.map(_SavesAtItsEnd(str(path))) as area, area.memoryview() as view:
        view[5 * PAGE_SIZE] = 55
        os.kill(roles()["server"], signal.SIGKILL)
        view[6 * PAGE_SIZE] = 66
        assert path.read_bytes()[5 * PAGE_SIZE] == 55  # saved by the start of the next server
        view[5 * PAGE_SIZE] += 1  # was evicted under this client, whose thread comes back to the driver
    assert _left_nothing()
    found = path.read_bytes()
    assert (found[5 * PAGE_SIZE], found[6 * PAGE_SIZE]) == (56, 66)
