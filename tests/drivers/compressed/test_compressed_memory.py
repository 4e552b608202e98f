"""Compressed memory holds what was written to it, whatever is packed, unpacked, discarded or killed meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device import Area, Device
from prefault.drivers import CompressedMemory
from prefault.errors import DeviceError, DriverError
from prefault.sizes import MIB, PAGE_SIZE
from prefault.testing import check_device
from support import processes
from support.children import Child
from support.wardens import frames_of, holders_of, peek

pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

PAGES = 256


class _ByFork(CompressedMemory):
    """A server by fork: each scene of the check then shows the driver's calls."""

    def recipe(self) -> Any:
        return None


def _statistics(area: Area) -> dict[str, int]:
    found: dict[str, int] = json.loads(area.control(b"statistics"))
    return found


def _content(chance: random.Random) -> bytes:
    """Return a page: zeros, text that packs well, or noise that does not pack."""
    kind = chance.randrange(4)
    if kind == 0:
        return bytes(PAGE_SIZE)
    if kind == 1:
        return chance.randbytes(PAGE_SIZE)
    words = [chance.randbytes(chance.randrange(1, 200)) for _ in range(4)]
    return b"".join(chance.choices(words, k=400)).ljust(PAGE_SIZE, b"x")[:PAGE_SIZE]


def _write(area: Area, page: int, content: bytes) -> None:
    with area.memoryview() as view:
        view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = content


def _read(area: Area, page: int) -> bytes:
    with area.memoryview() as view:
        return bytes(view[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])


@pytest.mark.parametrize("make", [CompressedMemory, _ByFork], ids=["recipe", "fork"])
def test_it_keeps_the_contract(make: type[CompressedMemory], no_leaks: None) -> None:
    def device() -> Device:
        return make(48 * PAGE_SIZE, 24 * PAGE_SIZE, MIB)

    check_device(device, seed=2, expected=lambda page: bytes(PAGE_SIZE), after_discard="zeros")


def _kill(frames: int, role: str) -> None:
    """Kill a process of the device with these frames, and wait until another has taken its place."""

    def living() -> set[int]:
        return {pid for pid in holders_of(frames) if processes.name(pid) == f"prefault-{role}" and processes.alive(pid)}

    (before,) = living()
    os.kill(before, signal.SIGKILL)
    assert processes.eventually(lambda: len(living() - {before}) == 1)


def _kill_at_random(frames: int, seed: int) -> None:
    chance = random.Random(seed)
    for role in ("server", "server", "warden", "server", "server"):
        time.sleep(chance.random() * 0.2)
        _kill(frames, role)


@pytest.mark.parametrize("kills", [False, True], ids=["in peace", "with kills"])
@pytest.mark.parametrize("seed", range(2))
def test_it_agrees_with_a_model(seed: int, kills: bool, no_leaks: None) -> None:
    """Pages of all kinds are written, read and discarded at random; the store is swept many times."""
    with contextlib.ExitStack() as stack:
        area = stack.enter_context(prefault.device.map(CompressedMemory(PAGES * PAGE_SIZE, 32 * PAGE_SIZE, 450 << 10)))
        killer = stack.enter_context(Child(partial(_kill_at_random, frames_of(area), seed))) if kills else None
        steps = _compare_with_a_model(area, random.Random(seed), lambda: killer is not None and not killer.ended())
        assert steps >= 3000
        if killer is not None:
            killer.result()


def _compare_with_a_model(area: Area, chance: random.Random, more: Callable[[], bool]) -> int:
    """Do random things to the memory and to a model, 3 000 and as long as there are ``more``; return their number."""
    model = {page: bytes(PAGE_SIZE) for page in range(PAGES)}
    noisy: set[int] = set()
    steps = 0
    while steps < 3000 or more():
        steps += 1
        page = chance.randrange(PAGES)
        match chance.randrange(20):
            case 0:
                count = min(chance.randrange(1, 40), PAGES - page)
                area.discard(offset=page * PAGE_SIZE, length=count * PAGE_SIZE)
                model.update((gone, bytes(PAGE_SIZE)) for gone in range(page, page + count))
                noisy -= set(range(page, page + count))
            case kind if kind < 12:
                content = _content(chance)
                noisy.discard(page)
                if len(set(content)) > 200 and len(noisy) < 40:  # noise does not pack, and more would fill the store
                    noisy.add(page)
                elif len(set(content)) > 200:
                    content = b"x" * PAGE_SIZE
                _write(area, page, content)
                model[page] = content
            case _:
                assert _read(area, page) == model[page], page
    for page, content in model.items():
        assert _read(area, page) == content, page
    area.stats()
    assert 0 < _statistics(area)["pages"] <= sum(map(any, model.values()))
    return steps


