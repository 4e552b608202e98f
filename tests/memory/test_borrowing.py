"""Any buffer as an address range: checked against what the owner itself says, and given back afterwards."""

from __future__ import annotations

import array
import ctypes
import gc
import mmap
import struct
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prefault
from prefault import PAGE_SIZE
from prefault.memory.borrowing import borrow


def _extent(owner: Any) -> tuple[int, int]:
    """The address and the length of an array, from the array interface and numpy's own arithmetic."""
    low, high = numpy.lib.array_utils.byte_bounds(owner)
    return low, high - low


def _borrowed(buffer: Any) -> tuple[int, int, bool, bool]:
    with borrow(buffer) as memory:
        return memory.address, memory.length, memory.readonly, memory.contiguous


# --- arrays


def _base() -> numpy.ndarray[Any, Any]:
    return numpy.arange(4 * 6 * 10, dtype="i4").reshape(4, 6, 10)


@pytest.mark.parametrize(
    ("make", "contiguous"),
    [
        (lambda: _base(), True),
        (lambda: numpy.asfortranarray(_base()), True),
        (lambda: _base().T, True),
        (lambda: _base().transpose(0, 2, 1), True),  # neither C nor Fortran order, and no gap
        (lambda: _base()[::-1], True),
        (lambda: _base()[:, ::-1, ::-1], True),
        (lambda: _base()[1:3], True),
        (lambda: _base()[::2], False),
        (lambda: _base()[:, 1:3], False),
        (lambda: _base()[..., 3], False),
        (lambda: _base()[::-2, 1:5:3, 9:2:-4], False),
        (lambda: _base()[1:2, 2:3, ::2], False),
        (lambda: _base()[1:2, 2:3, 3:4], True),  # one item
        (lambda: numpy.broadcast_to(_base()[0, 0, :1], (1000,)), False),
        (lambda: numpy.array(7.5), True),
        (lambda: numpy.zeros((3, 5), "M8[ns]"), True),  # of which the buffer protocol cannot tell the format
        (lambda: numpy.zeros((3, 5), "m8[s]")[::2], False),
        (lambda: numpy.zeros(7, [("a", "u1"), ("b", ">f8", (2, 3))]), True),
        (lambda: numpy.zeros(7, [("a", "u1"), ("b", "f8")])["b"], False),
        (lambda: numpy.zeros(9, "U5"), True),
        (lambda: numpy.zeros(9, "V3"), True),
        (lambda: numpy.zeros(9, "O"), True),
        (lambda: numpy.zeros(9, "f2"), True),
        (lambda: numpy.zeros(9, "g"), True),
    ],
)
def test_arrays_of_every_layout(make: Callable[[], numpy.ndarray[Any, Any]], contiguous: bool) -> None:
    owner = make()
    address, length, readonly, whole = _borrowed(owner)
    assert (address, length) == _extent(owner)
    assert readonly == (not owner.flags.writeable)
    assert whole is contiguous


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (3, 0, 2)])
def test_empty_arrays(shape: tuple[int, ...]) -> None:
    for owner in (numpy.zeros(shape), numpy.zeros((9, 9, 9))[:0], numpy.zeros(9)[5:5][::-1]):
        assert _borrowed(owner)[1:] == (0, False, True)
        assert prefault.populate(owner).bytes == 0
        assert "empty" in str(prefault.populate(owner))
        assert prefault.discard(owner).bytes == 0
        assert prefault.residency(owner).range.length == 0


def test_a_read_only_array() -> None:
    owner = numpy.zeros(3 * PAGE_SIZE, "u1")
    owner.flags.writeable = False
    assert _borrowed(owner)[2]
    assert prefault.plan(owner).access == "read"


