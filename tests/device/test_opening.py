"""Mapping a device: what is given, what is refused, and that nothing stays behind."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
import prefault.device
from prefault.device import Area, Device, DeviceArea, this_server
from prefault.errors import DeviceError, DeviceGoneError, DriverError, NoPopulateError
from prefault.sizes import MIB, PAGE_SIZE
from support import oracle, processes
from support.children import in_child
from support.devices import Failing, Pattern, Remade, content, expected

pytestmark = pytest.mark.usefixtures("no_leaks")


def _content(area: Area) -> bytes:
    with area.memoryview() as view:
        return bytes(view)


def _all(device: Pattern) -> bytes:
    return b"".join(expected(device, page) for page in range(-(-device.length // device.page_size)))


@pytest.mark.parametrize("populate", [False, True, "read", "write"])
def test_the_bytes_are_the_drivers(populate: Any) -> None:
    device = Pattern(16, writable=True)
    with prefault.device.map(device, populate=populate) as area:
        there = oracle.present(area.address, len(area))
        assert there == [populate is not False] * 16
        assert _content(area) == _all(device)
        assert (area.populated is None) == (populate is False)


def test_the_five_lines() -> None:
    with prefault.device.map(Pattern(8), populate=True) as area:
        array = area.ndarray("uint64")
        assert array.shape == (8 * PAGE_SIZE // 8,)
        assert array[:512].tobytes() == content(0)
        del array


def test_a_part_of_a_device() -> None:
    device = Pattern(16)
    with prefault.device.map(device, 2 * PAGE_SIZE + 100, 3 * PAGE_SIZE) as area:
        assert len(area) == 2 * PAGE_SIZE + 100
        assert _content(area) == _all(device)[3 * PAGE_SIZE : 5 * PAGE_SIZE + 100]
        assert area.range.pages == 3
        assert area.file_offset == 3 * PAGE_SIZE


def test_a_device_that_ends_inside_of_a_page() -> None:
    device = Pattern(4, tail=1000)
    with prefault.device.map(device) as area:
        assert len(area) == 4 * PAGE_SIZE - 1000
        assert _content(area) == _all(device)[:-1000]


def test_a_device_is_read_only_or_not() -> None:
    with prefault.device.map(Pattern(2)) as area:
        assert area.access == "read"
        assert not area.writable
        assert not area.ndarray().flags.writeable
        assert area.fd is not None
        assert "w" not in _permissions(area)
    with prefault.device.map(Pattern(2, writable=True)) as area:
        assert area.access == "write"
        array = area.ndarray()
        array[5] = 77
        assert _content(area)[5] == 77
        del array
    with prefault.device.map(Pattern(2, writable=True), access="read") as area:
        assert not area.writable
        assert "w" not in _permissions(area)


def _permissions(area: Area) -> str:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(line.split()[1] for line in lines if int(line.split("-")[0], 16) == area.address)


def test_areas_of_one_device_share_its_server_and_its_descriptors() -> None:
    device = Pattern(8, writable=True)
    before = processes.descendants(os.getpid())
    with prefault.device.map(device) as one:
        servers, descriptors = processes.descendants(os.getpid()), processes.descriptors(os.getpid())
        with prefault.device.map(device, populate=True) as other:
            assert processes.descendants(os.getpid()) == servers
            assert processes.descriptors(os.getpid()) == descriptors
            one.ndarray()[123] = 42
            assert other.ndarray()[123] == 42
        assert processes.descriptors(os.getpid()) == descriptors
        assert _content(one)[123] == 42
    assert not processes.descendants(os.getpid()) & (servers - before)


def test_two_devices_have_a_server_each() -> None:
    with prefault.device.map(Pattern(2, salt=1)) as one, prefault.device.map(Pattern(2, salt=2)) as other:
        assert _content(one)[:PAGE_SIZE] == content(0, salt=1)
        assert _content(other)[:PAGE_SIZE] == content(0, salt=2)


def test_the_last_area_ends_the_server_and_the_next_starts_one() -> None:
    device = Pattern(2)
    before = processes.descendants(os.getpid())
    for _ in range(2):
        with prefault.device.map(device) as area:
            assert len(processes.descendants(os.getpid()) - before) == 2
            assert _content(area) == _all(device)
        assert processes.descendants(os.getpid()) == before


def test_a_device_with_a_recipe() -> None:
    device = Remade(4, salt=9)
    with prefault.device.map(device, populate=True) as area:
        assert _content(area) == _all(device)


def test_threads_that_map_one_device_at_once_share_its_server() -> None:
    device = Pattern(8)

    def run() -> tuple[int, bool, int]:
        areas: list[Area] = []
        threads = [threading.Thread(target=lambda: areas.append(prefault.device.map(device))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        servers = len(processes.descendants(os.getpid()))
        right = [_content(area) for area in areas] == [_all(device)] * 8
        for area in areas:
            area.close()
        return servers, right, len(processes.descendants(os.getpid()))

    assert in_child(run) == (2, True, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 0}, "0 bytes"),
        ({"length": 9 * PAGE_SIZE}, "offset 0 and length 36864 end at 36864, beyond Pattern, which has 32768 bytes"),
        ({"length": PAGE_SIZE, "offset": 8 * PAGE_SIZE}, "lies beyond Pattern, which has 32768 bytes"),
        ({"length": 2 * PAGE_SIZE, "offset": 7 * PAGE_SIZE}, "end at 36864"),
        ({"offset": 100}, "multiple of its page size, 4096 bytes, not 100"),
        ({"offset": -PAGE_SIZE}, "-4096"),
        ({"access": "write"}, "Pattern is read-only"),
        ({"access": "execute"}, "access is 'read' or 'write'"),
        ({"populate": "write"}, "cannot be populated writable"),
        ({"populate": "yes"}, "populate is False, True"),
        ({"track_dirty": True}, "no dirty pages"),
    ],
)
def test_what_cannot_be_mapped(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefault.device.map(Pattern(8), **arguments)
    assert not [pid for pid in processes.descendants(os.getpid()) if _is_ours(pid)]


def _is_ours(pid: int) -> bool:
    return Path(f"/proc/{pid}/comm").read_text().startswith("prefault-")


@pytest.mark.parametrize("what", [None, 5, "device", b"", object(), Pattern])
def test_an_object_that_is_no_device_is_refused(what: Any) -> None:
    with pytest.raises(TypeError, match="a device is an object of a class made from"):
        prefault.device.map(what)


def test_a_server_cannot_map_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pattern(2)
    monkeypatch.setattr(this_server, "device", device)
    with pytest.raises(DeviceError, match="cannot map its own device"):
        prefault.device.map(device)
    with prefault.device.map(Pattern(2)):  # another one may be
        pass


class _MapsItself(Device):
    writable = False
    length = PAGE_SIZE

    def fault(self, area: Any, page: int, access: Any) -> None:
        with prefault.device.map(self) as mine:
            area.frame(page)[:] = _content(mine)


def test_a_driver_that_maps_its_own_device_is_told() -> None:
    with prefault.device.map(_MapsItself()) as area, pytest.raises(DriverError, match="cannot map its own device"):
        area.populate()


def test_population_that_fails_leaves_nothing_mapped() -> None:
    with pytest.raises(DriverError, match="page 3 is worn out") as caught:
        prefault.device.map(Failing(8, batch_pages=1), populate=True)
    assert caught.value.offset == 3 * PAGE_SIZE
    assert not [pid for pid in processes.descendants(os.getpid()) if _is_ours(pid)]


def test_population_that_is_meaningless_is_refused_and_touching_works() -> None:
    device = Pattern(4, populates=False)
    with pytest.raises(NoPopulateError, match="meaningless"):
        prefault.device.map(device, populate=True)
    with prefault.device.map(device) as area:
        with pytest.raises(NoPopulateError):
            prefault.populate(area)
        assert area.read() == _all(device)


class _Refusing(Pattern):
    def open(self, area: Any) -> None:
        raise PermissionError(f"process {area.pid} may not")


class _OpensSlowly(Pattern):
    def open(self, area: DeviceArea) -> None:
        if area.offset:
            time.sleep(0.5)


def test_ctrl_c_while_the_driver_opens_an_area_takes_no_later_one_away() -> None:
    device = _OpensSlowly(8)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with prefault.device.map(device, PAGE_SIZE):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                prefault.device.map(device, PAGE_SIZE, PAGE_SIZE)
            # At the same address, and of the same part of the device.
            with prefault.device.map(device, PAGE_SIZE, PAGE_SIZE) as area:
                area.stats()  # by then the server has done all that was asked of it before
                assert area.read() == expected(device, 1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_driver_may_refuse_an_area() -> None:
    with pytest.raises(DeviceError, match="may not"):
        prefault.device.map(_Refusing(2))
    assert not [pid for pid in processes.descendants(os.getpid()) if _is_ours(pid)]


def test_pages_of_two_mib() -> None:
    device = Pattern(3, page_size=2 * MIB)
    with prefault.device.map(device, populate=True) as area:
        assert area.page_size == 2 * MIB
        assert area.address % (2 * MIB) == 0
        assert all(oracle.present(area.address, len(area)))
        array = area.ndarray("uint64")
        for page in range(3):
            assert array[page * MIB // 4] == numpy.frombuffer(expected(device, page)[:8], "uint64")[0]
        del array
        assert area.populated is not None
        # Either they are huge, or it is said that they are not.
        assert oracle.smaps(area.address).get("ShmemPmdMapped", 0) or area.populated.notes or _is_hugetlb(area)


def _is_hugetlb(area: Area) -> bool:
    return oracle.smaps(area.address)["KernelPageSize"] == 2 * MIB


# --- served devices


def test_connecting_to_nothing(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="there is no such socket"):
        prefault.device.connect(tmp_path / "nothing")
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    with pytest.raises(DeviceError, match="no server is alive there"):
        prefault.device.connect(tmp_path / "stale")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()
        with pytest.raises(DeviceError, match="is not that of a device"):
            prefault.device.connect(tmp_path / "other")
    with pytest.raises(ValueError, match="a timeout is"):
        prefault.device.connect(tmp_path / "nothing", timeout=0)


def test_a_server_that_hangs_up_at_once(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "rude"))
        listener.listen()

        def hang_up() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(DeviceGoneError):
            prefault.device.connect(tmp_path / "rude")
        thread.join()


def test_a_served_device(tmp_path: Path) -> None:
    device = Pattern(8, writable=True)
    with prefault.device.serve(device, tmp_path / "socket"), prefault.device.connect(tmp_path / "socket") as client:
        assert (client.name, client.length, client.page_size) == ("Pattern", device.length, PAGE_SIZE)
        assert client.writable
        with pytest.raises(ValueError, match="beyond Pattern"):
            client.map(9 * PAGE_SIZE)
        with prefault.device.connect(tmp_path / "socket") as other, client.map() as one, other.map(populate=True) as two:
            assert _content(two) == _all(device)
            one.ndarray()[0] = 200
            assert _content(two)[0] == 200
            with pytest.raises(BufferError, match="1 area is still open"):
                client.close()
        client.close()
        client.close()
        assert client.closed
        with pytest.raises(ValueError, match="closed"):
            client.map()


def test_an_area_keeps_a_client_that_is_forgotten(tmp_path: Path) -> None:
    device = Pattern(4)
    with prefault.device.serve(device, tmp_path / "socket"):
        area = prefault.device.connect(tmp_path / "socket").map()
        assert _content(area) == _all(device)
        area.close()
