"""``prefault device serve`` with paths and devices that cannot be: one sentence says what is the matter, and what to do."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr
from pathlib import Path

import pytest

import prefault.device
from prefault.cli import device, main
from prefault.device.process import serving, startup
from support import needs
from support.children import in_child
from support.devices import Pattern

LOADED = (device, startup, serving)
"""Here, as another user may not read what Python is made of."""

_NOBODY = 65534
_GOOD = "support.devices:Pattern"


@pytest.fixture
def directory() -> Iterator[Path]:
    """One that other users may enter, which those of pytest are not."""
    with tempfile.TemporaryDirectory(prefix="prefault-cli-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


def _told(what: str, path: str, *arguments: str, user: int | None = None) -> tuple[int, str]:
    """The exit status, and what it says: one line of one sentence, in a process of its own."""

    def run() -> tuple[int, str]:
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        errors = io.StringIO()
        with redirect_stderr(errors):
            status = main(["device", "serve", what, *arguments, "--socket", path])
        return status, errors.getvalue()

    status, text = in_child(run)
    assert re.fullmatch(r"prefault: [^\n]+\n", text), text
    assert "Traceback" not in text
    assert not re.search(r"^prefault: \[Errno|\[E[A-Z]+: ", text), text  # a number that is no help
    return status, text.removeprefix("prefault: ").rstrip("\n")


# --- where


def _bound(path: Path, kind: socket.SocketKind, *, alive: bool) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, kind)
    with ExitStack() as unless_alive:
        unless_alive.callback(bound.close)
        bound.bind(str(path))
        if alive:
            if kind != socket.SOCK_DGRAM:
                bound.listen(1)
            unless_alive.pop_all()
    return bound


def _file(directory: Path) -> str:
    (directory / "file").write_text("precious")
    return str(directory / "file")


def _dangling(directory: Path) -> str:
    (directory / "link").symlink_to("nowhere")
    return str(directory / "link")


def _loop(directory: Path) -> str:
    (directory / "loop").symlink_to("loop")
    return str(directory / "loop" / "s")


_PATHS: dict[str, tuple[Callable[[Path], str], str, int]] = {
    "no directory": (lambda at: f"{at}/none/s", "can be made at {at}/none/s: there is no directory {at}/none: make it", 1),
    "a file": (_file, "{at}/file exists and is not a socket: choose another path", 1),
    "in a file": (lambda at: _file(at) + "/s", "made at {at}/file/s: {at}/file is not a directory", 1),
    "a directory": (str, "{at} is a directory: give the path of a socket to make, such as {at}/device.sock", 1),
    "a directory, and a slash": (lambda at: f"{at}/", "{at} is a directory: give the path of a socket", 1),
    "the root": (lambda at: "/", "/ is a directory: give the path of a socket to make, such as /device.sock", 1),
    "nothing": (lambda at: "", "--socket takes the path of the socket to make, not an empty one", 2),
    "a link to nothing": (_dangling, "{at}/link exists and is not a socket: choose another path", 1),
    "a loop": (_loop, "made at {at}/loop/s: {at}/loop is a symbolic link that leads to itself: choose another path", 1),
    "a long name": (lambda at: f"{at}/{'n' * 81}", "at most 80 bytes, and that of {at}/nnnn", 2),
    "a longer name": (lambda at: f"{at}/{'n' * 300}/s", "is too long for the file system: choose a shorter one", 1),
    "a longer path": (lambda at: f"{at}{'/tmp' * 1100}/s", "is too long for the file system: choose a shorter one", 1),
    "procfs": (lambda at: "/proc/s", "made at /proc/s: /proc does not take one (No such file or directory): choose", 1),
}  # fmt: skip


@pytest.mark.parametrize("user", [None, _NOBODY], ids=["self", "nobody"])
@pytest.mark.parametrize("name", _PATHS)
def test_a_path_that_cannot_be(name: str, user: int | None, directory: Path) -> None:
    if user is not None:
        needs.root("become another user")
    make, message, status = _PATHS[name]
    path = make(directory)
    before = sorted(directory.rglob("*"))
    told = _told(_GOOD, path, user=user)
    assert told[0] == status
    assert message.format(at=directory) in told[1]
    assert len(told[1]) < 1000
    assert sorted(directory.rglob("*")) == before


def test_a_directory_of_another_user(directory: Path) -> None:
    needs.root("become another user")
    status, text = _told(_GOOD, f"{directory}/s", user=_NOBODY)
    assert status == 1
    assert f"user {_NOBODY} may not do so in {directory}, which belongs to user 0 and has mode 755: choose" in text
    directory.chmod(0o700)
    assert f"user {_NOBODY} may not do so in {directory}, which belongs" in _told(_GOOD, f"{directory}/s", user=_NOBODY)[1]
    (directory / "within").mkdir()
    assert f"may not do so in {directory}/within: choose" in _told(_GOOD, f"{directory}/within/s", user=_NOBODY)[1]


@pytest.mark.parametrize("mode", [0o777, 0o1777])
@pytest.mark.parametrize("alive", [True, False])
def test_a_socket_of_another_user(directory: Path, mode: int, alive: bool) -> None:
    needs.root("become another user")
    directory.chmod(mode)
    path = directory / "s"
    with _bound(path, socket.SOCK_SEQPACKET, alive=alive):
        path.chmod(0o600)
        status, text = _told(_GOOD, str(path), user=_NOBODY)
        assert (status, path.owner()) == (1, "root")
    assert f"{path} is a socket of user 0, and user {_NOBODY} may not see whether a server is alive there: choose" in text


def test_a_stale_socket_of_another_user_that_all_may_ask(directory: Path) -> None:
    needs.root("become another user")
    directory.chmod(0o1777)
    path = directory / "s"
    _bound(path, socket.SOCK_SEQPACKET, alive=False)
    path.chmod(0o666)
    status, text = _told(_GOOD, str(path), user=_NOBODY)
    assert status == 1
    assert f"no socket can be made at {path}: user {_NOBODY} may not do so in {directory}, which belongs to user 0" in text
    assert os.listdir(directory) == ["s"]


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_a_server_that_lives_there(directory: Path, kind: socket.SocketKind) -> None:
    path = directory / "s"
    with _bound(path, kind, alive=True):
        assert _told(_GOOD, str(path)) == (
            1, f"a server is alive at {path}: connect to it, or choose another path"
        )  # fmt: skip


def test_a_file_system_that_takes_nothing(small_tmpfs: Callable[[str], Path]) -> None:
    mounted = small_tmpfs("64k")
    subprocess.run(["mount", "-o", "remount,nr_inodes=1", mounted], check=True)
    assert f"made at {mounted}/s: no space is left for a file in {mounted}: make room" in _told(_GOOD, f"{mounted}/s")[1]
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    status, text = _told(_GOOD, f"{mounted}/s")
    assert (status, text) == (
        1, f"no socket can be made at {mounted}/s: {mounted} is on a read-only file system: choose a path on another"
    )  # fmt: skip


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_what_a_dead_server_left_is_replaced_at_a_path_of_any_length(directory: Path, kind: socket.SocketKind) -> None:
    deep = directory / ("d" * 90) / ("e" * 90)
    deep.mkdir(parents=True)
    path = deep / "s"
    before = os.getcwd()
    os.chdir(deep)
    try:
        _bound(Path("s"), kind, alive=False)
    finally:
        os.chdir(before)
    with prefault.device.serve(Pattern(4), path), prefault.device.connect(path) as client:
        assert client.length == Pattern(4).length


# --- what

_MODULE = """
import prefault.device

