"""A client that keeps changing its mappings, so that no page is taken from it: other enclaves and instructions go on."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device import DeviceClient, DevicePool
from prefault.drivers.enclave import Enclave, EnclavePageCache, PageInfo, PageType, kept_tables, statistics
from prefault.errors import DeviceError
from prefault.sizes import MIB, PAGE_SIZE
from support.enclaves import dies

_LENGTH = 8 * PAGE_SIZE


class Hindered(EnclavePageCache):
    """Has operations of the pool fail as they do for a client that keeps changing its mappings.

    The file names the operation, and the pages on which it fails if they are among those asked for.
    """

    def __init__(self, file: Path) -> None:
        super().__init__("1 MiB", address_space="64 MiB")
        self._file = file

    def start(self, pool: DevicePool) -> None:
        super().start(pool)
        self._pool: Any = _HinderedPool(pool, self._file)


class _HinderedPool:
    def __init__(self, pool: DevicePool, file: Path) -> None:
        self._real = pool
        self._file = file

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._real, name)
        operation, start, stop = self._file.read_text().split() if self._file.exists() else ("", 0, 0)
        if name != operation:
            return method

        def hindered(pages: range, *arguments: object) -> object:
            if pages.start < int(stop) and int(start) < pages.stop:
                raise OSError(errno.EBUSY, "process 1 keeps changing its mappings")
            return method(pages, *arguments)

        return hindered


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def client(path: Path, tmp_path: Path, no_leaks: None) -> Iterator[DeviceClient]:
    with prefault.device.serve(Hindered(tmp_path / "hindered"), path), prefault.device.connect(path) as connected:
        yield connected


def _hinder(tmp_path: Path, operation: str, pages: range) -> None:
    (tmp_path / "new").write_text(f"{operation} {pages.start} {pages.stop}")
    os.replace(tmp_path / "new", tmp_path / "hindered")


def _store(memory: memoryview) -> object:
    memory[0] = 1
    return None


def test_c5_permissions_that_could_not_be_restricted_are_as_before(tmp_path: Path, path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    with enclave.map() as area, area.memoryview() as memory:
        memory[:] = b"\x07" * _LENGTH
        enclave.emodpe(2 * PAGE_SIZE, PAGE_SIZE, "rx")  # so that there are three pieces
        before = enclave.pages()
        _hinder(tmp_path, "protect", range(3, 4))
        with pytest.raises(DeviceError, match="keeps changing its mappings") as caught:
            enclave.emodpr(0, _LENGTH, "rx")
        assert caught.value.errno == errno.EBUSY
        assert enclave.pages() == before
        memory[0] = memory[2 * PAGE_SIZE] = memory[7 * PAGE_SIZE] = 8
        (tmp_path / "hindered").unlink()
        enclave.emodpr(0, _LENGTH, "rx")
        assert dies(path, "a", _store)


@pytest.mark.parametrize("page_type", [PageType.TRIM, PageType.TCS])
def test_c5_pages_whose_type_could_not_be_changed_are_as_before(
    tmp_path: Path, client: DeviceClient, page_type: PageType
) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    with enclave.map() as area, area.memoryview() as memory:
        memory[:] = b"\x07" * _LENGTH
        enclave.emodpr(0, 4 * PAGE_SIZE, "r")
        before = enclave.pages()
        _hinder(tmp_path, "evict", range(7, 8))
        with pytest.raises(DeviceError, match="keeps changing its mappings"):
            enclave.emodt(0, _LENGTH, page_type)
        assert enclave.pages() == before
        assert memory[:] == b"\x07" * _LENGTH
        memory[7 * PAGE_SIZE] = 8
        (tmp_path / "hindered").unlink()
        enclave.emodt(0, _LENGTH, page_type)
        assert enclave.pages()[0].info == PageInfo(page_type, "", modified=True)


def test_c5_pages_that_cannot_be_evicted_now_are_later_and_others_in_their_place(
    tmp_path: Path, client: DeviceClient
) -> None:
    busy = Enclave.create(client, "busy", "1 MiB")
    with busy.map() as area, Enclave.create(client, "other", "4 MiB", overcommit=True).map() as other:
        prefault.populate(area, length=PAGE_SIZE * 128)
        prefault.populate(other, length=PAGE_SIZE * 128)
        _hinder(tmp_path, "evict", range(128))
        with other.memoryview() as memory:
            for page in range(1024):
                memory[page * PAGE_SIZE] = 1
        assert statistics(client).frames <= MIB // PAGE_SIZE
        (tmp_path / "hindered").unlink()
        prefault.populate(other, length=MIB)  # needs all frames
        assert area.read(0, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_c5_an_enclave_for_which_the_table_has_no_room_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None
) -> None:
    monkeypatch.setattr(kept_tables, "MAX_ENCLAVES", 2)
    with prefault.device.open(Hindered(tmp_path / "none")) as client:  # a fork, which has the limit of here
        first = Enclave.create(client, "first", _LENGTH)
        Enclave.create(client, "second", _LENGTH)
        with pytest.raises(DeviceError, match="2 enclaves already, the maximum") as caught:
            Enclave.create(client, "third", _LENGTH)
        assert caught.value.errno == errno.ENOSPC
        assert statistics(client).enclaves == 2
        first.delete()
        with Enclave.create(client, "third", _LENGTH).map() as area:
            assert area.read() == bytes(_LENGTH)
