"""Device memory in the workers of pytest-xdist: their streams are pipes to a controller that waits for their end."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from support import processes

MODULE = """
    import multiprocessing

    import prefault
    import prefault.device
    import pytest
    from prefault.device import Device, Recipe

    class Numbers(Device):
        length = 1 << 20

        def fault(self, area, page, access):
            area.frame(page)[:] = bytes([page % 251]) * 4096

    class WithRecipe(Numbers):
        def recipe(self):
            return Recipe("test_user:WithRecipe", {})

    class Failing(Numbers):
        def fault(self, area, page, access):
            raise OSError(5, "no such luck")

    def in_a_child(kind, queue):
        with prefault.device.map(kind()) as area:
            queue.put(area.read(7 * 4096, 1))

    @pytest.mark.parametrize("kind", [Numbers, WithRecipe])
    def test_touch_and_populate(kind):
        with prefault.device.map(kind()) as area:
            assert area.memoryview()[3 * 4096] == 3
            assert prefault.populate(area).bytes == Numbers.length - 4096

    @pytest.mark.parametrize("kind", [Numbers, WithRecipe])
    @pytest.mark.parametrize("method", ["fork", "spawn"])
    def test_children(kind, method):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        with prefault.device.map(kind(), populate=True):
            child = context.Process(target=in_a_child, args=(kind, queue))
            child.start()
            assert queue.get(timeout=60) == bytes([7])
            child.join(60)
            assert child.exitcode == 0

    def test_a_driver_that_raises():
        with prefault.device.map(Failing()) as area, pytest.raises(prefault.DriverError, match="no such luck"):
            prefault.populate(area)

    left_open = []

    def test_an_area_that_is_never_closed():
        left_open.append(prefault.device.map(Numbers(), populate=True))

    def test_touching_a_failing_page_ends_the_worker():
        prefault.device.map(Failing()).memoryview()[0]
"""


def _run(directory: Path, workers: int, distribution: str, chosen: str) -> tuple[int, str]:
    """Run the module's chosen tests; wait until no process is left of them. Return the exit status and the output."""
    (directory / "test_user.py").write_text(textwrap.dedent(MODULE))
    mark = f"PREFAULT_TEST_XDIST={os.getpid()}-{directory.name}"
    command = [
        sys.executable, "-m", "pytest", "-p", "xdist.plugin", "-n", str(workers), "--dist", distribution, "-W", "error",
        "-p", "no:cacheprovider", "--max-worker-restart", "0", "-k", chosen, "test_user.py",
    ]  # fmt: skip
    path = os.pathsep.join(filter(None, [str(directory), os.environ.get("PYTHONPATH")]))
    # Other plugins would take most of the time: each of the processes imports them.
    environment = os.environ | {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | dict([mark.split("=", 1)])
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=100)
    deadline = time.monotonic() + 30
    while left := processes.with_environment(mark):
        assert time.monotonic() < deadline, {pid: processes.name(pid) for pid in left}
        time.sleep(0.05)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("workers", "distribution"),
    # loadfile gives one file to one worker: a second one would have nothing to do.
    [(2, "load"), (1, "loadfile")],
)
def test_a_module_of_a_user(tmp_path: Path, workers: int, distribution: str) -> None:
    status, said = _run(tmp_path, workers, distribution, "not ends_the_worker")
    assert status == 0, said
    assert "8 passed" in said
    assert "unclosed" not in said
    assert "Bad file descriptor" not in said


def test_a_worker_that_dies_of_a_page(tmp_path: Path) -> None:
    _, said = _run(tmp_path, 1, "load", "ends_the_worker")
    assert "crashed while running 'test_user.py::test_touching_a_failing_page" in said
