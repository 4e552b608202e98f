"""A client that becomes another program by exec: the same process, with none of its memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import prefault.device
from support.devices import Pattern
from support.processes import alive, children, descriptors, eventually, name

_CLIENT = """
import os, sys, prefault.device
device = prefault.device.connect(sys.argv[1])
area = device.map(16384)
assert len(bytes(area.memoryview()[:5])) == 5
os.execv("/bin/sleep", ["sleep", "60"])
"""


def _watched(pid: int) -> int:
    """How many userfaultfds a process has."""
    return sum("userfaultfd" in what for what in descriptors(pid))


def test_its_areas_go_and_the_new_program_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with prefault.device.serve(Pattern(8), path) as server:
        holders = [server.pid, *children(server.pid)]
        with subprocess.Popen([sys.executable, "-c", _CLIENT, str(path)]) as client:
            try:
                assert eventually(lambda: name(client.pid) == "sleep")
                assert eventually(lambda: not any(_watched(pid) for pid in holders))
                # Its lifeline was called off too: the end of both is no longer its end.
                for pid in holders:
                    os.kill(pid, signal.SIGKILL)
                assert eventually(lambda: not any(alive(pid) for pid in holders[1:]))
                assert client.poll() is None
            finally:
                client.kill()
