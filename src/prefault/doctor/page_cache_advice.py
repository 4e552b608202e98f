"""Advice on the page cache."""

from __future__ import annotations

from collections.abc import Iterator

from prefault.doctor.record import Advice, Record


def proactive_reclaim(record: Record) -> Iterator[Advice]:
    """Advise to lock what must stay, where the kernel takes cold memory away though there is enough."""
    for reading in record.readings("proactive_reclaim"):
        if isinstance(reading.value, int | float):
            yield Advice(
                "proactive-reclaim", "warning",
                f"memory that nobody used for {reading.value:g} s is taken away, though there is enough (DAMON,"
                f" {reading.source}): files that were warmed have to be read from the disk again",
                "prefault lock PATH...  # keeps files in memory; or warm them shortly before they are used",
            )  # fmt: skip
            return
