"""Rules of the enclave page cache map (EPCM): the state of an enclave's page, and the instructions that change it.

The rules are those of Intel's manual (SDM volume 3D, the leaf functions of ENCLS and ENCLU) and, for removal, of the ioctl
SGX_IOC_ENCLAVE_REMOVE_PAGES (Linux 6.0, arch/x86/kernel/cpu/sgx/ioctl.c). An entry is one byte, so that an instruction on
many pages is a translation table: it is computed once from the rule for one page, and applied to a run by
``bytes.translate``.
"""

from __future__ import annotations

import enum
import errno
import functools
from collections.abc import Callable
from typing import Final, Literal, NamedTuple, TypeAlias

from prefault.errors import errno_name

READ: Final = 1
WRITE: Final = 2
EXECUTE: Final = 4
_ALL: Final = READ | WRITE | EXECUTE
_PENDING: Final = 8
_MODIFIED: Final = 16
_RESTRICTED: Final = 32
_TYPE_SHIFT: Final = 6

FREE: Final = 0
"""Entry of a page that was not added."""


class PageType(enum.IntEnum):
    """Type of a page that was added (PT_REG, PT_TCS, PT_TRIM)."""

    REG = 1
    """Code or data."""
    TCS = 2
    """Thread control structure: the processor's, no software reads or writes it."""
    TRIM = 3
    """To be removed."""


class Code(enum.Enum):
    """Reason why an instruction was refused or a touch failed, as the hardware or the kernel reports it."""

    NOT_ADDED = "#PF: not added"
    ALREADY_ADDED = "#PF: already added"
    WRONG_TYPE = "#PF: wrong page type"
    PENDING = "#PF: pending"
    MODIFIED = "#PF: modified"
    NO_PERMISSION = "#PF: no permission"
    INVALID_REQUEST = "#GP: invalid request"
    ATTRIBUTES_MISMATCH = "SGX_PAGE_ATTRIBUTES_MISMATCH"
    NOT_MODIFIABLE = "SGX_PAGE_NOT_MODIFIABLE"
    NOT_TRIMMED = "EPERM: not trimmed and accepted"
    NOT_PERMITTED = "EACCES: beyond the permissions of the enclave"
    POISONED = "SGX_MAC_COMPARE_FAIL"


class EnclaveError(OSError):
    """An instruction on enclave pages was refused; no page was changed.

    Attributes:
        code: the reason, as the hardware or the kernel names it.
        page: number of the first such page, from the start of the enclave.
    """

    def __init__(self, code: Code, message: str, page: int = 0) -> None:
        super().__init__(_ERRNO.get(code, errno.EFAULT), message)
        self.code = code
        self.page = page

    def __str__(self) -> str:
        return f"{self.strerror} [{self.code.value}, {errno_name(self.errno)}]"


_ERRNO = {
    Code.INVALID_REQUEST: errno.EINVAL,
    Code.NOT_TRIMMED: errno.EPERM,
    Code.NOT_PERMITTED: errno.EACCES,
    Code.NO_PERMISSION: errno.EACCES,
    Code.POISONED: errno.EIO,
}


class PageInfo(NamedTuple):
    """State of a page that was added: its entry in the EPCM.

    Attributes:
        type: REG, TCS or TRIM.
        permissions: of ``"r"``, ``"w"``, ``"x"``, in this order.
        pending: added by EAUG, and not accepted yet.
        modified: its type was changed by EMODT, which was not accepted yet.
        restricted: its permissions were restricted by EMODPR, which was not accepted yet.
    """

    type: PageType
    permissions: str
    pending: bool = False
    modified: bool = False
    restricted: bool = False


class Refusal(NamedTuple):
    """Reason why a rule refuses an entry."""

    code: Code
    message: str


Entry: TypeAlias = int
"""State of a page in one byte: permissions, PENDING, MODIFIED, PR, and the type; :data:`FREE`: not added."""

Rule: TypeAlias = Callable[[Entry], Entry | Refusal]
"""Effect of an instruction on one page: its next entry, or why it is refused."""


def encode(info: PageInfo | None) -> Entry:
    """Return the byte for the state of a page; None: not added."""
    if info is None:
        return FREE
    flags = info.pending * _PENDING | info.modified * _MODIFIED | info.restricted * _RESTRICTED
    return parse_permissions(info.permissions) | flags | info.type << _TYPE_SHIFT


def decode(entry: Entry) -> PageInfo | None:
    """Return the state of a page from its byte; None: not added."""
    if entry == FREE:
        return None
    return PageInfo(
        PageType(entry >> _TYPE_SHIFT),
        format_permissions(entry),
        bool(entry & _PENDING),
        bool(entry & _MODIFIED),
        bool(entry & _RESTRICTED),
    )


