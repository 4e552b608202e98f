"""What this machine can do for population, what limits it, and plain advice.

:func:`examine` looks and advises. The parts can be used alone: :func:`~prefault.doctor.collect.collect` only looks,
:func:`~prefault.doctor.advice.advise` is pure and takes any :class:`~prefault.doctor.record.Record`, also one of another
machine or one that a test made up. Nothing is printed and nothing of the machine is changed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from prefault.doctor.advice import advise
from prefault.doctor.collect import collect
from prefault.doctor.record import Advice, CapabilityAnswer, Machine, Pool, Reading, Record, Report, Severity

SCHEMA = 1
"""The version of :func:`to_json`'s layout, described in ``docs/doctor-json.md``."""

__all__ = [
    "SCHEMA",
    "Advice",
    "CapabilityAnswer",
    "Machine",
    "Pool",
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
    """Look at this machine and say what could be better. Sources that cannot be read are reported as unknown."""
    record = collect()
    return Report(record, advise(record))


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain dicts, lists, numbers and texts, for :func:`json.dumps`. Sizes are bytes as integers."""
    record = report.record
    return {
        "schema": SCHEMA,
        "kind": "prefault-doctor",
        "machine": asdict(record.machine),
        "capabilities": [asdict(answer) for answer in record.capabilities],
        "transparent_huge_pages": [asdict(setting) for setting in record.settings],
        "hugetlb_pools": [asdict(pool) for pool in record.pools],
        "limits": [asdict(limit) for limit in record.limits],
        "advice": [asdict(advice) for advice in report.advice],
    }
