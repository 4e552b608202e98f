"""A device for many clients: serve() and the command."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault._system.capabilities import UFFD_KERNEL_FAULTS
from prefault.cli import main
from prefault.device import protocol
from prefault.device.driver import Recipe
from prefault.errors import DeviceError, DeviceGoneError
from support import needs, processes
from support.children import Child, in_child
from support.devices import Pattern, Remade
from support.raw_clients import Raw, served
from support.wardens import NeverCloses, frames_of, holders_of, peek, right, roles

_ROOT = Path(prefault.__file__).parent.parent
_TESTS = Path(__file__).parents[2]


_used: set[int] = set()


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    """Where to serve; at the end nobody has anything of it."""
    path = tmp_path / "device.sock"
    _used.clear()
    yield path
    assert processes.eventually(lambda: not any(map(holders_of, _used)))
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []


def _map(path: Path) -> tuple[prefault.device.DeviceClient, prefault.device.Area]:
    client = prefault.device.connect(path)
    area = client.map()
    _used.add(frames_of(area))
    if area.user_mode_only:
        area.close()
        client.close()
        needs.missing("system calls cannot wait for a page of such memory (CAP_SYS_PTRACE)")
    return client, area


class Command:
    """``prefault device serve``, in the foreground of a session of its own."""

    def __init__(self, path: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefault", "device", "serve", *arguments, "--socket", str(path)],
            env={**os.environ, "PYTHONPATH": f"{_ROOT}:{_TESTS}"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 30)
        self.line = self.process.stdout.readline() if ready else "nothing"

    def end(self, number: int, *, group: bool = False) -> tuple[int, str]:
        (os.killpg if group else os.kill)(self.process.pid, number)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(
    "device", [Pattern(16), Recipe("support.devices:Remade", {"pages": 16})], ids=["fork", "recipe"]
)  # fmt: skip
def test_several_processes_share_a_served_device(device: Any, socket_path: Path) -> None:
    needs.capability(UFFD_KERNEL_FAULTS)  # for peek(), in the child
    with prefault.device.serve(device, socket_path) as server:
        assert server.path == str(socket_path)
        assert socket_path.stat().st_mode & 0o777 == 0o600
        assert roles()["warden"] == server.pid

        def elsewhere() -> bool:
            client, area = _map(socket_path)
            with client, area:
                return [peek(area, page) for page in range(16)] == [right(page) for page in range(16)]

        assert in_child(elsewhere)
        client, area = _map(socket_path)
        with client, area:
            assert peek(area, 3) == right(3)
            assert in_child(elsewhere)
            assert peek(area, 4) == right(4)
        repr(server)
    server.close()
    assert "closed" in repr(server)
    assert processes.eventually(lambda: not roles())


@pytest.mark.usefixtures("no_leaks")
def test_clients_outlive_the_end(socket_path: Path) -> None:
    with prefault.device.serve(Pattern(16), socket_path):
        client, area = _map(socket_path)
        prefault.populate(area, length=4 * 4096)
    assert not roles()
    assert peek(area, 3) == right(3)
    assert peek(area, 4) is None
    with pytest.raises(DeviceGoneError):
        prefault.populate(area)
    area.close()
    client.close()


def test_a_driver_that_does_not_end_is_ended(socket_path: Path) -> None:
    with prefault.device.serve(NeverCloses(16, timeout_s=0.3, restartable=True), socket_path):
        client, area = _map(socket_path)
        assert peek(area, 3) == right(3)
    assert not roles()
    assert (peek(area, 3), peek(area, 4)) == (right(3), None)
    area.close()
    client.close()


def test_a_second_server_at_the_path_is_refused(socket_path: Path) -> None:
    with prefault.device.serve(Pattern(4), socket_path):
        with pytest.raises(DeviceError, match="a server is alive at"):
            prefault.device.serve(Pattern(4), socket_path)
        client, area = _map(socket_path)
        assert peek(area, 1) == right(1)
        area.close()
        client.close()


def test_no_place_for_the_socket(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none" / "s", "there is no directory"),
        (tmp_path, "is a directory"),
        (tmp_path / ("x" * 99), "80 bytes"),
    ):
        with pytest.raises(DeviceError, match=message):
            prefault.device.serve(Pattern(4), path)
    assert processes.eventually(lambda: not roles())


def test_it_ends_with_its_owner(socket_path: Path) -> None:
    def owner() -> None:
        server = prefault.device.serve(Pattern(4), socket_path)
        time.sleep(30)
        server.close()

    with Child(owner) as child:
        assert processes.eventually(lambda: len(roles(child.pid)) == 2 and socket_path.exists())
        pids = roles(child.pid).values()
        client, area = _map(socket_path)
    assert processes.eventually(lambda: not any(map(processes.alive, pids)))
    assert peek(area, 1) is None
    area.close()
    client.close()


def test_it_ends_with_its_owner_though_a_fork_of_that_lives(socket_path: Path) -> None:
    """Which has the owner's end of the connection to the warden."""
    with Child(lambda: _owner_with_fork(socket_path)) as child:
        assert processes.eventually(lambda: len(roles(child.pid)) == 2 and len(processes.children(child.pid)) == 2)
        pids = set(roles(child.pid).values())
        (fork,) = processes.children(child.pid) - pids
        client, area = _map(socket_path)
    try:
        assert processes.eventually(lambda: not any(map(processes.alive, pids)))
        assert processes.alive(fork)
    finally:
        os.kill(fork, signal.SIGKILL)
    area.close()
    client.close()