def parse_permissions(text: str) -> int:
    """Return the bits of permissions such as ``"rw"``.

    Raises:
        EnclaveError: not of the letters r, w and x, each at most once.
    """
    if not isinstance(text, str) or len(set(text)) != len(text) or not set(text) <= set("rwx"):
        raise EnclaveError(Code.INVALID_REQUEST, f"permissions are made of the letters r, w and x, not {text!r}")
    return sum({"r": READ, "w": WRITE, "x": EXECUTE}[letter] for letter in text)


def format_permissions(bits: int) -> str:
    """Return permission bits as text, such as ``"rw"``."""
    return "".join(letter for letter, bit in (("r", READ), ("w", WRITE), ("x", EXECUTE)) if bits & bit)


def type_of(entry: Entry) -> int:
    """Return the page type of an entry; 0: not added."""
    return entry >> _TYPE_SHIFT


# --- the instructions, each as a rule for one entry


def eaug() -> Rule:
    """ENCLS[EAUG]: add a zeroed page, readable and writable, that the enclave has to accept."""
    added = encode(PageInfo(PageType.REG, "rw", pending=True))

    def rule(entry: Entry) -> Entry | Refusal:
        return Refusal(Code.ALREADY_ADDED, "EAUG of a page that was added already: remove it first") if entry else added

    return rule


def eaccept(expected: PageInfo) -> Rule:
    """ENCLU[EACCEPT]: accept what EAUG, EMODPR or EMODT did, if the entry is as expected. PR is not compared.

    Raises:
        EnclaveError: INVALID_REQUEST: no combination of type, pending and modified that can be accepted.
    """
    regular = expected.type is PageType.REG and not expected.modified
    if not regular and not (expected.type is not PageType.REG and not expected.pending and expected.modified):
        raise EnclaveError(
            Code.INVALID_REQUEST,
            "EACCEPT is of type REG that is not modified, or of TCS or TRIM that is modified and not pending",
        )
    wanted = encode(expected) & ~_RESTRICTED

    def rule(entry: Entry) -> Entry | Refusal:
        if entry == FREE:
            return Refusal(Code.NOT_ADDED, "EACCEPT of a page that was not added: touch or populate it, or EAUG it, first")
        if entry & ~_RESTRICTED != wanted:
            return Refusal(
                Code.ATTRIBUTES_MISMATCH, f"EACCEPT expects {_show(wanted)}, and the page is {_show(entry & ~_RESTRICTED)}"
            )
        return entry & ~(_PENDING | _MODIFIED | _RESTRICTED)

    return rule


def emodpr(permissions: int) -> Rule:
    """ENCLS[EMODPR]: restrict permissions to these; a permission that the page does not have is not added.

    Raises:
        EnclaveError: INVALID_REQUEST: writable and not readable.
    """
    _check_permissions("EMODPR", permissions)

    def rule(entry: Entry) -> Entry | Refusal:
        if entry == FREE:
            return Refusal(Code.NOT_ADDED, "EMODPR of a page that was not added")
        if entry & (_PENDING | _MODIFIED):
            return Refusal(Code.NOT_MODIFIABLE, f"EMODPR of a page that is {_show(entry)}: accept that first")
        if entry >> _TYPE_SHIFT != PageType.REG:
            return Refusal(Code.WRONG_TYPE, f"EMODPR is for pages of type REG, and this one is {_show(entry)}")
        return entry & ~(_ALL & ~permissions) | _RESTRICTED

    return rule


def emodpe(permissions: int, most: int = _ALL) -> Rule:
    """ENCLU[EMODPE]: add these permissions. The enclave does that alone: nothing is to be accepted.

    Args:
        permissions: bits to add.
        most: bits that pages of the enclave may have at all (vm_max_prot_bits in the kernel).

    Raises:
        EnclaveError: INVALID_REQUEST: writable and not readable. NOT_PERMITTED: beyond ``most``.
    """
    _check_permissions("EMODPE", permissions)
    if permissions & ~most:
        raise EnclaveError(
            Code.NOT_PERMITTED,
            f"EMODPE to {format_permissions(permissions)}: the enclave was created for at most {format_permissions(most)}",
        )

    def rule(entry: Entry) -> Entry | Refusal:
        if entry == FREE:
            return Refusal(Code.NOT_ADDED, "EMODPE of a page that was not added")
        if entry & (_PENDING | _MODIFIED):
            return Refusal(
                Code.PENDING if entry & _PENDING else Code.MODIFIED,
                f"EMODPE of a page that is {_show(entry)}: accept that first",
            )
        if entry >> _TYPE_SHIFT != PageType.REG:
            return Refusal(Code.WRONG_TYPE, f"EMODPE is for pages of type REG, and this one is {_show(entry)}")
        return entry | permissions

    return rule


