"""The driver: enclaves that share a small pool of frames, the EPC, with everything beyond it sealed in ordinary memory."""

from __future__ import annotations

import errno
import itertools
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, TypeVar

from prefault.device import Device, DeviceArea, DevicePool, Recipe
from prefault.device.device_pool import Access, ClientProcess
from prefault.device.driver import Supplied
from prefault.drivers.enclave import enclave_requests as requests
from prefault.drivers.enclave import epcm
from prefault.drivers.enclave.arrival_order import ArrivalOrder
from prefault.drivers.enclave.epcm import FREE, WRITE, Code, EnclaveError, PageInfo, PageType
from prefault.drivers.enclave.kept_tables import EnclaveRow, KeptTables
from prefault.drivers.enclave.sealing import POISONED, PageSealer, SealError, load_cipher
from prefault.ipc.transport import ProtocolError
from prefault.sizes import GIB, MIB, PAGE_SIZE, Size, format_size, parse_size

_log = logging.getLogger("prefault.device")

_RECLAIM: Final = 64
"""Pages that a fault evicts at once where the EPC is full: the next ones find room."""

_Entry = TypeVar("_Entry")

_PENDING = epcm.encode(PageInfo(PageType.REG, "rw", pending=True))
_ADDED = epcm.encode(PageInfo(PageType.REG, "rw"))


