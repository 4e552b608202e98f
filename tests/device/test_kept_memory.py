"""Memory that a driver keeps: found by the next server, whichever process was killed, at whatever moment."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import prefault
import prefault.device
from prefault.device import kept_memory
from prefault.device.device_pool import Access, DevicePool
from prefault.device.driver import Device, DeviceArea, Supplied
from prefault.device.frames import Frames
from prefault.errors import DeviceError
from prefault.sizes import GIB, PAGE_SIZE
from support import processes
from support.children import Child
from support.lifecycle_devices import Keeper, counts
from support.wardens import frames_of, holders_of, peek

TIB = 1 << 40


@pytest.fixture
def frames(no_leaks: None) -> Iterator[Frames]:
    made = Frames.create(20 * PAGE_SIZE, PAGE_SIZE)
    yield made
    made.close()


def _again(frames: Frames) -> Frames:
    """Return the same frames in the way in which another server gets them."""
    return Frames(os.dup(frames.fd), os.dup(frames.states_fd), frames.length, PAGE_SIZE, False)


def test_it_is_zeros_at_first_and_the_same_bytes_in_the_next_server(frames: Frames) -> None:
    first = frames.kept.keep("versions", 100_000)
    other = frames.kept.keep("places", 3)
    assert (bytes(first), bytes(other)) == (bytes(100_000), bytes(3))
    first[-1] = 7
    other[:] = b"abc"
    assert frames.kept.keep("versions", 100_000)[-1] == 7
    again = _again(frames)
    assert again.kept.keep("versions", 100_000)[-1] == 7
    assert bytes(again.kept.keep("places", 3)) == b"abc"
    assert bytes(again.kept.keep("new", 10)) == bytes(10)
    del first, other
    again.close()


def test_a_view_that_the_driver_released_is_no_loss(frames: Frames) -> None:
    with frames.kept.keep("table", 10) as view:
        view[0] = 1
    assert frames.kept.keep("table", 10)[0] == 1


def test_it_takes_memory_where_it_is_written_to_and_gives_it_back(frames: Frames) -> None:
    before = os.fstat(frames.states_fd).st_blocks
    view = frames.kept.keep("sparse", 15 * TIB)
    view[14 * TIB] = 1
    assert 0 < os.fstat(frames.states_fd).st_blocks - before < 10 * PAGE_SIZE // 512
    prefault.discard(view, offset=14 * TIB, length=PAGE_SIZE)
    assert view[14 * TIB] == 0


@pytest.mark.parametrize(
    ("name", "length", "error", "message"),
    [
        ("known", 11, ValueError, "'known' is kept with 10 bytes, not 11"),
        ("x", 0, ValueError, "at least one byte, not 0"),
        ("x", -1, ValueError, "at least one byte, not -1"),
        ("x", 1.5, TypeError, "an int, not float"),
        ("x", True, TypeError, "an int, not bool"),
        ("x", 16 * TIB, ValueError, r"at most 16\.0 TiB: 4\.0 KiB are kept, and 'x' would add 16\.0 TiB"),
        ("x", 1 << 80, ValueError, r"at most 16\.0 TiB"),
        ("", 1, ValueError, "1 to 100 bytes in UTF-8 and no NUL, not 0"),
        ("\0", 1, ValueError, "no NUL, not 1"),
        ("\N{SNOWMAN}" * 34, 1, ValueError, "not 102"),
        ("\udce9", 1, ValueError, "text that UTF-8 can encode"),
        (b"x", 1, TypeError, "a str, not bytes"),
    ],
)
def test_what_cannot_be_kept_is_an_error_and_changes_nothing(
    frames: Frames, name: str, length: int, error: type[Exception], message: str
) -> None:
    frames.kept.keep("known", 10)[:] = b"0123456789"
    size = os.fstat(frames.states_fd).st_size
    with pytest.raises(error, match=message):
        frames.kept.keep(name, length)
    assert os.fstat(frames.states_fd).st_size == size
    assert bytes(frames.kept.keep("known", 10)) == b"0123456789"


def test_the_number_of_names_is_limited(frames: Frames) -> None:
    for number in range(kept_memory.NAMES_MOST):
        frames.kept.keep(f"{number:0100}", 1)[0] = number
    with pytest.raises(ValueError, match="100 names, the maximum: 'one' is one more"):
        frames.kept.keep("one", 1)
    again = _again(frames)
    assert [again.kept.keep(f"{number:0100}", 1)[0] for number in range(kept_memory.NAMES_MOST)] == list(range(100))
    again.close()


def _limited(limit: int, most: int) -> str:
    made = Frames.create(20 * PAGE_SIZE, PAGE_SIZE)
    resource.setrlimit(limit, (most, most))
    try:
        made.kept.keep("table", 10 * GIB)
    except DeviceError as error:
        return str(error)
    return "it was kept"


@pytest.mark.parametrize(
    ("limit", "most", "name"), [(resource.RLIMIT_FSIZE, GIB, "RLIMIT_FSIZE"), (resource.RLIMIT_AS, 8 * GIB, "RLIMIT_AS")]
)
def test_a_limit_of_the_system_is_named(limit: int, most: int, name: str) -> None:
    with Child(partial(_limited, limit, most)) as child:
        message = child.result()
    assert "10.0 GiB cannot be kept for 'table'" in message
    assert name in message


def test_names_of_the_framework_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"begin with 'prefault\.' are the framework's: 'prefault\.objects'"):
        prefault.device.map(_KeepsAForeignName())


class _KeepsAForeignName(Device):
    length = PAGE_SIZE

    def start(self, pool: DevicePool) -> None:
        pool.keep("prefault.objects", 10)

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        return None


# --- kills


def _kill(area: prefault.device.Area, role: str) -> None:
    """Kill a process of the device, and wait until another has taken its place."""

    inode = frames_of(area)

    def living() -> set[int]:
        return {pid for pid in holders_of(inode) if processes.name(pid) == f"prefault-{role}" and processes.alive(pid)}

    (before,) = living()
    os.kill(before, signal.SIGKILL)
    assert processes.eventually(lambda: len(living() - {before}) == 1)


def test_a_piece_kept_just_before_the_server_is_killed_is_found() -> None:
    with prefault.device.map(Keeper(die_after=(3, 4))) as area:
        assert counts(peek(area, 1) or b"") == (1, 1)
        assert counts(peek(area, 3) or b"") == (2, 2)
        assert counts(peek(area, 4) or b"") == (3, 2)


@pytest.mark.parametrize("by_recipe", [True, False], ids=["recipe", "fork"])
def test_the_server_is_killed(by_recipe: bool) -> None:
    with prefault.device.map(Keeper(by_recipe=by_recipe)) as area:
        for number in range(1, 4):
            assert counts(peek(area, number) or b"") == (number, 1)
            _kill(area, "server")


@pytest.mark.parametrize(
    "victims",
    [("warden", "server"), ("server", "warden", "server"), ("warden", "warden", "server", "server", "warden", "server")],
    ids=lambda victims: "-".join(victims),
)
def test_either_is_killed_in_turn(victims: tuple[str, ...]) -> None:
    with prefault.device.map(Keeper()) as area:
        servers = 1
        for page, victim in enumerate(victims):
            assert counts(peek(area, page) or b"") == (servers, 1)
            _kill(area, victim)
            servers += victim == "server"
        assert counts(peek(area, 20) or b"") == (servers, 1)


def test_another_device_finds_nothing() -> None:
    for _ in range(2):
        with prefault.device.map(Keeper()) as area:
            assert counts(peek(area, 1) or b"") == (1, 1)