_slices = st.builds(
    slice, st.none() | st.integers(-7, 7), st.none() | st.integers(-7, 7), st.sampled_from([1, 2, 3, -1, -2])
)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_any_view_against_the_bytes_that_it_covers(shape: list[int], data: st.DataObject) -> None:
    whole = numpy.arange(int(numpy.prod(shape)), dtype="u2").reshape(shape)
    view = whole[tuple(data.draw(_slices) for _ in shape)].transpose(data.draw(st.permutations(range(len(shape)))))
    address, length, _, contiguous = _borrowed(view)
    if not view.size:
        assert length == 0
        return
    # Mark the items of the view; what is marked is what it covers.
    marks = numpy.zeros(whole.size, bool)
    marks[view.ravel()] = True
    first, last = numpy.flatnonzero(marks)[[0, -1]]
    assert address == whole.ctypes.data + 2 * int(first)
    assert length == 2 * int(last - first + 1)
    assert contiguous == bool(marks[first : last + 1].all())
    interface = _Interface(view.__array_interface__, view)
    assert _borrowed(interface)[:2] == (address, length)
    assert _borrowed(interface)[3] == contiguous


# --- other owners of memory


def test_bytes_and_bytearrays() -> None:
    content = b"x" * 1000
    address, length, readonly, _ = _borrowed(content)
    assert (length, readonly) == (1000, True)
    assert ctypes.string_at(address, 1000) == content
    grown = bytearray(1000)
    assert _borrowed(grown)[:3] == (ctypes.addressof(ctypes.c_char.from_buffer(grown)), 1000, False)
    with borrow(grown), pytest.raises(BufferError):
        grown.extend(bytes(100))
    grown.extend(bytes(100))
    assert len(grown) == 1100


def test_arrays_of_the_standard_library() -> None:
    numbers = array.array("d", range(500))
    address, items = numbers.buffer_info()
    assert _borrowed(numbers) == (address, items * 8, False, True)
    with borrow(numbers), pytest.raises(BufferError):
        numbers.append(1)
    numbers.append(1)


def test_ctypes_objects() -> None:
    class Point(ctypes.Structure):
        _fields_ = (("x", ctypes.c_int), ("y", ctypes.c_double))

    for owner in ((ctypes.c_long * 300)(), (ctypes.c_short * 3 * 4)(), Point(), ctypes.c_int(5)):
        assert _borrowed(owner) == (ctypes.addressof(owner), ctypes.sizeof(owner), False, True)


def test_mmaps() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(3 * PAGE_SIZE)
        for access, readonly in ((mmap.ACCESS_WRITE, False), (mmap.ACCESS_READ, True), (mmap.ACCESS_COPY, False)):
            memory = mmap.mmap(file.fileno(), 2 * PAGE_SIZE, access=access, offset=PAGE_SIZE)
            expected = numpy.frombuffer(memory, "u1").ctypes.data
            assert _borrowed(memory) == (expected, 2 * PAGE_SIZE, readonly, True)
            with borrow(memory), pytest.raises(BufferError):
                memory.close()
            prefault.populate(memory)
            prefault.residency(memory)
            prefault.discard(memory)
            memory.close()  # nothing holds it any more
            with pytest.raises(ValueError, match="closed"):
                borrow(memory)