class EnclavePageCache(Device):
    """A model of the enclave page cache of SGX: a small pool of frames, shared by the enclaves that are created on it.

    A page is added when it is touched (EAUG: zeros), or in bulk by populate. If the pool is full, pages are sealed and
    evicted to ordinary memory, in the order in which they came in: user space has no access information for the memory of
    other processes. All pages survive the death of the server.

    Args:
        capacity: size of the EPC, in bytes or as ``"64 MiB"``.
        address_space: bytes for all enclaves together; parts that are not touched cost nothing.
        enclaves: names and lengths of enclaves to create with the device, with the defaults of :meth:`Enclave.create`.
        overcommit: of these enclaves.

    Raises:
        ImportError: the package ``cryptography`` is not installed.
        ValueError: a size that is no positive number of whole pages.
    """

    evicts = True
    restartable = True
    batch = MIB  # the loop makes all calls, and a fault waits for the one under way: up to 10 ms if it evicts

    def __init__(
        self,
        capacity: Size = 64 * MIB,
        *,
        address_space: Size = 4096 * GIB,
        enclaves: Mapping[str, Size] | None = None,
        overcommit: bool = False,
    ) -> None:
        load_cipher()
        self.capacity: int = _positive("the capacity of an enclave page cache", capacity)
        self.length = _positive("the address space of an enclave page cache", address_space)
        self._initial = {name: parse_size(length) for name, length in (enclaves or {}).items()}
        self._overcommit = overcommit
        self._enclaves: dict[str, EnclaveRow] = {}
        self._sorted: list[EnclaveRow] = []
        self._starts: list[int] = []
        self._names: dict[int, str] = {}
        """Names of the enclaves, by their first page; ``_sorted`` and ``_starts`` are in the order of these."""
        self._mapped: dict[int, int] = {}
        """Number of areas of each enclave, by its number."""
        self._order = ArrivalOrder()
        """Pages that came in; some of them may be gone."""
        self._augmented = self._evicted = self._loaded = self._rejected = 0

    def recipe(self) -> Recipe | None:
        """Return how a fresh server process makes this device; None, for a fork, where a class is derived from it."""
        if type(self) is not EnclavePageCache:
            return None
        arguments: dict[str, Any] = {"capacity": self.capacity, "address_space": self.length}
        arguments |= {"enclaves": self._initial, "overcommit": self._overcommit}
        return Recipe("prefault.drivers.enclave:EnclavePageCache", arguments)

    # --- the life of the device

    def start(self, pool: DevicePool) -> None:
        """Find the enclaves of the server before this one, and put right what its death left half done."""
        self._pool = pool
        self._tables = KeptTables(pool.keep, len(pool.pages))
        self._sealer = PageSealer(self._tables)
        rows = {row.offset: row for row in self._tables.rows()}
        for extent in pool.objects():
            if extent.offset in rows:
                self._enclaves[extent.name] = rows[extent.offset]
            else:  # half created, or half removed
                self._erase(extent.name, extent.pages(PAGE_SIZE))
        for name, row in self._enclaves.items():
            self._enter(name, row)
        for row in self._sorted:
            self._recover(row)
        if not self._tables.header[_STARTED]:
            for name, length in self._initial.items():
                if name not in self._enclaves:
                    self._create(requests.CreateEnclave(name, length, "auto", self._overcommit, "rwx"))
            self._tables.header[_STARTED] = 1

    def _recover(self, row: EnclaveRow) -> None:
        """Drop frames of pages that may not be accessed, renew protections, and list the other frames for reclaim."""
        refused = epcm.touching("read").refused
        for run in self._pool.ready(row.pages):
            for piece, entry in _pieces(run, bytes(self._tables.entries[run.start : run.stop])):
                if entry in refused:
                    self._pool.evict(piece, self._drop if epcm.type_of(entry) in (FREE, PageType.TRIM) else self._save)
                else:
                    self._order.add_run(piece)
        for run, entries in self._tables.added(row.pages):
            for piece, entry in _pieces(run, entries):
                if not entry & WRITE and epcm.type_of(entry) == PageType.REG:
                    self._pool.protect(piece, "read")

    def open(self, area: DeviceArea) -> None:
        """Count the mappings of an enclave; refuse those that are not within one."""
        row = self._row(area.pages.start)
        if area.pages.stop > row.pages.stop:
            raise ValueError("the mapping reaches beyond its enclave: map the enclave by its name")
        self._mapped[row.number] = self._mapped.get(row.number, 0) + 1

    def close(self, area: DeviceArea) -> None:
        """Count the mappings of an enclave."""
        self._mapped[self._row(area.pages.start).number] -= 1

    # --- pages for clients

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        """Add a page that was never touched (EAUG), or load a sealed one (ELDU)."""
        tables, row, run = self._tables, self._row(page), range(page, page + 1)
        entry = tables.entries[page]
        if entry in (FREE, _PENDING):
            if entry == FREE:
                self._augmented += 1
            if row.explicit:
                tables.set_entries(run, bytes([_PENDING]))
                self._check(row, run, bytes([_PENDING]), access)
            # EAUG, and the EACCEPT that the enclave's runtime answers its #PF with.
            tables.set_entries(run, bytes([_ADDED]))
        else:
            self._check(row, run, bytes([entry]), access)
            if tables.versions[page]:
                self._load(row, page, area.frame(page))
        self._order.add(page)
        return None

    def populate(self, area: DeviceArea, pages: range, access: Access) -> Supplied:
        """Add, accept and load pages in bulk."""
        tables, row = self._tables, self._row(pages.start)
        before = bytes(tables.entries[pages.start : pages.stop])
        free = before.count(FREE)
        entries = before.replace(bytes([FREE]), bytes([_ADDED])).replace(bytes([_PENDING]), bytes([_ADDED]))
        self._check(row, pages, entries, access)
        if free < len(before):
            frames = area.frames(pages)
            for page in pages:
                if tables.versions[page]:
                    at = (page - pages.start) * PAGE_SIZE
                    self._load(row, page, frames[at : at + PAGE_SIZE])
        if entries != before:
            self._augmented += free
            tables.set_entries(pages, entries)
        self._order.add_run(pages)
        return None

    def _check(self, row: EnclaveRow, pages: range, entries: bytes, access: Access) -> None:
        epcm.touching(access).apply(entries, pages.start - row.pages.start)

    def _load(self, row: EnclaveRow, page: int, frame: memoryview) -> None:
        offset = page - row.pages.start
        known = self._tables.versions[page] == POISONED
        try:
            self._sealer.unseal(page, frame, row.number, offset, PageType.REG)
        except SealError:
            message = f"page {offset}: its sealed copy fails the authentication: it was changed, exchanged or replayed"
            if not known:
                self._rejected += 1
                _log.error("enclave %r: %s; the page is poisoned", self._names[row.pages.start], message)
            raise EnclaveError(Code.POISONED, message, offset) from None
        self._loaded += 1

    def mkwrite(self, area: DeviceArea, page: int) -> None:  # noqa: ARG002
        """Refuse a store to a page without write permission."""
        self._check(self._row(page), range(page, page + 1), bytes([self._tables.entries[page]]), "write")

    def discard(self, area: DeviceArea, pages: range) -> None:  # noqa: ARG002
        """Trim, accept and remove pages: what kernel and runtime do for each, in bulk."""
        self._free(pages)

    # --- reclaim

    def reclaim(self, area: DeviceArea, pages: int) -> None:
        """Seal and evict pages, those first that came in first."""
        spared = self._pool.reclaiming_for
        row = self._row(area.pages.start)
        if spared and not row.overcommit and self._adds_pages(spared):
            raise OSError(
                errno.ENOSPC,
                f"the EPC of {format_size(self.capacity)} has no room for {pages} more pages, and populating enclave"
                f" {self._names[row.pages.start]!r} may not evict others: populate less, discard some, leave it to faults,"
                " or create the enclave with overcommit=True",
            )
        wanted = self._evicted + (pages if spared else max(pages, _RECLAIM))
        left: list[range] = []
        busy: set[EnclaveRow] = set()
        try:
            while self._evicted < wanted:
                runs = self._order.take(wanted - self._evicted, spared, self._names)
                if not runs:
                    return
                for run in runs:
                    of = self._row(run.start)
                    try:
                        if of not in busy:
                            self._pool.evict(run, self._save)
                            continue
                    except OSError:  # EBUSY: a client keeps changing its mappings. Other enclaves have pages, too
                        busy.add(of)
                    left.append(run)
        finally:
            for run in left:
                self._order.add_run(run)

    def _adds_pages(self, runs: list[range]) -> bool:
        """Return whether some of these pages were not added yet, or not accepted: loading sealed ones is no overcommit."""
        return any(
            entry in (FREE, _PENDING) for run in runs for entry in set(bytes(self._tables.entries[run.start : run.stop]))
        )

    def _save(self, run: range, content: memoryview) -> None:
        """Seal pages of one enclave."""
        row = self._row(run.start)
        first = row.pages.start
        for piece, entry in _pieces(run, bytes(self._tables.entries[run.start : run.stop])):
            at = (piece.start - run.start) * PAGE_SIZE
            part = content[at : at + len(piece) * PAGE_SIZE]
            self._sealer.seal(piece, part, row.number, piece.start - first, epcm.type_of(entry))
        self._evicted += len(run)

    def _drop(self, run: range, content: memoryview) -> None:
        """Let go of pages whose content is not wanted any more."""

    # --- control

    def control(self, client: ClientProcess, request: bytes) -> bytes:  # noqa: ARG002
        """Answer a control request: see :mod:`prefault.drivers.enclave.enclave_requests`."""
        try:
            message = requests.decode_request(request)
        except ProtocolError as error:
            raise OSError(errno.EINVAL, f"no request of an enclave page cache: {error}") from None
        try:
            return requests.encode(self._answer(message))
        except EnclaveError as error:
            return requests.encode(requests.InstructionRefused(error.code.name, error.strerror or "", error.page))

    def _answer(self, request: requests.Request) -> requests.Reply:
        match request:
            case requests.CreateEnclave():
                return self._create(request)
            case requests.AskCacheStatistics():
                frames = sum(len(ready) for run in self._order.runs(self._names) for ready in self._pool.ready(run))
                return requests.EnclaveStatistics(
                    frames,
                    self.capacity // PAGE_SIZE,
                    len(self._enclaves),
                    self._augmented,
                    self._evicted,
                    self._loaded,
                    self._rejected,
                )
        row = self._enclaves.get(request.name)
        if row is None:
            raise OSError(errno.ENOENT, f"there is no enclave {request.name!r}: {_listed(self._enclaves)}")
        match request:
            case requests.AskEnclave():
                return _facts(row)
            case requests.DeleteEnclave():
                self._delete(request.name, row)
            case requests.AskPages():
                return self._list_pages(row, self._checked(row, request.pages))
            case requests.Augment():
                self._augmented += len(self._execute(row, request.pages, epcm.instruction(epcm.eaug)))
            case requests.Accept():
                self._execute(row, request.pages, epcm.instruction(epcm.eaccept, request.expected))
            case requests.RestrictPermissions():
                permissions = epcm.parse_permissions(request.permissions)
                self._execute(row, request.pages, epcm.instruction(epcm.emodpr, permissions))
            case requests.ExtendPermissions():
                permissions = epcm.parse_permissions(request.permissions)
                self._execute(row, request.pages, epcm.instruction(epcm.emodpe, permissions, row.max_permissions))
            case requests.ChangeType():
                pages = self._execute(row, request.pages, epcm.instruction(epcm.emodt, request.page_type))
                if request.page_type is PageType.TRIM:
                    self._tables.forget(pages)
            case requests.RemovePages():
                self._execute(row, request.pages, epcm.instruction(epcm.remove), free=True)
        return requests.InstructionDone()

    def _checked(self, row: EnclaveRow, pages: range) -> range:
        """Return pages of an enclave as pages of the device."""
        own = row.pages
        if not 0 <= pages.start < pages.stop <= len(own):
            last = pages.stop - 1
            which = f"page {last} is" if pages.start == last else f"pages {pages.start} to {last} are"
            raise EnclaveError(
                Code.INVALID_REQUEST,
                f"{which} not within the enclave, which has {len(own)} pages, numbered from 0",
                pages.start,
            )
        return range(own.start + pages.start, own.start + pages.stop)

    def _execute(self, row: EnclaveRow, pages: range, instruction: epcm.Translation, *, free: bool = False) -> range:
        """Carry an instruction out on all of these pages of an enclave, or on none; return their numbers in the device.

        ``free``: the instruction makes the pages free.
        """
        if len(pages) > requests.MAX_PAGES:
            raise EnclaveError(
                Code.INVALID_REQUEST, f"an instruction is for at most {requests.MAX_PAGES} pages at once, not {len(pages)}"
            )
        run = self._checked(row, pages)
        before = bytes(self._tables.entries[run.start : run.stop])
        after = instruction.apply(before, pages.start)
        if free:
            self._free(run)
            return run
        self._tables.set_entries(run, after)
        # From here on no fault brings a page in that is not to be accessed; the entries that clients have follow.
        try:
            self._withdraw(list(_pieces(run, list(zip(before, after, strict=True)))))
        except OSError:  # EBUSY: a client keeps changing its mappings
            self._tables.set_entries(run, before)
            raise
        return run

    def _withdraw(self, changes: list[tuple[range, tuple[epcm.Entry, epcm.Entry]]]) -> None:
        """Take from clients what pages are not any more, by their entries before and after; OSError: as it was."""
        refused = epcm.touching("read").refused
        gone = [(piece, entry) for piece, (was, entry) in changes if was not in refused and entry in refused]
        if gone:  # one call, which takes all pages or none; all have one type
            save = self._drop if epcm.type_of(gone[0][1]) == PageType.TRIM else self._save
            self._pool.evict(range(gone[0][0].start, gone[-1][0].stop), save)
        restricted: list[range] = []
        try:
            for piece, (was, entry) in changes:
                if (entry ^ was) & WRITE and epcm.type_of(entry) == PageType.REG:
                    self._pool.protect(piece, "write" if entry & WRITE else "read")
                    if was & WRITE:
                        restricted.append(piece)
        except OSError:
            for piece in restricted:
                self._pool.protect(piece, "write")
            raise

    def _list_pages(self, row: EnclaveRow, pages: range) -> requests.PageRuns:
        first = row.pages.start
        runs: list[tuple[int, int, int]] = []
        for run, entries in self._tables.added(pages):
            for piece, entry in _pieces(run, entries):
                if len(runs) == requests.MAX_RUNS:
                    return requests.PageRuns(runs, piece.start - first)
                runs.append((piece.start - first, piece.stop - first, entry))
        return requests.PageRuns(runs, pages.stop - first)

    # --- enclaves

    def _create(self, request: requests.CreateEnclave) -> requests.EnclaveFacts:
        permissions = epcm.parse_permissions(request.max_permissions)
        if not request.length or request.length % PAGE_SIZE:
            raise OSError(
                errno.EINVAL,
                f"the length of an enclave is a multiple of {PAGE_SIZE} bytes, and at least one, not {request.length}",
            )
        try:
            extent = self._pool.create_object(request.name, request.length)
        except ValueError as error:
            raise OSError(errno.EINVAL, str(error)) from None
        try:
            row = self._tables.add(
                extent.offset,
                extent.length,
                explicit=request.accept == "explicit",
                overcommit=request.overcommit,
                max_permissions=permissions,
            )
        except OSError:
            self._pool.delete_object(request.name)
            raise
        self._enclaves[request.name] = row
        self._enter(request.name, row)
        return _facts(row)

    def _delete(self, name: str, row: EnclaveRow) -> None:
        mapped = self._mapped.get(row.number, 0)
        if mapped:
            areas = "one area: close it" if mapped == 1 else f"{mapped} areas: close them"
            raise OSError(errno.EBUSY, f"enclave {name!r} is mapped by {areas} first")
        self._tables.remove(row.number)  # from here on the next server erases it, should this one die
        del self._enclaves[name]
        self._erase(name, row.pages)
        index = bisect_right(self._starts, row.pages.start) - 1
        del self._sorted[index], self._starts[index], self._names[row.pages.start]

    def _erase(self, name: str, pages: range) -> None:
        """Remove an object with everything that its pages hold."""
        self._pool.evict(pages, self._drop)
        self._free(pages)
        self._pool.delete_object(name)

    def _free(self, pages: range) -> None:
        """Make pages free: the next touch adds them anew. A write protection that is left ends with the first store."""
        self._tables.clear(pages)
        self._order.remove(pages)

    def _enter(self, name: str, row: EnclaveRow) -> None:
        index = bisect_right(self._starts, row.pages.start)
        self._sorted.insert(index, row)
        self._starts.insert(index, row.pages.start)
        self._names[row.pages.start] = name

    def _row(self, page: int) -> EnclaveRow:
        """Return the enclave that a page of the device belongs to."""
        index = bisect_right(self._starts, page) - 1
        if index < 0 or page >= self._sorted[index].pages.stop:
            raise ValueError(f"page {page} of the device belongs to no enclave: {_listed(self._enclaves)}")
        return self._sorted[index]


_STARTED = 16
"""Word of the header: the enclaves that come with the device were created."""


def _pieces(run: range, entries: Iterable[_Entry]) -> Iterator[tuple[range, _Entry]]:
    """Split a run of pages where their entries change."""
    start = run.start
    for entry, same in itertools.groupby(entries):
        stop = start + sum(1 for _ in same)
        yield range(start, stop), entry
        start = stop


def _facts(row: EnclaveRow) -> requests.EnclaveFacts:
    return requests.EnclaveFacts(
        row.number,
        row.offset,
        row.length,
        "explicit" if row.explicit else "auto",
        row.overcommit,
        epcm.format_permissions(row.max_permissions),
    )


def _listed(enclaves: Mapping[str, EnclaveRow]) -> str:
    if not enclaves:
        return "there are none, create one first"
    names = sorted(enclaves)
    return f"there are {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}"


def _positive(what: str, size: Size) -> int:
    length = parse_size(size)
    if length <= 0 or length % PAGE_SIZE:
        raise ValueError(f"{what} is a positive multiple of {PAGE_SIZE} bytes, not {length}")
    return length
