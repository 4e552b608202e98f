"""The context manager of objects that cannot be closed while they are in use."""

from __future__ import annotations

import abc
from typing import Self


class Closing(abc.ABC):
    """Base of objects whose ``close`` raises BufferError while a view, or another object, still needs them.

    As a context manager the object is closed at the end of the block. Where an exception leaves the block, that exception
    matters more than the BufferError, and goes on.
    """

    __slots__ = ()

    @abc.abstractmethod
    def close(self) -> None:
        """Close it. Idempotent. Raises BufferError while it is in use."""

    def _abandon(self) -> None:  # noqa: B027  most have nothing to give up
        """Give up what could not be closed, because an exception leaves the block."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except BufferError:
            if kind is None:
                raise
            self._abandon()
