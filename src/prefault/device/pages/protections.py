"""Flags of pages: which clients may not write to, which they may have written to, and which are poisoned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prefault.device.page_runs import subtract
from prefault.device.page_states import DevicePageState, PageFlag

if TYPE_CHECKING:
    from prefault.device.device_pool import Access
    from prefault.device.driver import Device
    from prefault.device.frames import Frames

_SUPPLIED = (DevicePageState.READY, DevicePageState.EVICTING, DevicePageState.ASIDE)
_WHY = "the driver poisoned it"


class PageProtections:
    """The flags of a device's pages, and what they mean for entries; under the server's lock.

    Attributes:
        in_use: some page has, or may get, a flag; without any, faults are answered in fewer steps.
        allowing: pages for which the driver is being asked whether a store is allowed; a protection that comes meanwhile
            takes them out.
    """

    def __init__(self, device: Device, frames: Frames, *, restarted: bool) -> None:
        self._device = device
        self._frames = frames
        self.in_use = device.tracks_writes or (restarted and frames.has_flags())
        self.allowing: set[int] = set()
        self._reasons: list[tuple[range, str]] = []

    def writable_runs(self, pages: range) -> list[range]:
        """Return the runs of these pages that clients may write to without a fault."""
        runs = self.not_read_only_runs(pages)
        if self._device.tracks_writes:
            runs = [piece for run in runs for piece in self._with(run, PageFlag.DIRTY)]
        return runs

    def not_read_only_runs(self, pages: range) -> list[range]:
        """Return the runs of these pages that clients may write to, noticed or not."""
        return self._without(pages, PageFlag.READ_ONLY)

    def dirty_runs(self, pages: range) -> list[range]:
        """Return the supplied pages that clients may have written to, in runs."""
        supplied = self._frames.runs(pages, *_SUPPLIED) if self._device.writable else []
        if not self._device.tracks_writes:
            return supplied
        return [piece for run in supplied for piece in self._with(run, PageFlag.DIRTY)]

    def mark_written(self, pages: range) -> None:
        """Note writes to pages, if the device tracks them."""
        if self._device.tracks_writes:
            self._frames.set_flag(pages, PageFlag.DIRTY)

    def mark_clean(self, pages: range) -> None:
        """Note that pages were supplied or written back."""
        if self.in_use:
            self._frames.clear_flag(pages, PageFlag.DIRTY)

    def set(self, pages: range, access: Access) -> None:
        """Set whether clients may write to pages."""
        if access == "read":
            self.in_use = True
            self._frames.set_flag(pages, PageFlag.READ_ONLY)
            if self.allowing:
                self.allowing.difference_update([page for page in self.allowing if page in pages])
        elif self.in_use:
            self._frames.clear_flag(pages, PageFlag.READ_ONLY)

    def is_read_only(self, page: int) -> bool:
        """Return whether a write to a page asks the driver."""
        return bool(self._frames.flags[page] & PageFlag.READ_ONLY)

    def poison(self, pages: range, reason: str) -> None:
        """Poison pages, with a reason for people."""
        self.in_use = True
        self._frames.set_flag(pages, PageFlag.POISONED)
        self._forget_reasons(pages)
        self._reasons.append((pages, reason or _WHY))

    def cure(self, pages: range) -> list[tuple[range, str]]:
        """End the poison of pages; return the runs that were poisoned, each with its reason."""
        cured = [(run, self._reason_of(run.start)) for run in self.poisoned_runs(pages)]
        if cured:
            self._frames.clear_flag(pages, PageFlag.POISONED)
            self._forget_reasons(pages)
        return cured

    def _forget_reasons(self, pages: range) -> None:
        self._reasons = [(part, why) for where, why in self._reasons for part in subtract(where, [pages])]

    def _reason_of(self, page: int) -> str:
        return next((why for where, why in self._reasons if page in where), _WHY)

    def poisoned_runs(self, pages: range) -> list[range]:
        """Return the poisoned ones of these pages, in runs."""
        return self._with(pages, PageFlag.POISONED) if self.in_use else []

    def poisoned(self, pages: range) -> tuple[int, str] | None:
        """Return the first poisoned one of these pages, and the reason; None if there is none."""
        for run in self.poisoned_runs(pages):
            return run.start, self._reason_of(run.start)
        return None

    def _with(self, pages: range, flag: PageFlag) -> list[range]:
        return [run for run, set_ in self._frames.flag_runs(pages, flag) if set_]

    def _without(self, pages: range, flag: PageFlag) -> list[range]:
        return [run for run, set_ in self._frames.flag_runs(pages, flag) if not set_]
