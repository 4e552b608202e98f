"""The checks of :func:`check_device`: a driver is served to client processes, which use it in many orders."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from prefault.device.driver import Device
from prefault.sizes import PAGE_SIZE
from prefault.testing._client_processes import (
    ChildClient,
    ClientDiedError,
    ClientProcesses,
    ClientRefusedError,
)
from prefault.testing._driver_scenes import HANG_S, AfterDiscard, ContractError, Scene
from prefault.testing._persistence import PersistenceCheck
from prefault.testing._recording_device import InjectedError

__all__ = ["AfterDiscard", "Checked", "ContractError", "check_device"]


class Checked(NamedTuple):
    """Checks that a driver passed.

    Attributes:
        device: name of the driver's class.
        pages: number of pages whose bytes were compared.
        seed: seed of all random choices.
        scenes: circumstances of the checks, in order; each completes "It passes when ...".
    """

    device: str
    pages: int
    seed: int
    scenes: tuple[str, ...]

    def __str__(self) -> str:
        scenes = "".join(f"\n  {scene}" for scene in self.scenes)
        return f"{self.device} passes (seed {self.seed}, {self.pages} pages looked at) when{scenes}"


def check_device(
    factory: Callable[[], Device],
    *,
    seed: int = 0,
    expected: Callable[[int], bytes] | None = None,
    failing: Collection[int] = (),
    after_discard: AfterDiscard = "same",
    persistent: bool = False,
    delay_s: float = 0.003,
    patience_s: float | None = None,
) -> Checked:
    """Check that a driver keeps the contract of :class:`prefault.device.Device`. Works in any test framework.

    The check serves the driver to client processes, which touch, populate, discard and write its pages in many orders, from
    several processes and threads, while its calls are delayed at random. Populated and touched pages must hold the same
    bytes. A wrong driver may kill the client processes; the calling process survives.

    Args:
        factory: creates a device; called many times. Each must hold the same initial bytes, independent of the others.
        seed: seed of all random choices.
        expected: ``expected(page)`` returns the initial bytes of a page. None: the bytes of the first touch.
        failing: pages that the driver is meant to refuse: touching one raises SIGBUS, populating one DriverError.
        after_discard: bytes of a page after a discard: ``"same"`` as the initial ones, ``"zeros"``, or ``"any"`` bytes.
        persistent: what clients wrote is to be there when the same device, and a device by its recipe, is served again after
            it was stopped.
        delay_s: longest delay of a call, in seconds.
        patience_s: longest wait for an answer, in seconds. None: a few calls of the device's ``timeout_s``.

    Returns:
        The checks that passed, for you to print. Errors that the check itself provokes are not logged.

    Raises:
        ContractError: the driver breaks the contract; the message says how.
        DeviceError: this machine does not support device memory.
    """
    directory = Path(tempfile.mkdtemp(prefix="prefault-check-"))
    try:
        check = _Check(factory, directory, seed, expected, frozenset(failing), after_discard, delay_s, patience_s)
        check.run(persistent=persistent)
        return Checked(type(check.device).__name__, len(check.sample), seed, tuple(check.passed))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class _Check(PersistenceCheck):
    def run(self, *, persistent: bool) -> None:
        patience = self.patience_s if self.patience_s is not None else 2 * self.device.timeout_s + HANG_S
        with ClientProcesses(self.directory, patience) as self.processes:
            self._check_touch()
            self._check_edges()
            if self.device.populates:
                self._check_populate()
                self._check_routes()
            else:
                self._check_no_populate()
            self._check_failing_pages()
            self._check_discard()
            self._check_disorder()
            if self.device.writable:
                self._check_writes()
            else:
                self._check_read_only()
            if self.device.restartable:
                self._check_restart()
            self._check_recipe()
            if persistent:
                self.check_persistence()

    def _check_touch(self) -> None:
        with self.serving("its pages are touched one after the other") as scene:
            client = scene.client(area={})
            self.initial.update(client.touch("area", self.good(), self.size))
            if self.expected is not None:
                wanted = {page: self.expected(page).ljust(self.size, b"\0") for page in self.good()}
                self.compare(scene, self.initial, wanted, "and not what was expected")
            last = self.pages - 1
            beyond = self.pages * self.size - self.device.length
            if beyond and last in self.initial and any(self.initial[last][self.size - beyond :]):
                raise self.wrong(f"page {last}, the last one, is not zero behind the end of the device")
            scene.quiet()
            again = client.touch("area", self.good(), self.size)
            self.compare(scene, again, self.initial, "after the others were supplied, and held something else before")
        with self.serving("a second device is touched backwards") as scene:
            found = scene.client(area={}).touch("area", self.good()[::-1], self.size)
            self.compare(scene, found, self.initial, "there, and another in the first device, touched forwards")

    def _check_edges(self) -> None:
        size, length = self.size, self.device.length
        last = (self.pages - 1) * size
        with self.serving("its edges are mapped") as scene:
            client = scene.client()
            for offset, count in ((0, 0), (length + size, size), (0, self.pages * size + size), (1, size), (-size, size)):
                try:
                    client.ask("map", area="edge", offset=offset, length=count)
                except ClientRefusedError as refused:
                    if "ValueError" not in refused.kinds:
                        raise
                else:
                    raise self.wrong(f"{count} bytes from offset {offset} on can be mapped of a device of {length} bytes")
            client.ask("map", area="last", offset=last)
            if self.pages - 1 not in self.failing:
                self.compare(scene, client.touch("last", [self.pages - 1], size), self.initial, "where it is mapped alone")
            if self.device.populates:
                client.ask("populate", area="last", first=self.pages - 1, pages=0)

    def _check_populate(self) -> None:
        whole = self.device.capacity is None and self.pages == len(self.good())
        with self.serving("it is populated") as scene:
            client = scene.client(area={"populate": True} if whole else {})
            for run in self.runs(self.good()):
                client.ask("populate", area="area", first=run.start, pages=len(run))
                found = client.touch("area", list(run), self.size)
                self.compare(scene, found, self.initial, "once it is populated, unlike when it is touched")
                client.ask("populate", area="area", first=run.start, pages=len(run))  # of pages that are present already
            self._must_be_quiet(scene)
            scene.quiet()
            again = client.touch("area", self.good(), self.size)
            self.compare(scene, again, self.initial, "after the others were populated, unlike when it is touched")
        with self.serving("it is populated page by page, backwards, with faults between") as scene:
            client = scene.client(area={})
            backwards = self.good()[::-1]
            operations = [
                ("populate", {"area": "area", "first": page, "pages": 1})
                if index % 3
                else ("touch", {"area": "area", "pages": [page]})
                for index, page in enumerate(backwards)
            ]
            client.ask("together", threads=[operations])
            found = client.touch("area", backwards, self.size)
            self.compare(scene, found, self.initial, "once it is populated alone, unlike when it is touched")
            reader = scene.client(area={})
            for run in self.runs(self.good()):
                found = reader.read("area", run, self.size)
                self.compare(scene, found, self.initial, "by Area.read, unlike when it is touched")

    def _check_routes(self) -> None:
        """Check that lock() and protect() populate as well: equal bytes, and no faults."""
        run = self.random.choice(self.runs(self.good()))[: 4 if self.size == PAGE_SIZE else 1]
        offset = run.start * self.size
        length = min(len(run) * self.size, self.device.length - offset)
        for route in ("lock", "protect"):
            with self.serving(f"it is populated by {route}") as scene:
                client = scene.client()
                client.ask("map", area="part", offset=offset, length=length)
                try:
                    client.ask(route, area="part")
                except ClientRefusedError as refused:
                    if route != "lock" or "HeadroomError" not in refused.kinds:
                        raise
                    continue  # RLIMIT_MEMLOCK stopped it, and not the driver
                found = client.touch("part", list(run), self.size)
                self.compare(scene, found, self.initial, f"once it is populated by {route}, unlike when it is touched")
                self._must_be_quiet(scene)

    def _must_be_quiet(self, scene: Scene) -> None:
        calls = [call for call in scene.journal.calls().values() if call.kind == "fault"]
        if calls and self.device.capacity is None:
            raise self.wrong(f"page {calls[0].pages[0]} was faulted in after it was populated")

    def _check_no_populate(self) -> None:
        with self.serving("it is populated, which it declares as meaningless") as scene:
            client = scene.client(area={})
            self._must_refuse(client, "NoPopulateError", area="area", first=self.good()[0], pages=1)

    def _must_refuse(self, client: ChildClient, kind: str, **what: Any) -> str:
        pages = f"page {what['first']}" if what["pages"] == 1 else f"pages {what['first']} and {what['pages'] - 1} more"
        try:
            client.ask("populate", **what)
        except ClientRefusedError as refused:
            if kind not in refused.kinds:
                raise
            return refused.text
        raise self.wrong(f"populating {pages} succeeds, and must be refused with {kind}")

    def _check_failing_pages(self) -> None:
        for page in sorted(self.failing)[:2]:
            self._check_fails(page, injected=False)
        good = self.good()
        if good:
            self._check_fails(self.random.choice(good), injected=True)

    def _check_fails(self, page: int, *, injected: bool) -> None:
        """Check that a page that cannot be supplied fails only the clients that ask for it."""
        what = f"page {page} fails for the sake of the check" if injected else f"page {page} is touched, which fails"
        with self.serving(what, fails=(page,) if injected else ()) as scene:
            near = [near for near in (page - 1, page + 1) if near in self.initial and near != page]
            victim, witness = scene.client(area={}), scene.client(area={})
            try:
                victim.touch("area", [page], self.size)
            except ClientDiedError as death:
                if death.status != -signal.SIGBUS:
                    raise
            else:
                raise self.wrong(f"page {page} must fail, and touching it gave bytes")
            self.compare(scene, witness.touch("area", near, self.size), self.initial, "beside one that failed")
            if self.device.populates:
                text = self._must_refuse(witness, "DriverError", area="area", first=page, pages=1)
                if injected and "for the sake of the check" not in text:
                    raise self.wrong(f"what {InjectedError.__name__} said is not in the client's exception: {text!r}")
                if near:
                    first = min(page, near[0])
                    self._must_refuse(witness, "DriverError", area="area", first=first, pages=2)
            self.compare(scene, witness.touch("area", near, self.size), self.initial, "beside one that failed")

    def _check_discard(self) -> None:
        with self.serving("pages were discarded") as scene:
            client, other = scene.client(area={}), scene.client(area={})
            for run in self.runs(self.good()):
                client.touch("area", list(run), self.size)
                other.touch("area", list(run)[:2], self.size)
                self._discard(client, scene, run)
                self._compare_anew(scene, other, run, populate=False)
                self._discard(client, scene, run)
                self._compare_anew(scene, client, run, populate=self.device.populates)
                part = range(run.start + len(run) // 3, run.stop - len(run) // 3)
                if part:
                    self._discard(client, scene, part)
                    self._compare_anew(scene, client, run, populate=False)

    def _discard(self, client: ChildClient, scene: Scene, run: range) -> None:
        client.ask("discard", area="area", first=run.start, pages=len(run))
        # A last page that belongs to the device only in part stays: discarding rounds inward.
        scene.discarded.update(page for page in run if (page + 1) * self.size <= self.device.length)

    def _compare_anew(self, scene: Scene, client: ChildClient, run: range, *, populate: bool) -> None:
        if populate:
            client.ask("populate", area="area", first=run.start, pages=len(run))
        found = client.touch("area", list(run), self.size)
        if self.after_discard == "any":
            return
        wanted = {page: self.initial[page] for page in run}
        if self.after_discard == "zeros":
            wanted.update((page, bytes(self.size)) for page in scene.discarded if page in run)
        how = "populated after a discard" if populate else "touched after a discard"
        self.compare(scene, found, wanted, f"{how}, and not what it is to hold then")

    def _check_disorder(self) -> None:
        """Check several processes with several threads and areas each, random orders and sizes, and delayed calls."""
        with self.serving("several processes and threads use it at once and its calls are delayed", delayed=True) as scene:
            clients = [scene.client(area={}) for _ in range(3)]
            good = self.good()
            for client in clients:
                first = self.random.choice(good)
                client.ask("map", area="part", offset=first * self.size)
                client.start("together", threads=[self._schedule(good, first) for _ in range(3)])
            for client in clients:
                client.finish()
            if self.after_discard == "any":
                return
            for number, client in enumerate(clients):
                order = self.random.sample(good, len(good))
                how = f"read by process {number} in the end, and another when it is touched alone"
                self.compare(scene, client.touch("area", order, self.size), self.initial, how)

    def _schedule(self, good: list[int], first: int) -> list[tuple[str, dict[str, Any]]]:
        operations: list[tuple[str, dict[str, Any]]] = []
        most = 8 if self.size == PAGE_SIZE else 2
        if self.device.capacity is not None:
            most = min(most, max(1, self.device.capacity // self.size // 6))  # of what 9 threads ask for at once
        for _ in range(12):
            area = self.random.choice(("area", "part"))
            pages = [page for page in good if area == "area" or page >= first]
            run = self.random.choice(self.runs(pages))
            start = self.random.choice(run)
            some = run[start - run.start :][: self.random.randint(1, most)]
            if self.device.populates and self.random.random() < 0.4:
                operations.append(("populate", {"area": area, "first": some.start, "pages": len(some)}))
            elif self.after_discard == "same" and self.random.random() < 0.2:
                operations.append(("discard", {"area": area, "first": some.start, "pages": len(some)}))
            else:
                operations.append(("touch", {"area": area, "pages": self.random.sample(some, len(some))}))
        return operations

    def _check_read_only(self) -> None:
        with self.serving("a client wants to write, and it is read-only") as scene:
            client = scene.client(area={})
            if not client.ask("readonly", area="area"):
                raise self.wrong("the device is not writable, and its mapping can be written")
            for what, arguments in (
                ("map", {"area": "writable", "access": "write"}),
                ("populate", {"area": "area", "first": self.good()[0], "pages": 1, "access": "write"}),
            ):
                with contextlib.suppress(ClientRefusedError):
                    client.ask(what, **arguments)
                    raise self.wrong(f"the device is not writable, and {what} with access='write' succeeds")
            page = self.good()[0]
            try:
                client.ask("write", area="area", page=page, byte=1)
            except ClientRefusedError as refused:
                if "ValueError" not in refused.kinds:
                    raise
            self.compare(scene, client.touch("area", [page], self.size), self.initial, "after an attempt to write")

    def _check_writes(self) -> None:
        """Check that written bytes stay until they are discarded, wherever the page goes in between."""
        with self.serving("clients write", delayed=True) as scene:
            one, two = scene.client(area={"access": "write"}), scene.client(area={"access": "write"})
            good = self.good()
            now = dict(self.initial)
            for page in self.random.sample(good, max(1, len(good) // 2)):
                byte = self.random.randint(1, 255)
                self.random.choice((one, two)).ask("write", area="area", page=page, byte=byte)
                inside = self.size
                if (page + 1) * self.size > self.device.length:
                    inside = self.device.length - page * self.size
                now[page] = bytes([byte]) * inside + bytes(self.size - inside)
            for client in (one, two, one):
                if self.device.populates:  # which takes more than a page at once from a client over its capacity
                    run = self.random.choice(self.runs(good))
                    client.ask("populate", area="area", first=run.start, pages=len(run))
                order = self.random.sample(good, len(good))
                self.compare(scene, client.touch("area", order, self.size), now, "and lost what was written to it")
            run = self.random.choice(self.runs(good))
            self._discard(one, scene, run)
            whole = [page for page in run if page in scene.discarded]
            if whole:
                self._compare_anew(scene, two, range(whole[0], whole[-1] + 1), populate=False)

    def _check_restart(self) -> None:
        with self.serving("its server was killed in between, and it says that it is restartable", kills=True) as scene:
            client = scene.client(area={})
            good = self.good()
            client.touch("area", good[::2], self.size)
            (server,) = {call.pid for call in scene.journal.calls().values()}
            scene.killed.add(server)
            os.kill(server, signal.SIGKILL)
            found = client.touch("area", good, self.size)
            self.compare(scene, found, self.initial, "after the restart, and another before")

    def _check_recipe(self) -> None:
        if self.device.recipe() is None:
            return
        with self.serving_recipe(self.device, "it is made by its recipe") as scene:
            found = scene.client(area={}).touch("area", self.good(), self.size)
            self.compare(scene, found, self.initial, "and another in a device of the factory")
