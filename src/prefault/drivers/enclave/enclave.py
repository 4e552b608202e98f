"""The client's side of an enclave page cache: an enclave, with the instructions as methods."""

from __future__ import annotations

import errno
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

from prefault._kernel import mman
from prefault.drivers.client_checks import check_choice, check_client, check_request
from prefault.drivers.enclave import enclave_requests as requests
from prefault.drivers.enclave import epcm
from prefault.drivers.enclave.enclave_requests import Acceptance, EnclaveStatistics
from prefault.drivers.enclave.epcm import Code, EnclaveError, PageInfo, PageType
from prefault.errors import DeviceGoneError
from prefault.sizes import PAGE_SIZE, Size, parse_size

if TYPE_CHECKING:
    from prefault.device import Area, DeviceClient


_QUESTIONS = 3
"""Times that a question is asked while servers die."""


class EnclavePages(NamedTuple):
    """Adjacent pages of an enclave in one state.

    Attributes:
        offset: of the first, in bytes from the start of the enclave.
        length: in bytes.
        info: their entry in the EPCM.
    """

    offset: int
    length: int
    info: PageInfo


class Enclave:
    """An enclave of an :class:`EnclavePageCache`: memory that lies encrypted where it does not fit into the page cache.

    Instructions are methods with their names. Each takes a range in bytes, whole pages, and is carried out on all of them
    or on none; ranges of more than 64 MiB are done in pieces of that size, so that earlier pieces may be done when a later
    one is refused, as with the kernel's ioctls. A refusal is an :class:`EnclaveError`, with the hardware's name of it and
    the page.

    Args:
        client: a connection to the page cache: of ``prefault.device.open()`` or ``prefault.device.connect()``.
        name: of an enclave that was created before, by any process.

    Raises:
        TypeError, ValueError: ``client`` is not a connection, or ``name`` cannot be a name.
        DeviceError: there is no such enclave (ENOENT).

    Attributes:
        name: as given.
        length: in bytes.
        accept: ``"auto"`` or ``"explicit"``: see :meth:`create`.
        overcommit: whether populate may evict pages.
        max_permissions: permissions that its pages may have, such as ``"rwx"``.
    """

    def __init__(self, client: DeviceClient, name: str) -> None:
        check_client("Enclave", client)
        self._client = client
        self.name = name
        facts = _ask(client, requests.AskEnclave(name))
        assert isinstance(facts, requests.EnclaveFacts)
        self.length = facts.length
        self.accept, self.overcommit, self.max_permissions = facts.accept, facts.overcommit, facts.max_permissions
        self._areas: weakref.WeakKeyDictionary[Area, int] = weakref.WeakKeyDictionary()
        """Mappings that were made by this object, and their offsets in the enclave, in bytes."""

    @classmethod
    def create(
        cls,
        client: DeviceClient,
        name: str,
        length: Size,
        *,
        accept: Acceptance = "auto",
        overcommit: bool = False,
        max_permissions: str = "rwx",
    ) -> Enclave:
        """Create an enclave (ECREATE and EINIT), which lasts until :meth:`delete`, and costs nothing until it is touched.

        Args:
            client: a connection to the page cache.
            name: for all processes that are to map it; 1 to 200 bytes in UTF-8, without NUL.
            length: in bytes, whole pages of 4 KiB, or as ``"1 TiB"``.
            accept: ``"auto"``: a touch adds the page and accepts it, as a runtime does that answers the #PF of a pending
                page by EACCEPT. ``"explicit"``: a touch adds the page and is an error (SIGBUS) until :meth:`eaccept`.
                Populate accepts always.
            overcommit: True: populate evicts pages, of other enclaves too, where the EPC is full. False: it fails.
            max_permissions: those that :meth:`emodpe` may give to pages.

        Raises:
            TypeError, ValueError: ``client``, ``name`` or ``accept`` is not what it can be; nothing is sent.
            EnclaveError: ``max_permissions`` has other letters than r, w and x.
            DeviceError: there is such an enclave (EEXIST), the address space of the page cache is full, or the length is not
                a positive number of whole pages (EINVAL).
        """
        check_client("Enclave.create", client)
        check_choice("accept", accept, ("auto", "explicit"))
        epcm.parse_permissions(max_permissions)
        _ask(client, requests.CreateEnclave(name, parse_size(length), accept, overcommit, max_permissions))
        return cls(client, name)

    def delete(self) -> None:
        """Remove the enclave with all its pages.

        Raises:
            DeviceError: a process maps it (EBUSY).
        """
        _ask(self._client, requests.DeleteEnclave(self.name))

    def map(self, length: Size | None = None, *, offset: Size = 0, **options: Any) -> Area:
        """Map the enclave or a part of it, as ``DeviceClient.map()`` does, with execute permission for executable pages."""
        area = self._client.map(length, offset=offset, object=self.name, **options)
        start = parse_size(offset)
        self._areas[area] = start
        for pages in self.pages(start, len(area)):
            if "x" in pages.info.permissions:
                self._set_executable(pages.offset, pages.length, True)
        return area

    # --- the instructions

    def eaug(self, offset: Size, length: Size) -> None:
        """Add zeroed pages, readable and writable, that are pending (ENCLS[EAUG]), without touching them."""
        for first, stop in _split(offset, length):
            _ask(self._client, requests.Augment(self.name, first, stop))

    def eaccept(
        self,
        offset: Size,
        length: Size,
        *,
        permissions: str = "rw",
        page_type: PageType = PageType.REG,
        pending: bool = False,
        modified: bool = False,
    ) -> None:
        """Accept what was done to pages, if they are as expected (ENCLU[EACCEPT]).

        Args:
            offset: of the first page, in bytes.
            length: in bytes.
            permissions: after EAUG ``"rw"``, after EMODT none, after EMODPR those that are left.
            page_type: the new type, after EMODT.
            pending: after EAUG.
            modified: after EMODT.

        Raises:
            EnclaveError: ATTRIBUTES_MISMATCH, NOT_ADDED, INVALID_REQUEST.
        """
        _check_type(page_type)
        expected = PageInfo(page_type, epcm.format_permissions(epcm.parse_permissions(permissions)), pending, modified)
        for first, stop in _split(offset, length):
            _ask(self._client, requests.Accept(self.name, first, stop, expected))
            if pending:
                self._forget_errors(first * PAGE_SIZE, (stop - first) * PAGE_SIZE)

    def emodpr(self, offset: Size, length: Size, permissions: str) -> None:
        """Restrict the permissions of pages to these (ENCLS[EMODPR], ETRACK); the enclave has to :meth:`eaccept` it.

        When this returns no client can write to pages that lost the permission. Permissions that a page does not have are
        not added.
        """
        epcm.parse_permissions(permissions)
        for first, stop in _split(offset, length):
            _ask(self._client, requests.RestrictPermissions(self.name, first, stop, permissions))
            if "x" not in permissions:
                self._set_executable(first * PAGE_SIZE, (stop - first) * PAGE_SIZE, False)

    def emodpe(self, offset: Size, length: Size, permissions: str) -> None:
        """Add permissions to pages (ENCLU[EMODPE]); nothing is to be accepted.

        The server enforces reading and writing. Executing it cannot: this process's mappings of the enclave become
        executable by mprotect(2), and those of other processes by their own calls, or when they map it.

        Raises:
            EnclaveError: NOT_PERMITTED: beyond :attr:`max_permissions`.
        """
        epcm.parse_permissions(permissions)
        for first, stop in _split(offset, length):
            _ask(self._client, requests.ExtendPermissions(self.name, first, stop, permissions))
            if "x" in permissions:
                self._set_executable(first * PAGE_SIZE, (stop - first) * PAGE_SIZE, True)

    def emodt(self, offset: Size, length: Size, page_type: PageType) -> None:
        """Change the type of pages to TCS or TRIM (ENCLS[EMODT], ETRACK); the enclave has to :meth:`eaccept` it.

        The pages lose their permissions, and are not accessible any more.
        """
        _check_type(page_type)
        for first, stop in _split(offset, length):
            _ask(self._client, requests.ChangeType(self.name, first, stop, page_type))
            self._set_executable(first * PAGE_SIZE, (stop - first) * PAGE_SIZE, False)

    def remove(self, offset: Size, length: Size) -> None:
        """Remove pages that were trimmed, and whose trim was accepted (SGX_IOC_ENCLAVE_REMOVE_PAGES): they are free."""
        for first, stop in _split(offset, length):
            _ask(self._client, requests.RemovePages(self.name, first, stop))

    def trim(self, offset: Size, length: Size) -> None:
        """Give pages back: EMODT to TRIM, EACCEPT, removal. ``prefault.discard()`` of a mapping does it in one call."""
        self.emodt(offset, length, PageType.TRIM)
        self.eaccept(offset, length, permissions="", page_type=PageType.TRIM, modified=True)
        self.remove(offset, length)

    # --- looking

    def pages(self, offset: Size = 0, length: Size | None = None) -> list[EnclavePages]:
        """Return the pages that were added, with their entries in the EPCM."""
        start = parse_size(offset)
        (first, stop), *_ = _ranges(start, self.length - start if length is None else length)
        found = []
        while first < stop:
            reply = _ask(self._client, requests.AskPages(self.name, first, stop))
            assert isinstance(reply, requests.PageRuns)
            for run_start, run_stop, entry in reply.runs:
                info = epcm.decode(entry)
                assert info is not None
                found.append(EnclavePages(run_start * PAGE_SIZE, (run_stop - run_start) * PAGE_SIZE, info))
            first = reply.done
        return found

    def __repr__(self) -> str:
        return f"<Enclave {self.name!r}, {self.length} bytes>"

    # --- this process's mappings

    def _parts(self, offset: int, length: int) -> list[tuple[Area, int, int]]:
        """Return the mappings of a part of the enclave in this process, each with the address and the length of the part."""
        found = []
        for area, first in list(self._areas.items()):
            start, stop = max(offset, first), min(offset + length, first + (0 if area.closed else len(area)))
            if start < stop:
                found.append((area, area.address + start - first, stop - start))
        return found

    def _set_executable(self, offset: int, length: int, executable: bool) -> None:
        for area, address, size in self._parts(offset, length):
            protection = mman.PROT_READ | (mman.PROT_WRITE if area.writable else 0) | (mman.PROT_EXEC if executable else 0)
            mman.mprotect(address, size, protection)

    def _forget_errors(self, offset: int, length: int) -> None:
        """Drop this process's page-table entries, with the markers of touches that failed: the next touch faults again."""
        for _, address, size in self._parts(offset, length):
            mman.madvise(address, size, mman.MADV_DONTNEED)


