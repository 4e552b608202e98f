"""Errors of the processes of a device that stand for a limit: DeviceError with the limit, its number, and what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from prefault._kernel._call import no_descriptor
from prefault.errors import DeviceError
from prefault.limits.process_limits import explain_limit, no_process

__all__ = ["explained", "no_descriptor", "no_process", "reason"]

reason = explain_limit


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise an error that stands for a limit as DeviceError: ``what`` failed, which limit is reached, and what to do.

    Errors with a text of their own, and errors that stand for no limit, are raised as they are.
    """
    try:
        yield
    except OSError as error:
        sentence = reason(error.errno)
        if sentence is None or not (error.strerror or "").endswith(os.strerror(error.errno or 0)):
            raise
        raise DeviceError(error.errno, f"{what}: {sentence}") from error
