"""Pools: a bounded store of memory from which sparse memories draw, in one process or shared by several.

Sharing needs msgspec (``pip install msgspec``); a pool of one process does not.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from prefault.pool.high_water import OnHighWater
from prefault.pool.pool import Pool
from prefault.pool.pool_statistics import MemberStatistics, PoolStatistics

if TYPE_CHECKING:
    # For annotations: both need msgspec, and are made by connect() and Pool.serve().
    from prefault.pool.service.pool_client import PoolClient as PoolClient
    from prefault.pool.service.pool_server import PoolServer as PoolServer

__all__ = ["MemberStatistics", "OnHighWater", "Pool", "PoolStatistics", "connect"]


def connect(path: str | os.PathLike[str], *, timeout: float = 30.0, on_high_water: OnHighWater | None = None) -> PoolClient:
    """Connect to a pool that another process of this user serves at ``path``.

    Args:
        path: path of the socket that :meth:`Pool.serve` made.
        timeout: seconds that the server has for each reply.
        on_high_water: as for :class:`Pool`; called when the charge of the shared pool reaches its mark.

    Raises:
        FileNotFoundError, ConnectionError: no server is there, or it refuses.
        PermissionError: the server is not of this user, nor root's.
        ImportError: msgspec is not installed (``pip install msgspec``).
    """
    from prefault.pool.service.pool_client import PoolClient

    return PoolClient(path, timeout=timeout, on_high_water=on_high_water)
