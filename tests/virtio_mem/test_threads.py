"""Requests from several threads at once."""

from __future__ import annotations

import os
import threading
import time

from prefault.sparse import SparseMemory
from prefault.virtio_mem import BlockState, Request, RequestType, Response, ResponseType, VirtioMem

PLUG, UNPLUG, _, STATE = RequestType
ACK = Response(ResponseType.ACK)
BLOCK = 64 << 10
WORKERS, ROUNDS = 4, 10


def test_several_threads_may_ask() -> None:
    """Each plugs and unplugs blocks of its own; one more reads the configuration."""
    with SparseMemory("2 MiB", backing="memfd", block=BLOCK, unpopulated="fault") as memory:
        device = VirtioMem(memory, addr=0, block_size=BLOCK, requested_size="2 MiB")
        answers: list[Response] = []
        torn: list[object] = []
        done = threading.Event()

        def ask(kind: int, first: int, blocks: int) -> None:
            answers.append(device.process(Request(kind, first * BLOCK, blocks)))

        def work(number: int) -> None:
            first = number * 8
            for _ in range(ROUNDS):
                ask(PLUG, first, 3)
                ask(UNPLUG, first + 1, 1)
                ask(STATE, first, 3)
                ask(UNPLUG, first, 1)
                ask(UNPLUG, first + 2, 1)

        def watch() -> None:
            while not done.is_set():
                if device.config.check().plugged_size > WORKERS * 3 * BLOCK:
                    torn.append(device.config)
                time.sleep(0.0005)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(WORKERS)]
        watcher = threading.Thread(target=watch)
        for thread in [*threads, watcher]:
            thread.start()
        for thread in threads:
            thread.join()
        done.set()
        watcher.join()
        assert not torn
        assert answers.count(ACK) == WORKERS * ROUNDS * 4
        assert answers.count(Response(ResponseType.ACK, BlockState.MIXED)) == WORKERS * ROUNDS
        assert memory.fd is not None
        assert device.config.plugged_size == os.fstat(memory.fd).st_blocks == 0


class Slow:
    """A memory that populates for as long as one likes."""

    block = BLOCK
    unpopulated = "zeros"

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go_on = threading.Event()

    def __len__(self) -> int:
        return 8 * BLOCK

    def populate(self, offset: int, length: int) -> None:
        self.entered.set()
        assert self.go_on.wait(30)

    def discard(self, offset: int, length: int) -> None:
        pass


def test_one_request_after_the_other() -> None:
    memory = Slow()
    device = VirtioMem(memory, addr=0, block_size=BLOCK, requested_size=BLOCK)
    answers: list[Response] = []

    def plug() -> None:
        answers.append(device.process(Request(PLUG, 0, 1)))

    def lower() -> None:
        device.request_size(0)

    first, second, third = (threading.Thread(target=task) for task in (plug, plug, lower))
    first.start()
    assert memory.entered.wait(30)
    before = device.config
    second.start()
    third.start()
    second.join(0.1)
    third.join(0.1)
    assert second.is_alive()  # a request waits, and so does a change of the size that it was checked against
    assert third.is_alive()
    assert device.config == before  # but reading the configuration does not
    memory.go_on.set()
    for thread in (first, second, third):
        thread.join()
    assert answers == [ACK, Response(ResponseType.ERROR)]
    assert device.config[-2:] == (BLOCK, 0)
