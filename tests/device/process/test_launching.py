"""How the processes of a device are started, from whatever program, and what goes wrong then."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault._system.capabilities import UFFD_KERNEL_FAULTS
from prefault.device import recipes, spawning
from prefault.device.driver import Recipe
from prefault.device.process.launching import launch
from prefault.errors import DeviceError
from support import needs, processes
from support.devices import Pattern, Remade, expected
from support.wardens import everything, roles

_ROOT = Path(prefault.__file__).parent.parent
_TESTS = Path(__file__).parents[2]


class _ByRecipe(Pattern):
    def __init__(self, recipe: Any) -> None:
        super().__init__(4)
        self._recipe = recipe

    def recipe(self) -> Recipe | None:
        return self._recipe  # type: ignore[no-any-return]


def _end(launched: Any) -> None:
    launched.connection.close()
    assert launched.reap(20)


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("device", [Pattern(8), Remade(8)], ids=["fork", "recipe"])
def test_a_warden_and_a_server_start_and_end_with_the_connection(device: Pattern) -> None:
    launched = launch(device)
    assert roles() == {"warden": launched.pid, "server": launched.server_pid}
    assert launched.connection.type == socket.SOCK_SEQPACKET
    assert not launched.connection.get_inheritable()
    assert os.getsid(launched.pid) == launched.pid
    assert not launched.reap(0)
    _end(launched)
    assert launched.reap(0)
    assert processes.eventually(lambda: not processes.alive(launched.server_pid))
    with pytest.raises(ChildProcessError):  # no zombie: it is not our child any more
        os.waitpid(launched.pid, os.WNOHANG)


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        (Recipe("nowhere.at.all:Device"), DeviceError, "there is no module nowhere"),
        (Recipe("support.devices:Nothing"), DeviceError, "support.devices has no Nothing"),
        (Recipe("support.wardens:raising"), DeviceError, "LookupError: no such thing"),
        (Recipe("support.wardens:leaving"), DeviceError, "SystemExit: enough"),
        (Recipe("support.wardens:vanishing"), DeviceError, "ended while the device was made"),
        (Recipe("support.wardens:a_number"), DeviceError, "makes is no device: int is not a prefault.device.Device"),
        (Recipe("support.wardens:lengthless"), DeviceError, "makes is no device: Pattern.length is at least 1 byte"),
        (Recipe("support.devices:Pattern", {"pages": 1 << 60}), DeviceError, "length is at least 1 byte and at most"),
        (Recipe("support.devices:Pattern", {"pages": 1 << 49}), DeviceError, "cannot create frames of"),
        (Recipe("support.devices:Remade", {"colour": 1}), DeviceError, "TypeError.*colour"),
        (Recipe("test_launch"), ValueError, "'package.module:name', not 'test_launch'"),
        (Recipe("os:path.join"), ValueError, "'package.module:name'"),
        (Recipe("__main__:Device"), ValueError, "move the class into a module"),
        (Recipe("a:b", {"when": datetime.date(2026, 1, 1)}), TypeError, r"arguments\['when'\] of a recipe is date"),
        (Recipe("a:b", {"pair": [(1, 2)]}), TypeError, r"arguments\['pair'\]\[0\] of a recipe is tuple"),
        (Recipe("a:b", {"of": {1: 2}}), TypeError, "str as keys"),
        (Recipe("a:b", {"n": 1 << 64}), TypeError, "more than 64 bits"),
        (("a:b", {}), TypeError, r"recipe\(\) returns a prefault.device.Recipe or None, not tuple"),
    ],
)
def test_a_recipe_that_leads_to_no_device(recipe: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        launch(_ByRecipe(recipe))
    assert processes.eventually(lambda: not roles())


def test_all_kinds_of_arguments_arrive() -> None:
    _end(launch(_ByRecipe(Recipe("support.wardens:of_everything", everything()))))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("length", 0, ValueError),
        ("length", "4096", TypeError),
        ("length", True, TypeError),
        ("page_size", 8192, ValueError),
        ("workers", -1, ValueError),
        ("batch", 0, ValueError),
        ("timeout_s", 0, ValueError),
        ("timeout_s", float("nan"), ValueError),
        ("capacity", 100, ValueError),
        ("fault_around", 4096, ValueError),
    ],
)
def test_a_device_with_a_wrong_attribute_is_refused_before_anything_starts(
    name: str, value: Any, error: type[Exception]
) -> None:
    device = Pattern(4)
    setattr(device, name, value)
    with pytest.raises(error, match=rf"Pattern\.{name}"):
        launch(device)


def test_a_device_without_a_length() -> None:
    device = Pattern(4)
    del device.length
    with pytest.raises(TypeError, match=r"Pattern\.length is a number of bytes, set by __init__"):
        recipes.check_device_attributes(device)


def test_other_threads_at_the_time_of_the_fork() -> None:
    """Notebooks have some. With Python 3.12 a warning would be an error here."""
    stop = threading.Event()
    others = [threading.Thread(target=stop.wait) for _ in range(4)]
    for other in others:
        other.start()
    found: list[bytes] = []

    def elsewhere() -> None:
        with prefault.device.map(Pattern(4)) as area, area.memoryview() as view:
            found.append(bytes(view[:4096]))

    try:
        worker = threading.Thread(target=elsewhere)
        worker.start()
        worker.join(20)
        assert found == [expected(Pattern(4), 0)]
    finally:
        stop.set()
        for other in others:
            other.join()


@pytest.mark.usefixtures("no_leaks")
def test_signal_handlers_of_the_program_do_not_run_in_its_forks() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda *_: calls.append(os.getpid()))
    ignored = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with prefault.device.map(Pattern(4)) as area, area.memoryview() as view:
            assert bytes(view[:4096]) == expected(Pattern(4), 0)
            for pid in roles().values():
                status = Path(f"/proc/{pid}/status").read_text()
                caught = int(status.partition("SigCgt:")[2].split()[0], 16)
                assert not caught >> (signal.SIGUSR1 - 1) & 1
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGCHLD, ignored)
    assert not calls


# --- other programs


def _run(*command: str, text: str = "", path: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path} if path else {**os.environ}
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=60, env=environment, **options
    )  # fmt: skip


_OWN = textwrap.dedent(
    """
    import prefault, prefault.device
    class Ones(prefault.device.Device):
        length = 65536
        def fault(self, area, page, access):
            area.frame(page)[:] = b"1" * 4096

    area = prefault.device.map(Ones())
    view = area.memoryview()
    print(bytes(view[4096:4099]))
    view.release()
    print(prefault.populate(area).bytes)
    """
)


def test_a_script_on_the_standard_input() -> None:
    done = _run(sys.executable, text=_OWN)
    assert (done.stdout, done.stderr, done.returncode) == ("b'111'\n61440\n", "", 0)


def test_an_interactive_interpreter() -> None:
    done = _run(sys.executable, "-i", "-q", text=_OWN.replace("\narea =", "\n\narea ="))
    assert done.stdout == "b'111'\n61440\n"
    assert done.returncode == 0
    assert "Error" not in done.stderr


def test_with_the_standard_descriptors_closed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    for factory in ("Pattern(4)", "Remade(4)"):
        script.write_text(
            "import prefault.device, sys\nfrom support.devices import *\n"
            f"with prefault.device.map({factory}) as area, area.memoryview() as view:\n"
            f"    sys.exit(0 if bytes(view[:4096]) == expected({factory}, 0) else 1)\n"
        )
        done = _run("sh", "-c", f"exec {sys.executable} {script} <&- >&- 2>&-", path=f"{_ROOT}:{_TESTS}")
        assert done.returncode == 0


def test_a_module_that_is_only_on_sys_path(tmp_path: Path) -> None:
    """Nothing of it is in the environment or installed where the interpreter looks."""
    (tmp_path / "only_here.py").write_text(
        "from prefault.device import *\n"
        "class Here(Device):\n"
        "    length = 4096\n"
        "    def recipe(self): return Recipe('only_here:Here')\n"
        "    def fault(self, area, page, access): area.frame(page)[:] = b'h' * 4096\n"
    )
    done = _run(
        sys.executable,
        "-c",
        f"import sys; sys.path.append({str(tmp_path)!r}); import prefault.device, only_here\n"
        "with prefault.device.map(only_here.Here()) as area, area.memoryview() as view: print(bytes(view[:2]))",
        path=str(_ROOT),
    )
    assert (done.stdout, done.stderr) == ("b'hh'\n", "")


def test_the_path_to_prefault_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(_ROOT)])
    assert spawning.search_path() == [str(_ROOT), *sys.path]
    monkeypatch.setattr(sys, "path", [*sys.path, str(_ROOT), Path("/")])
    assert spawning.search_path() == sys.path[:-1]


def test_a_program_that_has_python_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("", None, "/usr/bin/some-editor"):
        monkeypatch.setattr(sys, "executable", name)
        _end(launch(Remade(4)))
    monkeypatch.setattr(sys, "executable", "")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: "/nowhere")
    monkeypatch.setattr(sysconfig, "get_config_var", lambda _: "/nowhere")
    with pytest.raises(DeviceError, match=r"no Python interpreter was found .*sys\.executable is ''"):
        launch(Remade(4))


def test_what_a_driver_prints_is_not_the_output_of_the_program() -> None:
    done = _run(
        sys.executable,
        "-c",
        "import prefault.device; from support.wardens import *\n"
        "with prefault.device.map(Chatty(4)) as area, area.memoryview() as view: print(view[0])",
        text="not the driver's to read",
        path=f"{_ROOT}:{_TESTS}",
    )
    assert (done.stdout, done.stderr) == (f"{expected(Pattern(4), 0)[0]}\n", "from the driver\n")


def test_ctrl_c_is_the_programs() -> None:
    """The terminal sends it to the whole process group."""
    needs.capability(UFFD_KERNEL_FAULTS)  # for peek()
    done = _run(
        sys.executable,
        "-c",
        "import os, signal, time, prefault.device; from support.wardens import *; from support.devices import *\n"
        "area, other = prefault.device.map(Pattern(8)), prefault.device.map(Remade(8))\n"
        "try:\n"
        "    os.killpg(0, signal.SIGINT); time.sleep(20)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
        "print(peek(area, 3) == right(3), peek(other, 3) == right(3))",
        path=f"{_ROOT}:{_TESTS}",
        start_new_session=True,
    )
    assert (done.stdout, done.stderr) == ("interrupted\nTrue True\n", "")


def test_finalizers_of_the_program_do_not_run_in_its_forks(tmp_path: Path) -> None:
    done = _run(
        sys.executable,
        "-c",
        "import gc, os, tempfile, prefault.device; from support.devices import *\n"
        f"class Cycle: pass\nc = Cycle(); c.self = c; c.file = tempfile.NamedTemporaryFile(dir={str(tmp_path)!r})\n"
        "name = c.file.name; gc.disable(); del c\n"
        "class Collecting(Pattern):\n"
        "    def populate(self, area, pages, access):\n"
        "        gc.collect(); return super().populate(area, pages, access)\n"
        "area = prefault.device.map(Collecting(4)); prefault.populate(area); print(os.path.exists(name))",
        path=f"{_ROOT}:{_TESTS}",
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_interrupted_while_it_starts(tmp_path: Path) -> None:
    """A recipe whose import hangs: Ctrl-C leaves no process."""
    (tmp_path / "hanging.py").write_text(
        "import pathlib, time\npathlib.Path(__file__).with_name('here').touch()\ntime.sleep(60)\n"
    )
    code = (
        "import os, signal, threading, time, prefault.device; from pathlib import Path; from support.devices import *\n"
        "from support.wardens import roles\n"
        "class Hanging(Pattern):\n"
        "    def recipe(self): return prefault.device.Recipe('hanging:Device')\n"
        "def interrupt():\n"
        f"    while not Path({str(tmp_path / 'here')!r}).exists(): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=interrupt).start()\n"
        "try: prefault.device.map(Hanging(4))\n"
        "except KeyboardInterrupt: print('interrupted', roles())"
    )
    done = _run(sys.executable, "-c", code, path=f"{_ROOT}:{_TESTS}:{tmp_path}")
    assert (done.stdout, done.stderr) == ("interrupted {}\n", "")


def test_a_process_that_is_killed_at_its_start_is_not_waited_for(tmp_path: Path) -> None:
    """Also where somebody else keeps its end of the link open, as a server does that was forked just before."""
    noted = tmp_path / "child"

    class Remote(Pattern):
        def recipe(self) -> Recipe:
            return Recipe("support.wardens:DiesAtItsStart", {"path": str(noted)})

    with pytest.raises(DeviceError, match="ended while the device was made"):
        prefault.device.map(Remote(8))
    child = noted.read_text()
    assert child != "ended"
    os.kill(int(child), signal.SIGKILL)
