"""A guest that runs on a plugged region: KVM's memory slot is the device's sparse memory.

These tests need /dev/kvm; ``make guest`` runs them in an emulated machine that has one.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import numpy
import pytest

from prefault.sizes import GIB, MIB
from prefault.sparse import SparseMemory
from prefault.virtio_mem import Request, RequestType, Response, ResponseType, VirtioMem
from support import kvm, oracle
from support.block_devices import Blocks, opened
from support.kvm import Guest, Stopped

pytestmark = pytest.mark.usefixtures("no_leaks")

PLUG, UNPLUG, UNPLUG_ALL, _ = RequestType
ACK = Response(ResponseType.ACK)
ADDR = GIB
BLOCK = 2 * MIB
BLOCKS = 16
PAGES = BLOCK // oracle.PAGE  # in a block

KINDS = {"anonymous": "anonymous", "memfd": "memfd", "tmpfs": "tmpfs", "hugetlb": "memfd-hugetlb"}
Unpopulated = Literal["zeros", "fault"]
MakeMachine: TypeAlias = Callable[..., AbstractContextManager["Machine"]]


class Machine:
    """A virtual machine with a virtio-mem device, and the transport of its requests."""

    def __init__(self, memory: SparseMemory, guest: Guest) -> None:
        self.memory = memory
        self.guest = guest
        self.device = VirtioMem(memory, addr=ADDR, block_size=BLOCK, requested_size=len(memory))

    def ask(self, kind: RequestType, first: int = 0, blocks: int = 1) -> None:
        """Send a request as a driver does, 24 bytes to 10 bytes, that is acknowledged."""
        answer = self.device.handle(Request(kind, block(first), blocks).encode())
        assert Response.decode(answer, kind) == ACK, self.device.busy_reason

    def numbers(self, first: int, blocks: int = 1) -> list[int]:
        """Read the numbers at the starts of the pages, on the host."""
        raw = self.memory.read(first * BLOCK, blocks * BLOCK)
        numbers: list[int] = numpy.frombuffer(raw, "<u4")[:: oracle.PAGE // 4].tolist()
        return numbers

    def file_bytes(self) -> int:
        return 0 if self.memory.fd is None else os.fstat(self.memory.fd).st_blocks * 512

    def present_bytes(self, first: int = 0, blocks: int = BLOCKS) -> int:
        return oracle.present_bytes(self.memory.range.start + first * BLOCK, blocks * BLOCK)


@pytest.fixture
def machine(request: pytest.FixtureRequest) -> MakeMachine:
    """A function that makes a machine over one kind of memory; hugetlb pages are added to the pool first."""

    @contextmanager
    def make(kind: str, unpopulated: Unpopulated = "fault", huge: str | None = None) -> Iterator[Machine]:
        kvm.needed()
        if kind == "hugetlb":
            request.getfixturevalue("hugetlb_pool")(BLOCKS)
        options = {} if huge is None else {"huge": huge}
        with (
            SparseMemory(BLOCKS * BLOCK, backing=KINDS[kind], block=BLOCK, unpopulated=unpopulated, **options) as memory,  # type: ignore[arg-type]
            kvm.guest(memory, ADDR) as guest,
        ):
            yield Machine(memory, guest)

    return make


def block(number: int) -> int:
    """Return the guest-physical address of a block."""
    return ADDR + number * BLOCK


def resident_bytes() -> int:
    """Return the resident set of this process, hugetlb included (proc_pid_status(5))."""
    text = Path("/proc/self/status").read_text()
    return sum(int(size) << 10 for size in re.findall(r"^(?:VmRSS|HugetlbPages):\s+(\d+) kB", text, re.MULTILINE))


@pytest.mark.parametrize("kind", KINDS)
def test_a_guest_uses_what_is_plugged_and_nothing_else(machine: MakeMachine, kind: str) -> None:
    with machine(kind) as vm:
        guest = vm.guest
        assert guest.write(block(0), 1, 1) == Stopped(block(0), 0)  # nothing is plugged
        vm.ask(PLUG, 2, 4)
        # The guest writes, the host reads; and the other way round.
        assert guest.write(block(2), 4 * PAGES, 1000) is None
        assert guest.privilege == 3
        assert vm.numbers(2, 4) == list(range(1000, 1000 + 4 * PAGES))
        vm.memory.write(block(3) - ADDR, struct.pack("<I", 5))
        assert guest.sum(block(3), 2) == 5 + 1000 + PAGES + 1
        # A touch of an unplugged block ends KVM_RUN; this process goes on, and so does the guest when the block is plugged.
        assert guest.write(block(1), 1, 1) == Stopped(block(1), 0)
        assert guest.sum(block(7), 1) == Stopped(block(7), 0)
        assert guest.write(block(5), 2 * PAGES, 7) == Stopped(block(6), PAGES)
        vm.ask(PLUG, 6)
        assert guest.resume() is None
        assert vm.numbers(5, 2) == list(range(7, 7 + 2 * PAGES))
        assert vm.present_bytes() == 5 * BLOCK


@pytest.mark.parametrize("kind", KINDS)
def test_unplug_gives_memory_back_from_under_a_guest(machine: MakeMachine, kind: str) -> None:
    with machine(kind) as vm:
        guest = vm.guest
        vm.ask(PLUG, 0, 12)
        assert guest.write(block(0), 12 * PAGES, 1) is None  # KVM maps all of it now
        has_file = vm.memory.fd is not None
        assert (vm.present_bytes(), vm.file_bytes()) == (12 * BLOCK, 12 * BLOCK * has_file)
        resident = resident_bytes()
        vm.ask(UNPLUG, 1, 10)
        assert (vm.present_bytes(), vm.file_bytes()) == (2 * BLOCK, 2 * BLOCK * has_file)
        assert resident - resident_bytes() > 10 * BLOCK - MIB  # the kernel's counters lag a little
        # Its second-level page tables are empty as well: the guest cannot reach the old pages.
        for number in (1, 10):
            assert guest.sum(block(number), 1) == Stopped(block(number), 0)
        assert guest.sum(block(11), 1) == 1 + 11 * PAGES
        # Plugged again it reads zeros, for the guest before the host has touched it.
        vm.ask(PLUG, 1, 10)
        assert guest.sum(block(1), 10 * PAGES) == 0
        assert set(vm.numbers(1, 10)) == {0}
        vm.ask(UNPLUG_ALL)
        assert (vm.present_bytes(), vm.file_bytes()) == (0, 0)
        assert guest.sum(block(0), 1) == Stopped(block(0), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_unplug_while_the_guest_runs(machine: MakeMachine, kind: str) -> None:
    """The vCPU has a thread of its own, as in each monitor; it sees its numbers or is stopped, and never reads zeros."""
    with machine(kind) as vm:
        guest = vm.guest
        vm.ask(PLUG, 0, 4)
        assert guest.write(block(0), 4 * PAGES, 1) is None
        seen: list[int | Stopped] = []
        enough = threading.Event()

        def run() -> None:
            while not enough.is_set() and not (seen and isinstance(seen[-1], Stopped)):
                seen.append(guest.sum(block(0), 4 * PAGES))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            while len(seen) < 3 and thread.is_alive():
                time.sleep(0.001)
            vm.ask(UNPLUG, 2)
            thread.join(10)
        finally:
            enough.set()
            thread.join()
        *sums, stopped = seen
        assert set(sums) == {sum(range(1, 4 * PAGES + 1))}
        assert isinstance(stopped, Stopped)
        assert block(2) <= stopped.address < block(3)  # it may have been in the middle of the block
        assert guest.sum(block(0), 2 * PAGES) == sum(range(1, 2 * PAGES + 1))
        vm.ask(PLUG, 2)
        assert guest.sum(block(2), PAGES) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_plug_drops_what_the_guest_wrote_to_the_unplugged_block(machine: MakeMachine, kind: str) -> None:
    """Where unplugged memory reads as zeros a guest can write to it, against the rules."""
    with machine(kind, "zeros") as vm:
        guest = vm.guest
        vm.ask(PLUG, 0)
        assert guest.write(block(0), 3 * PAGES, 1) is None
        assert vm.present_bytes() == 3 * BLOCK
        vm.ask(PLUG, 1)
        assert guest.sum(block(1), PAGES) == 0
        assert guest.sum(block(0), PAGES) == sum(range(1, 1 + PAGES))
        vm.ask(UNPLUG_ALL)
        assert (vm.present_bytes(), vm.file_bytes()) == (0, 0)
        assert guest.sum(block(0), 3 * PAGES) == 0


def test_a_guest_on_blocks_of_a_device(tmp_path: Path) -> None:
    """The pages come from a driver by userfaultfd. A plug brings all of them in, so the guest waits for no fault of it."""
    kvm.needed()
    device = Blocks(4 * PAGES)
    with (
        opened(device, tmp_path) as client,
        SparseMemory(4 * BLOCK, device=client, block=BLOCK, unpopulated="fault") as memory,
        kvm.guest(memory, ADDR) as guest,
    ):
        vm = Machine(memory, guest)
        vm.ask(PLUG, 1, 2)
        supplied = device.counts
        assert guest.write(block(1), 2 * PAGES, 1) is None
        assert vm.numbers(1, 2) == list(range(1, 1 + 2 * PAGES))
        assert guest.sum(block(0), 1) == Stopped(block(0), 0)
        assert device.counts == supplied
        vm.ask(UNPLUG, 1)
        assert guest.sum(block(1), 1) == Stopped(block(1), 0)
        assert vm.present_bytes(0, 4) == BLOCK
        vm.ask(PLUG, 1)
        assert guest.sum(block(1), PAGES) == 0
        assert guest.sum(block(2), 1) == 1 + PAGES


@pytest.mark.parametrize(
    ("kind", "huge"), [("anonymous", "never"), ("anonymous", "advise"), ("memfd", "never"), ("hugetlb", None)]
)
def test_second_level_faults(machine: MakeMachine, kind: str, huge: str | None) -> None:
    """A plug completes the monitor's page tables. KVM's own are filled by faults, or by KVM_PRE_FAULT_MEMORY."""
    kvm.extension(kvm.KVM_CAP_BINARY_STATS_FD, "KVM_GET_STATS_FD (Linux 5.14)")
    kvm.extension(kvm.KVM_CAP_PRE_FAULT_MEMORY, "KVM_PRE_FAULT_MEMORY (Linux 6.11)")
    # Not block 0: before Linux 6.14 a page table is left there that keeps a huge page out (docs/design/sparse.md).
    one, other, blocks = 1, BLOCKS // 2, BLOCKS // 2 - 1
    with machine(kind, huge=huge) as vm:
        guest = vm.guest

        def faults(first: int) -> int:
            before = guest.second_level_faults()
            assert guest.write(block(first), blocks * PAGES, 1) is None
            return guest.second_level_faults() - before

        vm.ask(PLUG, one, blocks)
        vm.ask(PLUG, other, blocks)
        monitors = oracle.minor_faults()
        without, again = faults(one), faults(one)
        guest.pre_fault(block(other), blocks * BLOCK)
        after = faults(other)
        assert oracle.minor_faults() - monitors < PAGES // 2  # pages are there: KVM only looks them up
        vm.ask(UNPLUG, other, blocks)
        vm.ask(PLUG, other, blocks)
        replugged = faults(other)
        print(
            f"{kind}, huge={huge}: second-level faults of {blocks * BLOCK >> 20} MiB: {without} after a plug, {again} the"
            f" second time, {after} after KVM_PRE_FAULT_MEMORY, {replugged} after another plug"
        )
        start = vm.memory.range.start + one * BLOCK
        are_huge = "ht" in oracle.vma_flags(start) or oracle.smaps(start)["AnonHugePages"] >= blocks * BLOCK
        assert are_huge or huge != "advise"
        most = blocks if are_huge else blocks * PAGES
        slack = blocks // 2  # the program's page, and what the kernel unmaps on its own
        # KVM may map a few neighbours of a page at one fault.
        assert most // 8 <= without <= most + slack
        assert again <= slack
        assert after <= slack
        assert most // 8 <= replugged <= most + slack  # the notifier of the discard took the entries away


def test_pre_faulting_what_is_not_plugged_is_refused(machine: MakeMachine) -> None:
    kvm.extension(kvm.KVM_CAP_PRE_FAULT_MEMORY, "KVM_PRE_FAULT_MEMORY (Linux 6.11)")
    with machine("memfd") as vm:
        vm.ask(PLUG, 1)
        for first, blocks, number in ((2, 1, errno.EFAULT), (1, 2, errno.EFAULT), (BLOCKS, 1, errno.ENOENT)):
            with pytest.raises(OSError, match=os.strerror(number)) as caught:
                vm.guest.pre_fault(block(first), blocks * BLOCK)
            assert caught.value.errno == number
        assert vm.file_bytes() == BLOCK
        assert vm.guest.write(block(1), PAGES + 1, 1) == Stopped(block(2), PAGES)


def test_the_example_for_monitors() -> None:
    kvm.needed()
    example = Path(__file__).parents[2] / "examples" / "monitor.py"
    done = subprocess.run([sys.executable, "-X", "dev", example], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "a request of the guest: ACK" in done.stdout
    assert "EFAULT" in done.stdout
    assert done.stdout.endswith("unplugged, and given back: 0 bytes are left\n")
