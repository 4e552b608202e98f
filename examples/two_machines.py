"""Two virtual machines on one pool of memory: what one unplugs the other can plug, and what dies is free again.

Each machine is a process with a virtio-mem device, over sparse memory whose blocks come from the pool. The pool is a device
with a server process of its own, which survives the machines, and restarts if it dies.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import prefault.device
from prefault.drivers import VmPool, VmPoolControl
from prefault.virtio_mem import Request, RequestType, ResponseType, VirtioMem

BLOCK = 2 << 20
ADDR = 4 << 30  # where the guest sees the memory


def machine(path: str, name: str, orders: Connection) -> None:
    """Run a machine: plug and unplug blocks as ordered, and answer with what became of each."""
    with (
        prefault.device.connect(path) as client,
        VmPoolControl(client).create(name, 64 * BLOCK) as memory,
    ):
        device = VirtioMem(memory, addr=ADDR, requested_size=64 * BLOCK)
        while order := orders.recv():
            kind, first, count = order
            for block in range(first, first + count):
                response = device.process(Request(kind, ADDR + block * BLOCK, 1))
                zeros = None
                if (kind, response.type) == (RequestType.PLUG, ResponseType.ACK):
                    zeros = not any(memory.read(block * BLOCK, BLOCK))
                    memory.write(block * BLOCK, name.encode() * 1000)  # as the guest would use it
                orders.send((response.type.name, zeros, device.busy_reason))


class Machine:
    """A machine's process, as its monitor sees it."""

    def __init__(self, path: str, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.orders, theirs = context.Pipe()
        self.process = context.Process(target=machine, args=(path, name, theirs))
        self.process.start()
        theirs.close()

    def order(self, kind: RequestType, first: int, count: int = 1) -> list[tuple[str, bool | None, str | None]]:
        """Have the machine plug or unplug blocks; return each answer, whether it was zeros, and why it was refused."""
        self.orders.send((kind, first, count))
        return [self.orders.recv() for _ in range(count)]


def main() -> None:
    """Run both machines, and kill one of them."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "pool")
        with prefault.device.serve(VmPool("16 MiB"), path), prefault.device.connect(path) as client:
            one, other = Machine(path, "one"), Machine(path, "other")
            print("one plugs 6 blocks:  ", [kind for kind, _, _ in one.order(RequestType.PLUG, 0, 6)])
            print("other plugs 3 blocks:", [kind for kind, _, _ in other.order(RequestType.PLUG, 0, 3)])
            print("  because", other.order(RequestType.PLUG, 2)[0][2])
            print("one unplugs 2 blocks:", [kind for kind, _, _ in one.order(RequestType.UNPLUG, 0, 2)])
            ((kind, zeros, _),) = other.order(RequestType.PLUG, 2)
            print("other plugs a third: ", kind, "zeros" if zeros else "NOT ZEROS")

            assert one.process.pid is not None
            os.kill(one.process.pid, signal.SIGKILL)
            one.process.join()
            while len(VmPoolControl(client).usage().machines) > 1:
                time.sleep(0.01)
            answers = other.order(RequestType.PLUG, 3, 5)
            print("one was killed, and other plugs 5 more:", [kind for kind, _, _ in answers])
            print("  all zeros:", all(zeros for _, zeros, _ in answers))
            usage = VmPoolControl(client).usage()
            print(f"the pool: {usage.plugged >> 20} of {usage.capacity >> 20} MiB, {usage.machines[0]}")
            other.orders.send(None)
            other.process.join()


if __name__ == "__main__":
    main()
