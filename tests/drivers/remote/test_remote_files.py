"""One server for all remote files of a program: how many processes, what hangs, what dies, and what stays apart."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from drivers.remote.conftest import QUICK
from prefault.drivers import Patience, RemoteFile, SourceMissingError, area_of, open_remote
from prefault.drivers.remote.file_records import SLOT_BYTES, TABLE_BYTES, FileTable
from prefault.drivers.remote.remote_files import RemoteFiles
from prefault.drivers.remote.sharing import share
from prefault.errors import DeviceError
from prefault.sizes import KIB, MIB, PAGE_SIZE
from support import processes
from support.device_server import ends_by
from support.http_server import HttpServer

Content = Callable[[int], bytes]


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def files(server: HttpServer, content: Content) -> list[bytes]:
    """Return the content of 20 files of different lengths, f0 to f19, on the server."""
    found = [content(2 * MIB + 1000 * number) for number in range(20)]
    for number, expected in enumerate(found):
        (server.directory / f"f{number}").write_bytes(expected)
    return found


def _servers() -> list[int]:
    return [pid for pid in processes.descendants(os.getpid()) if processes.name(pid) == "prefault-server"]


def _wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def _map_all(stack: contextlib.ExitStack, server: HttpServer, **options: Any) -> list[prefault.device.Area]:
    options.setdefault("patience", QUICK)
    return [
        stack.enter_context(prefault.device.map(RemoteFile(server.url(f"f{number}"), **options))) for number in range(20)
    ]


# --- one server


def test_all_files_have_one_server_which_ends_with_the_last(server: HttpServer, files: list[bytes]) -> None:
    arrays = [open_remote(server.url(f"f{number}"), patience=QUICK) for number in range(10)]
    with contextlib.ExitStack() as stack:
        areas = _map_all(stack, server)
        assert len(_servers()) == 1
        del arrays[1:]
        for area, expected in zip(areas, files, strict=True):
            assert area.read() == expected
            assert area.device == "RemoteFile"
    assert len(_servers()) == 1
    assert arrays[0].tobytes() == files[0]
    arrays.clear()
    _wait_for(lambda: not _servers())
    with prefault.device.map(RemoteFile(server.url("f3"), patience=QUICK)) as area:  # and one begins anew
        assert area.read() == files[3]


def test_each_file_has_its_own_length_statistics_and_log(server: HttpServer, files: list[bytes]) -> None:
    with contextlib.ExitStack() as stack:
        first, second, *_ = _map_all(stack, server, fault_around=(64 * KIB, 64 * KIB))
        assert len(second) == len(files[1])
        content = second.ndarray()
        assert content[MIB] == files[1][MIB]
        assert (first.stats().faults, second.stats().faults) == (0, 1)
        assert [(run.offset, run.length) for run in second.access_log().runs] == [(MIB, 64 * KIB)]
        assert first.access_log().runs == ()
        log = second.access_log()
        assert (log.device, log.length) == ("RemoteFile", len(files[1]))  # as in the logs of files with their own server
        with pytest.raises(ValueError, match="the log is of RemoteFile"):
            first.replay(log)
        last = content[(len(files[1]) - 1) // PAGE_SIZE * PAGE_SIZE :]
        assert last.tobytes() == files[1][-len(last) :]
        del content, last


def test_maps_of_one_file_share_its_pages_and_other_objects_do_not(server: HttpServer, files: list[bytes]) -> None:
    device = RemoteFile(server.url("f0"), patience=QUICK)
    other = RemoteFile(server.url("f0"), patience=QUICK)
    with prefault.device.map(device) as area, prefault.device.map(device, MIB, offset=MIB) as part:
        area.populate()
        server.requests(clear=True)
        assert part.read() == files[0][MIB : 2 * MIB]
        assert server.requests() == []
        with prefault.device.map(other) as again:
            assert again.read(0, 10) == files[0][:10]
            assert len(server.requests()) == 1


def test_a_closed_file_is_forgotten_and_its_place_is_free(server: HttpServer, files: list[bytes]) -> None:
    with prefault.device.map(RemoteFile(server.url("f0"), patience=QUICK)) as kept:
        places = set()
        for _ in range(30):
            device = RemoteFile(server.url("f1"), patience=QUICK)
            with prefault.device.map(device) as area:
                assert area.read() == files[1]
                assert area.object is not None
                places.add(area.object.offset)
        _wait_for(lambda: Path(f"/proc/self/fd/{kept.fd}").stat().st_blocks * 512 < MIB)
        # The server closes a file when it has heard of the end of its area: by then the next may be open.
        assert len(places) <= 3


@pytest.mark.parametrize(
    ("first", "second"),
    [({"workers": 2}, {}), ({"batch": MIB}, {}), ({"fault_around": (0, 0)}, {}), ({"patience": Patience(total_s=9)}, {})],
)
def test_files_with_other_options_of_a_server_have_another(
    server: HttpServer, files: list[bytes], first: dict[str, Any], second: dict[str, Any]
) -> None:
    devices = [RemoteFile(server.url(f"f{number}"), **options) for number, options in enumerate((first, second, first))]
    with contextlib.ExitStack() as stack:
        areas = [stack.enter_context(prefault.device.map(device)) for device in devices]
        assert len(_servers()) == 2
        assert [area.read() for area in areas] == files[:3]


def test_another_environment_has_another_server(
    server: HttpServer, files: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with prefault.device.map(RemoteFile(server.url("f0"))) as first:
        monkeypatch.setenv("HTTP_PROXY_FOR_A_TEST", "1")
        with prefault.device.map(RemoteFile(server.url("f1"))) as second:
            assert len(_servers()) == 2
            assert [first.read(), second.read()] == files[:2]


def test_what_cannot_be_shared_has_a_server_of_its_own(server: HttpServer, files: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(files[0])
    url = server.url("f0")
    for device in (
        RemoteFile(lambda: (tmp_path / "f").open("rb")),
        RemoteFile(url, capacity=MIB),
        RemoteFile(url, page_size=2 * MIB),
        RemoteFile(url, headers={"X": "y" * SLOT_BYTES}),
    ):
        assert device.shared_server() is None
        with prefault.device.map(device) as area:
            assert area.read(0, 100) == files[0][:100]
    assert RemoteFile(url).shared_server() is not None


def test_a_limit_of_address_space_is_respected(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content" * 1000)
    code = "import prefault, sys; print(prefault.open_remote(sys.argv[1])[:7].tobytes())"
    limit = 4 << 30
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "f"], capture_output=True, text=True, timeout=60, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )  # fmt: skip
    assert done.stdout == "b'content'\n", done.stderr


def test_a_child_of_fork_has_a_server_of_its_own(server: HttpServer, files: list[bytes]) -> None:
    device = RemoteFile(server.url("f0"), patience=QUICK)
    with prefault.device.map(device) as area:
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException), prefault.device.map(device) as own:
                if own.read() == files[0]:
                    os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert area.read() == files[0]


def test_many_threads_open_and_close_files(server: HttpServer, files: list[bytes]) -> None:
    devices = [RemoteFile(server.url(f"f{number}"), patience=QUICK) for number in range(3)]
    failures: list[object] = []

    def work(seed: int) -> None:
        try:
            for step in range(15):
                number = (seed + step) % 3
                with prefault.device.map(devices[number]) as area:
                    at = 50_000 * (step + 1)
                    if area.read(at, 9) != files[number][at : at + 9]:
                        failures.append((seed, step))
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# --- one hangs, or the server dies


def test_a_hung_file_does_not_stop_the_others(server: HttpServer, files: list[bytes], tmp_path: Path) -> None:
    """All readers of one file wait for a web server that says nothing, and populates and touches of the others go on."""
    with (tmp_path / "hung").open("wb") as file:
        file.truncate(512 * MIB)  # more requests than the server has threads
    patience = Patience(retries=0, timeout_s=15, total_s=15)
    with HttpServer(tmp_path) as silent, contextlib.ExitStack() as stack:
        hung = stack.enter_context(prefault.device.map(RemoteFile(silent.url("hung"), patience=patience, batch=MIB)))
        areas = _map_all(stack, server, patience=patience, batch=MIB)
        assert len(_servers()) == 1
        silent.set_latency(3600)
        silent.requests(clear=True)
        ended: list[BaseException] = []

        def populate() -> None:
            try:
                hung.populate()
            except BaseException as error:  # noqa: BLE001
                ended.append(error)

        waiting = threading.Thread(target=populate)
        waiting.start()
        _wait_for(lambda: _connections(silent.port) >= 16)
        for area, expected in zip(areas, files, strict=True):
            view = area.memoryview()
            assert view[5] == expected[5]  # a fault
            view.release()
            area.populate()
            assert area.read() == expected
        late = stack.enter_context(prefault.device.map(RemoteFile(server.url("f7"), patience=patience, batch=MIB)))
        assert late.read() == files[7]  # and a file can be opened
        assert waiting.is_alive()
        assert _connections(silent.port) == 16  # the threads that one file may take, of 128
        assert len(_servers()) == 1
        silent.close()
        waiting.join(60)
        assert not waiting.is_alive()
        assert isinstance(ended[0], prefault.PopulateError)


def _connections(port: int) -> int:
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[2].partition(":")[2], 16) == port and row[3] == "01" for row in rows)


def test_all_files_go_on_after_the_server_was_killed(server: HttpServer, files: list[bytes]) -> None:
    with contextlib.ExitStack() as stack:
        areas = _map_all(stack, server, fault_around=(64 * KIB, 64 * KIB), headers={"Authorization": "Bearer x"})
        for area, expected in zip(areas, files, strict=True):
            assert area.read(0, 10) == expected[:10]
        for at in (MIB // 2, MIB, 2 * MIB - 10):
            (pid,) = _servers()
            os.kill(pid, signal.SIGKILL)
            for area, expected in zip(areas, files, strict=True):
                with area.memoryview() as view:
                    assert bytes(view[at : at + 20]) == expected[at : at + 20]
        server.requests(clear=True)
        late = stack.enter_context(prefault.device.map(RemoteFile(server.url("f0"), patience=QUICK)))  # other options
        assert late.read(5, 5) == files[0][5:10]
        again = _map_all(stack, server, fault_around=(64 * KIB, 64 * KIB))
        assert [area.read() for area in again] == [area.read() for area in areas] == files
        asked = [request for request in server.requests() if request.headers.get("Authorization")]
        assert asked, "the headers of each file survive the server too"
        assert len(_servers()) == 2
    _wait_for(lambda: not _servers())


def test_files_are_opened_and_closed_while_the_server_is_killed(server: HttpServer, files: list[bytes]) -> None:
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.25):
            for pid in _servers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    patience = Patience(total_s=QUICK.total_s + 1)
    with prefault.device.map(RemoteFile(server.url("f19"), patience=patience)) as kept:
        killer = threading.Thread(target=kill)
        killer.start()
        try:
            until = time.monotonic() + 3
            step = 0
            while time.monotonic() < until:
                number = step % 19
                step += 1
                try:
                    with prefault.device.map(RemoteFile(server.url(f"f{number}"), patience=patience)) as area:
                        assert area.read(MIB - 5, 10) == files[number][MIB - 5 : MIB + 5]
                except prefault.DeviceGoneError:  # killed too often in a short time: the warden gives up
                    break
        finally:
            done.set()
            killer.join()
        assert step > 3
        if _servers():
            assert kept.read() == files[19]


def test_one_changed_file_after_a_crash_is_an_error_of_that_file_alone(server: HttpServer, files: list[bytes]) -> None:
    with contextlib.ExitStack() as stack:
        areas = _map_all(stack, server)
        (server.directory / "f4").unlink()
        (pid,) = _servers()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(prefault.PopulateError, match="HTTP 404"):
            areas[4].populate()
        assert [area.read() for area in areas[5:]] == files[5:]


# --- requests, and what they may not show


def test_credentials_are_in_no_name_message_or_log(
    server: HttpServer, files: list[bytes], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    url = server.url("f0").replace("://", "://user:secret1@") + "?signature=secret2"
    device = RemoteFile(url, headers={"X-Token": "secret3"}, patience=QUICK)
    shared = device.shared_server()
    assert shared is not None
    with caplog.at_level(logging.DEBUG), prefault.device.map(device) as area:
        assert area.read(0, 5) == files[0][:5]
        (server.directory / "f0").unlink()
        with pytest.raises(prefault.PopulateError) as error:
            area.populate()
        names = f"{area!r}{area.object}{area.access_log()}{error.value}{shared.name}"
        with pytest.raises(DeviceError) as refused, prefault.device.open(shared.device) as client:
            client.control(shared.open_request + b"\xc1")
        names += str(refused.value)
    for pid in _servers():
        names += Path(f"/proc/{pid}/cmdline").read_text()
    assert "secret" not in names + caplog.text + "".join(capfd.readouterr())
    assert re.fullmatch(r"RemoteFile\(http://127.0.0.1:\d+/f0\?\.\.\.\) [0-9a-f]{16}", shared.name)


def _shared(url: str, **options: Any) -> Any:
    found = RemoteFile(url, patience=QUICK, **options).shared_server()
    assert found is not None
    return found


def test_requests_that_are_none_are_refused_and_change_nothing(server: HttpServer, files: list[bytes]) -> None:
    import msgspec

    shared = _shared(server.url("f0"))
    good = msgspec.msgpack.decode(shared.open_request)
    with prefault.device.open(shared.device) as client:
        for change in (
            {"type": "other"}, {"name": ""}, {"name": "x" * 201}, {"name": 7}, {"source": 7}, {"source": b"gopher://x"},
            {"compression": "lzma"}, {"headers": {"a": 1}}, {"version": [1]}, {"version": [0, "", ""]}, {"workers": 0},
            {"version": [-1, "", ""]}, {"patience": "long"}, {"batch": -1}, {"page_size": 3}, {"page_size": 2 * MIB},
            {"more": 1},
        ):  # fmt: skip
            request = msgspec.msgpack.encode(good | change)
            if change == {"source": b"gopher://x"}:  # opened when it is mapped
                continue
            with pytest.raises(DeviceError, match="not a request to open or close a remote file"):
                client.control(request)
        for request in (b"", b"\xc1", b"\x00" * 60_000, os.urandom(1000), shared.open_request[:-3]):
            with pytest.raises(DeviceError, match="not a request"):
                client.control(request)
        with pytest.raises(DeviceError, match="no object"):
            client.map(object=shared.name)
        assert client.control(shared.close_request) == b""  # of a file that is not open
        facts = msgspec.msgpack.decode(client.control(shared.open_request))
        assert facts == {"name": shared.name, "length": len(files[0])}
        with client.map(object=shared.name) as area:
            assert area.read() == files[0]
            client.control(shared.close_request)
            client.control(shared.close_request)  # once too often
            assert area.read() == files[0]
        _wait_for(lambda: _is_closed(client, shared.name))


def _is_closed(client: prefault.device.DeviceClient, name: str) -> bool:
    try:
        client.map(object=name).close()
    except DeviceError:
        return True
    return False


def test_a_file_that_was_not_mapped_after_all_is_closed(server: HttpServer, files: list[bytes]) -> None:
    device = RemoteFile(server.url("f0"), patience=QUICK)
    shared = device.shared_server()
    assert shared is not None
    with prefault.device.open(shared.device) as client:
        (server.directory / "f0").unlink()
        with pytest.raises(prefault.PopulateError, match="404"):
            prefault.device.map(device, populate=True)
        _wait_for(lambda: _is_closed(client, shared.name))
        missing = RemoteFile(server.url("f1"), patience=QUICK, index=None)
        with pytest.raises(ValueError, match="beyond RemoteFile"):
            prefault.device.map(missing, 100 * MIB)
    with pytest.raises(SourceMissingError):
        RemoteFile(server.url("f0"), patience=QUICK)


def test_shards_with_a_capacity_share_it(server: HttpServer, files: list[bytes]) -> None:
    one, two, other = (RemoteFile(server.url(f"f{number}"), capacity=MIB, patience=QUICK, batch=MIB) for number in range(3))
    for file, group in ((one, 1), (two, 1), (other, 2)):
        file.share_capacity(group)
    with prefault.device.map(one) as first, prefault.device.map(two) as second, prefault.device.map(other) as third:
        assert len(_servers()) == 2
        for at in range(0, 2 * MIB, 256 * KIB):
            for area, expected in zip((first, second, third), files, strict=False):
                assert area.read(at, 10) == expected[at : at + 10]
        assert Path(f"/proc/self/fd/{first.fd}").stat().st_blocks * 512 <= MIB
        assert Path(f"/proc/self/fd/{third.fd}").stat().st_blocks * 512 <= MIB


# --- the table


def test_the_table_of_files_survives_and_overwrites_what_it_removes() -> None:
    memory = memoryview(bytearray(SLOT_BYTES * 5))
    table = FileTable(memory)
    slots = [table.add(record) for record in (b"one", b"two", b"three" * 1000)]
    assert slots == [1, 2, 3]
    table.remove(2)
    assert b"two" not in bytes(memory)
    again = FileTable(memory)
    assert again.records() == [(1, b"one"), (3, b"three" * 1000)]
    assert again.add(b"x" * (SLOT_BYTES - 8)) == 2
    assert again.records()[0] == (1, b"one")
    assert FileTable(memory).records() == again.records()
    assert TABLE_BYTES % SLOT_BYTES == 0


def test_a_recipe_makes_the_same_server() -> None:
    device = RemoteFiles(4, MIB, (PAGE_SIZE, MIB), 20.0, None)
    recipe = device.recipe()
    assert RemoteFiles(**recipe.arguments).recipe() == recipe
    assert device.object_workers == 4


def test_the_name_of_a_long_url_fits(tmp_path: Path) -> None:
    name = tmp_path / ("é" * 120)
    name.write_bytes(b"content")
    shared = share(RemoteFile(name), "0" * 16, None)
    assert shared is not None
    assert len(shared.name.encode()) <= 200
    assert area_of(open_remote(name)).read() == b"content"


@pytest.mark.skipif(os.geteuid() != 0, reason="setgroups(2) needs CAP_SETGID")
def test_a_program_that_drops_groups_does_not_read_with_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")

    def drop(say: Callable[[str], None]) -> None:
        file = RemoteFile(tmp_path / "file")

        def server() -> object:
            shared = share(file, "0" * 16, None)
            assert shared is not None
            return shared.device

        os.setgroups([12345])
        before = server()
        say(f"{server() is before} ")
        os.setgroups([])
        say(f"{server() is before}")

    assert ends_by(drop) == ("True False", 0)
