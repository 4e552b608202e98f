"""A run of pages that the driver is to supply, and why it could not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from prefault.device.device_pool import Access

if TYPE_CHECKING:
    from prefault.device.pages.served_areas import ServedArea


class FillFailure(NamedTuple):
    """Reason why pages were not supplied, or why another call of the driver failed.

    Attributes:
        kind: ``"driver"``: it raised; ``"full"``: there was no memory for the frames, or no capacity.
        number: errno.
        message: for people.
        page: the first page that was not supplied.
        over_capacity: the capacity was exhausted; pages that are being filled may be dropped or evicted once they are READY.
    """

    kind: Literal["driver", "full"]
    number: int
    message: str
    page: int = 0
    over_capacity: bool = False


@dataclass(slots=True, eq=False)
class Fill:
    """A run of pages that the driver is to supply; they are FILLING until it is finished.

    Attributes:
        area: the driver is asked on behalf of it.
        single: True: one page, supplied by ``fault``; False: a run, supplied by ``populate``.
        keep: pages that may not be reclaimed to make room for these.
        waiting: faults to be answered: area, page, whether it is a write, when it was read (ns).
        changes: ``ServerState.changes`` before the capacity was found exhausted.
        done: the page up to which they are supplied.
        around: True for the window of a fault: not every page of it was asked for.
        reserved: True once the frames count against the capacity.
        retry: the driver could not supply the pages from ``done`` on yet.
        rounds: ``ParkedFaults.rounds`` when it began.
        overtaken: another thread of the driver supplies or shoots down some of the pages: the fill did not begin.
        finished: called in the loop, under the lock, after the pages' states are set; the fill that it returns is started.
    """

    area: ServedArea
    pages: range
    access: Access
    _: KW_ONLY
    single: bool
    keep: list[range]
    finished: Callable[[Fill], Fill | None]
    around: bool = False
    waiting: list[tuple[ServedArea, int, bool, int]] = field(default_factory=list)
    changes: int = 0
    reserved: bool = False
    retry: bool = False
    rounds: int = 0
    overtaken: bool = False
    failure: FillFailure | None = None
    done: int = field(init=False)

    def __post_init__(self) -> None:
        self.done = self.pages.start