def emodt(page_type: PageType) -> Rule:
    """ENCLS[EMODT]: change the type to TCS or TRIM; the page loses its permissions and has to be accepted.

    Raises:
        EnclaveError: INVALID_REQUEST: another type.
    """
    if page_type not in (PageType.TCS, PageType.TRIM):
        raise EnclaveError(Code.INVALID_REQUEST, f"EMODT changes a page to TCS or TRIM, not to {page_type.name}")
    changed = encode(PageInfo(page_type, "", modified=True))

    def rule(entry: Entry) -> Entry | Refusal:
        if entry == FREE:
            return Refusal(Code.NOT_ADDED, "EMODT of a page that was not added")
        before = entry >> _TYPE_SHIFT
        if before != PageType.REG and (before, page_type) != (PageType.TCS, PageType.TRIM):
            return Refusal(Code.WRONG_TYPE, f"EMODT to {page_type.name} of a page that is {_show(entry)}")
        if entry & (_PENDING | _MODIFIED):
            return Refusal(Code.NOT_MODIFIABLE, f"EMODT of a page that is {_show(entry)}: accept that first")
        return changed

    return rule


def remove() -> Rule:
    """SGX_IOC_ENCLAVE_REMOVE_PAGES: remove a page that was trimmed, and whose trim was accepted (ENCLS[EREMOVE])."""
    trimmed = encode(PageInfo(PageType.TRIM, ""))

    def rule(entry: Entry) -> Entry | Refusal:
        if entry == FREE:
            return Refusal(Code.NOT_ADDED, "removal of a page that was not added")
        if entry != trimmed:
            return Refusal(Code.NOT_TRIMMED, f"removal of a page that is {_show(entry)}: EMODT it to TRIM, and EACCEPT that")
        return FREE

    return rule


def touch(access: Literal["read", "write"]) -> Rule:
    """Access by software in the enclave; it changes nothing."""
    needed = WRITE if access == "write" else 0

    def rule(entry: Entry) -> Entry | Refusal:
        if entry == FREE:
            return Refusal(Code.NOT_ADDED, "the page was not added")
        if entry & _PENDING:
            return Refusal(Code.PENDING, "the page is pending: EACCEPT it first")
        if entry & _MODIFIED:
            return Refusal(Code.MODIFIED, f"the page is {_show(entry)}: EACCEPT that first")
        if entry >> _TYPE_SHIFT != PageType.REG:
            return Refusal(Code.WRONG_TYPE, f"the page is {_show(entry)}: no software accesses it")
        if not entry & _ALL or entry & needed != needed:
            return Refusal(Code.NO_PERMISSION, f"a {access} of a page that is {_show(entry)}")
        return entry

    return rule


def _check_permissions(name: str, permissions: int) -> None:
    if permissions & WRITE and not permissions & READ:
        raise EnclaveError(Code.INVALID_REQUEST, f"{name} to writable and not readable: there are no such pages")


def _show(entry: Entry) -> str:
    info = decode(entry)
    if info is None:
        return "not added"
    flags = [name for name in ("pending", "modified", "restricted") if getattr(info, name)]
    return " ".join([info.type.name, info.permissions or "without permissions", *flags])


# --- rules on runs of pages


class Translation(NamedTuple):
    """A rule for all entries at once.

    Attributes:
        entries: byte for byte, the next entry.
        refused: the entries that the rule refuses.
        rule: for the message of a refusal.
    """

    entries: bytes
    refused: bytes
    rule: Rule

    def apply(self, entries: bytes, first: int = 0) -> bytes:
        """Return the next entries of a run of pages; ``first``: number of its first page.

        Raises:
            EnclaveError: the rule refuses a page; ``page`` is the first such page.
        """
        allowed = entries.translate(None, self.refused) if self.refused else entries
        if len(allowed) != len(entries):
            index = next(index for index, entry in enumerate(entries) if entry in self.refused)
            refusal = self.rule(entries[index])
            assert isinstance(refusal, Refusal)
            raise EnclaveError(refusal.code, f"page {first + index}: {refusal.message}", first + index)
        return entries.translate(self.entries)


def translation(rule: Rule) -> Translation:
    """Return a rule as tables for runs of pages."""
    answers = [rule(entry) if _is_entry(entry) else Refusal(Code.NOT_ADDED, "no entry") for entry in range(256)]
    refused = bytes(entry for entry, answer in enumerate(answers) if isinstance(answer, Refusal))
    return Translation(bytes(0 if isinstance(answer, Refusal) else answer for answer in answers), refused, rule)


@functools.lru_cache(256)
def instruction(make: Callable[..., Rule], *arguments: int | PageInfo) -> Translation:
    """Return the tables of ``make(*arguments)``. Making them takes 1 ms, as much as ten instructions."""
    return translation(make(*arguments))


@functools.cache
def touching(access: Literal["read", "write"]) -> Translation:
    """Return the tables of :func:`touch`."""
    return translation(touch(access))


def _is_entry(entry: Entry) -> bool:
    return entry == FREE or entry >> _TYPE_SHIFT in tuple(PageType)
