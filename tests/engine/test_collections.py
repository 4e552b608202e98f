"""Collections of buffers: populate, plan, residency and lock of all of them by one call."""

from __future__ import annotations

import mmap
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pyarrow  # type: ignore[import-untyped]
import pytest
import safetensors.numpy

import prefault
from prefault.drivers.remote.safetensors_files import SafeTensors
from prefault.memory.borrowing import borrow
from prefault.memory.collecting import leaves_of
from prefault.sizes import KIB, MIB, PAGE_SIZE
from support import oracle
from support.regions import Region


@pytest.fixture
def arrays() -> list[numpy.ndarray[Any, Any]]:
    """Eight arrays of 1 MiB in mappings of their own, of which nothing is populated."""
    return [_array() for _ in range(8)]


def _array() -> numpy.ndarray[Any, Any]:
    # Freed with the array, which a traceback may still refer to when the test ends.
    memory = mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return numpy.frombuffer(memory, numpy.uint8)


def _present(array: numpy.ndarray[Any, Any]) -> int:
    return oracle.present_bytes(array.ctypes.data, array.nbytes)


class _Module:
    """What torch.nn.Module offers, as far as it matters."""

    def __init__(self, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
        self._parameters, self._buffers = parameters, buffers

    def named_parameters(self) -> Iterable[tuple[str, Any]]:
        return iter(self._parameters.items())

    def named_buffers(self) -> Iterable[tuple[str, Any]]:
        return iter(self._buffers.items())


_SHAPES: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "generator": lambda some: (one for one in some),
    "dictionary": lambda some: {str(index): one for index, one in enumerate(some)},
    "values": lambda some: {str(index): one for index, one in enumerate(some)}.values(),
    "ordered dictionary": lambda some: OrderedDict(enumerate(some)),
    "optimizer": lambda some: {
        "state": {0: {"step": 3, "exp_avg": some[0]}, 1: {"exp_avg": some[1:]}},
        "param_groups": [{"lr": 0.1, "foreach": None, "nesterov": False}],
    },
    "module": lambda some: _Module({"w.0": some[0], "w.1": some[1]}, {f"b{n}": one for n, one in enumerate(some[2:])}),
    "nested": lambda some: (tuple(some[:4]), [some[4:]]),
}


@pytest.mark.parametrize("shape", _SHAPES)
def test_all_buffers_are_populated(arrays: list[numpy.ndarray[Any, Any]], shape: str) -> None:
    result = prefault.populate(_SHAPES[shape](arrays))
    assert [_present(array) for array in arrays] == [MIB] * 8
    assert (result.bytes, result.present_bytes, result.access) == (8 * MIB, 0, "write")
    assert prefault.residency(_SHAPES[shape](arrays)).present_bytes == 8 * MIB


