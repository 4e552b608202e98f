"""Control requests: what a driver answers that is not about memory; and the end of clients."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device import ClientProcess, DeviceArea, Recipe, protocol
from prefault.errors import DeviceError, DeviceGoneError
from prefault.sizes import PAGE_SIZE
from support import processes
from support.children import in_child
from support.device_server import served
from support.devices import Pattern, Remade, content

pytestmark = pytest.mark.usefixtures("no_leaks")

_LATE_S = 5.0


class Controlled(Pattern):
    """Carries out control requests, which are text; and writes down in a file what it is told of."""

    def __init__(
        self, path: str = os.devnull, *, workers: int = 0, restartable: bool = False, timeout_s: float = 30.0
    ) -> None:
        super().__init__(16, workers=workers, restartable=restartable, timeout_s=timeout_s, writable=True)
        self._arguments = {"path": path, "workers": workers, "restartable": restartable, "timeout_s": timeout_s}
        self._path = path

    def recipe(self) -> Recipe | None:
        return Recipe(f"{__name__}:Controlled", self._arguments) if self.restartable else None

    def _note(self, text: str) -> None:
        with open(self._path, "a") as file:
            file.write(f"{text}\n")

    def open(self, area: DeviceArea) -> None:
        self._note(f"open {area.offset}")

    def close(self, area: DeviceArea) -> None:
        self._note(f"close {area.offset}")

    def disconnect(self, client: ClientProcess) -> None:
        self._note(f"disconnect {client.number}")

    def control(self, client: ClientProcess, request: bytes) -> Any:
        word, _, rest = request.partition(b" ")
        match word:
            case b"echo":
                return rest
            case b"who":
                return b"%d %d %d" % client
            case b"size":
                return bytes(int(rest))
            case b"sleep":
                self._note("asleep")
                time.sleep(float(rest))
                self._note("awake")
                return b"slept"
            case b"die":
                self._note("dies")
                os.kill(os.getpid(), signal.SIGKILL)
            case b"refuse":
                raise OSError(int(rest), "the buffer is pinned")
            case b"open":
                os.open(rest, os.O_RDONLY)
            case b"wrong":
                raise KeyError("no such buffer")
            case b"exit":
                raise SystemExit(3)
            case b"errno":
                raise OSError(10**30, "a number that is none")
            case b"nothing":
                return None
            case b"text":
                return "text"
            case b"array":
                return bytearray(5)
        return super().control(client, request)


@pytest.fixture(params=[0, 2], ids=["in the loop", "in workers"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[prefault.device.DeviceClient]:
    with prefault.device.open(Controlled(str(tmp_path / "notes"), workers=request.param)) as client:
        yield client


def test_a_reply(client: prefault.device.DeviceClient) -> None:
    for text in (b"", b"hello", bytes(range(256)), b"x" * (protocol.MAX_CONTROL - 5)):
        assert client.control(b"echo " + text) == text
    assert client.control(bytearray(b"echo a")) == b"a"
    assert client.control(memoryview(b"echo a")) == b"a"
    assert len(client.control(b"size %d" % protocol.MAX_CONTROL)) == protocol.MAX_CONTROL


def test_an_area_forwards(client: prefault.device.DeviceClient) -> None:
    with client.map(PAGE_SIZE, 3 * PAGE_SIZE) as area:
        assert area.control(b"who") == client.control(b"who")
        assert client.control(b"who").split()[1:] == [b"%d" % os.getpid(), b"%d" % os.geteuid()]
        assert area.read() == content(3)
    with pytest.raises(ValueError, match="the area is closed"):
        area.control(b"who")


@pytest.mark.parametrize(
    ("request_", "number", "message"),
    [
        (b"refuse 16", errno.EBUSY, r"^the buffer is pinned \[EBUSY"),
        (b"refuse 0", errno.EIO, "the driver raised in control.*the buffer is pinned"),
        (b"open /nowhere", errno.ENOENT, "No such file or directory: b'/nowhere'"),
        (b"wrong", errno.EIO, r"the driver raised in control\(\): KeyError: 'no such buffer' \(test_control.py, line"),
        (b"exit", errno.EIO, "the driver raised in control.*SystemExit: 3"),
        (b"errno", errno.EIO, "the driver raised in control.*a number that is none"),
        (b"nothing", errno.EIO, r"control\(\) returns bytes, not None"),
        (b"text", errno.EIO, r"control\(\) returns bytes, not 'text'"),
        (b"array", errno.EIO, r"control\(\) returns bytes, not bytearray"),
        (b"", errno.ENOTTY, "the driver Controlled takes no control requests"),
        (b"\xff\0garbage", errno.ENOTTY, "the driver Controlled takes no control requests"),
        (b"size 64513", errno.EMSGSIZE, "the driver's reply has 64513 bytes, .* at most 64512"),
        (b"size 100000000", errno.EMSGSIZE, "the driver's reply has 100000000 bytes"),
    ],
)
def test_what_a_driver_refuses(client: prefault.device.DeviceClient, request_: bytes, number: int, message: str) -> None:
    with pytest.raises(DeviceError, match=message) as caught:
        client.control(request_)
    assert caught.value.errno == number
    assert client.control(b"echo it lives") == b"it lives"


def test_a_driver_without_control() -> None:
    with prefault.device.open(Remade(2)) as client, pytest.raises(DeviceError, match="Remade takes no control") as caught:
        client.control(b"")
    assert caught.value.errno == errno.ENOTTY


def test_what_a_client_refuses(client: prefault.device.DeviceClient) -> None:
    with pytest.raises(ValueError, match="a control request has at most 64512 bytes, not 64513"):
        client.control(bytes(protocol.MAX_CONTROL + 1))
    for wrong in ("text", 5, None, [1]):
        with pytest.raises(TypeError, match="a control request is bytes"):
            client.control(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a timeout is a positive number"):
        client.control(b"echo", timeout=0)
    client.close()
    with pytest.raises(ValueError, match="closed"):
        client.control(b"echo")


def test_no_reply_in_time(tmp_path: Path) -> None:
    with prefault.device.open(Controlled(str(tmp_path / "notes"), workers=1)) as client:
        with pytest.raises(TimeoutError, match=r"did not answer a control request within 0\.1 s: it may still"):
            client.control(b"sleep 1", timeout=0.1)
        assert client.control(b"echo next") == b"next"  # and not the reply to the first
        assert "awake" in (tmp_path / "notes").read_text()


def test_a_request_that_is_never_answered_ends_the_server(tmp_path: Path) -> None:
    with prefault.device.open(Controlled(str(tmp_path / "notes"), timeout_s=0.5)) as client, client.map() as area:
        assert area.read(0, PAGE_SIZE) == content(0)
        with pytest.raises(DeviceGoneError, match=r"0\.5 s, and its process was killed; the"):
            client.control(b"sleep 600")
        assert area.memoryview()[:8] == content(0)[:8]
        with pytest.raises(DeviceGoneError):
            client.control(b"echo")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_request_is_not_repeated_after_a_crash(tmp_path: Path, workers: int) -> None:
    device = Controlled(str(tmp_path / "notes"), workers=workers, restartable=True)
    with prefault.device.open(device) as client, client.map() as area:
        assert area.read(0, PAGE_SIZE) == content(0)
        with pytest.raises(DeviceGoneError, match="the control request may have been carried out"):
            client.control(b"die")
        assert client.control(b"echo next") == b"next"
        assert area.read(PAGE_SIZE, PAGE_SIZE) == content(1)
    assert (tmp_path / "notes").read_text().splitlines().count("dies") == 1


def test_other_requests_are_repeated_beside_one_that_is_not(tmp_path: Path) -> None:
    device = Controlled(str(tmp_path / "notes"), workers=1, restartable=True)
    with prefault.device.open(device) as client, client.map() as area:
        said: list[object] = []

        def ask() -> None:
            try:
                client.control(b"sleep 600")
            except DeviceGoneError as gone:
                said.append(gone)

        thread = threading.Thread(target=ask)
        thread.start()
        assert processes.eventually(lambda: "asleep" in (tmp_path / "notes").read_text())
        populating = threading.Thread(target=area.populate)  # waits for the only worker
        populating.start()
        (server,) = (pid for pid in processes.descendants(os.getpid()) if processes.name(pid) == "prefault-server")
        os.kill(server, signal.SIGKILL)
        thread.join()
        populating.join()
        assert len(said) == 1
        assert area.residency().present_bytes == 16 * PAGE_SIZE
    assert (tmp_path / "notes").read_text().splitlines().count("asleep") == 1


def test_ctrl_c_while_waiting(tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with prefault.device.open(Controlled(str(tmp_path / "notes"), workers=1)) as client:
        before = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                client.control(b"sleep 2")
            assert time.monotonic() - began < 2
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert client.control(b"echo next") == b"next"


def test_threads_get_their_own_replies(client: prefault.device.DeviceClient) -> None:
    wrong: list[bytes] = []

    def ask(number: int) -> None:
        for index in range(50):
            text = b"%d %d" % (number, index)
            reply = client.control(b"echo " + text)
            if reply != text:
                wrong.append(reply)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_requests_under_way_are_limited() -> None:
    with served(Controlled(workers=1)) as (_, client):
        for index in range(258):
            client.send(protocol.Control(next(client.numbers), b"echo" if index else b"sleep 0.5"))
        replies = [client.receive() for _ in range(258)]
        refused = [reply for reply in replies if isinstance(reply, protocol.Refused)]
        assert len(refused) == 2
        assert "256 control requests are under way already" in refused[0].message


# --- a client object for a private server


def test_open_shares_the_server_of_the_device() -> None:
    device = Pattern(8)
    before = processes.descendants(os.getpid())
    with prefault.device.open(device) as client:
        servers = processes.descendants(os.getpid())
        assert (client.name, client.length, client.path) == ("Pattern", 8 * PAGE_SIZE, None)
        assert repr(client) == "<DeviceClient of Pattern, 32.0 KiB, private, connected>"
        with (
            prefault.device.map(device) as area,
            client.map(PAGE_SIZE, PAGE_SIZE) as other,
            prefault.device.open(device) as two,
        ):
            assert processes.descendants(os.getpid()) == servers
            assert area.read()[PAGE_SIZE : 2 * PAGE_SIZE] == other.read() == content(1)
            with pytest.raises(BufferError, match="1 area is still open"):
                client.close()
            two.close()
            assert not client.closed
            assert area.read(5 * PAGE_SIZE, 100) == content(5)[:100]
    assert repr(client) == "<DeviceClient of Pattern, 32.0 KiB, private, not connected>"
    assert not processes.descendants(os.getpid()) & (servers - before)


def test_open_of_no_device() -> None:
    with pytest.raises(TypeError, match="a device is an object"):
        prefault.device.open(5)  # type: ignore[arg-type]


def test_tracking_on_a_private_server(tmp_path: Path) -> None:
    with prefault.device.open(Controlled()) as client, client.map(track_dirty=True) as area:
        with area.memoryview() as view:
            view[3 * PAGE_SIZE] = 1
        assert [span.start // PAGE_SIZE for span in area.dirty_pages()] == [3]
        assert area.control(b"who") == client.control(b"who")


def test_one_number_for_a_client_with_two_connections(tmp_path: Path) -> None:
    with (
        prefault.device.serve(Controlled(), tmp_path / "s"),
        prefault.device.connect(tmp_path / "s") as client,
        client.map() as plain,
        client.map(track_dirty=True) as tracked,
    ):
        assert plain.control(b"who") == tracked.control(b"who") == client.control(b"who")


# --- the end of clients


def _notes(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("workers", [0, 3])
def test_disconnect_comes_after_the_close_of_all_areas(tmp_path: Path, workers: int) -> None:
    notes = tmp_path / "notes"

    def use() -> str:
        with contextlib.ExitStack() as stack:
            client = stack.enter_context(prefault.device.connect(tmp_path / "s"))
            for page in range(5):
                stack.enter_context(client.map(PAGE_SIZE, page * PAGE_SIZE))
            number = client.control(b"who").split()[0].decode()
            os.kill(os.getpid(), signal.SIGKILL)
            return number

    with prefault.device.serve(Controlled(str(notes), workers=workers), tmp_path / "s"):
        with prefault.device.connect(tmp_path / "s") as client:
            mine = client.control(b"who").split()[0].decode()
            with contextlib.suppress(Exception):
                in_child(use)
            assert processes.eventually(lambda: any(line.startswith("disconnect") for line in _notes(notes)), _LATE_S)
            lines = _notes(notes)
            assert set(lines[-6:-1]) == {f"close {page * PAGE_SIZE}" for page in range(5)}
            assert lines[-1].startswith("disconnect")
            other = lines[-1].split()[1]
            assert other != mine
        assert processes.eventually(lambda: f"disconnect {mine}" in _notes(notes), _LATE_S)
        with prefault.device.connect(tmp_path / "s") as client:  # no number comes twice
            assert client.control(b"who").split()[0].decode() not in (mine, other)
            number = client.control(b"who").split()[0].decode()
    assert _notes(notes)[-1] == f"disconnect {number}"
    assert sum(line.startswith("disconnect") for line in _notes(notes)) == 3


def test_disconnect_waits_for_a_control_request(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    device = Controlled(str(notes), workers=2)
    with prefault.device.serve(device, tmp_path / "s"), prefault.device.connect(tmp_path / "s"):

        def ask() -> None:
            with prefault.device.connect(tmp_path / "s") as client, contextlib.suppress(TimeoutError):
                client.control(b"sleep 1", timeout=0.2)

        in_child(ask)
        assert processes.eventually(lambda: len(_notes(notes)) == 3, _LATE_S)
    assert _notes(notes)[:2] == ["asleep", "awake"]


def test_the_end_of_a_server_disconnects_its_clients(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with prefault.device.open(Controlled(str(notes))) as client, client.map():
        number = client.control(b"who").split()[0].decode()
    assert _notes(notes) == ["open 0", "close 0", f"disconnect {number}"]


def test_numbers_stay_and_are_not_given_twice_after_a_crash(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    device = Controlled(str(notes), restartable=True)
    with prefault.device.serve(device, tmp_path / "s"), prefault.device.connect(tmp_path / "s") as client:
        mine = client.control(b"who")
        with prefault.device.connect(tmp_path / "s") as other:
            theirs = other.control(b"who")
        with pytest.raises(DeviceGoneError):
            client.control(b"die")
        assert client.control(b"who") == mine
        with prefault.device.connect(tmp_path / "s") as other:
            assert other.control(b"who") not in (mine, theirs)