class Good(prefault.device.Device):
    length = 1 << 20

    def fault(self, area, page, access):
        return prefault.device.ZERO

class Unfinished(prefault.device.Device):
    length = 4096

class Empty(Good):
    length = 0

class Raising(Good):
    def __init__(self):
        raise RuntimeError("no such disk:" + chr(10) + "  /dev/none")

class Exiting(Good):
    def __init__(self):
        raise SystemExit(0)

class Alarm(BaseException):
    pass

class Alarming(Good):
    def __init__(self):
        raise Alarm("all is lost")

class Mute(Exception):
    def __str__(self):
        raise ValueError("nothing to say")

class Muted(Good):
    def __init__(self):
        raise Mute

class Needing(Good):
    def __init__(self, path, size):
        self.path, self.length = path, size

class Endless(Good):
    length = 1 << 61

class Other:
    pass

number = 5
made = Good()

def nothing():
    return None

def raising():
    raise OSError("no such bus")
"""
_NAME_ONE = (
    "name a class made from prefault.device.Device (made_up has Alarming, Empty, Endless, Exiting, Good), or a function"
)


@pytest.fixture
def modules(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in {
        "made_up": _MODULE, "exits": "import sys; sys.exit('not today')", "alarms": "class A(BaseException): pass\nraise A",
        "lacks": "import no_such_thing", "broken": "def", "empty": "",
    }.items():  # fmt: skip
        (directory / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return directory


@pytest.mark.parametrize("user", [None, _NOBODY], ids=["self", "nobody"])
@pytest.mark.parametrize(
    ("factory", "status", "message"),
    [
        ("nowhere:X", 1, "there is no module nowhere on sys.path: set PYTHONPATH to the directory that holds it"),
        ("made_up.py:Good", 1, "name the module without .py, and set PYTHONPATH to the directory that holds it"),
        ("made_up.inner:X", 1, "there is no module made_up.inner on sys.path: set PYTHONPATH"),
        ("lacks:X", 1, "there is no module no_such_thing on sys.path, which lacks imports: install it"),
        ("broken:X", 1, "the device broken:X cannot be made: to import broken failed: SyntaxError: invalid syntax"),
        ("exits:X", 1, "the device exits:X cannot be made: to import exits failed: SystemExit: not today"),
        ("alarms:X", 1, "the device alarms:X cannot be made: it raised A"),
        ("empty:X", 1, "empty has no X: name a class made from prefault.device.Device, or a function"),
        ("made_up:Nope", 1, f"made_up has no Nope: {_NAME_ONE}"),
        ("made_up:Other", 1, f"Other is not a prefault.device.Device: {_NAME_ONE}"),
        ("made_up:nothing", 1, f"NoneType is not a prefault.device.Device: {_NAME_ONE}"),
        ("made_up:number", 1, f"'int' object is not callable: {_NAME_ONE}"),
        ("made_up:made", 1, f"'Good' object is not callable: {_NAME_ONE}"),
        ("made_up:Unfinished", 1, "made_up:Unfinished cannot be made: TypeError: Can't instantiate abstract class"),
        ("made_up:Empty", 1, "Empty.length is at least 1 byte and at most"),
        ("made_up:Endless", 1, "made_up:Endless: cannot create frames of 2.0 EiB"),
        ("made_up:Raising", 1, "made_up:Raising cannot be made: RuntimeError: no such disk: /dev/none"),
        ("made_up:raising", 1, "made_up:raising cannot be made: OSError: no such bus\n"),
        ("made_up:Exiting", 1, "made_up:Exiting cannot be made: SystemExit: 0"),
        ("made_up:Alarming", 1, "made_up:Alarming cannot be made: it raised Alarm"),
        ("made_up:Muted", 1, "made_up:Muted cannot be made: it raised ValueError"),
        ("made_up:Needing", 1, "missing 2 required positional arguments: 'path' and 'size': --arg NAME=VALUE gives"),
        ("made_up", 2, "the factory of a device is named 'package.module:name', not 'made_up'"),
        ("./made_up.py:Good", 2, "is named 'package.module:name', not './made_up.py:Good'"),
        ("", 2, "is named 'package.module:name', not ''"),
    ],
)  # fmt: skip
def test_a_device_that_cannot_be(modules: Path, factory: str, status: int, message: str, user: int | None) -> None:
    if user is not None:
        needs.root("become another user")
        modules.chmod(0o777)
    told = _told(factory, f"{modules}/s", user=user)
    assert told[0] == status
    assert message in told[1] + "\n"
    assert factory in told[1]
    assert not (modules / "s").exists()


def test_a_module_that_may_not_be_read(modules: Path) -> None:
    needs.root("become another user")
    (modules / "made_up.py").chmod(0o600)
    status, text = _told("made_up:Good", f"{modules}/s", user=_NOBODY)
    assert status == 1
    assert f"to import made_up failed: PermissionError: [Errno 13] Permission denied: '{modules}/made_up.py'" in text
