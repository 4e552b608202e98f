"""The server dies in the middle of an instruction: the next one finishes it, or it has not begun."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device import DeviceClient, DevicePool
from prefault.drivers.enclave import Enclave, EnclavePageCache, PageInfo, PageType, statistics
from prefault.errors import DeviceGoneError
from prefault.sizes import PAGE_SIZE
from support.enclaves import dies

_LENGTH = 8 * PAGE_SIZE


class Mortal(EnclavePageCache):
    """Dies where the driver next calls the operation of the pool that is named in a file."""

    def __init__(self, file: Path) -> None:
        super().__init__("1 MiB", address_space="64 MiB")
        self._file = file

    def start(self, pool: DevicePool) -> None:
        super().start(pool)
        self._pool: Any = _Deadly(pool, self._file)


class _Deadly:
    def __init__(self, pool: DevicePool, file: Path) -> None:
        self._real = pool
        self._file = file

    def __getattr__(self, name: str) -> Any:
        if self._file.exists() and self._file.read_text() == name:
            self._file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return getattr(self._real, name)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def client(path: Path, tmp_path: Path, no_leaks: None) -> Iterator[DeviceClient]:
    with prefault.device.serve(Mortal(tmp_path / "deadly"), path), prefault.device.connect(path) as connected:
        yield connected


@contextmanager
def _dying_at(tmp_path: Path, client: DeviceClient, operation: str) -> Iterator[None]:
    """Have the server die at an operation of the pool inside of the block, and wait for the next one."""
    (tmp_path / "deadly").write_text(operation)
    with pytest.raises(DeviceGoneError, match="may have been carried out"):
        yield
    assert not (tmp_path / "deadly").exists()
    statistics(client)


def _load(memory: memoryview) -> object:
    return memory[0]


def _store(memory: memoryview) -> object:
    memory[0] = 1
    return None


def test_c5_permissions_are_restricted_by_the_next_server(tmp_path: Path, path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    with enclave.map() as area, area.memoryview() as memory:
        memory[:] = b"\x07" * _LENGTH
        with _dying_at(tmp_path, client, "protect"):
            enclave.emodpr(0, PAGE_SIZE, "r")
        assert enclave.pages(0, PAGE_SIZE)[0].info == PageInfo(PageType.REG, "r", restricted=True)
        assert dies(path, "a", _store)
        assert not dies(path, "a", _load)
        assert memory[:] == b"\x07" * _LENGTH


@pytest.mark.parametrize("page_type", [PageType.TRIM, PageType.TCS])
def test_c5_pages_that_changed_their_type_are_evicted_by_the_next_server(
    tmp_path: Path, path: Path, client: DeviceClient, page_type: PageType
) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    with enclave.map() as area:
        prefault.populate(area)
        with _dying_at(tmp_path, client, "evict"):
            enclave.emodt(0, PAGE_SIZE, page_type)
        assert enclave.pages(0, PAGE_SIZE)[0].info == PageInfo(page_type, "", modified=True)
        assert dies(path, "a", _load)
        assert statistics(client).frames == _LENGTH // PAGE_SIZE - 1
        enclave.eaccept(0, PAGE_SIZE, permissions="", page_type=page_type, modified=True)
        enclave.trim(0, PAGE_SIZE) if page_type is PageType.TCS else enclave.remove(0, PAGE_SIZE)
        assert area.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)


@pytest.mark.parametrize("operation", ["evict", "delete_object"])
def test_c5_an_enclave_that_was_half_deleted_is_gone(tmp_path: Path, client: DeviceClient, operation: str) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    with enclave.map() as area, area.memoryview() as memory:
        memory[:] = b"\x07" * _LENGTH
    with _dying_at(tmp_path, client, operation):
        enclave.delete()
    assert statistics(client).enclaves == 0
    with Enclave.create(client, "a", _LENGTH).map() as area:
        assert area.read() == bytes(_LENGTH)


def test_c5_an_enclave_that_was_not_created_can_be(tmp_path: Path, client: DeviceClient) -> None:
    with _dying_at(tmp_path, client, "create_object"):
        Enclave.create(client, "a", _LENGTH)
    with Enclave.create(client, "a", _LENGTH).map() as area:
        assert area.read() == bytes(_LENGTH)


def test_c5_an_eviction_that_was_cut_off_loses_nothing(tmp_path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "2 MiB", overcommit=True)

    def written(page: int) -> bytes:
        return page.to_bytes(8, "little") * (PAGE_SIZE // 8)

    with enclave.map() as area, area.memoryview() as memory:
        for page in range(512):
            if page % 100 == 99:
                (tmp_path / "deadly").write_text("evict")
            memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = written(page)
        assert [page for page in range(512) if memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != written(page)] == []
    (tmp_path / "deadly").unlink(missing_ok=True)
