"""The options of populate_async, for type checkers."""

from __future__ import annotations

from typing import TypedDict

from prefault.engine.methods import Access
from prefault.engine.planning import Huge, Threads
from prefault.engine.progress import Progress
from prefault.engine.rate import RateLimit
from prefault.limits.admission import HeadroomChoice
from prefault.memory.node_policy import Interleave
from prefault.sizes import Size


class AsyncOptions(TypedDict, total=False):
    """Keyword arguments of :func:`prefault.populate`, each as there."""

    access: Access | None
    offset: Size
    length: Size | None
    method: str | None
    threads: Threads
    rollback: bool
    progress: Progress | bool
    rate: RateLimit | Size | None
    headroom: HeadroomChoice
    huge: Huge
    node: int | None
    interleave: Interleave
