"""Examine this machine: what it can do for population, what limits it, and plain advice.

:func:`examine` collects a record and advises. :func:`~prefault.doctor.collect.collect` only collects.
:func:`~prefault.doctor.advice.advise` is pure and takes any :class:`~prefault.doctor.record.Record`, also one of another
machine or of a test. :mod:`prefault.doctor.report` renders. None of them changes the machine.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefault.doctor.advice import advise
from prefault.doctor.collect import collect
from prefault.doctor.record import (
    Advice,
    CapabilityAnswer,
    MachineFacts,
    Reading,
    Record,
    Report,
    Severity,
)

SCHEMA = 1
"""The version of :func:`to_json`'s layout, described in ``docs/doctor-json.md``."""

__all__ = [
    "SCHEMA",
    "Advice",
    "CapabilityAnswer",
    "MachineFacts",
    "Reading",
    "Record",
    "Report",
    "Severity",
    "advise",
    "collect",
    "examine",
    "to_json",
]


def examine() -> Report:
    """Examine this machine and advise. A source that cannot be read is reported as unknown."""
    record = collect()
    return Report(record, advise(record))


def to_json(report: Report) -> dict[str, Any]:
    """Convert the report to plain dicts, lists, numbers and texts, for :func:`json.dumps`. Sizes are integers in bytes."""
    record = report.record
    return {
        "schema": SCHEMA,
        "kind": "prefault-doctor",
        "machine": asdict(record.machine),
        "capabilities": [asdict(answer) for answer in record.capabilities],
        "transparent_huge_pages": [asdict(setting) for setting in record.settings],
        "hugetlb_pools": [pool._asdict() for pool in record.pools],
        "limits": [asdict(limit) for limit in record.limits],
        "advice": [asdict(advice) for advice in report.advice],
    }