def statistics(client: DeviceClient) -> EnclaveStatistics:
    """Return the statistics of an enclave page cache; ``client``: a connection to it."""
    check_client("statistics", client)
    reply = _ask(client, requests.AskCacheStatistics())
    assert isinstance(reply, EnclaveStatistics)
    return reply


def _ask(client: DeviceClient, request: requests.Request) -> requests.Reply:
    check_request(request)
    repeatable = isinstance(request, requests.AskPages | requests.AskEnclave | requests.AskCacheStatistics)
    for left in reversed(range(_QUESTIONS)):
        try:
            reply = requests.decode_reply(client.control(requests.encode(request)))
            break
        except DeviceGoneError as error:
            # The server was replaced: an instruction may have been carried out, a question is asked again.
            if not (repeatable and left and error.errno == errno.ECONNRESET):
                raise
    if isinstance(reply, requests.InstructionRefused):
        raise EnclaveError(Code[reply.code], reply.message, reply.page)
    return reply


def _check_type(page_type: object) -> None:
    if not isinstance(page_type, PageType):
        choices = ", ".join(f"PageType.{each.name}" for each in PageType)
        raise TypeError(f"page_type is one of {choices}, not {page_type!r}")


def _ranges(offset: Size, length: Size) -> list[tuple[int, int]]:
    start, size = parse_size(offset), parse_size(length)
    if start % PAGE_SIZE or size % PAGE_SIZE or size <= 0 or start < 0:
        raise EnclaveError(
            Code.INVALID_REQUEST,
            f"a range of enclave pages begins at a multiple of {PAGE_SIZE} bytes, and has one or more whole pages; not"
            f" {size} bytes at {start}",
        )
    return [(start // PAGE_SIZE, (start + size) // PAGE_SIZE)]


def _split(offset: Size, length: Size) -> list[tuple[int, int]]:
    """Return the page range in pieces for single instructions."""
    ((first, stop),) = _ranges(offset, length)
    return [(at, min(at + requests.MAX_PAGES, stop)) for at in range(first, stop, requests.MAX_PAGES)]
