"""A virtual machine monitor in Python: sparse memory, a virtio-mem device over it, and KVM's memory slot on the same range.

A request lies in a page that guest and monitor share, and a port is the doorbell, in place of a virtqueue. Needs /dev/kvm.

    python examples/monitor.py
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct

import prefault
from prefault.virtio_mem import REQUEST_BYTES, VERSION_1, Feature, Request, RequestType, Response, VirtioMem

KVM_CREATE_VM, KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_RUN = 0xAE01, 0xAE04, 0xAE41, 0xAE80
KVM_SET_USER_MEMORY_REGION, KVM_EXIT_IO = 0x4020AE46, 2

ADDR, BLOCK = 0x20000, 64 << 10  # guest-physical; real mode reaches 1 MiB
ROM = 0xFFFFF000  # the vCPU begins at its last 16 bytes
REQUEST, RESPONSE, DOORBELL, DONE = 0x100, 0x200, 0x10, 0x11  # offsets in that page; ports

GUEST = bytes.fromhex(
    "b80020 8ed8"  # mov ax, 0x2000; mov ds, ax: the first block
    "e610"  # out DOORBELL, al: please plug it
    "2e833e00f200 7505"  # cmp word [cs:RESPONSE], ACK; jne over the store
    "c60600002a"  # mov byte [0], 42
    "b80030 8ed8"  # mov ax, 0x3000; mov ds, ax: the second block, which nobody has plugged
    "c60600002b"  # mov byte [0], 43: ends KVM_RUN, and is tried again by the next
    "e611"  # out DONE, al
)


class Machine:
    """One vCPU, a page of code and the region of a virtio-mem device."""

    def __init__(self, memory: prefault.SparseMemory) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = fcntl.ioctl(self.kvm, KVM_CREATE_VM, 0)
        self.page = mmap.mmap(-1, mmap.PAGESIZE)
        self.page[: len(GUEST)] = GUEST
        self.page[0xFF0:0xFF3] = b"\xe9" + struct.pack("<h", -0xFF3)  # the reset vector: jmp to the start of the page
        self.slot(0, ROM, mmap.PAGESIZE, ctypes.addressof(ctypes.c_char.from_buffer(self.page)))
        # All of the region is one slot for ever. Plugging and unplugging changes what lies behind it, never the slot.
        self.slot(1, ADDR, len(memory), memory.range.start)
        self.vcpu = fcntl.ioctl(self.vm, KVM_CREATE_VCPU, 0)
        self.state = mmap.mmap(self.vcpu, fcntl.ioctl(self.kvm, KVM_GET_VCPU_MMAP_SIZE, 0))

    def slot(self, number: int, addr: int, length: int, address: int) -> None:
        """Map memory of this process into the guest."""
        fcntl.ioctl(self.vm, KVM_SET_USER_MEMORY_REGION, struct.pack("=IIQQQ", number, 0, addr, length, address))

    def run(self) -> int | None:
        """Run the guest until it uses a port, and return its number; None: it touched what is not plugged."""
        try:
            fcntl.ioctl(self.vcpu, KVM_RUN, 0)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            return None
        reason, port = struct.unpack_from("=8xI22xH", self.state)
        assert reason == KVM_EXIT_IO, f"the guest ended with exit reason {reason}"
        return int(port)


def main() -> None:
    """Let a guest plug a block, write to it, and touch one that is not plugged."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or os.uname().machine != "x86_64":
        print("this example needs /dev/kvm on x86-64")
        return
    with prefault.SparseMemory(8 * BLOCK, backing="memfd", block=BLOCK, unpopulated="fault") as memory:
        device = VirtioMem(memory, addr=ADDR, block_size=BLOCK)
        machine = Machine(memory)
        # The transport is made after the device. A real one raises an interrupt here.
        device.on_config_change = lambda: print(
            f"the device wants {prefault.format_size(device.config.requested_size)} plugged"
        )
        assert device.negotiate(VERSION_1 | Feature.UNPLUGGED_INACCESSIBLE)
        device.request_size(2 * BLOCK)
        machine.page[REQUEST : REQUEST + REQUEST_BYTES] = Request(RequestType.PLUG, ADDR, 1).encode()
        while (port := machine.run()) != DONE:
            if port == DOORBELL:
                answer = device.handle(machine.page[REQUEST : REQUEST + REQUEST_BYTES])
                machine.page[RESPONSE : RESPONSE + len(answer)] = answer
                print(f"a request of the guest: {Response.decode(answer, RequestType.PLUG).type.name}")
            else:
                print("the guest touched an unplugged block: EFAULT. A strict monitor ends it; this one plugs the block")
                device.process(Request(RequestType.PLUG, ADDR + BLOCK, 1))
        assert memory.read(0, 1) + memory.read(BLOCK, 1) == bytes((42, 43))
        device.process(Request(RequestType.UNPLUG, ADDR, 2))
        print(f"unplugged, and given back: {memory.populated.length} bytes are left")


if __name__ == "__main__":
    main()