def test_zero_pages_take_nothing_and_packed_ones_little() -> None:
    with prefault.device.map(CompressedMemory("8 MiB", "1 MiB", "1 MiB")) as area, area.memoryview() as view:
        for at in range(0, len(view), PAGE_SIZE):
            view[at] = 0
        assert _statistics(area) == {"pages": 0, "bytes": 0}
        for at in range(0, len(view), PAGE_SIZE):
            view[at] = at >> 12 & 0xFF or 1
        found = _statistics(area)
        assert 2048 - 256 <= found["pages"] <= 2048
        assert found["bytes"] == found["pages"] * 64
        assert all(view[at] == (at >> 12 & 0xFF or 1) for at in range(0, len(view), PAGE_SIZE))
        prefault.discard(area)
        assert _statistics(area) == {"pages": 0, "bytes": 0}


def test_a_full_store_is_an_error_and_loses_nothing() -> None:
    chance = random.Random(5)
    with prefault.device.map(CompressedMemory(PAGES * PAGE_SIZE, 80 * PAGE_SIZE, 64 * PAGE_SIZE)) as area:
        noise = [chance.randbytes(PAGE_SIZE) for _ in range(PAGES)]
        written = 0
        with pytest.raises(DriverError, match=r"store of 256\.0 KiB for packed pages is full: give it more"):  # noqa: PT012
            for page in range(PAGES):
                prefault.populate(area, offset=page * PAGE_SIZE, length=PAGE_SIZE)
                _write(area, page, noise[page])
                written += 1
        assert written >= 80
        kept = [page for page in range(written) if (peek(area, page) or noise[page][:512]) == noise[page][:512]]
        assert kept == list(range(written))
        area.discard(length=100 * PAGE_SIZE)
        prefault.populate(area, offset=200 * PAGE_SIZE, length=PAGE_SIZE)
        assert _read(area, 110) == noise[110]


def test_the_store_and_the_frames_survive_the_server_and_the_warden() -> None:
    chance = random.Random(9)
    contents = [_content(chance) for _ in range(PAGES)]
    with prefault.device.map(CompressedMemory(PAGES * PAGE_SIZE, 32 * PAGE_SIZE)) as area:
        for page, content in enumerate(contents):
            _write(area, page, content)
        before = _statistics(area)
        for role in ("server", "warden", "server"):
            _kill(frames_of(area), role)
            area.stats()  # repeated after a restart, unlike a control request, which the client would see fail
            assert _statistics(area) == before
        assert [_read(area, page) for page in range(PAGES)] == contents


@pytest.mark.parametrize(
    ("request_", "message"), [(b"", "answers b'statistics', not b''"), (b"x" * 1000, "not b'xxx"), (b"\xff\0", "not b'")]
)
def test_another_control_request_is_refused(request_: bytes, message: str) -> None:
    with (
        prefault.device.map(CompressedMemory(PAGE_SIZE, PAGE_SIZE)) as area,
        pytest.raises(DeviceError, match=message),
    ):
        area.control(request_)


def test_without_zstd_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"compressed memory needs backports\.zstd, .*: pip install 'prefault\[zstd\]'"):
        CompressedMemory(PAGE_SIZE)


@pytest.mark.parametrize(
    ("level", "kind", "message"),
    [
        ("x", TypeError, "the level of zstd is an int, not 'x'"),
        (1.5, TypeError, "an int, not 1.5"),
        (99, ValueError, "the level of zstd is -[0-9]+ to [0-9]+, not 99"),
        (-(1 << 40), ValueError, "not -1099511627776"),
    ],
)
def test_a_level_that_zstd_does_not_have(level: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        CompressedMemory(PAGE_SIZE, level=level)