def _owner_with_fork(path: Path) -> None:
    with prefault.device.serve(Pattern(4), path):
        if not os.fork():
            try:
                time.sleep(60)
            finally:
                os._exit(0)
        time.sleep(60)


def test_it_ends_when_it_is_forgotten_though_a_fork_has_its_socket(socket_path: Path) -> None:
    server = prefault.device.serve(Pattern(4), socket_path)
    pid = server.pid
    with Child(lambda: time.sleep(60)):
        del server
        assert processes.eventually(lambda: not processes.alive(pid))


def test_a_fork_has_no_say(socket_path: Path) -> None:
    with prefault.device.serve(Pattern(4), socket_path) as server:
        in_child(server.close)
        client, area = _map(socket_path)
        assert peek(area, 1) == right(1)
        area.close()
        client.close()


def test_close_after_the_warden_was_killed(socket_path: Path) -> None:
    with prefault.device.serve(Remade(8), socket_path) as server:
        client, area = _map(socket_path)
        found = roles()
        os.kill(server.pid, signal.SIGKILL)
        assert processes.eventually(lambda: processes.children(found["server"]) != set())
        prefault.populate(area, length=4096)  # answered when all is handed over
        os.kill(found["server"], signal.SIGKILL)
        assert peek(area, 1) == right(1)
        later, second = _map(socket_path)  # the next server listens as well
        assert peek(second, 2) == right(2)
        for each in (second, later, area, client):
            each.close()


def test_close_after_all_was_killed(socket_path: Path) -> None:
    with prefault.device.serve(Remade(8), socket_path) as server:
        found = roles()
        for number in (signal.SIGSTOP, signal.SIGKILL):
            os.kill(server.pid, number)
            os.kill(found["server"], number)
        assert processes.eventually(lambda: not any(map(processes.alive, found.values())))


# --- who may come

_NOBODY = 65534


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One in which other users may make files, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="prefault-serving-") as name:
        os.chmod(name, 0o777)
        yield Path(name)


def _server() -> int:
    (server,) = (pid for pid in processes.descendants(os.getpid()) if processes.name(pid) == "prefault-server")
    return server


def _connected_as_nobody(directory: Path) -> str:
    os.chdir(directory)
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    with pytest.raises(DeviceGoneError) as caught:
        prefault.device.connect("s")
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o666, 0o777])
@pytest.mark.parametrize("first", ["server", "client"])
def test_another_user_gets_the_reason_in_either_order_of_events(
    open_directory: Path, no_leaks: None, first: str, mode: int
) -> None:
    """Where the client's Hello lies unread when the server hangs up, the kernel answers with ECONNRESET."""
    needs.root("become another user")

    with served(open_directory) as path:
        os.chmod(path, mode)
        server = _server()
        if first == "client":
            os.kill(server, signal.SIGSTOP)
        try:
            with Child(lambda: _connected_as_nobody(open_directory)) as child:
                assert processes.eventually(lambda: child.ended() if first == "server" else _waits(child.pid))
                os.kill(server, signal.SIGCONT)
                said = child.result()
        finally:
            os.kill(server, signal.SIGCONT)
    assert f"no device at {path}: " in said
    assert f"it serves user {os.geteuid()}, not user {_NOBODY}" in said


