"""Kill processes of device memory at random while others use it, and check what the survivors see.

Run as a program, whose environment identifies all processes that it starts::

    PREFAULT_KILLING=... python -m support.random_kills SEED SECONDS HANG_S [ROUND]

The program prints counts as JSON. ``tests/device/warden/test_kills.py`` runs it and checks for leftovers. A failure names
its round, which can be run alone: with the same schedule of operations and kills, though not of the kernel's scheduler.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import prefault.device
from prefault.device.driver import Device
from prefault.sizes import PAGE_SIZE
from support import processes
from support.devices import content
from support.random_kill_clients import (
    ALARM_S,
    KILLED,
    OBJECT_PAGES,
    OBJECTS,
    PAGES,
    START_S,
    STOP,
    THREADS,
    Board,
    Sluggish,
    SluggishObjects,
    be_client,
)

_MOST_CLIENTS = 3
_LEFTOVERS_S = START_S + 5.0
_FOR_EVER_S = START_S + 5.0


class _Plan(NamedTuple):
    """Parameters of a round, chosen at random."""

    workers: int
    restartable: bool
    named: bool
    shared: bool
    delay_s: float
    clients: int
    kills: list[tuple[float, str]]
    objects: bool


def _plan(chance: random.Random) -> _Plan:
    victims = ("server", "server", "warden", "warden", "client", "server and warden", "warden and server")
    return _Plan(
        workers=chance.choice((0, 0, 3)),
        restartable=chance.random() < 0.6,
        named=chance.random() < 0.4,
        shared=chance.random() < 0.6,
        delay_s=chance.choice((0.0, 0.0005, 0.003)),
        clients=chance.randint(1, _MOST_CLIENTS),
        kills=[(chance.random() * 0.12, chance.choice(victims)) for _ in range(chance.randint(1, 3))],
        objects=chance.random() < 0.4,
    )


class _Round:
    def __init__(self, seed: int, number: int, hang_s: float, directory: str, counts: Counter[str]) -> None:
        self._chance = random.Random(seed * 1_000_003 + number)
        self.plan = _plan(self._chance)
        self._hang_s = hang_s
        self._directory = directory
        self._counts = counts
        self._board = Board()
        self._clients: dict[int, int] = {}  # pid -> number
        self._killed_clients: set[int] = set()
        self.worst_s = 0.0
        self.wrong: list[str] = []

    def run(self) -> None:
        path = f"{self._directory}/file"
        plan = self.plan
        with open(path, "wb") as file:
            for number in range(OBJECTS if plan.objects else 1):
                first = number * OBJECT_PAGES
                file.seek(first * PAGE_SIZE)
                file.write(b"".join(content(page) for page in range(first, first + PAGES)))
        kind = SluggishObjects if plan.objects else Sluggish
        device = kind(path, workers=plan.workers, restartable=plan.restartable, named=plan.named, delay_s=plan.delay_s)
        self._counts["rounds with objects"] += plan.objects
        try:
            with contextlib.ExitStack() as stack:
                socket = None
                if plan.shared:
                    socket = stack.enter_context(prefault.device.serve(device, f"{self._directory}/socket")).path
                for number in range(plan.clients):
                    self._start(number, device, socket)
                self._wait_for_steps(20, 20.0, "before anybody was killed")
                for delay, victim in plan.kills:
                    time.sleep(delay)
                    self._kill(victim)
                    self._wait_for_steps(1, self._hang_s, f"after {victim} was killed", measure=True)
                self._board.raise_flag(STOP)
                self._reap_all()
            self._check_leftovers()
        finally:
            self._end_clients()
            self.wrong += self._board.reports()
            for slot in range(plan.clients * THREADS):
                self._counts["operations"] += self._board.steps(slot)
            self._board.close()

    def _start(self, number: int, device: Device, socket: str | None) -> None:
        seed = self._chance.randrange(1 << 30)
        pid = os.fork()
        if pid == 0:
            be_client(self._board, number, device, socket, seed, self._directory)
        self._clients[pid] = number

    def _wait_for_steps(self, steps: int, limit_s: float, when: str, *, measure: bool = False) -> None:
        """Each thread of each client that lives goes on."""
        waiting = {
            (pid, slot): self._board.steps(slot) + steps
            for pid, number in self._clients.items()
            for slot in range(number * THREADS, (number + 1) * THREADS)
        }
        began = time.monotonic()
        said, longest, late = False, 0.0, 0.0
        while True:
            self._reap()
            waiting = {
                (pid, slot): wanted
                for (pid, slot), wanted in waiting.items()
                if pid in self._clients and self._board.steps(slot) < wanted
            }
            took = time.monotonic() - began
            if not waiting:
                break
            # Some operations start processes, which on a busy machine takes longer than any fault.
            starting, start_s = (("fork",), ALARM_S) if self.plan.shared else (("fork", "map"), START_S)
            stuck = {(pid, slot) for pid, slot in waiting if self._board.operation(slot) not in starting}
            if ((stuck and took > limit_s) or took > limit_s + start_s) and not said:
                said = True
                doing = ", ".join(f"client {pid} thread {slot} in {self._board.operation(slot)}" for pid, slot in waiting)
                self.wrong.append(f"waits for {took:.1f} s {when}: {doing}; alive: {_family()}")
                for pid in {pid for pid, _ in waiting}:
                    self._wrong_stacks(pid)
            if took > limit_s + _FOR_EVER_S:
                self.wrong.append(f"HANGS for {took:.1f} s {when}")
                break
            if stuck:
                longest = took
            time.sleep(0.002)
            late = max(late, time.monotonic() - began - took - 0.002)
        if said:
            self.wrong.append(f"it was {took:.1f} s in the end; this process was itself up to {late:.2f} s late")
        if measure:
            self.worst_s = max(self.worst_s, longest)

    def _wrong_stacks(self, pid: int) -> None:
        for task in sorted(os.listdir(f"/proc/{pid}/task")):
            with contextlib.suppress(OSError):
                where = Path(f"/proc/{pid}/task/{task}/wchan").read_text()
                self.wrong.append(f"  client {pid} task {task} waits in {where}")
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGUSR1)
            time.sleep(0.3)
            self.wrong.append(Path(f"{self._directory}/stacks-{pid}").read_text()[-3000:])

    def _victims(self, role: str) -> list[int]:
        return [pid for pid in processes.with_environment(_MARK) if processes.name(pid) == f"prefault-{role}"]

    def _kill(self, victim: str) -> None:
        self._board.raise_flag(KILLED)
        if victim == "client":
            if self._clients:
                pid = self._chance.choice(sorted(self._clients))
                self._killed_clients.add(pid)
                self._shoot(pid, victim)
            return
        # Of private servers there are several: the first that is found, with the one that belongs to it.
        first, _, second = victim.partition(" and ")
        for pid in self._victims(first)[:1]:
            relatives = processes.children(pid) | {processes.parent(pid)}
            self._shoot(pid, first)
            for other in self._victims(second) if second else []:
                if other in relatives:
                    self._shoot(other, f"{second} at once")

    def _shoot(self, pid: int, role: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self._counts[f"killed {role}"] += 1

    def _reap(self) -> None:
        for pid in list(self._clients):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._ended(pid, os.waitstatus_to_exitcode(status))

    def _ended(self, pid: int, status: int) -> None:
        del self._clients[pid]
        killed = self._board.flag(KILLED)
        self._counts["clients"] += 1
        if status == -signal.SIGBUS and killed:
            self._counts["clients that got SIGBUS"] += 1
        elif status and not (status == -signal.SIGKILL and pid in self._killed_clients):
            self.wrong.append(f"client {pid} ended with {status}, somebody killed: {killed}")

    def _reap_all(self) -> None:
        give_up = time.monotonic() + _LEFTOVERS_S
        while self._clients and time.monotonic() < give_up:
            self._reap()
            time.sleep(0.002)
        for pid in self._clients:
            self.wrong.append(f"client {pid} does not end; alive: {_family()}")
            self._wrong_stacks(pid)
        self._end_clients()

    def _end_clients(self) -> None:
        for pid in list(self._clients):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            del self._clients[pid]

    def _check_leftovers(self) -> None:
        if not processes.eventually(lambda: processes.with_environment(_MARK) == {os.getpid()}, _LEFTOVERS_S):
            self.wrong.append(f"LEFT OVER: {_family()}")
            for pid in processes.with_environment(_MARK) - {os.getpid()}:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for stacks in Path(self._directory).glob("stacks-*"):
            stacks.unlink()
        left = os.listdir(self._directory)
        if sorted(left) != ["file"]:
            self.wrong.append(f"LEFT OVER in its directory: {left}")
            for name in left:
                os.unlink(f"{self._directory}/{name}")


_MARK = f"PREFAULT_KILLING={os.environ.get('PREFAULT_KILLING')}"


def _family() -> str:
    others = sorted(processes.with_environment(_MARK) - {os.getpid()})
    return ", ".join(f"{processes.name(pid)} {pid} (of {processes.parent(pid)})" for pid in others) or "nobody"


def main(seed: int, seconds: float, hang_s: float, only: int | None = None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    counts: Counter[str] = Counter()
    worst_s = 0.0
    wrong: list[str] = []
    began = time.monotonic()
    before = processes.descriptors(os.getpid())
    with tempfile.TemporaryDirectory(prefix="prefault-killing-") as directory:
        number = only or 0
        while time.monotonic() - began < seconds and len(wrong) < 20:
            this = _Round(seed, number, hang_s, directory, counts)
            try:
                this.run()
            except Exception:  # noqa: BLE001  what happened is in the report
                this.wrong.append(traceback.format_exc())
            wrong += [f"round {number} ({this.plan}): {what}" for what in this.wrong]
            worst_s = max(worst_s, this.worst_s)
            counts["rounds"] += 1
            after = processes.descriptors(os.getpid())
            if len(after) > len(before):
                wrong.append(f"round {number}: descriptors {after} and before {before}")
                before = after
            number += 1
            if only is not None:
                break
    print(json.dumps({"seed": seed, "counts": counts, "longest wait after a kill, s": round(worst_s, 3), "wrong": wrong}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else None)
