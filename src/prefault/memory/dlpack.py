"""Tensors: where their memory lies, read off the DLPack structure, which knows every item type (bfloat16, float8, ...)."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple


class _Tensor(ctypes.Structure):
    """``DLTensor`` (dlpack.h)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """``DLManagedTensorVersioned`` (dlpack.h, since DLPack 1.0). The one without a version begins with the tensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_IN_CPU_MEMORY = (1, 3, 11)  # kDLCPU, and memory that CUDA or ROCm pinned: kDLCUDAHost, kDLROCMHost

_is_capsule = ctypes.pythonapi.PyCapsule_IsValid
_is_capsule.argtypes = (ctypes.py_object, ctypes.c_char_p)
_pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
_pointer_of.argtypes = (ctypes.py_object, ctypes.c_char_p)
_pointer_of.restype = ctypes.c_void_p


class Exported(NamedTuple):
    """The memory of a tensor.

    ``address`` is that of its first item, ``strides`` are bytes (None: no gaps, the last dimension first), and the memory
    stays in place while ``capsule`` is referred to: it is not consumed, and gives the tensor back when it goes.
    """

    address: int
    itemsize: int
    shape: list[int]
    strides: list[int] | None
    readonly: bool
    capsule: object


def export(tensor: Any) -> Exported:
    """Return where the memory of an object with ``__dlpack__`` lies.

    An exporter without a version cannot say that its memory is read-only, so it counts as read-only.

    Raises:
        BufferError: it lies in the memory of another device, its items are smaller than a byte, or its library refuses.
        TypeError: its ``__dlpack__`` fails, or returns no DLPack capsule.
    """
    kind = type(tensor).__name__
    if getattr(tensor, "requires_grad", False) is True and hasattr(tensor, "detach"):
        tensor = tensor.detach()  # PyTorch exports no tensor with a gradient; the detached one has the same memory
    capsule = _ask(tensor, kind)
    if _is_capsule(capsule, b"dltensor_versioned"):
        versioned = _Versioned.from_address(_pointer_of(capsule, b"dltensor_versioned"))
        if versioned.major != 1:
            raise BufferError(f"the {kind} exports version {versioned.major} of DLPack, and version 1 was asked for")
        found, readonly = versioned.tensor, bool(versioned.flags & _READ_ONLY)
    elif _is_capsule(capsule, b"dltensor"):
        found, readonly = _Tensor.from_address(_pointer_of(capsule, b"dltensor")), True
    else:
        raise TypeError(f"the __dlpack__ of {kind} returns {type(capsule).__name__}, which is not a new DLPack capsule")
    if found.device_type not in _IN_CPU_MEMORY:
        raise _elsewhere(kind, found.device_type)
    if found.bits * found.lanes % 8:
        raise BufferError(f"the items of the {kind} are {found.bits * found.lanes} bits: only whole bytes have addresses")
    shape = found.shape[: found.ndim] if found.ndim else []
    if 0 not in shape and not found.data:
        raise TypeError(f"the __dlpack__ of {kind} gives no address")
    itemsize = found.bits * found.lanes // 8
    strides = [stride * itemsize for stride in found.strides[: found.ndim]] if found.strides and found.ndim else None
    return Exported((found.data or 0) + found.byte_offset, itemsize, shape, strides, readonly, capsule)


def _ask(tensor: Any, kind: str) -> object:
    try:
        device = int(tensor.__dlpack_device__()[0])
        if device in _IN_CPU_MEMORY:
            try:
                return tensor.__dlpack__(max_version=(1, 0))
            except TypeError:  # older than DLPack 1.0
                return tensor.__dlpack__()
    except BufferError as error:
        raise BufferError(f"the {kind} does not lend its memory: {error}") from error
    except Exception as error:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise TypeError(f"the {kind} cannot be asked for its memory: its __dlpack__ raises {said}") from error
    raise _elsewhere(kind, device)


def _elsewhere(kind: str, device: int) -> BufferError:
    return BufferError(
        f"the {kind} lies in the memory of another device (DLPack type {device}): only the CPU's memory is populated"
    )
