"""Fork: a child gets a clean signal and never zeros, or maps again; exec and exit clean up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.errors import DeviceGoneError
from prefault.sizes import PAGE_SIZE
from support import needs, oracle, processes
from support.children import in_child
from support.devices import Pattern, Remade, Slow, expected

pytestmark = pytest.mark.usefixtures("no_leaks")


def _ends_by(function: Callable[[], object]) -> int:
    """The signal that ends a fork which calls the function; 0 if it comes back."""
    import faulthandler

    pid = os.fork()
    if not pid:
        faulthandler.disable()
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code <= 0
    return -code


@pytest.mark.parametrize("populated", [False, True])
def test_touching_in_a_child_is_a_signal(populated: bool) -> None:
    with prefault.device.map(Pattern(4, writable=True), populate=populated) as area:
        view = area.memoryview()
        assert _ends_by(lambda: view[0]) == signal.SIGSEGV

        def write() -> None:
            view[0] = 1

        assert _ends_by(write) == signal.SIGSEGV
        assert view[0] == expected(Pattern(4), 0)[0]
        view.release()


def test_nothing_else_ever_lies_where_the_area_was() -> None:
    with prefault.device.map(Pattern(64)) as area:
        view = area.memoryview()
        address, length = area.address, len(area)

        def fill() -> bool:
            import mmap

            kept = [mmap.mmap(-1, length) for _ in range(200)]
            lines = Path("/proc/self/maps").read_text().splitlines()
            found = [line for line in lines if int(line.split("-")[0], 16) < address + length]
            inside = [line for line in found if int(line.split("-")[1].split()[0], 16) > address]
            assert len(kept) == 200
            return [line.split()[1][:3] for line in inside] == ["---"]

        assert in_child(fill)
        view.release()


def test_calls_in_a_child_say_what_to_do() -> None:
    device = Pattern(4)
    with prefault.device.map(device) as area:

        def call() -> list[str]:
            said = []
            view = area.memoryview
            for what in (
                area.populate, area.stats, area.ndarray, area.access_log, area.read, area.discard, area.lock, view,
                lambda: prefault.populate(area), lambda: area.protect("read"),
            ):  # fmt: skip
                try:
                    what()
                except DeviceGoneError as error:
                    said.append(str(error))
            repr(area)
            area.close()
            return said

        said = in_child(call)
        assert len(said) == 10
        assert all("map the device again here" in text for text in said)
        assert area.read() == b"".join(expected(device, page) for page in range(4))


def test_a_view_in_a_child_is_not_populated_behind_its_back() -> None:
    with prefault.device.map(Pattern(4)) as area, area.memoryview() as view:

        def call() -> str:
            try:
                prefault.populate(view)
            except DeviceGoneError as error:
                return str(error)
            return ""

        assert "map the device again here" in in_child(call)


@pytest.mark.parametrize("device", [Pattern(8), Remade(8)], ids=["fork", "recipe"])
def test_a_child_maps_again(device: Pattern) -> None:
    with prefault.device.map(device, populate=True) as area:

        def again() -> bytes:
            with prefault.device.map(device) as mine:
                return mine.read()

        everything = b"".join(expected(device, page) for page in range(8))
        assert in_child(again) == everything
        assert area.read() == everything


def test_a_child_keeps_none_of_our_descriptors() -> None:
    outside = oracle.descriptors()
    with prefault.device.map(Pattern(4)) as area:
        ours = {line.split()[0] for line in oracle.descriptors() - outside if "/proc/" not in line}
        assert len(ours) >= 4

        def left() -> list[str]:
            return [line for line in oracle.descriptors() if line.split()[0] in ours and "pipe:" not in line]

        assert in_child(left) == []
        assert area.read(0, 1)


def test_a_child_that_ends_does_not_harm_the_others() -> None:
    device = Pattern(16)
    with prefault.device.map(device) as area:
        for _ in range(5):
            assert _ends_by(lambda: None) == 0
            assert _ends_by(lambda: os.kill(os.getpid(), signal.SIGKILL)) == signal.SIGKILL
        assert area.read() == b"".join(expected(device, page) for page in range(16))


def test_a_fork_in_the_middle_of_requests() -> None:
    import threading

    device = Pattern(256, batch_pages=1)
    with prefault.device.map(device) as area:
        stop = False

        def ask() -> None:
            while not stop:
                area.populate()
                area.discard()

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            for _ in range(10):

                def again() -> bool:
                    with prefault.device.map(device, PAGE_SIZE) as mine:
                        return mine.read() == expected(device, 0)

                assert in_child(again)
        finally:
            stop = True
            thread.join()


def _script(text: str, *, status: int = 0) -> str:
    source = str(Path(prefault.__file__).parents[1])
    tests = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": f"{source}:{tests}", "PREFAULT_TEST_EXIT": str(os.getpid())},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


def _wait_for_the_end() -> None:
    """Of the processes that the script started: they notice by themselves."""
    give_up = time.monotonic() + 10
    while left := processes.with_environment(f"PREFAULT_TEST_EXIT={os.getpid()}"):
        assert time.monotonic() < give_up, left
        time.sleep(0.01)


@pytest.mark.parametrize(
    "end",
    [
        "", "del area", "array = area.ndarray(); array[0]", "area.close()", "raise SystemExit(0)", "import os; os._exit(0)",
        "import atexit; array = area.ndarray(); atexit.register(lambda: print(array[-1]))",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), area.read())).start()",
    ],
)  # fmt: skip
def test_however_a_process_ends_its_server_does_too(end: str) -> None:
    _script(
        f"""
        import prefault.device
        from support.devices import Pattern
        area = prefault.device.map(Pattern(4), populate=True)
        {end}
        """
    )
    _wait_for_the_end()


def test_when_server_and_warden_are_killed_at_once_the_client_is_ended_and_does_not_hang() -> None:
    device = Slow(4, delay_s=60.0)

    def touch() -> None:
        area = prefault.device.map(device)
        ours = processes.descendants(os.getpid())
        assert len(ours) == 2
        if not os.fork():  # as nobody in this process can, while it waits for the page
            time.sleep(0.2)
            for pid in ours:
                os.kill(pid, signal.SIGSTOP)
            for pid in ours:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        area.memoryview()[0]

    began = time.monotonic()
    assert _ends_by(touch) == signal.SIGBUS
    assert time.monotonic() - began < 20  # not the driver's 60 s


def test_exec_ends_the_server() -> None:
    out = _script(
        """
        import os, sys, prefault.device
        from support.devices import Pattern
        area = prefault.device.map(Pattern(4), populate=True)
        os.execv(sys.executable, [sys.executable, "-c", "import os; print(sorted(os.listdir('/proc/self/fd')))"])
        """
    )
    assert out.strip() == "['0', '1', '2', '3']"
    _wait_for_the_end()


def test_a_server_that_is_a_fork_keeps_no_port_of_the_program_taken(tmp_path: Path) -> None:
    """A program that ends in the middle of a driver's call can be started again at once, at the same port."""
    program = """
        import os, socket, sys, threading
        import prefault.device
        from pathlib import Path

        class Waiting(prefault.device.Device):
            length = 65536

            def fault(self, area, page, access):
                Path(sys.argv[1]).touch()
                while not Path(sys.argv[2]).exists():
                    threading.Event().wait(0.01)

        listener = socket.create_server(("127.0.0.1", 0))
        area = prefault.device.map(Waiting())
        threading.Thread(target=area.populate, daemon=True).start()
        while not Path(sys.argv[1]).exists():
            threading.Event().wait(0.01)
        print(listener.getsockname()[1], flush=True)
        os._exit(0)
    """
    called, go_on = tmp_path / "called", tmp_path / "go-on"
    mark = f"PREFAULT_TEST_PORT={tmp_path}"
    with open(tmp_path / "out", "w+") as out:  # no pipe: the fork holds it
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program), called, go_on],
            stdout=out, timeout=60, check=True, env=os.environ | dict([mark.split("=", 1)]),
        )  # fmt: skip
        out.seek(0)
        port = int(out.read())
    try:
        assert processes.with_environment(mark)
        socket.create_server(("127.0.0.1", port)).close()
    finally:
        go_on.touch()
    deadline = time.monotonic() + 30
    while processes.with_environment(mark):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_program_with_a_socket_that_has_no_name() -> None:
    try:
        nameless = socket.socket(44, socket.SOCK_RAW)  # AF_XDP
    except OSError as error:
        needs.missing(f"no socket without a name is to be had: {error}")
    with nameless, prefault.device.map(Pattern()) as area:
        area.read(0, 1)
