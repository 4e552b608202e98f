"""The SGX2 instructions on enclaves that are mapped: what memory may be touched after each, and in which order they go."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import prefault
import prefault.device
from prefault.device import DeviceClient
from prefault.drivers.enclave import Code, Enclave, EnclaveError, EnclavePageCache, PageInfo, PageType, statistics
from prefault.errors import DeviceError, DriverError
from prefault.sizes import MIB, PAGE_SIZE
from support import oracle
from support.device_server import ends_by
from support.enclaves import cache_at, dies, kill_server

_LENGTH = 16 * PAGE_SIZE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


@pytest.fixture
def client(path: Path, no_leaks: None) -> Iterator[DeviceClient]:
    with cache_at(path) as connected:
        yield connected


def _load(page: int) -> Callable[[memoryview], object]:
    return lambda memory: memory[page * PAGE_SIZE]


def _store(page: int) -> Callable[[memoryview], object]:
    return lambda memory: memory.__setitem__(page * PAGE_SIZE, 1)


def _info(enclave: Enclave, page: int) -> PageInfo | None:
    found = enclave.pages(page * PAGE_SIZE, PAGE_SIZE)
    return found[0].info if found else None


# --- EAUG and EACCEPT


def test_c5_a_pending_page_is_an_error_until_it_is_accepted(path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH, accept="explicit")
    with enclave.map() as area:
        assert dies(path, "a", _load(3))  # the touch adds the page, and is an error
        assert _info(enclave, 3) == PageInfo(PageType.REG, "rw", pending=True)
        assert dies(path, "a", _store(3))
        with pytest.raises(EnclaveError, match="EACCEPT expects REG rw, and the page is REG rw pending") as caught:
            enclave.eaccept(3 * PAGE_SIZE, PAGE_SIZE)  # the flag is wrong
        assert caught.value.code is Code.ATTRIBUTES_MISMATCH
        assert _info(enclave, 3) == PageInfo(PageType.REG, "rw", pending=True)
        enclave.eaccept(3 * PAGE_SIZE, PAGE_SIZE, pending=True)
        assert not dies(path, "a", _load(3))
        assert not dies(path, "a", _store(3))
        with area.memoryview() as memory:
            assert memory[3 * PAGE_SIZE] == 1
        prefault.populate(area, offset=4 * PAGE_SIZE, length=4 * PAGE_SIZE)  # accepts as well
        assert _info(enclave, 7) == PageInfo(PageType.REG, "rw")
        enclave.eaug(8 * PAGE_SIZE, 2 * PAGE_SIZE)
        assert statistics(client).frames == 5  # pending pages have none yet
        enclave.eaccept(8 * PAGE_SIZE, 2 * PAGE_SIZE, pending=True)
        assert area.read(8 * PAGE_SIZE, 2 * PAGE_SIZE) == bytes(2 * PAGE_SIZE)


def test_c5_a_touch_that_failed_in_this_process_succeeds_after_eaccept(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH, accept="explicit")
    with enclave.map() as area, area.memoryview() as memory:
        # A touch by the kernel: an error where a touch by Python ends the process.
        reader, writer = os.pipe()
        try:
            for _ in range(2):
                with pytest.raises(OSError, match="Bad address"):
                    os.write(writer, memory[:1])
            enclave.eaccept(0, PAGE_SIZE, pending=True)
            assert os.write(writer, memory[:1]) == 1
        finally:
            os.close(reader)
            os.close(writer)


def test_c5_automatic_acceptance_accepts_pages_that_eaug_added(path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    enclave.eaug(0, PAGE_SIZE)
    assert _info(enclave, 0) == PageInfo(PageType.REG, "rw", pending=True)
    assert not dies(path, "a", _store(0))
    assert _info(enclave, 0) == PageInfo(PageType.REG, "rw")
    with pytest.raises(EnclaveError) as caught:
        enclave.eaug(0, 2 * PAGE_SIZE)
    assert (caught.value.code, caught.value.page) == (Code.ALREADY_ADDED, 0)
    assert _info(enclave, 1) is None


def test_c5_eaccept_of_a_page_that_was_not_added(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH, accept="explicit")
    enclave.eaug(0, PAGE_SIZE)
    with pytest.raises(EnclaveError, match="page 1: EACCEPT of a page that was not added") as caught:
        enclave.eaccept(0, 2 * PAGE_SIZE, pending=True)
    assert (caught.value.code, caught.value.page) == (Code.NOT_ADDED, 1)
    assert _info(enclave, 0) == PageInfo(PageType.REG, "rw", pending=True)  # all or nothing


# --- permissions


def test_c5_restricted_permissions_hold_for_all_clients_and_the_next_server(path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    with enclave.map() as area, area.memoryview() as memory:
        memory[:_LENGTH] = bytes(range(256)) * (_LENGTH // 256)
        enclave.emodpr(0, 4 * PAGE_SIZE, "r")
        assert memory[:_LENGTH] == bytes(range(256)) * (_LENGTH // 256)
        assert dies(path, "a", _store(3))
        assert not dies(path, "a", _load(3))
        assert not dies(path, "a", _store(4))
        enclave.eaccept(0, 4 * PAGE_SIZE, permissions="r")
        kill_server(client)
        assert dies(path, "a", _store(3))
        assert _info(enclave, 3) == PageInfo(PageType.REG, "r")
        enclave.emodpe(0, 2 * PAGE_SIZE, "rw")
        memory[0] = 77
        assert memory[0] == 77
        assert dies(path, "a", _store(3))
        enclave.emodpr(2 * PAGE_SIZE, PAGE_SIZE, "")
        assert dies(path, "a", _load(2))
        assert not dies(path, "a", _load(3))
        enclave.emodpe(2 * PAGE_SIZE, PAGE_SIZE, "r")
        assert memory[2 * PAGE_SIZE : 3 * PAGE_SIZE] == bytes(range(256)) * 16  # nothing was lost


def test_c5_permissions_stay_with_a_page_that_is_evicted(path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "2 MiB")
    with enclave.map() as area, area.memoryview() as memory:
        memory[0] = 5
        enclave.emodpr(0, PAGE_SIZE, "r")
        for page in range(1, 512):
            memory[page * PAGE_SIZE] = 1
        assert not oracle.present(area.address, PAGE_SIZE)[0]
        with pytest.raises(DriverError, match="a write of a page that is REG r"):
            prefault.populate(area, access="write", length=PAGE_SIZE)
        assert memory[0] == 5
        assert dies(path, "a", _store(0))
        for page in range(1, 512):
            memory[page * PAGE_SIZE] = 1
        enclave.emodpe(0, PAGE_SIZE, "rw")  # of a page that lies sealed
        memory[0] = 6
        assert memory[0] == 6


# mov eax, 42; ret
_CODE = bytes([0xB8, 42, 0, 0, 0, 0xC3])


def _call(area: prefault.device.Area, offset: int = 0) -> int:
    result: int = ctypes.CFUNCTYPE(ctypes.c_int)(area.address + offset)()
    return result


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the machine code is of x86-64")
def test_c5_machine_code_runs_from_an_executable_page_only(path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    with enclave.map() as area:
        with area.memoryview() as memory:
            memory[: len(_CODE)] = _CODE

        def run(say: Callable[[str], None]) -> None:
            with prefault.device.connect(path) as own:
                there = Enclave(own, "a")
                with there.map() as mapped:
                    say(str(_call(mapped)))

        assert ends_by(run) == ("", -11)  # SIGSEGV: not executable
        enclave.emodpe(0, PAGE_SIZE, "rx")
        assert "x" in str(_info(enclave, 0))
        assert _call(area) == 42
        assert ends_by(run) == ("42", 0)  # in another process, as it maps the enclave
        enclave.emodpr(0, PAGE_SIZE, "rx")
        enclave.eaccept(0, PAGE_SIZE, permissions="rx")
        assert _call(area) == 42
        assert dies(path, "a", _store(0))
        with Enclave(client, "a").map() as filler:  # it is evicted, and comes back
            enclave2 = Enclave.create(client, "b", "1 MiB", overcommit=True)
            with enclave2.map() as other:
                prefault.populate(other)
            assert not oracle.present(area.address, PAGE_SIZE)[0]
            assert _call(area) == 42
            assert _call(filler) == 42
        enclave.emodpr(0, PAGE_SIZE, "r")
        assert ends_by(run) == ("", -11)


def test_c5_permissions_that_may_not_be_extended(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH, max_permissions="rw")
    enclave.eaug(0, PAGE_SIZE)
    for permissions, code in (("rx", Code.NOT_PERMITTED), ("w", Code.INVALID_REQUEST), ("q", Code.INVALID_REQUEST)):
        with pytest.raises(EnclaveError) as caught:
            enclave.emodpe(0, PAGE_SIZE, permissions)
        assert caught.value.code is code
    with pytest.raises(EnclaveError) as caught:
        enclave.emodpe(0, PAGE_SIZE, "r")
    assert caught.value.code is Code.PENDING
    assert _info(enclave, 0) == PageInfo(PageType.REG, "rw", pending=True)


# --- types


def test_c5_trim_accept_remove(path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", "2 MiB")
    with enclave.map() as area:
        with area.memoryview() as memory:
            memory[:] = b"\x05" * (2 * MIB)
        everything = (0, 2 * MIB)  # some resident, most of it sealed
        with pytest.raises(EnclaveError):
            enclave.remove(*everything)
        with pytest.raises(EnclaveError):
            enclave.eaccept(*everything, permissions="", page_type=PageType.TRIM, modified=True)
        enclave.emodt(*everything, PageType.TRIM)
        assert statistics(client).frames == 0
        assert dies(path, "a", _load(0))
        assert dies(path, "a", _load(511))
        with pytest.raises(EnclaveError) as caught:
            enclave.remove(*everything)
        assert caught.value.code is Code.NOT_TRIMMED  # not accepted yet
        enclave.eaccept(*everything, permissions="", page_type=PageType.TRIM, modified=True)
        assert dies(path, "a", _load(0))
        with pytest.raises(DriverError, match="no software accesses it"):
            area.read(0, PAGE_SIZE)
        enclave.remove(*everything)
        assert enclave.pages() == []
        with area.memoryview() as memory:
            assert memory[:PAGE_SIZE] == memory[511 * PAGE_SIZE :] == bytes(PAGE_SIZE)
        enclave.trim(0, PAGE_SIZE)
        assert _info(enclave, 0) is None


def test_c5_a_thread_control_structure_is_not_accessible(path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    with enclave.map() as area:
        with area.memoryview() as memory:
            memory[: 2 * PAGE_SIZE] = b"\x05" * (2 * PAGE_SIZE)
        enclave.emodt(0, PAGE_SIZE, PageType.TCS)
        assert _info(enclave, 0) == PageInfo(PageType.TCS, "", modified=True)
        assert dies(path, "a", _load(0))
        kill_server(client)
        assert dies(path, "a", _load(0))
        enclave.eaccept(0, PAGE_SIZE, permissions="", page_type=PageType.TCS, modified=True)
        assert dies(path, "a", _store(0))
        with pytest.raises(EnclaveError) as caught:
            enclave.emodt(0, PAGE_SIZE, PageType.TCS)
        assert caught.value.code is Code.WRONG_TYPE
        enclave.trim(0, PAGE_SIZE)
        assert area.read(0, 2 * PAGE_SIZE) == bytes(PAGE_SIZE) + b"\x05" * PAGE_SIZE


def test_c5_a_page_that_was_removed_comes_back_writable(path: Path, client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    with enclave.map() as area, area.memoryview() as memory:
        memory[: 2 * PAGE_SIZE] = b"\x05" * (2 * PAGE_SIZE)
        enclave.emodpr(0, 2 * PAGE_SIZE, "r")
        enclave.eaccept(0, 2 * PAGE_SIZE, permissions="r")
        enclave.trim(0, PAGE_SIZE)
        prefault.discard(area, offset=PAGE_SIZE, length=PAGE_SIZE)
        assert not dies(path, "a", _store(0))
        assert not dies(path, "a", _store(1))
        assert memory[0] == memory[PAGE_SIZE] == 1


# --- bad input


@pytest.mark.parametrize("capacity", [0, "0 MiB", 100, -4096])
def test_c5_capacities_that_are_none(capacity: Any) -> None:
    with pytest.raises(ValueError, match=r"positive multiple|size"):
        EnclavePageCache(capacity)
    with pytest.raises(ValueError, match=r"positive multiple|size"):
        EnclavePageCache("1 MiB", address_space=capacity)


def test_c5_enclaves_that_cannot_be(client: DeviceClient) -> None:
    with Enclave.create(client, "a", _LENGTH).map() as area:
        area.read(0, PAGE_SIZE)
        for number, wrong in (
            (errno.EEXIST, lambda: Enclave.create(client, "a", _LENGTH)),
            (errno.EINVAL, lambda: Enclave.create(client, "b", 0)),
            (errno.EINVAL, lambda: Enclave.create(client, "b", PAGE_SIZE + 1)),
            (errno.ENOSPC, lambda: Enclave.create(client, "b", "1 PiB")),
            (errno.EINVAL, lambda: _create(client, "b" * 1000)),
            (errno.EINVAL, lambda: _create(client, "")),
            (errno.EINVAL, lambda: _create(client, "\u00e9" * 200)),
            (errno.EINVAL, lambda: _create(client, "b\0")),
            (errno.EINVAL, lambda: _create(client, "b", "never")),
            (errno.ENOENT, lambda: Enclave(client, "b")),
            (errno.EBUSY, lambda: Enclave(client, "a").delete()),
        ):
            with pytest.raises(DeviceError) as caught:
                wrong()
            assert caught.value.errno == number, caught.value
        with pytest.raises(DeviceError, match="'a' is mapped by one area: close it first"):
            Enclave(client, "a").delete()
        with Enclave(client, "a").map(), pytest.raises(DeviceError, match="by 2 areas: close them first"):
            Enclave(client, "a").delete()
        with pytest.raises(EnclaveError, match="permissions"):
            Enclave.create(client, "b", _LENGTH, max_permissions="z")
        assert statistics(client).enclaves == 1
        with pytest.raises(DeviceError, match="belongs to no enclave"):
            client.map(PAGE_SIZE, offset=64 * MIB)
        with pytest.raises(DeviceError, match="beyond its enclave"):
            client.map(2 * _LENGTH)
    Enclave(client, "a").delete()
    with pytest.raises(DeviceError, match="no enclave 'a': there are none"):
        Enclave(client, "a")


def _create(client: DeviceClient, name: str, accept: str = "auto") -> bytes:
    """Ask for an enclave past the checks of the client's side."""
    return client.control(msgspec.msgpack.encode(["createenclave", name, _LENGTH, accept, False, "rwx"]))


