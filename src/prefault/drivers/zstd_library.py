"""Zstandard: of Python itself from 3.14 on, and of the package backports.zstd before."""

from __future__ import annotations

from typing import Any


def zstd_library(needs: str) -> Any:
    """Return ``compression.zstd``, or the package in its place; the ImportError says "``needs`` backports.zstd"."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14
    except ImportError:
        try:
            from backports import zstd  # type: ignore[import-not-found, unused-ignore, no-redef]
        except ImportError as error:
            what = f"{needs} backports.zstd, which is not installed: pip install 'prefault[zstd]'"
            raise ImportError(what, name="backports.zstd") from error
    return zstd