def test_memoryviews() -> None:
    owner = bytearray(10 * PAGE_SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    view = memoryview(owner)
    assert _borrowed(view) == (address, len(owner), False, True)
    assert _borrowed(view.cast("I")) == (address, len(owner), False, True)
    assert _borrowed(view.cast("B", (10, PAGE_SIZE))) == (address, len(owner), False, True)
    assert _borrowed(view[100:300]) == (address + 100, 200, False, True)
    assert _borrowed(view[::-1]) == (address, len(owner), False, True)
    assert _borrowed(view[10:20:3]) == (address + 10, 10, False, False)
    assert _borrowed(view[20:10:-3]) == (address + 11, 10, False, False)
    assert _borrowed(view.toreadonly()) == (address, len(owner), True, True)
    assert _borrowed(view[5:5])[1] == 0
    with borrow(view), pytest.raises(BufferError):
        view.release()
    view.release()
    for call in (borrow, prefault.populate, prefault.discard, prefault.residency, prefault.plan):
        with pytest.raises(ValueError, match="released"):
            call(view)


def test_shared_memory() -> None:
    memory = SharedMemory(create=True, size=3 * PAGE_SIZE)
    try:
        expected = numpy.frombuffer(memory.buf or b"", "u1").ctypes.data
        gc.collect()
        assert _borrowed(memory) == (expected, 3 * PAGE_SIZE, False, True)
        assert prefault.populate(memory).bytes == 3 * PAGE_SIZE
        assert prefault.discard(memory).bytes == 3 * PAGE_SIZE
        with borrow(memory), pytest.raises(BufferError):
            memory.close()
        memory.close()
        for call in (borrow, prefault.populate, prefault.discard, prefault.residency):
            with pytest.raises(ValueError, match="SharedMemory is closed"):
                call(memory)
    finally:
        memory.unlink()


def test_a_mapping() -> None:
    mapping = prefault.Mapping(5 * PAGE_SIZE, backing="memfd")
    with borrow(mapping) as memory:
        assert (memory.address, memory.length, memory.readonly) == (mapping.range.start, 5 * PAGE_SIZE, False)
        assert memory.fd == mapping.fd
        with pytest.raises(BufferError, match="in use by another thread"):
            mapping.close()
    mapping.close()
    for call in (borrow, prefault.populate, prefault.discard, prefault.residency, prefault.plan):
        with pytest.raises(ValueError, match="the mapping is closed"):
            call(mapping)
    with prefault.Mapping(PAGE_SIZE, writable=False) as readonly:
        assert _borrowed(readonly)[2]


class _Interface:
    """An object that has nothing but an array interface."""

    def __init__(self, interface: dict[str, Any], owner: object = None) -> None:
        self.__array_interface__ = interface
        self.owner = owner


def _interface(**changes: Any) -> _Interface:
    owner = numpy.zeros((5, 7), "f8")
    return _Interface({**owner.__array_interface__, **changes}, owner)


def test_array_interfaces() -> None:
    plain = _interface()
    address, length = _extent(plain.owner)
    assert _borrowed(plain) == (address, length, False, True)
    assert _borrowed(_interface(data=(address, True)))[2] is True
    assert _borrowed(_interface(strides=(56, 8)))[1:] == (length, False, True)
    assert _borrowed(_interface(strides=(112, 8)))[1:] == (4 * 112 + 56, False, False)
    # Gaps and overlaps that add up to the size of the items: there is a gap all the same.
    assert _borrowed(_interface(shape=(2, 2), typestr="|u1", strides=(0, 3)))[1:] == (4, False, False)
    backwards = _interface(data=(address + length - 8, False), shape=(35,), strides=(-8,))
    assert _borrowed(backwards) == (address, length, False, True)
    assert _borrowed(_interface(shape=()))[1] == 8
    assert _borrowed(_interface(shape=(0, 3)))[1] == 0
    assert _borrowed(_interface(shape=(10,), typestr="<U3"))[1] == 10 * 3 * 4
    assert _borrowed(_interface(shape=(10,), typestr="<M8[ns]"))[1] == 80
    assert _borrowed(_interface(shape=(10,), typestr="|V12"))[1] == 120
    with pytest.raises(TypeError, match="gives no address"):
        borrow(_interface(data=None))
    with pytest.raises(TypeError, match="unknown type 'what'"):
        borrow(_interface(typestr="what"))


def test_an_array_interface_over_another_buffer() -> None:
    owner = bytearray(1000)
    address = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    assert _borrowed(_interface(data=owner, shape=(10, 10), typestr="|u1")) == (address, 100, False, True)
    assert _borrowed(_interface(data=owner, shape=(100,), typestr="<u4", offset=600)) == (address + 600, 400, False, True)
    assert _borrowed(_interface(data=bytes(owner), shape=(10,), typestr="|u1"))[2] is True
    with pytest.raises(ValueError, match="outside the buffer"):
        borrow(_interface(data=owner, shape=(100,), typestr="<u4", offset=601))
    owner.extend(b"x")  # given back, by the failure too


def test_an_array_interface_keeps_its_owner_while_borrowed() -> None:
    owner = _interface()
    before = sys.getrefcount(owner)
    with borrow(owner):
        assert sys.getrefcount(owner) == before + 1
    assert sys.getrefcount(owner) == before


class _Tensor:
    """What the tensor libraries have: DLPack, and no buffer protocol."""

    def __init__(self, owner: numpy.ndarray[Any, Any]) -> None:
        self.owner = owner

    def __dlpack__(self, **options: Any) -> Any:
        return self.owner.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.owner.__dlpack_device__()


class _TensorOnAGraphicsCard(_Tensor):
    def __dlpack__(self, **options: Any) -> Any:
        raise BufferError("it lies in device memory")


def test_tensors() -> None:
    owner = numpy.zeros((300, 40))
    assert _borrowed(_Tensor(owner))[:2] == _extent(owner)
    assert _borrowed(_Tensor(owner[::2]))[3] is False
    before = sys.getrefcount(owner)
    for _ in range(100):
        borrow(_Tensor(owner)).release()
    assert sys.getrefcount(owner) == before
    with pytest.raises(BufferError, match="device memory"):
        borrow(_TensorOnAGraphicsCard(owner))


class _Forged:
    """A tensor whose DLPack structure this test writes, as a library in C does: of any type, version and device."""

    def __init__(self, owner: bytearray, *, bits: int, shape: list[int], strides: list[int] | None = None,
                 name: bytes = b"dltensor_versioned", lanes: int = 1, flags: int = 0, major: int = 1, device: int = 1,
                 byte_offset: int = 0, null: bool = False) -> None:  # fmt: skip
        self.owner = owner
        self._device = device
        self._shape = (ctypes.c_int64 * len(shape))(*shape)
        self._strides = None if strides is None else (ctypes.c_int64 * len(shape))(*strides)
        address = 0 if null else ctypes.addressof(ctypes.c_char.from_buffer(owner))
        tensor = struct.pack(
            "=QiiiBBHQQQ", address, device, 0, len(shape), 4, bits, lanes, ctypes.addressof(self._shape),
            0 if self._strides is None else ctypes.addressof(self._strides), byte_offset,
        )  # fmt: skip
        head = struct.pack("=IIQQQ", major, 0, 0, 0, flags) if name == b"dltensor_versioned" else b""
        self._block = ctypes.create_string_buffer(head + tensor)
        self._name = name

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None) -> Any:
        make = ctypes.pythonapi.PyCapsule_New
        make.restype, make.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return make(ctypes.addressof(self._block), self._name, None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the structure may say otherwise


def test_tensors_of_types_that_numpy_does_not_know() -> None:
    owner = bytearray(8192)
    address = ctypes.addressof(ctypes.c_char.from_buffer(owner))
    for bits in (8, 16, 32, 64, 128):  # 4 is the code of bfloat16; float8 and others have codes beyond
        assert _borrowed(_Forged(owner, bits=bits, shape=[8, 4])) == (address, 4 * bits, False, True)
    assert _borrowed(_Forged(owner, bits=4, lanes=2, shape=[100])) == (address, 100, False, True)
    assert _borrowed(_Forged(owner, bits=16, shape=[8, 4], strides=[4, 1], byte_offset=64))[:2] == (address + 64, 64)
    assert _borrowed(_Forged(owner, bits=16, shape=[8, 4], strides=[8, 1]))[1:] == (7 * 16 + 8, False, False)
    assert _borrowed(_Forged(owner, bits=16, shape=[8], strides=[-1], byte_offset=14)) == (address, 16, False, True)
    assert _borrowed(_Forged(owner, bits=16, shape=[])) == (address, 2, False, True)
    assert _borrowed(_Forged(owner, bits=16, shape=[0, 5], null=True))[1] == 0
    assert _borrowed(_Forged(owner, bits=16, shape=[8], flags=1))[2] is True
    assert _borrowed(_Forged(owner, bits=16, shape=[8], name=b"dltensor"))[2] is True  # it cannot say that it may be written


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"bits": 4}, BufferError, "the items of the _Forged are 4 bits: only whole bytes have addresses"),
        ({"major": 2}, BufferError, "exports version 2 of DLPack"),
        ({"device": 2}, BufferError, r"lies in the memory of another device \(DLPack type 2\)"),
        ({"null": True}, TypeError, "gives no address"),
        ({"name": b"used_dltensor"}, TypeError, "returns PyCapsule, which is not a new DLPack capsule"),
    ],
)
def test_tensors_that_cannot_be_borrowed(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    tensor = _Forged(bytearray(8192), **{"bits": 16, "shape": [8], **changes})
    with pytest.raises(kind, match=message):
        borrow(tensor)


class _Bad:
    """A ``__dlpack__`` that raises or returns what it was told to."""

    def __init__(self, answer: Any, device: Any = (1, 0)) -> None:
        self._answer, self._device = answer, device

    def __dlpack__(self, **_: Any) -> Any:
        if isinstance(self._answer, BaseException):
            raise self._answer
        return self._answer

    def __dlpack_device__(self) -> Any:
        return self._device


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (_Bad(RuntimeError("broken")), TypeError, "its __dlpack__ raises RuntimeError: broken"),
        (_Bad(MemoryError()), TypeError, "its __dlpack__ raises MemoryError$"),
        (_Bad(BufferError("not contiguous")), BufferError, "does not lend its memory: not contiguous"),
        (_Bad(None), TypeError, "the __dlpack__ of _Bad returns NoneType, which is not a new DLPack capsule"),
        (_Bad(b"garbage"), TypeError, "returns bytes, which is not"),
        (_Bad(None, "cpu"), TypeError, "cannot be asked for its memory"),
        (_Bad(None, (2, 0)), BufferError, "lies in the memory of another device"),
    ],
)
def test_a_bad_dlpack(bad: _Bad, kind: type[Exception], message: str) -> None:
    for call in (borrow, prefault.populate):
        with pytest.raises(kind, match=message):
            call(bad)


