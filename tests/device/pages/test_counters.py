"""The log of pages: compact, in order, and bounded."""

from __future__ import annotations

from prefault.device.pages.counters import LOG_ENTRIES, LOG_MOST, UnusedCounters


def test_pages_and_runs_come_back_in_order_and_neighbours_are_one_run() -> None:
    counters = UnusedCounters()
    counters.log.append(7)
    counters.log_run(8, 20)
    counters.log_run(3, 4)
    counters.log_run(1 << 39, (1 << 39) + (1 << 25))
    assert counters.access_runs() == [(7, 20), (3, 4), (1 << 39, (1 << 39) + (1 << 25))]


def test_the_oldest_entries_are_dropped() -> None:
    counters = UnusedCounters()
    for page in range(0, 2 * (LOG_MOST + 10), 2):
        counters.log_run(page, page + 1)
    assert len(counters.log) <= LOG_MOST
    runs = counters.access_runs()
    assert len(runs) == LOG_ENTRIES
    assert runs[-1] == (2 * (LOG_MOST + 9), 2 * (LOG_MOST + 9) + 1)
