"""The policy of dirty tracking: by page, or by chunk where much is written."""

from __future__ import annotations

from prefault.drivers.buffers.dirty_tracking import DirtyTracking


def _method(tracking: DirtyTracking) -> str:
    return tracking.method


def test_d5_pages_are_reported_once() -> None:
    tracking = DirtyTracking(100, 10)
    for page in (3, 4, 50):
        assert tracking.mark(page) == range(page, page + 1)
    assert tracking.scan() == [range(3, 5), range(50, 51)]
    assert tracking.scan() == []


def test_the_method_follows_the_density_of_writes_as_vmwgfx_does() -> None:
    tracking = DirtyTracking(95, 10)
    for scan in range(3):
        assert _method(tracking) == "page", scan
        for page in range(10):  # more than 10 % of 95
            tracking.mark(page)
        tracking.scan()
    assert _method(tracking) == "chunk"
    assert tracking.mark(94) == range(90, 95)
    assert tracking.mark(7) == range(10)
    assert tracking.scan() == [range(10), range(90, 95)]
    for _ in range(3):
        assert _method(tracking) == "chunk"
        assert tracking.scan() == []
    assert _method(tracking) == "page"


def test_a_scan_between_that_finds_little_begins_anew() -> None:
    tracking = DirtyTracking(100, 10)
    for dense in (True, True, False, True, True):
        for page in range(20 if dense else 1):
            tracking.mark(page)
        tracking.scan()
    assert _method(tracking) == "page"
    tracking.mark_all()
    assert tracking.scan() == [range(100)]
    assert _method(tracking) == "chunk"
