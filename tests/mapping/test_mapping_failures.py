"""Failures and interruptions of mapping leave no address, descriptor or file behind, and name their limit."""

from __future__ import annotations

import contextlib
import dis
import errno
import functools
import itertools
import mmap
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

import prefault
from prefault import PAGE_SIZE, File, Mapping, MappingError, TemporaryFile
from prefault._kernel import mman
from support import needs, oracle
from support.children import in_child
from support.mappings import BACKINGS, backing_in

pytestmark = pytest.mark.usefixtures("no_leaks")

_HUGE = needs.HUGE


class _FailingMmap:
    """mmap(2) that works until its ``nth`` call, and fails there."""

    def __init__(self, nth: int, number: int = errno.ENOMEM) -> None:
        self.calls = 0
        self._nth = nth
        self._number = number
        self._mmap = mman.mmap

    def __call__(self, *arguments: int) -> int:
        self.calls += 1
        if self.calls == self._nth:
            raise OSError(self._number, os.strerror(self._number))
        return self._mmap(*arguments)


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


@pytest.mark.parametrize("name", BACKINGS)
@pytest.mark.parametrize("nth", [1, 2])
def test_mmap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    # The second call is the one into the address range that the first has reserved.
    monkeypatch.setattr(mman, "mmap", _FailingMmap(nth))
    before, descriptors = _mapped_bytes(), oracle.descriptors()
    with pytest.raises(MappingError, match=r"1\.0 GiB cannot be mapped: .*no limit .* says why \[ENOMEM") as caught:
        Mapping("1 GiB", backing=backing_in(name, tmp_path))
    assert isinstance(caught.value.__cause__, OSError)
    assert _mapped_bytes() - before < 1 << 30
    assert oracle.descriptors() == descriptors
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(mman, "mmap", _FailingMmap(nth, errno.EAGAIN))
    with pytest.raises(MappingError, match="cannot be mapped: Resource temporarily unavailable"):
        Mapping("1 GiB", backing=backing_in(name, tmp_path))
    assert _mapped_bytes() - before < 1 << 30


