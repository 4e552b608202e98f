"""Proactive reclaim: the kernel takes memory away that nobody used for a while, though there is enough.

DAMON does it (Linux 5.16): by schemes in sysfs whose action is ``pageout``, and in the module ``damon_reclaim``. It finds
cold memory by samples of physical regions, so that pages which were brought in a moment ago go as well now and then. Pages
that are locked stay.

Sources: Documentation/admin-guide/mm/damon/usage.rst and reclaim.rst.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

_KDAMONDS = Path("/sys/kernel/mm/damon/admin/kdamonds")
_MODULE = Path("/sys/module/damon_reclaim/parameters")


class ProactiveReclaim(NamedTuple):
    """A reclaimer that is at work.

    Attributes:
        source: the directory of its settings.
        cold_s: seconds without an access after which memory is taken away.
        thread: process identifier of its kernel thread.
    """

    source: str
    cold_s: float
    thread: int


def proactive_reclaimers() -> list[ProactiveReclaim]:
    """Return the reclaimers that are at work; the list is empty where there is none, or /sys does not show it."""
    return [*_of_module(), *_of_schemes()]


def _of_module() -> list[ProactiveReclaim]:
    if _read(_MODULE / "enabled") not in ("Y", "1"):
        return []
    return [ProactiveReclaim(str(_MODULE), _number(_MODULE / "min_age") / 1e6, _number(_MODULE / "kdamond_pid"))]


def _of_schemes() -> list[ProactiveReclaim]:
    found = []
    for kdamond in sorted(_KDAMONDS.glob("[0-9]*")):
        if _read(kdamond / "state") != "on":
            continue
        thread = _number(kdamond / "pid")
        for scheme in sorted(kdamond.glob("contexts/*/schemes/[0-9]*")):
            if _read(scheme / "action") == "pageout":
                aggregation_us = _number(scheme.parent.parent / "monitoring_attrs/intervals/aggr_us")
                cold_s = _number(scheme / "access_pattern/age/min") * aggregation_us / 1e6
                found.append(ProactiveReclaim(str(scheme), cold_s, thread))
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # no DAMON, or not for this user
        return ""


def _number(file: Path) -> int:
    text = _read(file)
    return int(text) if text.lstrip("-").isdigit() else 0
