"""Control requests of an enclave page cache and their replies: what the ioctls of /dev/sgx_enclave and ENCLU are to SGX.

Pages are numbered from the start of their enclave.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from prefault.drivers.enclave.epcm import PageInfo, PageType
from prefault.ipc.messages import Decoder, Number, TaggedMessage, msgspec
from prefault.ipc.messages import encode as encode

MAX_NAME: int = 200
"""Most characters in the name of an enclave."""
MAX_RUNS: int = 1000
"""Most runs of pages in one reply to :class:`AskPages`."""

MAX_PAGES: int = 16384
"""Most pages of one instruction: 64 MiB, the longest that another request waits for."""

Name: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_NAME)]
Permissions: TypeAlias = Annotated[str, msgspec.Meta(max_length=3)]
Acceptance: TypeAlias = Literal["auto", "explicit"]


class CreateEnclave(TaggedMessage, frozen=True):
    """Create an enclave (ECREATE); in bytes."""

    name: Name
    length: Number
    accept: Acceptance
    overcommit: bool
    max_permissions: Permissions


class DeleteEnclave(TaggedMessage, frozen=True):
    """Remove an enclave that no process maps, with all its pages."""

    name: Name


class _OnPages(TaggedMessage, frozen=True):
    name: Name
    first: Number
    stop: Number

    @property
    def pages(self) -> range:
        """Pages of the enclave that the request is about."""
        return range(self.first, self.stop)


class Augment(_OnPages, frozen=True):
    """EAUG."""


class Accept(_OnPages, frozen=True):
    """EACCEPT."""

    expected: PageInfo


class RestrictPermissions(_OnPages, frozen=True):
    """EMODPR."""

    permissions: Permissions


class ExtendPermissions(_OnPages, frozen=True):
    """EMODPE."""

    permissions: Permissions


class ChangeType(_OnPages, frozen=True):
    """EMODT."""

    page_type: PageType


class RemovePages(_OnPages, frozen=True):
    """SGX_IOC_ENCLAVE_REMOVE_PAGES."""


class AskPages(_OnPages, frozen=True):
    """Ask for the state of the pages that were added, at most :data:`MAX_RUNS` runs of them."""


class AskEnclave(TaggedMessage, frozen=True):
    """Ask for the facts of an enclave."""

    name: Name


class AskCacheStatistics(TaggedMessage, frozen=True):
    """Ask for the statistics of the page cache."""


Request: TypeAlias = (
    CreateEnclave
    | DeleteEnclave
    | Augment
    | Accept
    | RestrictPermissions
    | ExtendPermissions
    | ChangeType
    | RemovePages
    | AskPages
    | AskEnclave
    | AskCacheStatistics
)


class InstructionDone(TaggedMessage, frozen=True):
    """The request was carried out."""


class InstructionRefused(TaggedMessage, frozen=True):
    """An instruction was refused; nothing changed. ``code``: name of an :class:`~prefault.drivers.enclave.epcm.Code`."""

    code: str
    message: str
    page: Number


class EnclaveFacts(TaggedMessage, frozen=True):
    """Facts of an enclave; lengths and offsets in bytes."""

    number: Number
    offset: Number
    length: Number
    accept: Acceptance
    overcommit: bool
    max_permissions: str


class PageRuns(TaggedMessage, frozen=True):
    """States of pages: runs of first page, stop page and EPCM entry. ``done``: page up to which the list is complete."""

    runs: list[tuple[int, int, int]]
    done: int


class EnclaveStatistics(TaggedMessage, frozen=True):
    """Statistics of an enclave page cache; the counters begin with its server process.

    Attributes:
        frames: number of pages in the EPC.
        capacity: size of the EPC, in pages.
        enclaves: number of enclaves.
        augmented: pages added, by fault, populate or EAUG.
        evicted: pages sealed and evicted (EWB).
        loaded: pages loaded and verified (ELDU).
        rejected: sealed pages that failed their authentication, and were poisoned.
    """

    frames: int
    capacity: int
    enclaves: int
    augmented: int
    evicted: int
    loaded: int
    rejected: int


Reply: TypeAlias = InstructionDone | InstructionRefused | EnclaveFacts | PageRuns | EnclaveStatistics

decode_request: Decoder[Request] = Decoder(Request)
decode_reply: Decoder[Reply] = Decoder(Reply)