class _Parameter(_Tensor):
    """PyTorch exports no tensor with a gradient."""

    requires_grad = True

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

    def detach(self) -> _Tensor:
        return _Tensor(self.owner)


def test_a_parameter() -> None:
    owner = numpy.zeros((300, 40))
    assert _borrowed(_Parameter(owner))[:2] == _extent(owner)


def test_tensors_of_pytorch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (it is too large for the test requirements)")
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool):
        tensor = torch.empty(1 << 20, dtype=dtype)
        assert _borrowed(tensor) == (tensor.data_ptr(), tensor.numel() * tensor.element_size(), False, True)
        prefault.populate(tensor)
        assert prefault.residency(tensor).present_bytes == prefault.residency(tensor).range.length
    parameter = torch.nn.Parameter(torch.empty(1 << 20, dtype=torch.bfloat16))
    assert _borrowed(parameter)[:2] == (parameter.data_ptr(), 2 << 20)
    assert parameter.requires_grad
    assert _borrowed(torch.empty(100, 100)[::2, 3:])[1:] == (4 * (49 * 200 + 97), False, False)
    with pytest.raises(TypeError, match="meta"):
        borrow(torch.empty(3, device="meta"))
    with pytest.raises(BufferError, match="does not lend its memory"):
        borrow(torch.eye(3).to_sparse())