def _waits(pid: int) -> bool:
    """Whether a client has said Hello: it has a userfaultfd, and sleeps."""
    with contextlib.suppress(FileNotFoundError):
        stat_line = Path(f"/proc/{pid}/stat").read_text()
        return any("userfaultfd" in held for held in processes.descriptors(pid)) and " S " in stat_line
    return False


def test_the_reason_of_a_rejection_is_heard_whatever_else_was_said(tmp_path: Path, no_leaks: None) -> None:
    with served(tmp_path) as path:
        server = _server()
        with Raw(path) as raw:
            os.kill(server, signal.SIGSTOP)
            try:
                for _ in range(5):
                    raw.say(b"nonsense")
            finally:
                os.kill(server, signal.SIGCONT)
            hung_up = select.poll()
            hung_up.register(raw.socket, 0)
            assert hung_up.poll(10_000)
            (reply,) = raw.hear_all()
            assert isinstance(reply, protocol.Refused)
            assert reply.kind == "protocol"


# --- the command


def test_the_command_serves_until_it_is_told_to_end(socket_path: Path) -> None:
    with Command(socket_path, "support.devices:Remade", "--arg", "pages=16", "--arg", "writable=false") as command:
        assert command.line == f"serving Remade, 64.0 KiB in pages of 4.0 KiB, at {socket_path}\n"
        client, area = _map(socket_path)
        assert client.length == 16 * 4096
        prefault.populate(area, length=4096)
        assert command.end(signal.SIGTERM) == (0, "")
        assert (peek(area, 0), peek(area, 1)) == (right(0), None)
        area.close()
        client.close()


def test_ctrl_c_ends_it(socket_path: Path) -> None:
    with Command(socket_path, "support.devices:Pattern") as command:
        client, area = _map(socket_path)
        assert peek(area, 5) == right(5)
        assert command.end(signal.SIGINT, group=True) == (0, "")
        assert (peek(area, 5), peek(area, 6)) == (right(5), None)
        area.close()
        client.close()


def test_it_serves_on_after_a_ctrl_c_that_its_caller_ignores(socket_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        command = Command(socket_path, "support.devices:Pattern")
    finally:
        signal.signal(signal.SIGINT, before)
    with command:
        client, area = _map(socket_path)
        os.killpg(command.process.pid, signal.SIGINT)
        assert peek(area, 5) == right(5)
        assert command.end(signal.SIGTERM) == (0, "")
        area.close()
        client.close()


def test_its_clients_are_served_on_when_it_is_killed(socket_path: Path) -> None:
    with Command(socket_path, "support.devices:Remade") as command:
        client, area = _map(socket_path)
        assert peek(area, 1) == right(1)
        command.process.kill()
        command.process.wait(30)  # not for the end of its stderr, which the server has too
        assert processes.eventually(lambda: not socket_path.exists())
        assert peek(area, 2) == right(2)
        with Command(socket_path, "support.devices:Remade") as second:  # the path is free for whoever starts it again
            assert second.end(signal.SIGTERM)[0] == 0
        assert peek(area, 3) == right(3)
        area.close()
        client.close()


def test_its_exit_status_tells_that_the_driver_was_lost(socket_path: Path) -> None:
    with Command(socket_path, "support.devices:Pattern") as command:
        assert processes.eventually(lambda: "server" in roles(command.process.pid))
        os.kill(roles(command.process.pid)["server"], signal.SIGKILL)
        _, errors = command.process.communicate(timeout=30)
        assert command.process.returncode == 1
        assert "the driver's process was ended by SIGKILL" in errors


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["nowhere:Device"], 1, "there is no module nowhere on sys.path"),
        (["support.devices"], 2, "'package.module:name', not 'support.devices'"),
        (["support.devices:Pattern", "--arg", "pages"], 2, "--arg takes NAME=VALUE, not 'pages'"),
        (["support.devices:Pattern", "--arg", "pages=1", "--arg", "pages=2"], 2, "--arg pages is given twice"),
        (["support.devices:Pattern", "--arg", "pages=many"], 1, "support.devices:Pattern cannot be made: TypeError"),
        (["support.devices:content", "--arg", "page=1"], 1, "is no device: bytes is not a prefault.device.Device"),
    ],
)  # fmt: skip
def test_the_command_names_the_error(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    assert main(["device", "serve", *arguments, "--socket", str(path)]) == status
    assert message in capsys.readouterr().err
    assert not path.exists()
