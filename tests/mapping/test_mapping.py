"""Memory that we own: what it is like, that views keep it, and that every failure leaves nothing."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault import PAGE_SIZE, Mapping, MappingError
from prefault._kernel import mman
from prefault._system import thp
from support import needs, oracle
from support.children import in_child
from support.mappings import BACKINGS, backing_in, maps_line

pytestmark = pytest.mark.usefixtures("no_leaks")

_HUGE = needs.HUGE


# --- what it is like


@pytest.mark.parametrize("name", BACKINGS)
@pytest.mark.parametrize("shared", [False, True, None])
@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("noreserve", [False, True])
def test_every_backing(tmp_path: Path, name: str, shared: bool | None, writable: bool, noreserve: bool) -> None:
    with Mapping(
        5 * PAGE_SIZE - 7, backing=backing_in(name, tmp_path), shared=shared, writable=writable, noreserve=noreserve
    ) as mapping:
        assert len(mapping) == mapping.range.length == 5 * PAGE_SIZE
        expected_shared = (name != "anonymous") if shared is None else shared
        assert mapping.shared is expected_shared
        assert (mapping.fd is None) == (name == "anonymous")
        line = maps_line(mapping.range.start)
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
    assert maps_line(address) is None
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


@pytest.mark.parametrize("name", BACKINGS)
@pytest.mark.parametrize("align", [PAGE_SIZE, "64 KiB", "2 MiB", "4 MiB", "1 GiB"])
def test_alignment(tmp_path: Path, name: str, align: int | str) -> None:
    before = oracle.mappings()
    mappings = [Mapping(3 * PAGE_SIZE, backing=backing_in(name, tmp_path), align=align) for _ in range(4)]
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


@pytest.mark.parametrize("name", BACKINGS)
def test_what_could_hold_a_huge_page_is_aligned_for_one(tmp_path: Path, name: str) -> None:
    for length in (_HUGE, _HUGE + PAGE_SIZE, 5 * _HUGE):
        with Mapping(length, backing=backing_in(name, tmp_path)) as mapping:
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
