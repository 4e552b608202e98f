"""The public names: all of them, each with a docstring and types; and what importing them costs."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.virtio_mem

_PUBLIC = [
    "PAGE_SIZE",
    "Anonymous",
    "BackingFullError",
    "BackingSource",
    "BeyondEndError",
    "CollapseResult",
    "Descriptor",
    "DeviceError",
    "DeviceGoneError",
    "DiscardError",
    "DiscardResult",
    "DriverError",
    "EvictResult",
    "EvictedFile",
    "File",
    "FileFailure",
    "FileLock",
    "FileStatus",
    "FileStream",
    "FilesStatus",
    "GrowableArray",
    "GuardPageError",
    "Headroom",
    "HeadroomError",
    "HoleError",
    "HugePagesError",
    "Hugetlb",
    "Limit",
    "LockResult",
    "Mapping",
    "MappingError",
    "Memfd",
    "NoPopulateError",
    "NotCollapsed",
    "NotPopulatedError",
    "OutOfMemoryError",
    "PageFaultsError",
    "PageRange",
    "PageState",
    "Plan",
    "PoisonedPageError",
    "Pool",
    "PoolFullError",
    "PoolGoneError",
    "PoolStatistics",
    "PopulateCancelled",
    "PopulateError",
    "PopulateInterrupted",
    "PopulateResult",
    "PopulateTask",
    "ProtectionError",
    "RangeSet",
    "RateLimit",
    "ReadyMemory",
    "RecordedArea",
    "RecordedFile",
    "Recording",
    "RecordingError",
    "ReplayResult",
    "Residency",
    "SelectedFile",
    "Selection",
    "SharedMemory",
    "SharedMemoryProtection",
    "SkippedFile",
    "SparseMemory",
    "SpecialMappingError",
    "TemporaryFile",
    "WarmCancelled",
    "WarmInterrupted",
    "WarmResult",
    "WarmTask",
    "__version__",
    "collapse",
    "discard",
    "empty",
    "evict",
    "format_size",
    "full",
    "headroom",
    "lock",
    "open_remote",
    "parse_size",
    "plan",
    "populate",
    "populate_async",
    "populate_many",
    "protect_shared_memory",
    "ready",
    "recording",
    "replay",
    "residency",
    "select",
    "status",
    "stream",
    "unlock",
    "warm",
    "warm_async",
    "zeros",
]

_PUBLIC_VIRTIO_MEM = [
    "CONFIG_BYTES",
    "DEVICE_ID",
    "REQUEST_BYTES",
    "RESPONSE_BYTES",
    "TRANSPORT_FEATURES",
    "VERSION_1",
    "BlockState",
    "Config",
    "Feature",
    "Request",
    "RequestType",
    "Response",
    "ResponseType",
    "VirtioMem",
]


def test_the_list() -> None:
    assert list(prefault.__all__) == _PUBLIC
    assert len(set(_PUBLIC)) == len(_PUBLIC)  # their order is ruff's affair
    for name in _PUBLIC:
        assert hasattr(prefault, name)


def test_the_list_of_virtio_mem() -> None:
    assert list(prefault.virtio_mem.__all__) == _PUBLIC_VIRTIO_MEM
    for name in _PUBLIC_VIRTIO_MEM:
        assert hasattr(prefault.virtio_mem, name)


def test_nothing_else_is_public() -> None:
    modules = {path.stem for path in Path(prefault.__file__).parent.iterdir()}
    others = {name for name in vars(prefault) if not name.startswith("_")} - set(_PUBLIC)
    assert others <= modules  # submodules become attributes


def _objects() -> Iterator[tuple[str, Any]]:
    """The public classes and functions, and the public methods of the classes."""
    for name in _PUBLIC:
        value = getattr(prefault, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        yield name, value
        if inspect.isclass(value):
            for inner, member in vars(value).items():
                if not inner.startswith("_"):
                    found = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                    if inspect.isfunction(found):
                        yield f"{name}.{inner}", found


_OBJECTS = dict(_objects())


@pytest.mark.parametrize("name", _OBJECTS)
def test_docstrings(name: str) -> None:
    text = inspect.getdoc(_OBJECTS[name])
    assert text
    assert not text.startswith(f"{name}(")  # a docstring that a dataclass made up


@pytest.mark.parametrize("name", [name for name, value in _OBJECTS.items() if inspect.isfunction(value)])
def test_annotations(name: str) -> None:
    signature = inspect.signature(_OBJECTS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        if parameter.name not in ("self", "cls"):
            assert parameter.annotation is not inspect.Parameter.empty, parameter


@pytest.mark.parametrize("name", [name for name, value in _OBJECTS.items() if inspect.isfunction(value)])
def test_annotations_can_be_resolved(name: str) -> None:
    try:
        hints = typing.get_type_hints(_OBJECTS[name])
    except NameError as error:
        if error.name not in ("numpy", "PoolServer"):
            raise
        return  # they resolve for type checkers only: neither is imported before it is needed
    assert "return" in hints


def _in_a_fresh_interpreter(code: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, json; {code}"], capture_output=True, text=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "heavy",
    ["numpy", "rich", "click", "msgspec", "socket", "prefault.bench", "prefault.cli", "prefault.doctor", "hypothesis"],
)
def test_importing_loads_nothing_heavy(heavy: str) -> None:
    assert _in_a_fresh_interpreter(f"import prefault; print(json.dumps({heavy!r} in sys.modules))") is False


def test_importing_compiles_no_annotation() -> None:
    """A NamedTuple's annotations that are texts, by ``from __future__ import annotations``, took a twentieth of the time."""
    code = (
        "import typing; made = []; init = typing.ForwardRef.__init__;"
        " typing.ForwardRef.__init__ = lambda self, text, *a, **k: (made.append(text), init(self, text, *a, **k))[1];"
        " import prefault; print(json.dumps(made))"
    )
    assert _in_a_fresh_interpreter(code) == []


def test_populating_bytes_loads_nothing_heavy() -> None:
    code = (
        "import prefault; prefault.populate(bytearray(100000));"
        " print(json.dumps([name in sys.modules for name in ('numpy', 'rich')]))"
    )
    assert _in_a_fresh_interpreter(code) == [False, False]


def test_importing_opens_nothing_and_starts_no_thread() -> None:
    code = (
        "import os, threading; b = len(os.listdir('/proc/self/fd')); import prefault;"
        " print(json.dumps([len(os.listdir('/proc/self/fd')) - b, threading.active_count()]))"
    )
    assert _in_a_fresh_interpreter(code) == [0, 1]


def test_type_information_is_shipped() -> None:
    assert (Path(prefault.__file__).parent / "py.typed").is_file()


def test_the_version() -> None:
    assert prefault.__version__ == importlib.metadata.version("prefault")
    assert len(prefault.__version__.split(".")) == 3