def test_another_thread_takes_the_place_first(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = mman.mmap
    thieves: list[int] = []

    def stolen(address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
        if flags & mman.MAP_FIXED_NOREPLACE and len(thieves) < 3:
            thieves.append(
                mapped(address, PAGE_SIZE, prot, mman.MAP_PRIVATE | mman.MAP_ANONYMOUS | mman.MAP_FIXED_NOREPLACE)
            )
        return mapped(address, length, prot, flags, fd, offset)

    monkeypatch.setattr(mman, "mmap", stolen)
    with Mapping("4 MiB", backing="memfd") as mapping:
        assert mapping.range.start % _HUGE == 0
        assert len(thieves) == 3
        for thief in thieves:
            assert thief not in mapping.range
            assert oracle.smaps(thief)
            mman.munmap(thief, PAGE_SIZE)
    monkeypatch.setattr(mman, "mmap", _always_stolen(mapped))
    before = _mapped_bytes()
    with pytest.raises(MappingError, match="other threads"):
        Mapping("1 GiB", backing="memfd")
    assert _mapped_bytes() - before < 1 << 20


def _always_stolen(mapped: Callable[..., int]) -> Callable[..., int]:
    def refuse(address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
        if flags & mman.MAP_FIXED_NOREPLACE:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        return mapped(address, length, prot, flags, fd, offset)

    return refuse


def test_a_kernel_that_takes_the_address_for_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before Linux 4.17 MAP_FIXED_NOREPLACE means nothing: a taken place gives another one, perhaps not aligned."""
    mapped = mman.mmap
    elsewhere: list[int] = []

    def old(address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
        hinted = flags & mman.MAP_FIXED_NOREPLACE
        flags &= ~mman.MAP_FIXED_NOREPLACE
        if hinted and not elsewhere:
            elsewhere.append(mapped(address + PAGE_SIZE, length, prot, flags, fd, offset))
            return elsewhere[0]
        return mapped(address, length, prot, flags, fd, offset)

    monkeypatch.setattr(mman, "mmap", old)
    before = _mapped_bytes()
    with Mapping("1 GiB", backing="memfd") as mapping:
        assert elsewhere
        assert mapping.range.start % _HUGE == 0
        assert _mapped_bytes() - before < (1 << 30) + (1 << 20)


@pytest.mark.parametrize("what", [KeyboardInterrupt, MemoryError])
def test_an_interruption_while_mapping(monkeypatch: pytest.MonkeyPatch, what: type[BaseException]) -> None:
    def interrupted(*_: int) -> None:
        raise what

    descriptors = oracle.descriptors()
    monkeypatch.setattr(mman, "madvise", interrupted)
    with pytest.raises(what):
        Mapping(PAGE_SIZE, backing="memfd", huge="never")
    assert oracle.descriptors() == descriptors


def test_a_limit_on_the_address_space() -> None:
    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_AS, (_mapped_bytes() + (64 << 20),) * 2)
        before = _mapped_bytes(), len(os.listdir("/proc/self/fd"))
        with pytest.raises(
            MappingError, match=r"takes 1\.0 GiB, and RLIMIT_AS leaves 6[34]\.\d MiB of .*ulimit -v"
        ) as caught:
            Mapping("1 GiB", backing="memfd", align=PAGE_SIZE)
        assert caught.value.errno == errno.ENOMEM
        assert _mapped_bytes() - before[0] < 16 << 20
        assert len(os.listdir("/proc/self/fd")) == before[1]
        Mapping("1 MiB").close()
        return "survived"

    assert in_child(limited) == "survived"


def test_a_limit_on_data() -> None:
    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_DATA, (64 << 20, 64 << 20))
        Mapping("1 GiB", writable=False).close()
        with pytest.raises(MappingError, match=r"takes 1\.0 GiB, and RLIMIT_DATA leaves .* of 64\.0 MiB: .*ulimit -d"):
            Mapping("1 GiB")
        return "refused"

    assert in_child(limited) == "refused"


def test_a_limit_that_is_not_reached_is_not_named() -> None:
    def limited() -> str:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 50, 1 << 50))
        with pytest.raises(MappingError) as caught:
            Mapping(1 << 48)
        return str(caught.value)

    text = in_child(limited)
    assert re.search(r"256\.0 TiB are needed in one piece, and the largest gap .* is \d+\.\d TiB", text)
    assert "RLIMIT" not in text


def test_the_number_of_mappings() -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    if most > 200_000:
        pytest.skip(f"vm.max_map_count is {most}: it takes too long to reach it")

    def limited() -> str:
        flags = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS
        with contextlib.suppress(OSError):  # ENOMEM
            for number in range(2 * most):  # neighbours of unlike protection stay apart
                mman.mmap(0, PAGE_SIZE, mman.PROT_READ if number % 2 else mman.PROT_NONE, flags)
        with pytest.raises(MappingError) as caught:
            Mapping(PAGE_SIZE, backing="memfd")
        return str(caught.value)

    assert f"vm.max_map_count allows {most}" in in_child(limited)


@pytest.mark.parametrize("option", [{"huge": "x"}, {"align": 5}, {"backing": "x"}, {"length": -1}, {"length": 0}])
def test_wrong_options_open_nothing(tmp_path: Path, option: dict[str, Any]) -> None:
    before = oracle.descriptors(), _mapped_bytes()
    with pytest.raises(ValueError, match=r"."):
        Mapping(**{"length": "1 GiB", "backing": TemporaryFile(tmp_path), **option})
    assert oracle.descriptors() == before[0]
    assert _mapped_bytes() - before[1] < 1 << 30
    assert list(tmp_path.iterdir()) == []


def test_many_mappings_one_after_another() -> None:
    before = oracle.mappings()
    for index in range(300):
        with Mapping((index % 7 + 1) * PAGE_SIZE, backing=("anonymous", "memfd", "tmpfs")[index % 3]) as mapping:
            mapping.memoryview()[-1] = 1
    assert oracle.mappings() <= before + 2


def test_a_file_that_is_cut_short_while_it_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    with Mapping(backing=File(path)) as mapping:
        os.truncate(path, PAGE_SIZE)
        with pytest.raises(prefault.BeyondEndError) as caught:
            prefault.populate(mapping)
        assert caught.value.offset == PAGE_SIZE
        assert len(mapping) == 4 * PAGE_SIZE


@pytest.mark.parametrize("backing", ["memfd", prefault.TemporaryFile("/dev/shm")], ids=["memfd", "tmpfs"])
@pytest.mark.parametrize("make", [prefault.Mapping, prefault.SparseMemory])
def test_ctrl_c_at_any_step_of_making_leaves_no_descriptor(
    make: Callable[..., prefault.Mapping | prefault.SparseMemory], backing: prefault.BackingSource | str
) -> None:
    def interrupted_at(step: int) -> bool:
        """Make memory, and raise after so many calls in the modules that open and map; return whether there are so many."""
        left = step

        def trace(frame: FrameType, event: str, _: object) -> Callable[..., Any] | None:
            nonlocal left
            if frame.f_globals.get("__name__") not in ("prefault.memory.backings", "prefault.mapping.mapping", *_OPENERS):
                return None
            if frame.f_code.co_name in ("__del__", "close", "unmap", "__exit__"):
                return None
            frame.f_trace_opcodes = True
            if event == "opcode" and frame.f_lasti in _after_calls(frame.f_code):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            memory = make(PAGE_SIZE, backing=backing)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        memory.close()
        return False

    interrupted_at(1 << 60)  # what is opened once and kept
    descriptors, files = os.listdir("/proc/self/fd"), os.listdir("/dev/shm")
    step = 1
    while interrupted_at(step):
        step += 1
        assert os.listdir("/proc/self/fd") == descriptors, step
        assert [name for name in os.listdir("/dev/shm") if name.startswith("prefault-") and name not in files] == [], step
    assert step > 20


@functools.cache
def _after_calls(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which CPython may run a signal handler: those that follow a call."""
    instructions = itertools.pairwise(dis.get_instructions(code))
    return frozenset(after.offset for call, after in instructions if call.opname in ("CALL", "CALL_FUNCTION_EX"))


_OPENERS = ("prefault._system.descriptors", "prefault.sparse.sparse_memory", "prefault.sparse.layout")
