"""The promise of prefault.engines: names and signatures stay as long as API_VERSION is 1; and what container_memory says."""

from __future__ import annotations

import ctypes
import inspect
import os

import pytest

import prefault
from prefault import engines
from support import own_dev_shm
from support.regions import PAGE, Region

# Arguments may be added at the end of these, and fields too. If one has to go, API_VERSION grows.
_SIGNATURES = {
    "populate": "buffer *, access=None offset=0 length=None method=None threads=None rollback=False progress=False",
    "headroom": "target=None",
    "container_memory": "",
    "memory_at": "address length *, writable=True",
}
_FIELDS = {
    engines.ContainerMemory: (
        "limited_by limit_bytes used_bytes free_bytes reclaimable_bytes available_bytes shared_bytes huge_page_bytes remedy"
    ),
    engines.Headroom: "limits",
    engines.PopulateResult: "bytes present_bytes seconds access method threads notes",
}


def _described(name: str) -> str:
    words: list[str] = []
    for parameter in inspect.signature(getattr(engines, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*," not in words:
            words.append("*,")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        words.append(f"{parameter.name}{default}")
    return " ".join(words)


def test_version_1() -> None:
    assert engines.API_VERSION == 1
    assert engines.populate is prefault.populate
    assert engines.headroom is prefault.headroom
    assert {"BackingFullError", "HeadroomError", "PopulateError", "RawMemory", *_SIGNATURES} <= set(engines.__all__)


@pytest.mark.parametrize("name", _SIGNATURES)
def test_signatures_are_only_extended(name: str) -> None:
    assert _described(name).startswith(_SIGNATURES[name])


@pytest.mark.parametrize("kind", _FIELDS, ids=lambda kind: kind.__name__)
def test_fields_are_only_extended(kind: type[tuple[object, ...]]) -> None:
    assert " ".join(kind._fields).startswith(_FIELDS[kind])  # type: ignore[attr-defined]


def test_container_memory_without_a_container() -> None:
    memory = engines.container_memory()
    pages = os.sysconf("SC_PHYS_PAGES") * PAGE
    assert 0 < memory.available_bytes <= memory.free_bytes + memory.reclaimable_bytes <= pages * 2
    assert memory.shared_bytes <= memory.available_bytes
    assert memory.free_bytes == max(0, memory.limit_bytes - memory.used_bytes)
    assert f"left by {memory.limited_by}" in str(memory)
    assert memory.remedy


def test_a_small_dev_shm() -> None:
    code = "from prefault import engines; print(engines.container_memory().shared_bytes)"
    assert own_dev_shm.output(code, size="2m") == f"{2 << 20}\n"


def test_memory_at_an_address() -> None:
    with Region(8) as region:
        assert engines.populate(engines.memory_at(region.address, 8 * PAGE)).bytes == 8 * PAGE
        assert "32.0 KiB" in repr(engines.memory_at(region.address, "32 KiB"))
        assert engines.headroom(engines.memory_at(region.address, PAGE)).limits
    with Region(1) as region:  # unaligned: its page
        assert engines.populate(engines.memory_at(region.address + 100, 8)).bytes == PAGE


def test_memory_that_is_not_there() -> None:
    with Region(1) as region:
        address = region.address
    with pytest.raises(prefault.HoleError):
        engines.populate(engines.memory_at(address, PAGE))


def test_readable_memory() -> None:
    text = ctypes.create_string_buffer(b"text", 3 * PAGE)
    result = engines.populate(engines.memory_at(ctypes.addressof(text), 3 * PAGE, writable=False))
    assert result.access == "read"


@pytest.mark.parametrize(
    ("address", "length", "error"),
    [
        (0, 1, ValueError),
        (-4096, 1, ValueError),
        (1 << 63, 1 << 63 | 1, ValueError),
        ("a", 1, TypeError),
        (4096, -1, ValueError),
    ],
)
def test_wrong_addresses(address: object, length: int, error: type[Exception]) -> None:
    with pytest.raises(error):
        engines.memory_at(address, length)  # type: ignore[arg-type]