def test_plan_and_residency_touch_nothing(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    plan = prefault.plan(arrays)
    assert plan.length == 8 * MIB
    found = prefault.residency(arrays)
    assert (found.inspected_bytes, found.present_bytes) == (8 * MIB, 0)
    assert not sum(map(_present, arrays))
    arrays[3][5] = 1
    assert prefault.residency(arrays).present_bytes == PAGE_SIZE
    assert prefault.residency(arrays).ranges().length == PAGE_SIZE


def test_lock_and_unlock(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    locked = prefault.lock(arrays)
    assert locked.bytes == locked.populated.bytes == 8 * MIB
    assert all("lo" in oracle.vma_flags(array.ctypes.data) for array in arrays)
    assert prefault.unlock(arrays) == 8 * MIB
    assert not any("lo" in oracle.vma_flags(array.ctypes.data) for array in arrays)


@pytest.mark.parametrize("seed", range(8))
def test_pages_that_parts_share_are_populated_once(seed: int) -> None:
    choose = random.Random(seed)
    with prefault.Mapping("8 MiB", huge="never") as memory:
        whole = memory.ndarray().view(numpy.uint8)
        spans = [sorted(choose.sample(range(8 * MIB), 2)) for _ in range(40)]
        parts = [whole[start : min(stop, start + 200 * KIB)] for start, stop in spans]
        pages = {
            page for part in parts
            for page in range(part.ctypes.data // PAGE_SIZE, (part.ctypes.data + part.nbytes - 1) // PAGE_SIZE + 1)
        }  # fmt: skip
        before = prefault.populate(parts[0]).bytes
        seen: list[tuple[int, int]] = []
        result = prefault.populate(parts, progress=lambda done, total: seen.append((done, total)))
        assert result.bytes + before == result.bytes + result.present_bytes == len(pages) * PAGE_SIZE
        assert oracle.present_bytes(memory.range.start, 8 * MIB) == len(pages) * PAGE_SIZE
        assert seen[-1] == (len(pages) * PAGE_SIZE, len(pages) * PAGE_SIZE)
        del whole, parts


def test_a_page_that_one_part_writes_is_written() -> None:
    with prefault.Mapping("64 KiB", huge="never") as memory:
        whole = memory.ndarray().view(numpy.uint8)
        readonly = whole[:]
        readonly.flags.writeable = False
        result = prefault.populate([readonly[: 8 * PAGE_SIZE], whole[4 * PAGE_SIZE :]])
        assert result.bytes == 16 * PAGE_SIZE
        found = prefault.residency(whole)
        assert found.present_bytes == 16 * PAGE_SIZE
        assert found.allocated_bytes == 12 * PAGE_SIZE  # the others are the zero page
        del whole, readonly


def test_many_small_parts_take_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [bytearray(1000) for _ in range(20_000)]
    assert prefault.populate(parts).bytes + prefault.populate(parts).present_bytes >= 20_000 * 1000


def test_discard_gives_back_what_lies_inside(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    prefault.populate(arrays)
    for array in arrays:
        array[:] = 7
    halves = [arrays[2][:100], arrays[2][100 : 2 * PAGE_SIZE + 5]]
    result = prefault.discard({"a": arrays[0], "b": [arrays[1][5:], *halves]})
    assert result.bytes == result.freed_bytes == MIB + MIB - PAGE_SIZE + 2 * PAGE_SIZE
    assert [_present(array) for array in arrays[:4]] == [0, PAGE_SIZE, MIB - 2 * PAGE_SIZE, MIB]
    assert arrays[1][:5].tolist() == [7] * 5
    assert arrays[2][2 * PAGE_SIZE :].min() == 7
    assert not arrays[0].any()
    rows = arrays[3].reshape(-1, PAGE_SIZE)
    assert prefault.discard(list(rows[::2])).bytes == MIB // 2 == MIB - _present(arrays[3])  # more than are borrowed singly


def test_discard_checks_all_before_anything_is_lost(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    prefault.populate(arrays)
    readonly = arrays[5][:]
    readonly.flags.writeable = False
    with pytest.raises(ValueError, match=r"^\['r'\]: the buffer is read-only"):
        prefault.discard({"a": arrays[0], "r": readonly})
    with pytest.raises(ValueError, match=r"^\[1\]: the array is not contiguous"):
        prefault.discard([arrays[0], arrays[1][::3]])
    with pytest.raises(ValueError, match="offset and length are those of one buffer"):
        prefault.discard(arrays, length=PAGE_SIZE)
    with pytest.raises(TypeError, match=r"^\[1\]: '/etc/passwd' is a path"):
        prefault.discard([arrays[0], "/etc/passwd"])
    assert [_present(array) for array in arrays] == [MIB] * 8


def test_headroom_has_the_limits_of_all_kinds_of_memory(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    with prefault.Mapping(MIB, backing="tmpfs") as shared:
        both = {limit.name for limit in prefault.headroom([arrays[0], {"x": shared}]).limits}
        assert both == {limit.name for one in (arrays[0], shared) for limit in prefault.headroom(one).limits}
        assert both > {limit.name for limit in prefault.headroom(arrays[:3]).limits}
    with pytest.raises(TypeError, match="no memory to work on"):
        prefault.headroom(object())


# --- what fails, and where


@pytest.mark.parametrize("rollback", [False, True])
def test_errors_name_the_part_and_its_offset(arrays: list[numpy.ndarray[Any, Any]], rollback: bool) -> None:
    with Region(16) as region:
        region.protect(5, 1, 0)
        tensors = {"embed": arrays[0], "layers": [arrays[1], region.part(2, 10)]}
        with pytest.raises(prefault.ProtectionError, match=r"offset 12288 .* of \['layers'\]\[1\] \(40.0 KiB\)") as caught:
            prefault.populate(tensors, rollback=rollback)
        assert caught.value.offset == 3 * PAGE_SIZE
        assert caught.value.address == region.page(5)
        there = _present(arrays[0]) + _present(arrays[1]) + oracle.present_bytes(region.address, 16 * PAGE_SIZE)
        assert there == caught.value.populated_bytes
        assert not rollback or not there


@pytest.mark.parametrize("wrong", [object(), range(3), iter([])])
def test_an_item_without_memory_is_named(arrays: list[numpy.ndarray[Any, Any]], wrong: Any) -> None:
    for call in (prefault.populate, prefault.residency, prefault.plan, prefault.lock, prefault.unlock):
        with pytest.raises(TypeError, match=r"^\['a'\]\[1\]: .* has no memory to work on"):
            call({"a": [arrays[0], wrong]})
    assert not _present(arrays[0])


def test_a_closed_item_is_named(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    closed = memoryview(bytearray(5))
    closed.release()
    with pytest.raises(ValueError, match=r"^\[1\]: "):
        prefault.populate([arrays[0], closed])
    assert not _present(arrays[0])


def test_nothing_but_numbers_is_an_error_and_nothing_at_all_is_none() -> None:
    with pytest.raises(TypeError, match="nothing in this list has memory"):
        prefault.populate([1, 2.5, None])
    nothing: list[Any] = [[], {}, (), [[], {}]]
    for empty in nothing:
        assert prefault.populate(empty).bytes == 0
        assert prefault.residency(empty).present_bytes == 0
        assert prefault.plan(empty).length == 0


def test_a_collection_that_contains_itself_is_refused() -> None:
    knot: list[Any] = [bytearray(5)]
    knot.append(knot)
    with pytest.raises(ValueError, match="contains itself"):
        prefault.populate(knot)


def test_offset_and_length_are_of_one_buffer(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    for options in ({"offset": 5}, {"length": 5}):
        with pytest.raises(ValueError, match="those of one buffer"):
            prefault.populate(arrays, **options)  # type: ignore[arg-type]


def test_huge_pages_are_of_one_buffer(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    for some in (arrays, arrays[0][:: 2 * PAGE_SIZE]):
        for call in (prefault.populate, prefault.plan):
            with pytest.raises(ValueError, match="huge='auto' is for one buffer without gaps"):
                call(some, huge="auto")


def test_headroom_counts_all_parts_together(small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("2m")
    with ExitStack() as stack:
        parts = {}
        for name in "ab":
            file = stack.enter_context(open(directory / name, "wb+"))
            file.truncate(MIB + MIB // 4)
            parts[name] = mmap.mmap(file.fileno(), MIB + MIB // 4)
        with pytest.raises(prefault.HeadroomError, match="nothing was populated") as caught:
            prefault.populate(parts)
        assert caught.value.needed_bytes == 2 * (MIB + MIB // 4)
        assert prefault.residency(parts).present_bytes == 0
        assert prefault.populate([parts["a"]]).bytes == MIB + MIB // 4


def test_buffers_stay_exported_only_for_the_call(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    owner = bytearray(100_000)
    prefault.populate([owner, arrays])
    owner.append(1)  # BufferError while it is exported


def test_sparse_memory_is_left_to_its_own_methods() -> None:
    with prefault.SparseMemory("16 MiB") as memory, pytest.raises(TypeError, match=r"^\[0\] is sparse memory"):
        prefault.populate([memory])


# --- files of tensors


def test_safetensors_by_its_mapping(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({name: numpy.ones(100_000, numpy.float32) for name in "abc"}, path)
    with prefault.Mapping(path.stat().st_size, backing=prefault.File(path)) as mapping:
        tensors = SafeTensors(numpy.frombuffer(mapping.memoryview(), numpy.uint8))
        prefault.populate(tensors)
        assert all(_present(tensors[name]) >= 396_000 for name in tensors)
        del tensors


def test_tensors_that_are_copies_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": numpy.ones(100_000, numpy.float32)}, path)
    with safetensors.safe_open(path, "np") as file, pytest.raises(TypeError, match="its tensors are copies"):
        prefault.populate(file)


def test_tensors_that_are_views_are_populated(arrays: list[numpy.ndarray[Any, Any]]) -> None:
    # As safetensors gives them to torch, which is too large for the test requirements.
    file = SimpleNamespace(keys=lambda: ["a", "b"], get_tensor=lambda key: arrays["ab".index(key)][:])
    prefault.populate(file)
    assert [_present(array) for array in arrays[:3]] == [MIB, MIB, 0]


# --- Arrow


def _fresh(count: int) -> numpy.ndarray[Any, Any]:
    return numpy.arange(count, dtype=numpy.int64)


def test_arrow_tables_batches_and_arrays() -> None:
    numbers = pyarrow.array(_fresh(300_000))
    text = pyarrow.array([f"row {index}" for index in range(50_000)] + [None])
    coded = text.dictionary_encode()
    table = pyarrow.table(
        {
            "n": pyarrow.chunked_array([numbers[:100_000], numbers]),
            "m": pyarrow.chunked_array([numbers] * 1 + [numbers[:100_000]]),
        }
    )
    batch = pyarrow.record_batch({"t": text, "c": coded})
    names = [leaf.name for leaf in leaves_of([table, batch]) or ()]
    assert "[0]['n'].chunk(1).buffers()[1]" in names
    assert "[1]['t'].buffers()[2]" in names
    assert any(name.startswith("[1]['c'].dictionary") for name in names)
    sizes = sum(len(memoryview(leaf.value)) for leaf in leaves_of(batch) or ())
    assert sizes >= batch.nbytes
    for value in (table, batch, text, coded, table["n"]):
        assert prefault.populate(value).bytes + prefault.populate(value).present_bytes > 0
        found = prefault.residency(value)
        assert found.present_bytes == found.inspected_bytes


def test_an_arrow_table_on_a_mapping_brings_in_its_pages(tmp_path: Path) -> None:
    path = tmp_path / "table.arrow"
    table = pyarrow.table({"a": _fresh(1_000_000), "b": _fresh(1_000_000)})
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pyarrow.memory_map(str(path)) as source:
        mapped = pyarrow.ipc.open_file(source).read_all()
        buffers = [chunk.buffers()[1] for chunk in mapped["a"].chunks]
        with borrow(buffers[0]) as memory:
            address, length = memory.address, memory.length
        prefault.populate(mapped.select(["a"]))
        assert oracle.present_bytes(address, length) >= length - length % PAGE_SIZE
        other = mapped["b"].chunks[0].buffers()[1]
        assert oracle.present_bytes(other.address + MIB, 4 * MIB) < 4 * MIB
        del mapped, buffers, other
