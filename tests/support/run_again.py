"""Tests that run again, and the only reason for that: the kernel took cached pages of a test's files away meanwhile.

Such a test fails through no fault of the code. A test whose process crashed, or that fails in any other way, never runs
again: what a second run hides would be a defect. That is why no plugin does this.
"""

from __future__ import annotations

import pytest
from _pytest.runner import runtestprotocol

_MOST = 3
"""Times that a test runs again."""

_OUTCOME = "rerun"

_again = pytest.StashKey[bool]()


def allow(item: pytest.Item) -> None:
    """Have a test that is about to fail run again."""
    item.stash[_again] = True


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test as pytest does, and again if it was allowed: with fixtures of its own each time."""
    for left in reversed(range(_MOST + 1)):
        item.stash[_again] = False
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        again = item.stash[_again] and left > 0
        for report in reports:
            if again and report.failed:
                report.outcome = _OUTCOME  # type: ignore[assignment]  # a word of our own: it counts as no failure
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if not again:
            break
    return True


def pytest_report_teststatus(report: pytest.TestReport | pytest.CollectReport) -> tuple[str, str, str] | None:
    """Count the runs of tests that ran again, as ``R``."""
    outcome: str = report.outcome
    return (_OUTCOME, "R", "RERUN") if outcome == _OUTCOME else None