def test_arrays_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    for dtype in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn):
        array = numpy.zeros((300, 40), dtype)
        assert _borrowed(array)[:2] == _extent(array)
        prefault.populate(array)


# --- what is no memory


@pytest.mark.parametrize("wrong", [None, 5, 4096.0, object(), "text"[:0] or range(9), prefault, borrow])
def test_no_memory(wrong: Any) -> None:
    for call in (borrow, prefault.populate, prefault.discard, prefault.residency, prefault.plan):
        with pytest.raises(TypeError, match=f"{type(wrong).__name__} has no memory to work on: give a buffer"):
            call(wrong)


@pytest.mark.parametrize("path", ["/dev/shm/model.bin", Path("/dev/shm/model.bin")])
def test_a_path_is_no_memory(path: str | Path) -> None:
    takes_memory: tuple[Callable[[Any], object], ...] = (borrow, prefault.discard, prefault.unlock)
    for call in takes_memory:
        with pytest.raises(TypeError, match=r"is a path, not memory: prefault.warm takes paths .*, and prefault.Mapping"):
            call(path)
    takes_collections: tuple[Callable[[Any], object], ...]
    takes_collections = (prefault.populate, prefault.residency, prefault.plan, prefault.lock)
    for call in takes_collections:
        with pytest.raises(TypeError, match=r"\[1\]: .* is a path, not memory: prefault.warm takes paths"):
            call([bytearray(10), path])


