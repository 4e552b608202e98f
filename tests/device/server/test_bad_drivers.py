"""check_device fails on every wrong driver, and its message names the fault."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefault.device
from prefault.testing import ContractError, check_device
from support import bad_devices as bad
from support.devices import Pattern, Saved, expected

_LOADED = (prefault.device.serve, prefault.device.connect)  # what they import is mapped before a test counts mappings


def _quick(kind: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: kind(12, timeout_s=1.0)


_ZERO = {"after_discard": "zeros"}
_CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "returns short": (bad.ReturnsShort, {}, r"page \d+ holds zeros once it is populated, unlike when it is touched"),
    "returns a count": (bad.ReturnsCount, {}, r"fault\(page 0\) returned 4096, and is to return None, ZERO,"),
    "writes the neighbour's page": (
        bad.WritesNeighbour,
        {},
        r"the driver took the frame of page 1 while it was asked to supply page 0",
    ),
    "other bytes by populate": (
        bad.OtherByPopulate,
        {},
        r"page 5 holds .* at byte 100 once it is populated, unlike when it is touched",
    ),
    "forgets the last page": (bad.ForgetsLast, {}, r"page \d+ holds zeros once it is populated, unlike when it is touched"),
    "raises on populate": (
        bad.RaisesOnPopulate,
        {},
        r"populate\(pages 0 to 63\) raises NotImplementedError: populate is not written yet",
    ),
    "zeros": (
        bad.Zeros,
        {"expected": lambda page: expected(Pattern(), page)},
        r"page 0 holds zeros and not what was expected",
    ),
    "sleeps": (
        _quick(bad.Sleeps),
        {},
        r"fault\(page 4\) does not return within timeout_s, 1 s, and its process was killed",
    ),
    "loops": (_quick(bad.Loops), {}, r"fault\(page 4\) does not return within timeout_s, 1 s, and its process was killed"),
    "os._exit": (_quick(bad.Leaves), {}, r"fault\(page 4\) ends its process"),
    "sys.exit": (_quick(bad.CallsExit), {}, r"page 4 cannot be supplied: fault\(page 4\) raises SystemExit: enough"),
    "keeps views": (bad.KeepsViews, {}, r"the driver keeps a view of the frame after fault of page 0 returned"),
    "writes later": (bad.WritesLater, {}, r"the driver keeps a view of the frame after fault of page 0 returned"),
    "other bytes after a discard": (
        bad.OtherAfterDiscard,
        {},
        r"page \d+ holds 6c 65 66 74 6f 76 65 72 instead of .* after a discard",
    ),
    "one buffer for all threads": (
        bad.OneBufferForAllThreads,
        {},
        r"page \d+ holds .*, when (several processes|its pages)",
    ),
    "by the thread": (bad.ByTheThread, {}, r"page \d+ holds .* instead of .* at byte 6"),
    "touches its own area": (_quick(bad.TouchesItself), {}, r"fault\(page 4\)"),
    "open raises": (bad.OpenRaises, {}, r"open\(pages 0 to 63\) raises PermissionError: the medium is not in the drive"),
    "close raises": (bad.CloseRaises, {}, r"close\(pages 0 to 63\) raises KeyError"),
    "discard raises": (bad.DiscardRaises, {}, r"discard\(.*\) raises NotImplementedError: discard is not written yet"),
    "a page that cannot be supplied": (
        bad.RaisesForEver,
        {},
        r"page 7 cannot be supplied: fault\(page 7\) raises OSError: \[Errno 5\] the medium has a scratch",
    ),
    "forgets writes": (
        bad.ForgetsWrites,
        _ZERO,
        r"page \d+ holds zeros and lost what was written to it, when clients write",
    ),
    "mixes up what it saved": (bad.MixesUpSaved, _ZERO, r"page \d+ holds .* and lost what was written to it"),
    "takes frames on discard": (
        bad.WritesReadOnes,
        {},
        r"the driver took the frame of page \d+ while it was not asked to supply any",
    ),
    "start raises": (bad.StartRaises, {}, r"start\(\) raises FileNotFoundError: the medium is not in the drive"),
    "stop raises": (bad.StopRaises, {}, r"stop\(\) raises BlockingIOError: busy, when its pages are touched"),
    "no length": (bad.NoLength, {}, r"the factory makes no valid device: NoLength.length is a number of bytes"),
    "a negative length": (bad.NegativeLength, {}, r"NegativeLength.length is at least 1 byte .* not -4096"),
    "another device each time": (bad.OtherEachTime, {}, r"the factory makes devices that differ: one has length"),
    "another by its recipe": (
        functools.partial(bad.NotTheSameByRecipe, salt=2),
        {},
        r"page 0 holds .* and another in a device of the factory, when it is made by its recipe",
    ),
    "raises without populate": (bad.AlsoWithoutPopulate, {}, r"page 0 cannot be supplied: .* RuntimeError: not today"),
    "cannot be made": (bad.fails_to_make, {}, r"the factory raises ConnectionError: no such device"),
    "no device": (object, {}, r"the factory makes no valid device: object is not a prefault.device.Device"),
    "does not fail as announced": (Pattern, {"failing": (5,)}, r"page 5 must fail, and touching it gave bytes"),
    "other after discard than announced": (
        Pattern,
        {"after_discard": "zeros"},
        r"page 0 holds .* touched after a discard, and not what it is to hold then",
    ),
}


@pytest.mark.parametrize("name", _CASES)
def test_a_bad_driver_fails(name: str, no_leaks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factory, options, message = _CASES[name]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(bad.TouchesItself, "directory", str(tmp_path))
    with pytest.raises(ContractError, match=message) as caught:
        check_device(factory, seed=3, **options)
    assert "(seed 3)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (bad.ForgetsAtItsEnd, r"page \d+ holds .* and lost what was written to it before, when it was written to, stopped"),
        (
            bad.ForgetsDiscards,
            r"page \d+ holds .* instead of 00 .* and lost what was written to it before, when it was writ",
        ),
    ],
)
def test_a_driver_that_is_not_persistent_fails(kind: type[Saved], message: str, tmp_path: Path) -> None:
    numbers = itertools.count()

    def make() -> Saved:
        return kind(str(tmp_path / str(next(numbers))))

    check_device(make, seed=3, after_discard="zeros")
    with pytest.raises(ContractError, match=message):
        check_device(make, seed=3, after_discard="zeros", persistent=True)