def test_c5_arguments_that_cannot_be_are_not_sent(client: DeviceClient) -> None:
    anything: Any = Enclave  # for arguments of another type
    enclave = Enclave.create(client, "a", _LENGTH)
    wrong: Any = enclave
    assert enclave.pages() == []
    for kind, message, call in (
        (
            ValueError,
            "accept is 'auto' or 'explicit', not 'maybe'",
            lambda: anything.create(client, "b", 8192, accept="maybe"),
        ),
        (ValueError, "1 to 200 bytes in UTF-8 and no NUL, not 0", lambda: Enclave.create(client, "", _LENGTH)),
        (ValueError, "1 to 200 bytes in UTF-8 and no NUL, not 1000", lambda: Enclave.create(client, "b" * 1000, _LENGTH)),
        (ValueError, "no NUL", lambda: Enclave.create(client, "a\0b", _LENGTH)),
        (TypeError, "is a str, not NoneType", lambda: anything.create(client, None, _LENGTH)),
        (TypeError, "is a str, not NoneType", lambda: anything(client, None)),
        (TypeError, "Enclave takes a DeviceClient, .* not None", lambda: anything(None, "a")),
        (TypeError, r"Enclave.create takes a DeviceClient", lambda: anything.create(None, "b", _LENGTH)),
        (TypeError, "statistics takes a DeviceClient", lambda: statistics(None)),  # type: ignore[arg-type]
        (TypeError, "PageType.REG, PageType.TCS, PageType.TRIM, not 'TRIM'", lambda: wrong.emodt(0, 4096, "TRIM")),
        (TypeError, "not 'TRIM'", lambda: wrong.eaccept(0, 4096, page_type="TRIM")),
        (EnclaveError, "letters r, w and x, not 'read'", lambda: enclave.emodpr(0, 4096, "read")),
        (EnclaveError, "letters r, w and x, not 'execute'", lambda: enclave.emodpe(0, 4096, "execute")),
        (EnclaveError, "letters r, w and x, not None", lambda: wrong.emodpe(0, 4096, None)),
        (EnclaveError, "letters r, w and x, not 'read'", lambda: Enclave.create(client, "b", 8192, max_permissions="read")),
    ):
        with pytest.raises(kind, match=message):
            call()
    assert statistics(client).enclaves == 1


