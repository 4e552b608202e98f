"""Sealed pages: whatever is done to them in ordinary memory is detected, and no nonce is used twice."""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefault.drivers.enclave import sealing
from prefault.drivers.enclave.kept_tables import TAG, KeptTables
from prefault.drivers.enclave.sealing import PageSealer, SealError
from prefault.sizes import PAGE_SIZE
from support.kept_memory import KeptMemory

_PAGES = 64
_ENCLAVE = 7
_REG = 1


@pytest.fixture
def memory() -> Iterator[KeptMemory]:
    kept = KeptMemory()
    yield kept
    kept.close()


def _seal(sealer: PageSealer, run: range, seed: int, enclave: int = _ENCLAVE) -> bytes:
    content = random.Random(seed).randbytes(len(run) * PAGE_SIZE)
    sealer.seal(run, memoryview(content), enclave, run.start, _REG)
    return content


def _unseal(sealer: PageSealer, page: int, *, enclave: int = _ENCLAVE, offset: int | None = None, kind: int = _REG) -> bytes:
    frame = bytearray(PAGE_SIZE)
    sealer.unseal(page, memoryview(frame), enclave, page if offset is None else offset, kind)
    return bytes(frame)


def test_c5_a_sealed_page_is_encrypted_and_comes_back(memory: KeptMemory) -> None:
    tables = KeptTables(memory, _PAGES)
    content = _seal(PageSealer(tables), range(3, 6), 1)
    for index, page in enumerate(range(3, 6)):
        clear = content[index * PAGE_SIZE : (index + 1) * PAGE_SIZE]
        assert clear[:16] not in bytes(tables.sealed)
        assert _unseal(PageSealer(tables), page) == clear  # the key is kept: another server reads it
        assert _unseal(PageSealer(tables), page) == clear  # and again: it died before the frame was supplied


def test_c5_every_changed_bit_is_detected(memory: KeptMemory) -> None:
    tables = KeptTables(memory, _PAGES)
    sealer = PageSealer(tables)
    chance = random.Random(5)
    for _ in range(200):
        _seal(sealer, range(9, 10), chance.randrange(1 << 30))
        target, start, size = chance.choice(((tables.sealed, 9 * PAGE_SIZE, PAGE_SIZE), (tables.tags, 9 * TAG, TAG)))
        target[start + chance.randrange(size)] ^= 1 << chance.randrange(8)
        with pytest.raises(SealError, match="page 9 fails its authentication"):
            _unseal(sealer, 9)


def test_c5_exchanged_and_replayed_pages_are_detected(memory: KeptMemory) -> None:
    tables = KeptTables(memory, _PAGES)
    sealer = PageSealer(tables)

    def snapshot(page: int) -> tuple[bytes, bytes]:
        at = page * PAGE_SIZE
        return bytes(tables.sealed[at : at + PAGE_SIZE]), bytes(tables.tags[page * TAG : page * TAG + TAG])

    def put(page: int, copy: tuple[bytes, bytes]) -> None:
        at = page * PAGE_SIZE
        tables.sealed[at : at + PAGE_SIZE], tables.tags[page * TAG : page * TAG + TAG] = copy

    _seal(sealer, range(1), 1)
    old = snapshot(0)
    _seal(sealer, range(1), 2)
    good = snapshot(0)
    put(0, old)
    with pytest.raises(SealError):
        _unseal(sealer, 0)
    put(0, good)
    with pytest.raises(SealError):  # poisoned, and stays so
        _unseal(sealer, 0)

    _seal(sealer, range(1, 3), 3)
    first, second = snapshot(1), snapshot(2)
    put(1, second)
    put(2, first)
    for page in (1, 2):
        with pytest.raises(SealError):
            _unseal(sealer, page)


@pytest.mark.parametrize(
    "change", [{"enclave": _ENCLAVE + 1}, {"offset": 4}, {"kind": 2}], ids=lambda change: next(iter(change))
)
def test_c5_a_page_is_bound_to_its_enclave_place_and_type(memory: KeptMemory, change: dict[str, Any]) -> None:
    sealer = PageSealer(KeptTables(memory, _PAGES))
    _seal(sealer, range(3, 4), 1)
    with pytest.raises(SealError):
        _unseal(sealer, 3, **change)


