"""A buffer object that moves between video memory, system memory and the swap file while a process draws into it.

    python examples/moving_buffer.py

A child draws into the frame: it adds 1 to each pixel, again and again. The parent moves the frame to and fro meanwhile. In
the end each pixel must have every addition.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
from multiprocessing.synchronize import Event
from pathlib import Path

import prefault.device
from prefault.drivers.buffers import BufferObjects, Buffers

WIDTH, HEIGHT = 1024, 768
ROUNDS = 30


def draw(path: str, ready: Event) -> None:
    """Add 1 to each pixel, line by line, as often as ROUNDS."""
    with prefault.device.connect(path) as client, Buffers(client).map("frame") as area:
        pixels = area.ndarray("uint32").reshape(HEIGHT, WIDTH)
        for _ in range(ROUNDS):
            for line in pixels:
                line += 1
            ready.set()
        del pixels, line


def main() -> None:
    """Move the frame until the child is done, and look at every pixel."""
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "device")
        swap = str(Path(directory) / "swap")
        device = BufferObjects(vram="8 MiB", system="8 MiB", swap_file=swap, swap="8 MiB", space="64 MiB")
        with prefault.device.serve(device, path), prefault.device.connect(path) as client:
            buffers = Buffers(client)
            buffers.create("frame", WIDTH * HEIGHT * 4)
            context = multiprocessing.get_context("spawn")
            ready = context.Event()
            child = context.Process(target=draw, args=(path, ready))
            child.start()
            ready.wait(30)
            while child.is_alive():
                buffers.move("frame", "system")
                buffers.move("frame", "vram")
                buffers.swap_out("frame")
                child.join(0.01)
            with buffers.map("frame") as area:
                pixels = area.ndarray("uint32")
                lost = int((pixels != ROUNDS).sum())
                del pixels
            found = buffers.statistics()
        moved = f"{found.moves} moves, {found.swapouts} times swapped out"
        print(f"{ROUNDS} times {WIDTH}x{HEIGHT} pixels drawn; {moved}: {lost} lost")
        sys.exit(lost > 0 or child.exitcode != 0)


if __name__ == "__main__":
    main()
