"""The table against a dict, killed after any number of stores."""

from __future__ import annotations

import random

import pytest

from prefault.drivers.buffers.buffer_errors import BufferObjectError
from prefault.drivers.buffers.kept_table import KeptTable


def test_the_table_is_what_was_put_there_whenever_it_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each store of the table is an item assignment or a pack_into: a log of all states of the memory is replayed."""
    from prefault.drivers.buffers import kept_table

    chance = random.Random(7)
    memory = bytearray(64 + 2 * 400)
    states: list[tuple[bytes, dict[bytes, bytes], dict[bytes, bytes]]] = []
    model: dict[bytes, bytes] = {}
    after: dict[bytes, bytes] = {}

    class Recorded:
        """A view that notes the memory after each store."""

        def __len__(self) -> int:
            return len(memory)

        def __getitem__(self, key: slice) -> bytes:
            return bytes(memory[key])

        def __setitem__(self, key: slice, value: bytes) -> None:
            half = key.start + (key.stop - key.start) // 2  # torn: killed in the middle of a copy
            memory[key.start : half] = value[: half - key.start]
            states.append((bytes(memory), dict(model), dict(after)))
            memory[key] = value
            states.append((bytes(memory), dict(model), dict(after)))

    class Packed:
        def __init__(self, layout: object) -> None:
            self._layout = layout
            self.size = layout.size  # type: ignore[attr-defined]

        def unpack_from(self, _: object, at: int = 0) -> tuple[int, ...]:
            found: tuple[int, ...] = self._layout.unpack_from(memory, at)  # type: ignore[attr-defined]
            return found

        def pack_into(self, _: object, at: int, *values: int) -> None:
            self._layout.pack_into(memory, at, *values)  # type: ignore[attr-defined]
            states.append((bytes(memory), dict(model), dict(after)))

    with monkeypatch.context() as patch:
        for name in ("_HEAD", "_ENTRY", "_LENGTH"):
            patch.setattr(kept_table, name, Packed(getattr(kept_table, name)))
        table = KeptTable(Recorded())  # type: ignore[arg-type]
        for _ in range(300):
            key = b"key %d" % chance.randrange(6)
            after = dict(model)
            if chance.random() < 0.25:
                after.pop(key, None)
                table.remove(key)
            else:
                after[key] = chance.randbytes(chance.randrange(30))
                table.put(key, after[key])
            model = dict(after)
            assert table.records() == model
    assert len(states) > 500
    for content, before, then in states:
        found = KeptTable(memoryview(bytearray(content))).records()
        assert found in (before, then)


def test_a_full_table_refuses_and_stays() -> None:
    memory = memoryview(bytearray(64 + 2 * 200))
    table = KeptTable(memory)
    table.put(b"a", b"x" * 100)
    before = bytes(memory)
    with pytest.raises(BufferObjectError, match=r"the table of buffer objects is full"):
        table.put(b"b", b"y" * 100)
    assert table.records() == {b"a": b"x" * 100}
    assert KeptTable(memoryview(bytearray(before))).records() == table.records()
    assert KeptTable(memory).records() == table.records()
    table.put(b"b", b"small")
    assert KeptTable(memory).records() == {b"a": b"x" * 100, b"b": b"small"}