def test_c5_nothing_is_written_to_the_frame_of_a_bad_page(memory: KeptMemory) -> None:
    tables = KeptTables(memory, _PAGES)
    sealer = PageSealer(tables)
    _seal(sealer, range(1), 1)
    tables.tags[0] ^= 1
    frame = bytearray(PAGE_SIZE)
    with pytest.raises(SealError):
        sealer.unseal(0, memoryview(frame), _ENCLAVE, 0, _REG)
    assert frame == bytes(PAGE_SIZE)


def _seal_for_ever(memory: KeptMemory, log: int) -> None:
    """Seal pages, with each nonce logged before its use, until killed."""
    real, invalid = sealing.load_cipher()

    class Logging:
        def __init__(self, key: bytes) -> None:
            self._cipher = real(key)

        def encrypt(self, nonce: bytes, data: memoryview, bound: bytes) -> bytes:
            os.write(log, nonce)
            sealed: bytes = self._cipher.encrypt(nonce, data, bound)
            return sealed

    sealing.load_cipher = lambda: (Logging, invalid)
    sealer = PageSealer(KeptTables(memory, _PAGES))
    chance = random.Random(os.getpid())
    while True:
        start = chance.randrange(_PAGES)
        _seal(sealer, range(start, chance.randrange(start, _PAGES) + 1), 1)


def test_c5_no_nonce_is_used_twice_also_after_kill_9(memory: KeptMemory, tmp_path: Path) -> None:
    KeptTables(memory, _PAGES)
    log = os.open(tmp_path / "nonces", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    for round_ in range(20):
        pid = os.fork()
        if pid == 0:
            try:
                _seal_for_ever(memory, log)
            finally:
                os._exit(1)
        before, limit = os.fstat(log).st_size, time.monotonic() + 10
        while os.fstat(log).st_size < before + 12 * (1 + 37 * round_) and time.monotonic() < limit:
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    nonces = [nonce for (nonce,) in struct.iter_unpack("12s", (tmp_path / "nonces").read_bytes())]
    os.close(log)
    assert len(nonces) > 20 * 100
    assert len(set(nonces)) == len(nonces)


# --- the tables


def test_c5_a_tebibyte_of_tables_costs_what_was_touched(memory: KeptMemory) -> None:
    tables = KeptTables(memory, (1 << 40) // PAGE_SIZE)
    sealer = PageSealer(tables)
    assert list(tables.added(range(tables.pages))) == []  # the summary, 64 KiB for each TiB, is read
    before = memory.allocated()
    for page in (0, 1 << 20, (1 << 28) - 1):
        tables.set_entries(range(page, page + 1), b"\x43")
        sealer.seal(range(page, page + 1), memoryview(bytes(PAGE_SIZE)), 1, page, _REG)
    assert [run.start for run, _ in tables.added(range(tables.pages))] == [0, 1 << 20, (1 << 28) - 1]
    assert memory.allocated() - before <= 3 * 6 * PAGE_SIZE
    tables.clear(range(tables.pages))
    assert list(tables.added(range(tables.pages))) == []
    assert memory.allocated() - before <= 3 * 5 * PAGE_SIZE  # the sealed pages are gone; tables that were touched stay
    assert not any(sealer.is_sealed(page) for page in (0, 1 << 20, (1 << 28) - 1))


def test_c5_clearing_pages_spares_their_neighbours(memory: KeptMemory) -> None:
    tables = KeptTables(memory, 1 << 16)
    sealer = PageSealer(tables)
    everything = range(100, 9000)
    tables.set_entries(everything, b"\x43" * len(everything))
    content = {page: _seal(sealer, range(page, page + 1), page) for page in (1000, 5001, 8999)}
    tables.clear(range(1001, 5001))
    assert [run for run, _ in tables.added(range(1 << 16)) if len(run)] == [
        range(100, 1001),
        range(5001, 8192),
        range(8192, 9000),
    ]
    assert {page: _unseal(sealer, page) for page in content} == content


def test_c5_enclaves_are_entered_and_removed(memory: KeptMemory) -> None:
    tables = KeptTables(memory, _PAGES)
    made = [
        tables.add(index << 21, 4096 * index, explicit=index == 1, overcommit=index == 2, max_permissions=index)
        for index in range(4)
    ]
    assert KeptTables(memory, _PAGES).rows() == made
    tables.remove(made[1].number)
    again = tables.add(1 << 30, 4096, explicit=False, overcommit=False, max_permissions=7)
    assert again.number == 5  # never given twice
    assert sorted(KeptTables(memory, _PAGES).rows()) == [made[0], made[2], made[3], again]
