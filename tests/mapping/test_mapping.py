"""Memory that we own: what it is like, that views keep it, and that every failure leaves nothing."""

from __future__ import annotations

import contextlib
import dis
import errno
import functools
import gc
import itertools
import mmap
import os
import re
import resource
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy
import pytest

import prefault
from prefault import PAGE_SIZE, File, Mapping, MappingError, TemporaryFile
from prefault._kernel import mman
from prefault._system import thp
from prefault.mapping.mapping import MemoryPin
from support import needs, oracle
from support.children import in_child

pytestmark = pytest.mark.usefixtures("no_leaks")

_HUGE = needs.HUGE
_BACKINGS = ("anonymous", "memfd", "tmpfs", "disk")


def _backing(name: str, directory: Path) -> prefault.BackingSource | str:
    return TemporaryFile(directory) if name == "disk" else name


def _maps_line(address: int) -> str | None:
    """The line of /proc/self/maps that holds an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(end, 16) for end in line.split(" ", 1)[0].split("-"))
        if start <= address < stop:
            return line
    return None


# --- what it is like


@pytest.mark.parametrize("name", _BACKINGS)
@pytest.mark.parametrize("shared", [False, True, None])
@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("noreserve", [False, True])
def test_every_backing(tmp_path: Path, name: str, shared: bool | None, writable: bool, noreserve: bool) -> None:
    with Mapping(
        5 * PAGE_SIZE - 7, backing=_backing(name, tmp_path), shared=shared, writable=writable, noreserve=noreserve
    ) as mapping:
        assert len(mapping) == mapping.range.length == 5 * PAGE_SIZE
        expected_shared = (name != "anonymous") if shared is None else shared
        assert mapping.shared is expected_shared
        assert (mapping.fd is None) == (name == "anonymous")
        line = _maps_line(mapping.range.start)
        assert line is not None
        assert line.split()[1] == f"r{'w' if writable else '-'}-{'s' if expected_shared else 'p'}"
        assert ("nr" in oracle.vma_flags(mapping.range.start)) == noreserve
        view = mapping.memoryview()
        assert (view.nbytes, view.format, view.readonly) == (5 * PAGE_SIZE, "B", not writable)
        assert view.tobytes() == bytes(5 * PAGE_SIZE)
        assert mapping.ndarray().flags.writeable == writable
        if writable:
            view[-5:] = b"bytes"
            assert mapping.ndarray()[-5:].tobytes() == b"bytes"
            if mapping.fd is not None:
                assert os.pread(mapping.fd, 5, 5 * PAGE_SIZE - 5) == (b"bytes" if mapping.shared else bytes(5))
        else:
            with pytest.raises(TypeError):
                view[0] = 1
        address = mapping.range.start
        assert repr(mapping).startswith(f"<Mapping of 20.0 KiB, {'shared' if expected_shared else 'private'}, ")
        assert f"at {address:#x}" in repr(mapping)
        del view
    assert _maps_line(address) is None
    assert "closed" in repr(mapping)


@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("noreserve", [False, True])
def test_huge_pages(hugetlb_pool: Callable[[int], None], backing: str, shared: bool, noreserve: bool) -> None:
    hugetlb_pool(2)
    with Mapping("3 MiB", backing=backing, shared=shared, noreserve=noreserve) as mapping:
        assert (len(mapping), mapping.page_size) == (2 * _HUGE, _HUGE)
        assert mapping.range.start % _HUGE == 0
        assert ("ht" in oracle.vma_flags(mapping.range.start)) is True
        assert ("nr" in oracle.vma_flags(mapping.range.start)) == noreserve
        prefault.populate(mapping)
        smaps = oracle.smaps(mapping.range.start)
        assert smaps["KernelPageSize"] == _HUGE
        assert smaps["Shared_Hugetlb"] + smaps["Private_Hugetlb"] == 2 * _HUGE
        mapping.memoryview()[-1] = 1


@pytest.mark.parametrize("name", _BACKINGS)
@pytest.mark.parametrize("align", [PAGE_SIZE, "64 KiB", "2 MiB", "4 MiB", "1 GiB"])
def test_alignment(tmp_path: Path, name: str, align: int | str) -> None:
    before = oracle.mappings()
    mappings = [Mapping(3 * PAGE_SIZE, backing=_backing(name, tmp_path), align=align) for _ in range(4)]
    for mapping in mappings:
        assert mapping.range.start % prefault.parse_size(align) == 0
        assert mapping.range.length == 3 * PAGE_SIZE
    assert oracle.mappings() <= before + 4 + 2  # and nothing of what was reserved to find the place
    for mapping in mappings:
        mapping.close()


@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
def test_alignment_beyond_a_huge_page(hugetlb_pool: Callable[[int], None], backing: str) -> None:
    hugetlb_pool(1)
    for align in (PAGE_SIZE, _HUGE, "64 MiB", "1 GiB"):
        with Mapping(1, backing=backing, align=align) as mapping:
            assert mapping.range.start % max(_HUGE, prefault.parse_size(align)) == 0
            mapping.memoryview()[0] = 1


@pytest.mark.parametrize("name", _BACKINGS)
def test_what_could_hold_a_huge_page_is_aligned_for_one(tmp_path: Path, name: str) -> None:
    for length in (_HUGE, _HUGE + PAGE_SIZE, 5 * _HUGE):
        with Mapping(length, backing=_backing(name, tmp_path)) as mapping:
            assert mapping.range.start % _HUGE == 0


@pytest.mark.parametrize(
    ("align", "kind", "message"),
    [
        (0, ValueError, "a power of two of at least 4096 bytes, not 0"),
        (1, ValueError, "not 1"),
        (3 * PAGE_SIZE, ValueError, "not 12288"),
        ("3 MB", ValueError, "not 3000000"),
        (-PAGE_SIZE, ValueError, "negative"),
        (2.0, TypeError, "not float"),
        ("wide", ValueError, "not a size"),
    ],
)
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_wrong_alignments(backing: str, align: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Mapping(PAGE_SIZE, backing=backing, align=align)


def test_an_alignment_for_which_there_is_no_room() -> None:
    with pytest.raises(MappingError, match="beyond the address space"):
        Mapping(PAGE_SIZE, align=1 << 62)


# --- transparent huge pages


@pytest.mark.parametrize("huge", ["never", "advise", "auto"])
@pytest.mark.parametrize("shared", [False, True])
def test_huge_page_advice(huge: Any, shared: bool) -> None:
    if thp.pmd_size() is None:
        needs.missing("the kernel has no transparent huge pages")
    with Mapping(2 * _HUGE, huge=huge, shared=shared) as mapping:
        flags = oracle.vma_flags(mapping.range.start)
        assert ("hg" in flags, "nh" in flags) == (huge == "advise", huge == "never")
        prefault.populate(mapping)
        held = oracle.smaps(mapping.range.start)["AnonHugePages"]
        if not shared and huge == "never":
            assert held == 0
        elif not shared and huge == "advise" and thp.read_setting("enabled") != "never":
            assert held == 2 * _HUGE
        elif not shared and huge == "auto" and thp.read_setting("enabled") != "always":
            assert held == 0


def test_unknown_huge_page_advice() -> None:
    with pytest.raises(ValueError, match="huge is 'auto', 'advise' or 'never', not 'please'"):
        Mapping(PAGE_SIZE, huge="please")  # type: ignore[arg-type]


def test_advice_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> Callable[..., None]:
        def madvise(*_: int) -> None:
            raise OSError(number, os.strerror(number))

        return madvise

    monkeypatch.setattr(mman, "madvise", refuse(errno.EINVAL))
    monkeypatch.setattr(thp, "pmd_size", lambda: None)
    with pytest.raises(MappingError, match="this kernel has no transparent huge pages"):
        Mapping(PAGE_SIZE, huge="advise", backing="memfd")
    Mapping(PAGE_SIZE, huge="never").close()  # which is so already
    monkeypatch.setattr(mman, "madvise", refuse(errno.ENOMEM))
    for huge in ("advise", "never"):
        with pytest.raises(MappingError, match=f"huge='{huge}' is refused: Cannot allocate memory"):
            Mapping(PAGE_SIZE, huge=huge, backing="memfd")


# --- arrays


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("uint8", None, (PAGE_SIZE,)),
        ("float64", None, (PAGE_SIZE // 8,)),
        ("<u4", (16, 64), (16, 64)),
        (numpy.int16, 10, (10,)),
        (numpy.dtype([("a", "u1"), ("b", "f8")]), None, (PAGE_SIZE // 9,)),
        ("S100", None, (40,)),
        ("M8[ns]", (), ()),
        ("u1", (0,), (0,)),
    ],
)
def test_ndarray(dtype: Any, shape: Any, expected: tuple[int, ...]) -> None:
    with Mapping(PAGE_SIZE) as mapping:
        made = mapping.ndarray(dtype, shape)
        assert (made.dtype, made.shape) == (numpy.dtype(dtype), expected)
        assert made.ctypes.data == mapping.range.start
        del made


def test_arrays_that_cannot_be() -> None:
    with Mapping(PAGE_SIZE) as mapping:
        for wrong in ("O", numpy.dtype([("a", "u1"), ("b", "O")])):
            with pytest.raises(TypeError, match="cannot hold Python objects"):
                mapping.ndarray(wrong)
        for empty in ("S", "U", "V"):
            with pytest.raises(ValueError, match=r"items of dtype .* have no size"):
                mapping.ndarray(empty)
        with pytest.raises(ValueError, match="takes 4104 bytes, and 4096 are there"):
            mapping.ndarray("f8", PAGE_SIZE // 8 + 1)
        with pytest.raises(ValueError, match="negative"):
            mapping.ndarray("u1", (-2, -3))
        with pytest.raises(TypeError):
            mapping.ndarray("what")
        gc.collect()


# --- views keep the memory


def _views(mapping: Mapping) -> list[Any]:
    return [
        mapping.memoryview(),
        mapping.memoryview()[5:7],
        mapping.memoryview().cast("I"),
        mapping.ndarray(),
        mapping.ndarray("f8")[::2],
        numpy.frombuffer(mapping.memoryview(), "u2"),
        iter(mapping.memoryview()),
    ]


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_closing_refuses_while_a_view_is_alive(backing: str) -> None:
    for index in range(7):
        mapping = Mapping(PAGE_SIZE, backing=backing)
        mapping.memoryview()[:4] = b"here"
        view = _views(mapping)[index]
        for _ in range(2):
            with pytest.raises(BufferError, match="a view of the mapping is still alive: delete it first"):
                mapping.close()
        assert not mapping.closed
        assert mapping.ndarray()[:4].tobytes() == b"here"
        assert prefault.populate(mapping).bytes + PAGE_SIZE >= PAGE_SIZE
        del view
        mapping.close()
        assert mapping.closed


def test_a_released_view_is_no_view() -> None:
    with Mapping(PAGE_SIZE) as mapping:
        view = mapping.memoryview()
        view.release()
    assert mapping.closed


@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_a_forgotten_mapping_lives_on_in_its_views(backing: str) -> None:
    mapping = Mapping(2 * PAGE_SIZE, backing=backing)
    gone = weakref.ref(mapping)
    address, fd = mapping.range.start, mapping.fd
    view = mapping.ndarray()
    view[-4:] = list(b"here")
    del mapping
    gc.collect()
    assert gone() is None
    part = view[-4:]
    del view
    gc.collect()
    assert part.tobytes() == b"here"
    part[:] = 7
    assert _maps_line(address) is not None
    del part
    assert _maps_line(address) is None
    if fd is not None:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_forgotten_mapping_without_views_is_unmapped() -> None:
    mapping = Mapping(PAGE_SIZE, backing="memfd")
    address, fd = mapping.range.start, mapping.fd
    assert fd is not None
    del mapping
    assert _maps_line(address) is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_with_block_that_leaves_a_view() -> None:
    mapping = Mapping(PAGE_SIZE)
    view = mapping.memoryview()
    with pytest.raises(BufferError, match="still alive"), mapping:
        view[0] = 5
    assert view[0] == 5
    del view
    mapping.close()


def test_an_exception_on_its_way_out_is_not_hidden_by_a_view() -> None:
    views: list[memoryview] = []

    def fail(mapping: Mapping) -> None:
        with mapping:
            views.append(mapping.memoryview())
            views[0][0] = 5
            raise ZeroDivisionError

    mapping = Mapping(PAGE_SIZE)
    address = mapping.range.start
    with pytest.raises(ZeroDivisionError):
        fail(mapping)
    assert mapping.closed
    assert views[0][0] == 5
    assert oracle.smaps(address)
    views.clear()
    gc.collect()
    assert not oracle.smaps(address)


def test_close_is_idempotent_and_forgets_the_descriptor() -> None:
    mapping = Mapping(PAGE_SIZE, backing="memfd")
    fd = mapping.fd
    assert fd is not None
    mapping.close()
    other = os.open("/dev/null", os.O_RDONLY)  # takes the number
    try:
        assert other == fd
        mapping.close()
        with mapping:
            pass
        del mapping
        gc.collect()
        os.fstat(other)
    finally:
        os.close(other)


def test_a_closed_mapping() -> None:
    mapping = Mapping(PAGE_SIZE, backing="memfd")
    mapping.close()
    uses: list[Callable[[], Any]] = [
        mapping.memoryview,
        mapping.ndarray,
        lambda: mapping.range,
        lambda: mapping.fd,
        lambda: mapping.file_offset,
    ]
    for use in uses:
        with pytest.raises(ValueError, match="the mapping is closed"):
            use()
    assert mapping.closed
    assert len(mapping) == PAGE_SIZE


def test_a_view_that_is_asked_for_while_another_thread_closes() -> None:
    # The moment between looking whether the mapping is open and taking the view.
    mapping = Mapping(PAGE_SIZE)
    memory = mapping._memory
    assert memory is not None
    mapping.close()
    with pytest.raises(ValueError, match="the mapping is closed"):
        memory.exporter(PAGE_SIZE)
    with pytest.raises(ValueError, match="the mapping is closed"):
        MemoryPin(memory)


# --- fork


def test_private_and_shared_across_fork() -> None:
    for shared in (False, True):
        with Mapping(PAGE_SIZE, shared=shared) as mapping:
            mapping.memoryview()[0] = 1

            def in_the_child(mapping: Mapping = mapping) -> tuple[int, int]:
                view = mapping.memoryview()
                before = view[0]
                view[0] = 2
                prefault.populate(mapping)
                present = prefault.residency(mapping).present_bytes
                del view
                mapping.close()
                return before, present

            assert in_child(in_the_child) == (1, PAGE_SIZE)
            assert mapping.memoryview()[0] == (2 if shared else 1)
            assert not mapping.closed


# --- failures leave nothing


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


@pytest.mark.parametrize("name", _BACKINGS)
@pytest.mark.parametrize("nth", [1, 2])
def test_mmap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, nth: int) -> None:
    # The second call is the one into the address range that the first has reserved.
    monkeypatch.setattr(mman, "mmap", _FailingMmap(nth))
    before, descriptors = _mapped_bytes(), oracle.descriptors()
    with pytest.raises(MappingError, match=r"1\.0 GiB cannot be mapped: .*no limit .* says why \[ENOMEM") as caught:
        Mapping("1 GiB", backing=_backing(name, tmp_path))
    assert isinstance(caught.value.__cause__, OSError)
    assert _mapped_bytes() - before < 1 << 30
    assert oracle.descriptors() == descriptors
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(mman, "mmap", _FailingMmap(nth, errno.EAGAIN))
    with pytest.raises(MappingError, match="cannot be mapped: Resource temporarily unavailable"):
        Mapping("1 GiB", backing=_backing(name, tmp_path))
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
