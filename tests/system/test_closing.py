"""Objects that cannot be closed while they are in use, as context managers."""

from __future__ import annotations

import pytest

from prefault._system.closing import Closing


class _Busy(Closing):
    abandoned = False

    def close(self) -> None:
        raise BufferError("in use")

    def _abandon(self) -> None:
        self.abandoned = True


def test_the_refusal_leaves_the_block() -> None:
    busy = _Busy()
    with pytest.raises(BufferError, match="in use"), busy:
        pass
    assert not busy.abandoned


def test_another_exception_matters_more_than_the_refusal() -> None:
    busy = _Busy()
    with pytest.raises(ZeroDivisionError), busy:
        raise ZeroDivisionError
    assert busy.abandoned