# --- offset and length


def test_select() -> None:
    owner = bytearray(10 * PAGE_SIZE)
    with borrow(owner) as memory:
        start, stop = memory.address, memory.address + memory.length
        assert memory.select(0, None) == (start, stop)
        assert memory.select(5, None) == (start + 5, stop)
        assert memory.select(5, 7) == (start + 5, start + 12)
        assert memory.select("4 KiB", "8K") == (start + 4096, start + 12288)
        assert memory.select(len(owner), None) == (stop, stop)
        assert memory.select(len(owner), 0) == (stop, stop)
        assert memory.select(numpy.int64(5), numpy.uint8(7)) == (start + 5, start + 12)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("offset", "length", "kind", "message"),
    [
        (-1, None, ValueError, "cannot be negative: -1"),
        (0, -1, ValueError, "cannot be negative: -1"),
        (101, None, ValueError, "offset 101 lies outside the buffer of 100 bytes"),
        (0, 101, ValueError, "offset 0 and length 101 end at 101, outside the buffer of 100 bytes"),
        (50, 51, ValueError, "end at 101, outside"),
        (1, 2**63 - 1, ValueError, "outside the buffer"),
        (2**63, None, ValueError, "beyond what the kernel can address"),
        (0, 2**64, ValueError, "beyond what the kernel can address"),
        ("1 KiB", None, ValueError, "offset 1024 lies outside"),
        ("lots", None, ValueError, "is not a size"),
        (0.0, None, TypeError, "not float"),
        (False, None, TypeError, "not bool"),
        (None, None, TypeError, "not NoneType"),
        (0, 1.0, TypeError, "not float"),
        (0, True, TypeError, "not bool"),
    ],
)
def test_offsets_and_lengths_outside(offset: Any, length: Any, kind: type[Exception], message: str) -> None:
    owner = bytearray(100)
    for call in (prefault.populate, prefault.discard, prefault.residency, prefault.plan):
        with pytest.raises(kind, match=message):
            call(owner, offset=offset, length=length)
    owner.append(0)  # given back


# --- giving back


def _of_every_kind() -> list[Any]:
    owner = numpy.zeros((20, PAGE_SIZE), "u1")
    return [
        bytearray(PAGE_SIZE), array.array("d", range(500)), owner, owner[::2], (ctypes.c_char * 5000)(),
        memoryview(bytearray(5000)), _Interface(owner.__array_interface__, owner), _Tensor(owner), mmap.mmap(-1, PAGE_SIZE),
    ]  # fmt: skip


def test_references_are_given_back() -> None:
    for owner in _of_every_kind():
        borrow(owner).release()
        before = sys.getrefcount(owner)
        for _ in range(1000):
            memory = borrow(owner)
            memory.release()
            memory.release()
        borrow(owner)  # forgotten: the hold gives back what it holds
        assert sys.getrefcount(owner) == before


@pytest.mark.usefixtures("no_leaks")
def test_failing_calls_keep_no_reference() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(3 * PAGE_SIZE)
        with mmap.mmap(file.fileno(), 3 * PAGE_SIZE) as memory:
            file.truncate(PAGE_SIZE)

            def fail() -> None:
                with pytest.raises(prefault.BeyondEndError):
                    prefault.populate(memory)
                with pytest.raises(prefault.BeyondEndError):
                    prefault.populate(memory, rollback=True)
                with pytest.raises(ValueError, match="unknown method"):
                    prefault.populate(memory, method="telepathy")
                with pytest.raises(ValueError, match="outside"):
                    prefault.discard(memory, offset=10 * PAGE_SIZE)

            fail()
            gc.collect()
            # An array of many GiB must not wait for the garbage collector because populating it failed.
            gc.disable()
            try:
                before = sys.getrefcount(memory)
                for _ in range(20):
                    fail()
                assert sys.getrefcount(memory) <= before + 1
            finally:
                gc.enable()


def test_a_buffer_that_cannot_be_had() -> None:
    class Refuses:
        __array_interface__ = property(lambda self: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        borrow(Refuses())