def test_c5_ranges_that_are_none(client: DeviceClient) -> None:
    enclave = Enclave.create(client, "a", _LENGTH)
    for offset, length in ((1, PAGE_SIZE), (0, 1), (0, 0), (0, _LENGTH + PAGE_SIZE), (_LENGTH, PAGE_SIZE)):
        for call in (enclave.eaug, enclave.remove, lambda at, size: enclave.emodpr(at, size, "r")):
            with pytest.raises(EnclaveError) as caught:
                call(offset, length)
            assert caught.value.code is Code.INVALID_REQUEST
    assert enclave.pages() == []
    with pytest.raises(EnclaveError, match="page 16 is not within the enclave, which has 16 pages, numbered from 0"):
        enclave.eaug(_LENGTH, PAGE_SIZE)
    with pytest.raises(EnclaveError, match="pages 15 to 17 are not within the enclave"):
        enclave.eaug(_LENGTH - PAGE_SIZE, 3 * PAGE_SIZE)


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\xc1",
        b"garbage",
        bytes(60_000),
        msgspec.msgpack.encode(["augment", "a", -1, 5]),
        msgspec.msgpack.encode(["augment", "a", 0]),
        msgspec.msgpack.encode(["augment", 7, 0, 1]),
        b"\x96",
        msgspec.msgpack.encode(["nothing"]),
        msgspec.msgpack.encode(["changetype", "a", 0, 1, 9]),
    ],
)
def test_c5_control_requests_that_are_garbage(client: DeviceClient, request_: bytes) -> None:
    Enclave.create(client, "a", _LENGTH)
    with pytest.raises(DeviceError, match="no request of an enclave page cache") as caught:
        client.control(request_)
    assert caught.value.errno == errno.EINVAL
    assert statistics(client).enclaves == 1


def test_c5_an_instruction_on_more_pages_than_it_may_have(client: DeviceClient) -> None:
    Enclave.create(client, "a", "128 MiB")
    reply = client.control(msgspec.msgpack.encode(["augment", "a", 0, 1 << 62]))
    assert b"at most 16384 pages at once" in reply
    large = Enclave(client, "a")
    large.eaug(0, "128 MiB")  # the client splits it
    assert sum(found.length for found in large.pages()) == 128 * MIB
