"""Objects of a device: made by control requests, mapped by name, each with its own length, log and statistics."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.device import ClientProcess, DeviceArea, DeviceClient, DeviceObject, DevicePool, Recipe, protocol
from prefault.device.device_pool import Access
from prefault.errors import DeviceError, DeviceGoneError, DriverError
from prefault.sizes import GIB, MIB, PAGE_SIZE
from support import oracle, processes
from support.device_server import served
from support.devices import Pattern

pytestmark = pytest.mark.usefixtures("no_leaks")

_FAR = 2 * MIB // PAGE_SIZE


class Objects(prefault.device.Device):
    """A page has the name of its object and its number there. Clients make and delete objects."""

    evicts = True

    def __init__(self, *, length: int = GIB, workers: int = 0, restartable: bool = False) -> None:
        self.length = length
        self.workers = workers
        self.restartable = restartable
        self._arguments = {"length": length, "workers": workers, "restartable": restartable}
        self.opened: list[str | None] = []

    def recipe(self) -> Recipe | None:
        return Recipe(f"{__name__}:Objects", self._arguments) if self.restartable else None

    def start(self, pool: DevicePool) -> None:
        self.pool = pool
        if not pool.objects():
            pool.create_object("at the start", 3 * PAGE_SIZE)

    def open(self, area: DeviceArea) -> None:
        self.opened.append(None if area.object is None else area.object.name)

    def close(self, area: DeviceArea) -> None:
        if area.object is not None and area.object.name.startswith("temporary"):
            self.pool.delete_object(area.object.name)

    def fault(self, area: DeviceArea, page: int, access: Access) -> None:
        found = self.pool.object_at(page)
        if found is None:
            raise ValueError("the page belongs to no object")
        number = page - found.pages(self.page_size).start
        if number == 13:
            raise ValueError("bad luck")
        text = f"{found.name} {number}".encode()
        area.frame(page)[: len(text)] = text

    def control(self, client: ClientProcess, request: bytes) -> bytes:
        word, _, rest = request.decode().partition(" ")
        match word:
            case "create":
                length, _, name = rest.partition(" ")
                made = self.pool.create_object(name, int(length))
                return b"%d" % made.offset
            case "delete":
                self.pool.delete_object(rest)
                return b""
            case "list":
                return repr([tuple(each) for each in self.pool.objects()]).encode()
            case "find":
                return repr(self.pool.object(rest).length).encode()
            case "opened":
                return repr(self.opened).encode()
            case "clients":
                return repr([(each == client, each.pid) for each in self.pool.clients()]).encode()
            case "ready":
                return repr(self.pool.ready(self.pool.object(rest).pages(self.page_size))).encode()
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().control(client, request)


@pytest.fixture(params=[0, 2], ids=["in the loop", "in workers"])
def client(request: pytest.FixtureRequest) -> Iterator[DeviceClient]:
    with prefault.device.open(Objects(workers=request.param)) as client:
        yield client


def _text(area: prefault.device.Area, page: int) -> str:
    return area.read(page * PAGE_SIZE, 60).rstrip(b"\0").decode()


def test_an_object_is_mapped_by_its_name(client: DeviceClient) -> None:
    client.control(b"create 20000 the name")
    with client.map(object="the name") as area, client.map(8192, 4096, object="the name") as part:
        assert (len(area), area.offset, area.file_offset) == (20000, 0, 2 * MIB)
        assert area.object == DeviceObject("the name", 2 * MIB, 20000)
        assert (len(part), part.offset, part.file_offset) == (8192, 4096, 2 * MIB + 4096)
        assert [_text(area, page) for page in range(4)] == [f"the name {page}" for page in range(4)]
        assert _text(part, 1) == "the name 2"
        with area.memoryview() as view:
            view[2 * PAGE_SIZE] = ord("T")
        assert _text(part, 1) == "The name 2"
        assert "object 'the name' of Objects" in repr(area)
        assert client.control(b"opened") == b"['the name', 'the name']"
    with client.map(object="at the start") as area:
        assert _text(area, 2) == "at the start 2"
        assert area.object == DeviceObject("at the start", 0, 3 * PAGE_SIZE)


def test_mapped_with_the_device() -> None:
    device = Objects()
    with prefault.device.map(device, object="at the start", populate=True) as area:
        assert oracle.present(area.address, len(area)) == [True] * 3
        assert area.control(b"list") == b"[('at the start', 0, 12288)]"
    with prefault.device.map(device, PAGE_SIZE) as area:
        assert area.object is None
        assert _text(area, 0) == "at the start 0"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"object": "nothing"}, DeviceError, "the device has no object 'nothing'"),
        ({"object": ""}, DeviceError, "the device has no object ''"),
        ({"object": "\udc80"}, DeviceError, "the device has no object"),
        ({"object": 5}, TypeError, "mapped by its name"),
        ({"object": b"at the start"}, TypeError, "mapped by its name"),
        ({"object": "at the start", "length": 12289}, ValueError, "beyond object 'at the start', which has 12288 bytes"),
        ({"object": "at the start", "offset": 12288}, ValueError, "lies beyond object 'at the start'"),
        ({"object": "at the start", "offset": 1}, ValueError, "multiple of its page size"),
        ({"object": "at the start", "length": 0}, ValueError, "0 bytes"),
    ],
)
def test_what_cannot_be_mapped(client: DeviceClient, arguments: dict[str, object], kind: type, message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        client.map(**arguments)  # type: ignore[arg-type]
    assert getattr(caught.value, "errno", errno.ENOENT) == errno.ENOENT
    with client.map(object="at the start") as area:
        assert _text(area, 0) == "at the start 0"


def test_what_control_reports(client: DeviceClient) -> None:
    for request, number in (
        (b"create 4096 at the start", errno.EEXIST),
        (b"create 99999999999 large", errno.ENOSPC),
        (b"delete nothing", errno.ENOENT),
        (b"find nothing", errno.ENOENT),
    ):
        with pytest.raises(DeviceError) as caught:
            client.control(request)
        assert caught.value.errno == number
    assert client.control(b"list") == b"[('at the start', 0, 12288)]"
    assert client.control(b"clients") == b"[(True, %d)]" % os.getpid()


def test_an_object_in_use_is_not_deleted_and_a_deleted_one_is_gone(client: DeviceClient) -> None:
    client.control(b"create 8192 x")
    with client.map(object="x", populate=True) as area:
        with pytest.raises(DeviceError, match="object 'x' cannot be deleted: an area maps it") as caught:
            client.control(b"delete x")
        assert caught.value.errno == errno.EBUSY
        assert _text(area, 1) == "x 1"
    assert client.control(b"ready x") == b"[range(512, 514)]"
    client.control(b"delete x")
    with pytest.raises(DeviceError, match="no object 'x'"):
        client.map(object="x")
    assert client.control(b"create 8192 y") == b"%d" % (2 * MIB)
    assert client.control(b"ready y") == b"[]"  # none of the pages of the other
    with client.map(object="y") as area:
        assert _text(area, 1) == "y 1"


def test_a_driver_may_delete_an_object_when_it_closes_the_last_area(client: DeviceClient) -> None:
    client.control(b"create 8192 temporary")
    with client.map(object="temporary") as area:
        assert _text(area, 0) == "temporary 0"
    assert processes.eventually(lambda: b"temporary" not in client.control(b"list"))


def test_pages_that_were_supplied_without_a_name_are_not_those_of_a_new_object(client: DeviceClient) -> None:
    client.control(b"create 4096 old")
    with client.map(2 * PAGE_SIZE, 2 * MIB) as unnamed:
        assert _text(unnamed, 0) == "old 0"
        client.control(b"delete old")  # which such an area does not prevent
        with pytest.raises(DriverError, match="belongs to no object"):
            unnamed.read(0, 8)
        client.control(b"create 4096 new")
        assert _text(unnamed, 0) == "new 0"


def test_errors_and_records_are_those_of_the_object(client: DeviceClient) -> None:
    client.control(b"create 100000 x")
    with client.map(object="x") as area, client.map(8192, 8192, object="x") as part:
        with pytest.raises(DriverError, match=r"fault\(\) \(page 13 of 'x'\): ValueError: bad luck") as caught:
            area.populate(offset=10 * PAGE_SIZE, length=8 * PAGE_SIZE)
        assert caught.value.offset == 13 * PAGE_SIZE
        with part.memoryview() as view:
            assert bytes(view[4096:4099]) == b"x 3"
        log = part.access_log()
        assert (log.device, log.length, log.runs) == ("x", 100000, ((3 * PAGE_SIZE, PAGE_SIZE),))
        assert area.replay(log).bytes == PAGE_SIZE
        assert oracle.present(area.address, 5 * PAGE_SIZE) == [False] * 3 + [True, False]
        with client.map(object="at the start") as other, pytest.raises(ValueError, match="the log is of x of 100000 bytes"):
            other.replay(log)
        first, second = area.stats(), part.stats()
        both = client.stats("x")
        assert second.missing == 1
        assert both.supplied_pages == first.supplied_pages + second.supplied_pages == 4
        assert both.populated_pages == first.populated_pages == 4
    assert client.stats("x") == both  # the closed ones count
    with client.map(object="x") as area:
        assert _text(area, 3) == "x 3"
        assert client.stats("x").populated_pages == both.populated_pages + 1
    assert client.stats("at the start").faults == 0
    client.control(b"delete x")
    client.control(b"create 100000 x")
    assert client.stats("x").faults == client.stats("x").supplied_pages == 0
    with pytest.raises(DeviceError, match="no object 'y'"):
        client.stats("y")


def test_dirty_pages_and_discard_count_from_the_object(client: DeviceClient) -> None:
    client.control(b"create 10000 x")
    with client.map(object="x", track_dirty=True) as area:
        with area.memoryview() as view:
            view[2 * PAGE_SIZE] = 1
        assert [(span.start, span.stop) for span in area.dirty_pages()] == [(2 * PAGE_SIZE, 3 * PAGE_SIZE)]
        area.populate()
        assert area.discard().bytes == 3 * PAGE_SIZE  # the last page as well, the rest of which is no one's
        assert client.control(b"ready x") == b"[]"


def test_an_object_that_is_made_anew_meanwhile_is_looked_up_again(
    client: DeviceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _change_after_lookup(client, monkeypatch, b"delete x", b"create 5000000 filler", b"create 8192 x")
    with client.map(object="x") as area:
        assert len(asked) == 2
        assert len(area) == 8192
        assert _text(area, 1) == "x 1"
    client.control(b"delete x")
    assert not client._areas


@pytest.mark.parametrize("colocate", [False, True])
def test_an_object_that_is_deleted_meanwhile_leaves_no_area(
    client: DeviceClient, monkeypatch: pytest.MonkeyPatch, colocate: bool
) -> None:
    asked = _change_after_lookup(client, monkeypatch, b"delete x")
    users, cpus = client._connection.users, os.sched_getaffinity(0)
    with pytest.raises(DeviceError, match="no object 'x'"):
        client.map(object="x", colocate=colocate)
    assert len(asked) == 1
    assert client._connection.users == users
    assert os.sched_getaffinity(0) == cpus
    client.close()


def _change_after_lookup(client: DeviceClient, monkeypatch: pytest.MonkeyPatch, *requests: bytes) -> list[object]:
    """Make an object x, and have the requests sent right after it is found for the first time; return what is found."""
    client.control(b"create 4096 x")
    connection = type(client._connection)
    found: list[object] = []
    ask = connection.ask

    def ask_and_change(self: object, request: object, kind: type) -> object:
        reply = ask(self, request, kind)  # type: ignore[arg-type, var-annotated]
        if isinstance(request, protocol.FindObject):
            found.append(reply)
            if len(found) == 1:
                for change in requests:
                    client.control(change)
        return reply

    monkeypatch.setattr(connection, "ask", ask_and_change)
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_objects_survive_the_server(workers: int) -> None:
    with prefault.device.open(Objects(workers=workers, restartable=True)) as client:
        for name in ("a", "gone", "c"):
            client.control(f"create 10000 {name}".encode())
        client.control(b"delete gone")
        before = client.control(b"list")
        with client.map(object="c") as area, client.map(PAGE_SIZE, 6 * MIB) as unnamed:
            assert _text(area, 0) == "c 0"
            with pytest.raises(DeviceGoneError):
                client.control(b"die")
            assert client.control(b"list") == before
            assert client.control(b"opened") == b"['c', None]"
            assert [_text(area, page) for page in range(3)] == ["c 0", "c 1", "c 2"]
            assert _text(unnamed, 0) == "c 0"
            assert [run.offset for run in area.access_log().runs] == [PAGE_SIZE]  # since the server started
            with pytest.raises(DeviceError, match="an area maps it"):
                client.control(b"delete c")
            assert client.control(b"create 4096 new") == b"%d" % (4 * MIB)
        client.control(b"delete c")
        with client.map(object="a") as area:
            assert _text(area, 2) == "a 2"


def test_a_device_without_objects_pays_nothing(tmp_path: Path) -> None:
    with prefault.device.serve(Pattern(2), tmp_path / "s"), prefault.device.connect(tmp_path / "s") as client:
        with pytest.raises(DeviceError, match="the device has no object 'x'"):
            client.map(object="x")
        with pytest.raises(DeviceError, match="the device has no object"):
            client.stats("x" * 60_000)


# --- raw messages


def test_a_map_of_an_object_is_checked() -> None:
    with served(Objects()) as (_, client):

        def map_it(placed: DeviceObject, offset: int, length: int) -> protocol.Refused:
            request = protocol.Map(next(client.numbers), 1 << 40, offset, length, "read", False, None, placed)
            return client.ask(protocol.Refused, request)

        right = client.ask(protocol.ObjectFound, protocol.FindObject(next(client.numbers), "at the start")).object
        for wrong in (
            right._replace(name="other"),
            right._replace(length=1),
            right._replace(offset=2 * MIB),
            right._replace(offset=-2 * MIB),
            right._replace(offset=1 << 62),
        ):
            assert map_it(wrong, 0, PAGE_SIZE).kind == ("stale" if wrong.offset == 0 else "value")
        assert map_it(right, PAGE_SIZE, 3 * PAGE_SIZE).kind == "value"
        assert map_it(right, 2 * MIB, PAGE_SIZE).kind == "value"
        # No reference was leaked: it can be deleted.
        reply = client.ask(protocol.ControlReply, protocol.Control(next(client.numbers), b"delete at the start"))
        assert reply.content == b""
