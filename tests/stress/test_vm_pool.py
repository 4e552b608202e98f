"""Integrity of a pool for virtual machines: processes plug, write and verify while machines and the server are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

import prefault.device
from prefault.device.warden.supervisor import RESTARTS_MOST, RESTARTS_WINDOW_S
from prefault.drivers import VmPool, VmPoolControl
from prefault.errors import DeviceGoneError
from prefault.sizes import MIB
from support import processes, vm_machines

BLOCK = 64 << 10
"""Sparse memory of this block, of pages of 4 KiB: a step takes some hundred microseconds."""
_KILLS_APART_S = 1.25 * RESTARTS_WINDOW_S / RESTARTS_MOST
"""Servers that die more often are not started again."""
_SEED = int(os.environ.get("PREFAULT_SEED", "20261121"))


def _run(directory: Path, seconds: float, seed: int) -> tuple[int, int, int]:
    """Let four machines work on a pool for half of their memory; return the kills of servers and machines, and the plugs."""
    chance = random.Random(seed)
    kills = deaths = plugs = number = 0
    killed = 0.0
    device = VmPool(8 * MIB, block="4 KiB", address_space="1 GiB")
    with prefault.device.serve(device, directory / "pool") as server, prefault.device.connect(server.path) as client:
        control = VmPoolControl(client)
        running: list[subprocess.Popen[str]] = []
        try:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                while len(running) < 4:
                    number += 1
                    running.append(vm_machines.start(server.path, f"m{number}", 4 * MIB, seed + number, 400 * (number % 3)))
                time.sleep(chance.uniform(0.1, 0.6))
                for machine in [one for one in running if one.poll() is not None]:
                    output, errors = machine.communicate()
                    assert machine.returncode == 0, errors
                    plugs += int(output.split()[-2])
                    running.remove(machine)
                if time.monotonic() - killed > _KILLS_APART_S and chance.random() < 0.5:
                    (pid,) = processes.children(server.pid)
                    os.kill(pid, signal.SIGKILL)
                    kills, killed = kills + 1, time.monotonic()
                if chance.random() < 0.4 and running:
                    machine = running.pop(chance.randrange(len(running)))
                    machine.kill()
                    _, errors = machine.communicate()
                    assert "AssertionError" not in errors, errors
                    deaths += 1
        finally:
            for machine in running:
                machine.kill()
                machine.communicate()
        assert processes.eventually(lambda: not _machines(control))
        with control.create("last", 8 * MIB) as memory:
            memory.populate()
            assert memory.read(0, 8 * MIB).count(0) == 8 * MIB
    return kills, deaths, plugs


def _machines(control: VmPoolControl) -> bool:
    try:
        return bool(control.usage().machines)
    except DeviceGoneError:  # the server was killed in the middle of the request
        return True


def test_machines_never_see_bytes_of_others_nor_lose_their_own(tmp_path: Path) -> None:
    kills, deaths, plugs = _run(tmp_path, 3.0, _SEED)
    print(f"seed {_SEED}: {kills} servers and {deaths} machines killed, {plugs} plugs")
    assert deaths + kills


@pytest.mark.stress
@pytest.mark.timeout(1200)
def test_machines_for_ten_minutes(tmp_path: Path) -> None:
    kills, deaths, plugs = _run(tmp_path, 600.0, _SEED + 1)
    print(f"seed {_SEED + 1}: {kills} servers and {deaths} machines killed, {plugs} plugs")
    assert kills > 50
    assert deaths > 50
