"""Scenes of a check: a driver inside a recording device, served to client processes, and the cause of each failure."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from prefault.device.driver import Device, Recipe
from prefault.device.recipes import check_device_attributes
from prefault.errors import DeviceError
from prefault.sizes import PAGE_SIZE
from prefault.testing._client_processes import (
    ChildClient,
    ClientDiedError,
    ClientHangsError,
    ClientProcesses,
    ClientRefusedError,
)
from prefault.testing._recording_device import ATTRIBUTES, Call, Journal, RecordingDevice

AfterDiscard: TypeAlias = Literal["same", "zeros", "any"]

_SAMPLE = 64
_SAMPLE_HUGE = 6
"""Most pages to compare, of 4 KiB and of 2 MiB. On a larger device these are both ends and random ones between."""

_RESTARTED = "another is started"

HANG_S = 10.0
"""Seconds that the framework may take in addition to the driver's timeout."""


class ContractError(AssertionError):
    """A driver breaks its contract; the message says how, with the page and the seed."""


class DriverBench:
    """A driver under test; the arguments are those of ``check_device``.

    Attributes:
        initial: bytes of the pages at their first touch.
        sample: numbers of the pages that are compared.
        passed: circumstances of the scenes that passed.
        size, pages: bytes in a page, and number of pages.
        random: source of all random choices.
    """

    processes: ClientProcesses

    def __init__(
        self, factory: Callable[[], Device], directory: Path, seed: int, expected: Callable[[int], bytes] | None,
        failing: frozenset[int], after_discard: AfterDiscard, delay_s: float, patience_s: float | None,
    ) -> None:  # fmt: skip
        self._factory = factory
        self.directory = directory
        self._seed = seed
        self.expected = expected
        self.failing = failing
        self.after_discard = after_discard
        self._delay_s = delay_s
        self.patience_s = patience_s
        self.random = random.Random(seed)
        self._served = 0
        self.passed: list[str] = []
        self.initial: dict[int, bytes] = {}
        self.device = self._make()
        self._attributes = {name: getattr(self.device, name, None) for name in ATTRIBUTES}
        self.size = self.device.page_size
        self.pages = -(-self.device.length // self.size)
        self.sample = self._choose_sample()

    # --- failures

    def wrong(self, what: str) -> ContractError:
        return ContractError(f"{what} (seed {self._seed})")

    def make(self) -> Device:
        """Return a fresh device of the factory, equal to the first one in its attributes; ContractError if it is not."""
        device = self._make()
        self._check_equal(device)
        return device

    def _make(self) -> Device:
        try:
            device = self._factory()
        except Exception as error:
            raise self.wrong(f"the factory raises {type(error).__name__}: {error}") from error
        try:
            check_device_attributes(device)
        except (TypeError, ValueError) as error:
            raise self.wrong(f"the factory makes no valid device: {error}") from error
        return device

    def _check_equal(self, device: Device) -> None:
        for name, value in self._attributes.items():
            if getattr(device, name) != value:
                other = getattr(device, name)
                raise self.wrong(f"the factory makes devices that differ: one has {name} {value}, another {other}")

    # --- the pages to read

    def _choose_sample(self) -> list[int]:
        most = _SAMPLE if self.size == PAGE_SIZE else _SAMPLE_HUGE
        if self.pages <= most:
            chosen = set(range(self.pages))
        else:
            window = most // 4
            starts = [0, self.pages - window, *(self.random.randrange(self.pages - window) for _ in range(2))]
            chosen = {page for start in starts for page in range(start, start + window)}
        chosen.update(page for page in self.failing if page < self.pages)
        return sorted(chosen)

    def good(self) -> list[int]:
        return [page for page in self.sample if page not in self.failing]

    def runs(self, pages: list[int]) -> list[range]:
        """Group the pages into runs, none longer than half of the capacity."""
        most = self.pages if self.device.capacity is None else max(1, self.device.capacity // self.size // 2)
        found: list[range] = []
        for page in pages:
            if found and found[-1].stop == page and len(found[-1]) < most:
                found[-1] = range(found[-1].start, page + 1)
            else:
                found.append(range(page, page + 1))
        return found

    # --- serving

    @contextmanager
    def serving(
        self, what: str, *, delayed: bool = False, fails: tuple[int, ...] = (), kills: bool = False,
        device: Device | None = None, outlived: bool = False,
    ) -> Iterator[Scene]:  # fmt: skip
        """Serve a device, record its calls, and judge the driver at the end.

        Errors that the check provokes are not logged: a driver that passes leaves no message.

        Args:
            what: circumstances; completes "when ...".
            delayed: the driver's calls are delayed at random.
            fails: pages that fail for the sake of the check.
            kills: the scene kills the server.
            device: None: a fresh one.
            outlived: clients end after the server.
        """
        from prefault.device import serve

        if device is None:
            device = self.make()
        self._served += 1
        journal = Journal(self.directory / f"journal-{self._served}")
        recording = RecordingDevice(
            device, journal, seed=self._seed + self._served, delay_s=self._delay_s if delayed else 0.0, fails=fails,
            failing=self.failing,
        )  # fmt: skip
        path = str(self.directory / f"server-{self._served}")
        scene = Scene(self.processes, journal, path, what)
        try:
            try:
                with _filtered(lambda log: recording.is_unprovoked(log) and not (kills and _RESTARTED in log.getMessage())):
                    server = serve(recording, path)
            except (ValueError, TypeError) as refusal:
                raise self.wrong(f"the device cannot be served: {refusal}") from refusal
            except DeviceError as failure:
                cause = self._settled_cause(scene, device)
                if not cause:
                    raise
                raise self.wrong(cause) from failure
            with server:
                try:
                    yield scene
                except (ClientDiedError, ClientHangsError, ClientRefusedError) as failure:
                    raise self._explain(scene, failure, device) from failure
                except ContractError as failure:
                    raise self._with_cause(scene, failure, device) from failure
                if not outlived:
                    scene.end_clients()
            scene.end_clients()
            self._judge(scene, device)
            self.passed.append(what)
        finally:
            journal.close()

    @contextmanager
    def serving_recipe(self, device: Device, what: str) -> Iterator[Scene]:
        """Serve a device by its recipe, in a fresh process, without a record of its calls."""
        from prefault.device import serve

        recipe = device.recipe()
        if not isinstance(recipe, Recipe):
            raise self.wrong(f"recipe() returns {recipe!r}, which is no Recipe")
        self._served += 1
        path = str(self.directory / f"server-{self._served}")
        journal = Journal(self.directory / f"journal-{self._served}")
        scene = Scene(self.processes, journal, path, what)
        try:
            with serve(recipe, path):
                yield scene
                scene.end_clients()
            self.passed.append(what)
        except (ClientDiedError, ClientHangsError, ClientRefusedError) as failure:
            raise self.wrong(f"made by its recipe {recipe.factory}, a client {failure}") from failure
        finally:
            journal.close()

    def _judge(self, scene: Scene, device: Device) -> None:
        """Raise ContractError for a breach of the contract that no client could see."""
        cause = self._cause(scene, device)
        if cause:
            raise self.wrong(f"{cause}, when {scene.what}")

    def _cause(self, scene: Scene, device: Device) -> str:
        """Return the driver's part in a failure, by its journal; empty where it has none."""
        for complaint in scene.journal.complaints():
            return complaint
        for call in scene.journal.unfinished():
            if not _alive(call.pid) and call.pid not in scene.killed:
                if time.monotonic() - call.began >= device.timeout_s * 0.9:
                    return f"{call} does not return within timeout_s, {device.timeout_s:g} s, and its process was killed"
                return f"{call} ends its process"
        for raised in scene.journal.raised():
            if not self._may_raise(raised.call):
                if raised.call.kind == "fault":
                    return f"page {raised.call.pages[0]} cannot be supplied: {raised.call} raises {raised.what}"
                return f"{raised.call} raises {raised.what}"
        return ""

    def _may_raise(self, call: Call) -> bool:
        if call.kind in ("mkwrite", "control"):  # that is how they refuse
            return True
        supplies = call.kind in ("fault", "populate")
        return supplies and any(page in self.failing for page in range(*call.pages))

    def _explain(self, scene: Scene, failure: Exception, device: Device) -> ContractError:
        cause = self._settled_cause(scene, device)
        about = f"a client {failure}" if not isinstance(failure, ClientRefusedError) else f"a client was refused ({failure})"
        return self.wrong(f"{cause}, when {scene.what}: {about}" if cause else f"when {scene.what}, {about}")

    def _with_cause(self, scene: Scene, failure: ContractError, device: Device) -> ContractError:
        """Add the cause of wrong bytes, where the journal has one."""
        cause = self._settled_cause(scene, device)
        return self.wrong(f"{cause}, and so {str(failure).rpartition(' (seed')[0]}") if cause else failure

    def _settled_cause(self, scene: Scene, device: Device) -> str:
        # A client may learn of the server's death before the server's process is gone.
        for _ in range(50):
            cause = self._cause(scene, device)
            if cause or not scene.journal.unfinished():
                return cause
            time.sleep(0.02)
        return ""

    # --- comparing

    def compare(self, scene: Scene, found: dict[int, bytes], wanted: dict[int, bytes], how: str) -> None:
        for page, content in found.items():
            if content != wanted[page]:
                raise self.wrong(f"page {page} holds {_describe(content, wanted[page])} {how}, when {scene.what}")


class Scene:
    """A server with clients.

    Attributes:
        what: circumstances; completes "when ...".
        killed: pids of servers that the check killed itself.
        discarded: pages that were discarded since the device was created.
    """

    def __init__(self, processes: ClientProcesses, journal: Journal, path: str, what: str) -> None:
        self.journal = journal
        self.what = what
        self.clients: list[ChildClient] = []
        self.killed: set[int] = set()
        self.discarded: set[int] = set()
        self._processes = processes
        self._path = path

    def client(self, **areas: dict[str, Any]) -> ChildClient:
        """Start a client process, connect it and map its areas."""
        client = self._processes.client()
        self.clients.append(client)
        client.ask("connect", path=self._path)
        for area, options in areas.items():
            client.ask("map", area=area, **options)
        return client

    def end_clients(self) -> None:
        """Have all client processes unmap their areas and end; idempotent."""
        for client in self.clients:
            client.close()

    def quiet(self) -> None:
        """Wait a moment, in which a driver that writes too late does so."""
        time.sleep(0.1)


@contextmanager
def _filtered(is_unprovoked: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Filter the log of processes that are forked inside the block."""
    log = logging.getLogger("prefault.device")
    log.addFilter(is_unprovoked)
    try:
        yield
    finally:
        log.removeFilter(is_unprovoked)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def _describe(found: bytes, wanted: bytes) -> str:
    """Describe how two contents of a page differ."""
    if not any(found):
        return "zeros"
    at = next(index for index in range(len(wanted)) if found[index : index + 1] != wanted[index : index + 1])
    return f"{found[at : at + 8].hex(' ')} instead of {wanted[at : at + 8].hex(' ')} at byte {at}"
