"""Requirement B5: a pool of memory blocks that a driver manages for virtual machines."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefault.device
from prefault.device import DeviceObject, DevicePool
from prefault.drivers import VmPool, VmPoolControl
from prefault.drivers.vmpool.machine_requests import CreateMachine, SetLimit
from prefault.errors import BackingFullError, DeviceError, DeviceGoneError, DriverError, NotPopulatedError
from prefault.ipc.messages import encode
from prefault.sizes import MIB
from prefault.sparse import SparseMemory
from prefault.testing import check_device
from prefault.virtio_mem import Request, RequestType, Response, ResponseType, VirtioMem
from support import oracle, processes, vm_machines
from support.block_devices import LOADED, frames_of

pytestmark = pytest.mark.usefixtures("no_leaks")

BLOCK = 2 * MIB
assert LOADED


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """The socket of a pool of eight blocks."""
    with prefault.device.serve(VmPool(8 * BLOCK, address_space="1 GiB"), tmp_path / "pool") as server:
        yield server.path


def test_machines_share_the_pool_and_each_has_its_limit(path: str) -> None:
    with prefault.device.connect(path) as client:
        control = VmPoolControl(client)
        with control.create("one", 16 * BLOCK, limit=6 * BLOCK) as one, control.create("other", 16 * BLOCK) as other:
            assert (one.block, len(one)) == (BLOCK, 16 * BLOCK)
            one.populate(3 * BLOCK, 4 * BLOCK)
            other.populate(0, BLOCK)
            usage = control.usage()
            assert (usage.capacity, usage.plugged, usage.block) == (8 * BLOCK, 5 * BLOCK, BLOCK)
            assert [machine[:4] for machine in map(_fields, usage.machines)] == [
                ("one", 16 * BLOCK, 6 * BLOCK, 4 * BLOCK),
                ("other", 16 * BLOCK, 16 * BLOCK, BLOCK),
            ]
            assert {machine.pid for machine in usage.machines} == {os.getpid()}
            with pytest.raises(
                DriverError, match=r"machine 'one' has 8.0 MiB of at most 12.0 MiB plugged, which leaves no room for 6.0 MiB"
            ):
                one.populate(8 * BLOCK, 3 * BLOCK)
            assert one.populated.length == 4 * BLOCK
            control.set_limit("one", 5 * BLOCK)
            one.populate(0, BLOCK)
            with pytest.raises(DriverError, match="raise its limit"):
                one.populate(BLOCK, BLOCK)
            with pytest.raises(
                BackingFullError, match=r"capacity of 8 pages has no room for 3 more: 6 are taken, of 2\.0 MiB each; discard"
            ):
                other.populate(8 * BLOCK, 3 * BLOCK)
            assert control.usage().plugged == 6 * BLOCK
            one.discard()
            other.populate(8 * BLOCK, 7 * BLOCK)
            assert control.usage().plugged == 8 * BLOCK
        control.remove("one")
        assert [machine.name for machine in control.usage().machines] == ["other"]
        assert control.usage().plugged == 8 * BLOCK
        control.remove("other")
        assert control.usage().plugged == 0


def _fields(machine: object) -> tuple[object, ...]:
    return tuple(getattr(machine, name) for name in ("name", "size", "limit", "plugged", "pid"))


def test_a_limit_holds_in_each_batch_of_a_large_plug(tmp_path: Path) -> None:
    with prefault.device.open(VmPool("64 MiB", address_space="1 GiB")) as client:
        control = VmPoolControl(client)
        with control.create("one", "64 MiB", limit="40 MiB") as memory:
            with pytest.raises(DriverError, match=r"40.0 MiB"):
                memory.populate(0, "48 MiB")
            assert (control.usage().plugged, memory.populated.length) == (0, 0)
            memory.populate(0, "40 MiB")


def test_no_block_comes_with_the_bytes_of_another_machine(path: str) -> None:
    """The oracle is the other machine: it fills every block of the pool, again and again."""
    chance = random.Random(5)
    with prefault.device.connect(path) as client:
        control = VmPoolControl(client)
        machines = [control.create(f"machine {number}", 16 * BLOCK) for number in range(3)]
        held: list[list[int]] = [[], [], []]
        for turn in range(120):
            number = chance.randrange(3)
            memory, mine = machines[number], held[number]
            if sum(map(len, held)) < 8 and chance.random() < 0.7:
                block = chance.choice([free for free in range(16) if free not in mine])
                memory.populate(block * BLOCK, BLOCK)
                assert memory.read(block * BLOCK, BLOCK).count(0) == BLOCK, turn
                memory.write(block * BLOCK, bytes([turn % 255 + 1]) * BLOCK)
                mine.append(block)
            elif mine:
                memory.discard(mine.pop(chance.randrange(len(mine))) * BLOCK, BLOCK)
        for memory in machines:
            memory.close()


def test_the_blocks_of_a_process_that_is_killed_are_free_and_zeros(path: str) -> None:
    killed = vm_machines.start(path, "killed", 8 * BLOCK, 1, 0)
    try:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "ready\n"
        with prefault.device.connect(path) as client:
            control = VmPoolControl(client)
            assert processes.eventually(lambda: control.usage().plugged >= 4 * BLOCK)
            assert control.usage().machines[0].pid == killed.pid
            killed.kill()
            killed.wait()
            assert processes.eventually(lambda: not control.usage().machines)
            assert control.usage().plugged == 0
            with control.create("killed", 8 * BLOCK) as memory:
                memory.populate()
                assert memory.read(0, 8 * BLOCK).count(0) == 8 * BLOCK
    finally:
        killed.kill()
        killed.communicate()


def test_machines_survive_the_server(tmp_path: Path) -> None:
    with (
        prefault.device.serve(VmPool(8 * BLOCK, address_space="1 GiB"), tmp_path / "pool") as server,
        prefault.device.connect(server.path) as client,
    ):
        control = VmPoolControl(client)
        with control.create("one", 8 * BLOCK, limit=3 * BLOCK) as memory:
            memory.populate(0, 2 * BLOCK)
            memory.write(BLOCK - 2, b"kept")
            (pid,) = processes.children(server.pid)
            os.kill(pid, signal.SIGKILL)
            memory.populate(2 * BLOCK, BLOCK)
            assert memory.read(BLOCK - 2, 4) == b"kept"
            with pytest.raises(DriverError, match=r"6\.0 MiB of at most 6\.0 MiB"):
                memory.populate(3 * BLOCK, BLOCK)
            (machine,) = control.usage().machines
            assert _fields(machine) == ("one", 8 * BLOCK, 3 * BLOCK, 3 * BLOCK, os.getpid())
        control.remove("one")


class MortalPool(VmPool):
    """Dies where it next calls the method that is named in a file."""

    def __init__(self, file: Path) -> None:
        super().__init__(8 * BLOCK, address_space="1 GiB")
        self._file = file

    def recipe(self) -> None:  # type: ignore[override]
        return None

    def start(self, pool: DevicePool) -> None:
        super().start(pool)
        real = pool.delete_object

        def delete_object(name: str) -> None:
            self._die("delete_object")
            real(name)

        pool.delete_object = delete_object  # type: ignore[method-assign]

    def _die(self, name: str) -> None:
        if self._file.exists() and self._file.read_text() == name:
            self._file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    def _set(self, machine: DeviceObject, field: int, value: int) -> None:
        self._die("_set")
        super()._set(machine, field, value)


@pytest.mark.parametrize("operation", ["_set", "delete_object"])
def test_a_machine_that_a_dead_server_left_half_made_or_half_removed_is_in_nobodys_way(
    tmp_path: Path, operation: str
) -> None:
    file = tmp_path / "method"
    with (
        prefault.device.serve(MortalPool(file), tmp_path / "pool") as server,
        prefault.device.connect(server.path) as client,
    ):
        control = VmPoolControl(client)
        if operation == "delete_object":  # all of the pool, which an area without a name mapped
            with client.map(BLOCK) as area:
                with area.memoryview() as view:
                    view[:4] = b"left"
                file.write_text(operation)
        else:
            file.write_text(operation)
            with pytest.raises(DeviceGoneError):
                control.create("one", BLOCK)
        assert processes.eventually(lambda: not file.exists())
        with control.create("one", BLOCK) as memory:
            memory.populate()
            assert memory.read(0, 4) == bytes(4)
        control.remove("one")
        client.map(BLOCK).close()


def test_virtio_mem_over_the_pool(path: str) -> None:
    with prefault.device.connect(path) as client, VmPoolControl(client).create("guest", 32 * BLOCK) as memory:
        device = VirtioMem(memory, addr=1 << 32, requested_size=32 * BLOCK)

        def ask(kind: RequestType, first: int, count: int = 1) -> Response:
            return device.process(Request(kind, (1 << 32) + first * BLOCK, count))

        assert ask(RequestType.PLUG, 2, 8).type == ResponseType.ACK
        assert os.fstat(frames_of(client)).st_blocks * 512 == 8 * BLOCK
        assert ask(RequestType.PLUG, 20).type == ResponseType.BUSY
        assert device.busy_reason is not None
        assert "capacity of 8 pages" in device.busy_reason
        assert ask(RequestType.UNPLUG, 2, 4).type == ResponseType.ACK
        assert os.fstat(frames_of(client)).st_blocks * 512 == 4 * BLOCK
        assert ask(RequestType.PLUG, 20).type == ResponseType.ACK
        with pytest.raises(NotPopulatedError):
            memory.read(2 * BLOCK, 1)


def test_huge_pages_of_the_pool(tmp_path: Path, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(8)
    with (
        prefault.device.open(VmPool(4 * BLOCK, address_space="1 GiB")) as client,
        VmPoolControl(client).create("one", 8 * BLOCK) as memory,
    ):
        memory.populate(BLOCK, 4 * BLOCK)
        assert oracle.smaps(memory.range.start + BLOCK)["KernelPageSize"] == BLOCK
        memory.write(BLOCK, b"x" * BLOCK)
        memory.discard(BLOCK, BLOCK)
        memory.populate(0, BLOCK)
        assert memory.read(0, BLOCK).count(0) == BLOCK


@pytest.mark.parametrize("block", ["4 KiB", "2 MiB"])
def test_the_driver_keeps_the_contract(block: str) -> None:
    size = {"4 KiB": 4096, "2 MiB": BLOCK}[block]
    addresses = max(2 * MIB, 32 * size)
    check_device(lambda: VmPool(addresses, block=block, address_space=addresses), expected=lambda _: bytes(size))


# --- what is refused


def test_requests_that_make_no_sense_change_nothing(path: str) -> None:
    with prefault.device.connect(path) as client:
        control = VmPoolControl(client)
        with control.create("one", BLOCK):
            for make, number in (
                (lambda: control.create("one", BLOCK), "EEXIST"),
                (lambda: control.create("odd", BLOCK + 4096), "EINVAL"),
                (lambda: control.create("none", 0), "EINVAL"),
                (lambda: control.create("huge", "2 GiB"), "ENOSPC"),
                (lambda: client.control(encode(CreateMachine("", BLOCK, 0))), "EINVAL"),
                (lambda: client.control(encode(CreateMachine("x" * 201, BLOCK, 0))), "EINVAL"),
                (lambda: client.control(encode(CreateMachine("\u00e9" * 101, BLOCK, 0))), "EINVAL"),
                (lambda: client.control(encode(CreateMachine("x\0", BLOCK, 0))), "EINVAL"),
                (lambda: control.remove("one"), "EBUSY"),
                (lambda: control.remove("two"), "ENOENT"),
                (lambda: control.set_limit("two", 0), "ENOENT"),
                (lambda: client.control(b""), "EINVAL"),
                (lambda: client.control(b"garbage"), "EINVAL"),
                (lambda: client.control(os.urandom(60_000)), "EINVAL"),
                (lambda: client.control(encode(CreateMachine("x", -1, 0))), "EINVAL"),
                (lambda: client.control(encode(SetLimit("one", (1 << 64) - 1))), "EINVAL"),
            ):
                with pytest.raises(DeviceError, match=number):
                    make()
            with pytest.raises(DeviceError, match="map one by its name"):
                client.map()
            (machine,) = control.usage().machines
            assert _fields(machine)[:4] == ("one", BLOCK, BLOCK, 0)
        control.remove("one")


@pytest.mark.parametrize("wrong", [{"bogus": 1}, {"unpopulated": "zero"}, {"block": "4 KiB"}], ids=str)
def test_a_machine_whose_memory_cannot_be_made_is_not_left_behind(path: str, wrong: dict[str, Any]) -> None:
    with prefault.device.connect(path) as client:
        control = VmPoolControl(client)
        with pytest.raises((TypeError, ValueError)):
            control.create("one", 2 * BLOCK, **wrong)
        assert control.usage().machines == ()
        with control.create("one", 2 * BLOCK) as memory:
            memory.populate()
        # Closed, the memory is still the machine's, until the machine is removed.
        assert control.usage().plugged == 2 * BLOCK
        control.remove("one")
        assert control.usage().plugged == 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "1 to 200 bytes in UTF-8 and no NUL, not 0"),
        ("x" * 201, "1 to 200 bytes in UTF-8 and no NUL, not 201"),
        ("a\0b", "no NUL"),
        ("\ud800", "text that UTF-8 can encode"),
        (None, "the name of an object is a str, not NoneType"),
    ],
)
def test_a_name_that_cannot_be_one_is_not_sent(path: str, name: Any, message: str) -> None:
    with prefault.device.connect(path) as client:
        control = VmPoolControl(client)
        for call in (
            lambda: control.create(name, BLOCK),
            lambda: control.remove(name),
            lambda: control.set_limit(name, BLOCK),
        ):
            with pytest.raises((TypeError, ValueError), match=message):
                call()
        control.create("é" * 100, BLOCK).close()
        assert [machine.name for machine in control.usage().machines] == ["é" * 100]


def test_a_control_takes_a_connection() -> None:
    with pytest.raises(TypeError, match=r"VmPoolControl takes a DeviceClient, .* not None"):
        VmPoolControl(None)  # type: ignore[arg-type]


def test_a_machine_belongs_to_the_process_that_made_it(path: str) -> None:
    with (
        prefault.device.connect(path) as client,
        prefault.device.connect(path) as stranger,
        VmPoolControl(client).create("one", BLOCK),
    ):
        with pytest.raises(DeviceError, match="belongs to another process"):
            VmPoolControl(stranger).remove("one")
        with pytest.raises(DeviceError, match="belongs to another process"):
            VmPoolControl(stranger).set_limit("one", 0)


def test_a_machine_that_others_map_goes_when_they_unmap_it(path: str) -> None:
    with prefault.device.connect(path) as helper:  # a device of the machine in a process of its own, as vhost-user has
        with prefault.device.connect(path) as client, VmPoolControl(client).create("one", 4 * BLOCK) as memory:
            memory.populate(0, BLOCK)
            memory.write(0, b"shared")
            shared = SparseMemory(None, device=helper, object="one")
            assert shared.read(0, 6) == b"shared"
        control = VmPoolControl(helper)
        assert processes.eventually(lambda: control.usage().machines[0].pid == 0)
        assert shared.read(0, 6) == b"shared"
        assert control.usage().plugged == BLOCK
        shared.close()
        assert processes.eventually(lambda: not control.usage().machines)
        assert control.usage().plugged == 0


@pytest.mark.parametrize(
    "options",
    [
        {"capacity": 0},
        {"capacity": 4096},
        {"capacity": "4 MiB", "address_space": "2 MiB"},
        {"capacity": "4 MiB", "block": 8192},
        {"capacity": "4 MiB", "address_space": 0},
    ],
)
def test_pools_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="block"):
        VmPool(**options)  # type: ignore[arg-type]
