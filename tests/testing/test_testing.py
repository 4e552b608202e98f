"""prefault.testing: what users get for their own tests."""

from __future__ import annotations

import pytest

from prefault import testing
from prefault._system import capabilities


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    before = set(capabilities.disabled)
    with (
        pytest.raises(ValueError, match=r"unknown capabilities \['warp_drive'\]: known are .*madv_populate"),
        testing.without("madv_populate", "warp_drive"),
    ):
        pass
    assert capabilities.disabled == before


def test_what_was_off_before_stays_off() -> None:
    with testing.without("cachestat"):
        with testing.without("cachestat", "pagemap"):
            assert {"cachestat", "pagemap"} <= capabilities.disabled
        assert "cachestat" in capabilities.disabled
        assert "pagemap" not in capabilities.disabled


def test_it_is_undone_after_an_exception() -> None:
    before = set(capabilities.disabled)
    with pytest.raises(RuntimeError), testing.without("pagemap"):
        raise RuntimeError
    assert capabilities.disabled == before


def test_it_works_as_a_decorator() -> None:
    @testing.without("pagemap")
    def inside() -> bool:
        return capabilities.PAGEMAP.available

    assert not inside()
    assert not inside()
    assert "pagemap" not in capabilities.disabled
