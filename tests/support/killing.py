"""Device memory in use by several processes, some of which are killed: what the others see of it.

Run as a program, in a process of its own, of which all that is started can be told by its environment::

    PREFAULT_KILLING=... python -m support.killing SEED SECONDS HANG_S [ROUND]

It prints counts as JSON. ``tests/device/test_kills.py`` runs it and looks at what is left. What goes wrong names its round,
which can be run alone; the schedule of operations and kills is the same then, but what meets what is up to the scheduler.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy

import prefault
import prefault.device
from prefault.device.driver import Access, Device, DeviceArea, Recipe
from prefault.errors import DeviceError, PopulateError
from prefault.sizes import PAGE_SIZE
from support import processes
from support.devices import Saved, content

_PAGES = 48
_SALTS = 4
_THREADS = 3
_MOST_CLIENTS = 3
_LEFTOVERS_S = 10.0
_ALARM_S = 5
_FOR_EVER_S = 15.0

_WORDS = numpy.arange(PAGE_SIZE // 8, dtype=numpy.uint64)

# What a client may be told when somebody was killed. Before that it may be told nothing of the kind.
_REFUSALS = (PopulateError, DeviceError, ConnectionError)


class Sluggish(Saved):
    """Pages from a file, in two halves with a pause; threads evict some all the time. Discarding changes nothing."""

    def __init__(
        self, path: str, *, workers: int, restartable: bool, named: bool, delay_s: float, timeout_s: float = 30.0
    ) -> None:
        super().__init__(path, _PAGES, capacity_pages=_PAGES - 8, workers=workers)
        self._delay_s = delay_s
        self._named = named
        self.restartable = restartable
        self._all = {
            "path": path,
            "workers": workers,
            "restartable": restartable,
            "named": named,
            "delay_s": delay_s,
        }
        self._ends: dict[int, threading.Event] = {}

    def recipe(self) -> Recipe | None:
        return Recipe("support.killing:Sluggish", self._all) if self._named else None

    def open(self, area: DeviceArea) -> None:
        self._ends[id(area)] = ends = threading.Event()
        threading.Thread(target=self._evict_some, args=(area, ends), daemon=True).start()

    def close(self, area: DeviceArea) -> None:
        self._ends.pop(id(area)).set()

    def discard(self, area: DeviceArea, pages: range) -> None:
        pass

    def _evict_some(self, area: DeviceArea, ends: threading.Event) -> None:
        chance = random.Random(area.pid)
        while not ends.wait(self._delay_s * 4):
            first = chance.randrange(_PAGES)
            area.evict(range(first, min(first + 4, _PAGES)), self._save)

    def populate(self, area: DeviceArea, pages: range, access: Access) -> None:
        middle = pages.start + len(pages) // 2
        if middle > pages.start:
            self._load(area, pages, range(pages.start, middle))
        time.sleep(self._delay_s)
        self._load(area, pages, range(middle, pages.stop))

    def _load(self, area: DeviceArea, pages: range, part: range) -> None:
        view = area.frames(pages)[(part.start - pages.start) * PAGE_SIZE : (part.stop - pages.start) * PAGE_SIZE]
        with open(self._path, "rb", buffering=0) as file:
            assert os.preadv(file.fileno(), [view], part.start * PAGE_SIZE) == len(view)


class _Board:
    """Memory that the killer shares with all clients: flags, and for each thread what it does."""

    _COUNT, _OPERATION = 0, 8
    _SLOT = 64

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PAGE_SIZE)  # MAP_SHARED
        self._fd, self._writer = os.pipe()
        os.set_blocking(self._fd, False)

    def close(self) -> None:
        self._memory.close()
        os.close(self._fd)
        os.close(self._writer)

    def flag(self, which: int) -> bool:
        return self._memory[which] != 0

    def raise_flag(self, which: int) -> None:
        self._memory[which] = 1

    def step(self, slot: int, operation: int) -> None:
        at = (1 + slot) * self._SLOT
        (count,) = struct.unpack_from("=Q", self._memory, at)
        struct.pack_into("=QQ", self._memory, at, count + 1, operation)

    def steps(self, slot: int) -> int:
        return int(struct.unpack_from("=Q", self._memory, (1 + slot) * self._SLOT)[0])

    def operation(self, slot: int) -> str:
        return _OPERATIONS[self._memory[(1 + slot) * self._SLOT + self._OPERATION]]

    def report(self, what: str) -> None:
        os.write(self._writer, f"{what[:200]} ... {what[-1500:]}\n".encode())

    def reports(self) -> list[str]:
        try:
            return os.read(self._fd, 1 << 20).decode().splitlines()
        except BlockingIOError:
            return []


_KILLED, _STOP = 0, 1

_OPERATIONS = ("touch", "write", "populate", "discard", "map", "unmap", "fork")
_WEIGHTS = (40, 20, 15, 10, 5, 5, 1)


class _Plan(NamedTuple):
    """A round, as chance has it."""

    workers: int
    restartable: bool
    named: bool
    shared: bool
    delay_s: float
    clients: int
    kills: list[tuple[float, str]]


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
    )


# --- a client


class _Thread:
    """One of a client's threads: operations by chance, on areas of its own, whose bytes it checks."""

    def __init__(self, board: _Board, slot: int, source: _Source, seed: int) -> None:
        self._board = board
        self._slot = slot
        self._source = source
        self._random = random.Random(seed)
        self._areas: list[Any] = []

    def run(self) -> None:
        try:
            while not self._board.flag(_STOP):
                operation = self._random.choices(_OPERATIONS, _WEIGHTS)[0] if self._areas else "map"
                self._board.step(self._slot, _OPERATIONS.index(operation))
                try:
                    getattr(self, f"_{operation}")()
                except _REFUSALS as refusal:
                    if not self._board.flag(_KILLED):
                        raise
                    self._forget(refusal)
                    time.sleep(0.002)
        except BaseException:  # noqa: BLE001  it is reported, and the round fails
            self._board.report(f"thread {self._slot}: {traceback.format_exc()}".replace("\n", " | "))

    def close(self) -> None:
        for area in self._areas:
            with contextlib.suppress(*_REFUSALS):
                area.close()

    def _forget(self, refusal: BaseException) -> None:
        # A traceback refers to views of the area, which then could not be closed.
        traceback.clear_frames(refusal.__traceback__)

    def _map(self) -> None:
        if len(self._areas) >= 4:
            return
        offset = self._random.randrange(_PAGES // 2) * PAGE_SIZE
        populate = self._random.random() < 0.3
        self._areas.append(self._source.map(offset, _PAGES // 2 * PAGE_SIZE, populate))

    def _unmap(self) -> None:
        self._areas.pop(self._random.randrange(len(self._areas))).close()

    def _pick(self) -> tuple[Any, int, int]:
        """An area, a page of it, and which of the device's that is."""
        area = self._random.choice(self._areas)
        index = self._random.randrange(len(area) // PAGE_SIZE)
        return area, index, index + area.offset // PAGE_SIZE

    def _touch(self) -> None:
        area, index, page = self._pick()
        wrong = _wrong(area, index, page)
        if wrong:
            self._board.report(f"thread {self._slot}: WRONG BYTES in page {page}: {wrong}")

    def _write(self) -> None:
        area, index, page = self._pick()
        new = numpy.frombuffer(content(page, salt=self._random.randint(1, _SALTS)), numpy.uint64)
        numpy.copyto(area.ndarray("uint64")[index * 512 : (index + 1) * 512], new)

    def _run(self) -> tuple[Any, dict[str, int]]:
        area, index, _ = self._pick()
        count = min(self._random.randint(1, 8), len(area) // PAGE_SIZE - index)
        return area, {"offset": index * PAGE_SIZE, "length": count * PAGE_SIZE}

    def _populate(self) -> None:
        area, where = self._run()
        prefault.populate(area, **where, access=self._random.choice(("read", "write")))  # type: ignore[arg-type]

    def _discard(self) -> None:
        area, where = self._run()
        prefault.discard(area, **where)

    def _fork(self) -> None:
        area, index, _ = self._pick()
        view = area.memoryview()
        anew = self._random.random() < 0.5
        pid = os.fork()
        if pid == 0:
            _be_grandchild(self._board, self._source, view, index, anew)
        view.release()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        killed = self._board.flag(_KILLED)
        well = status == 0 if anew else status == -signal.SIGSEGV
        if not well and not (killed and anew and status in (-signal.SIGBUS, 3)):
            self._board.report(f"thread {self._slot}: a fork that {'maps anew' if anew else 'touches'} ended with {status}")


def _wrong(area: Any, index: int, page: int) -> str:
    """Reads a page by touching it; what is wrong with its bytes. Each word says where it is from."""
    words = numpy.zeros(512, numpy.uint64)
    numpy.copyto(words, area.ndarray("uint64")[index * 512 : (index + 1) * 512])  # without the GIL
    salts = words - _WORDS - numpy.uint64((page + 1) << 20)
    good = (salts & numpy.uint64((1 << 48) - 1)) == 0
    good &= (salts >> numpy.uint64(48) >= 1) & (salts >> numpy.uint64(48) <= _SALTS)
    if good.all():
        return ""
    at = int(numpy.argmin(good))
    return f"{int((~good).sum())} words, the first is {int(words[at]):#x} at word {at}"


def _be_grandchild(board: _Board, source: _Source, view: memoryview, index: int, anew: bool) -> NoReturn:
    """A fork of a client: it may not touch what its parent mapped, and may map it itself."""
    status = 1
    try:
        signal.alarm(_ALARM_S)
        if anew:
            try:
                with source.map(0, _PAGES * PAGE_SIZE, False, fresh=True) as own:
                    status = 2 if _wrong(own, 5, 5) else 0
            except _REFUSALS:
                status = 3
        else:
            bytes(view[index * PAGE_SIZE : (index + 1) * PAGE_SIZE])
            status = 4  # it read something
    except BaseException:  # noqa: BLE001  it is reported, and the round fails
        board.report(f"a fork: {traceback.format_exc()}".replace("\n", " | "))
    finally:
        os._exit(status)


class _Source:
    """Where a client gets areas: from a server at a path, or from one of its own."""

    def __init__(self, device: Device, path: str | None) -> None:
        self._device = device
        self._path = path
        self._client: Any = None
        self._lock = threading.Lock()

    def map(self, offset: int, length: int, populate: bool, *, fresh: bool = False) -> Any:
        if self._path is None:
            return prefault.device.map(self._device, length, offset, populate=populate)
        if fresh:
            return prefault.device.connect(self._path).map(length, offset, populate=populate)
        with self._lock:
            if self._client is None:
                self._client = prefault.device.connect(self._path)
        return self._client.map(length, offset, populate=populate)


def _be_client(board: _Board, number: int, device: Device, path: str | None, seed: int, directory: str) -> NoReturn:
    status = 1
    try:
        chance = random.Random(seed)
        stacks = open(f"{directory}/stacks-{os.getpid()}", "w")  # noqa: SIM115  as long as the process
        faulthandler.register(signal.SIGUSR1, stacks)
        source = _Source(device, path)
        work = [_Thread(board, number * _THREADS + index, source, chance.randrange(1 << 30)) for index in range(_THREADS)]
        threads = [threading.Thread(target=thread.run) for thread in work]
        for running in threads:
            running.start()
        for running in threads:
            running.join()
        if chance.random() < 0.5:  # else it just ends
            for thread in work:
                thread.close()
        status = 0
    except BaseException:  # noqa: BLE001  it is reported, and the round fails
        board.report(f"client {number}: {traceback.format_exc()}".replace("\n", " | "))
    finally:
        os._exit(status)


# --- the killer


class _Round:
    def __init__(self, seed: int, number: int, hang_s: float, directory: str, counts: Counter[str]) -> None:
        self._chance = random.Random(seed * 1_000_003 + number)
        self.plan = _plan(self._chance)
        self._hang_s = hang_s
        self._directory = directory
        self._counts = counts
        self._board = _Board()
        self._clients: dict[int, int] = {}  # pid -> number
        self._killed_clients: set[int] = set()
        self.worst_s = 0.0
        self.wrong: list[str] = []

    def run(self) -> None:
        path = f"{self._directory}/file"
        Path(path).write_bytes(b"".join(content(page) for page in range(_PAGES)))
        plan = self.plan
        device = Sluggish(path, workers=plan.workers, restartable=plan.restartable, named=plan.named, delay_s=plan.delay_s)
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
                self._board.raise_flag(_STOP)
                self._reap_all()
            self._check_leftovers()
        finally:
            self._end_clients()
            self.wrong += self._board.reports()
            for slot in range(plan.clients * _THREADS):
                self._counts["operations"] += self._board.steps(slot)
            self._board.close()

    def _start(self, number: int, device: Device, socket: str | None) -> None:
        seed = self._chance.randrange(1 << 30)
        pid = os.fork()
        if pid == 0:
            _be_client(self._board, number, device, socket, seed, self._directory)
        self._clients[pid] = number

    def _wait_for_steps(self, steps: int, limit_s: float, when: str, *, measure: bool = False) -> None:
        """Each thread of each client that lives goes on."""
        waiting = {
            (pid, slot): self._board.steps(slot) + steps
            for pid, number in self._clients.items()
            for slot in range(number * _THREADS, (number + 1) * _THREADS)
        }
        began = time.monotonic()
        said, longest = False, 0.0
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
            starting = ("fork",) if self.plan.shared else ("fork", "map")
            stuck = {(pid, slot) for pid, slot in waiting if self._board.operation(slot) not in starting}
            if ((stuck and took > limit_s) or took > limit_s + _ALARM_S) and not said:
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
        if said:
            self.wrong.append(f"it was {took:.1f} s in the end")
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
        self._board.raise_flag(_KILLED)
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
        killed = self._board.flag(_KILLED)
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
