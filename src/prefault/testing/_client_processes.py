"""Client processes, which run operations on device memory and may die of them.

A fresh Python process forks each client process: a fork is cheap, and the fresh process has none of the threads of the
checking process. Operations are sent as JSON; the bytes that a client reads go into a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from prefault.device import Area, DeviceClient

_PACKET = 200_000
"""The receive buffer in bytes. Requests and answers are smaller."""

_START_S = 60.0

_BOOTSTRAP = (
    "import sys; sys.path[:0] = [sys.argv[1]]; from prefault.testing._client_processes import main; main(int(sys.argv[2]))"
)


class ClientDiedError(Exception):
    """The client process ended. ``status`` is that of :func:`os.waitstatus_to_exitcode`: negative for a signal."""

    def __init__(self, status: int) -> None:
        super().__init__(f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}")
        self.status = status


class ClientHangsError(Exception):
    """The client process gave no answer in time, and was killed."""


class ClientRefusedError(Exception):
    """The operation raised an exception in the client process.

    Attributes:
        kinds: the names of its class and of its base classes.
        text: its message.
    """

    def __init__(self, kinds: list[str], text: str) -> None:
        super().__init__(f"{kinds[0]}: {text}")
        self.kinds = kinds
        self.text = text


class ClientProcesses:
    """The process that forks client processes. Leaving the ``with`` ends all of them."""

    def __init__(self, directory: Path, patience_s: float) -> None:
        self._directory = directory
        self._patience_s = patience_s
        self._clients: list[ChildClient] = []
        self._number = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        import prefault

        root = os.path.dirname(os.path.dirname(os.path.abspath(prefault.__file__)))
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOTSTRAP, root, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                # Threads that a library starts when it is imported do not exist in forks.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        self._socket = ours
        self._socket.settimeout(_START_S)

    def client(self) -> ChildClient:
        """Fork a client process."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            socket.send_fds(self._socket, [b"fork"], [theirs.fileno()])
        answer = self._socket.recv(_PACKET)
        if not answer:
            ours.close()
            raise RuntimeError("the process that forks client processes has ended")
        self._number += 1
        client = ChildClient(self, int(answer), ours, self._directory / f"client-{self._number}", self._patience_s)
        self._clients.append(client)
        return client

    def wait(self, pid: int) -> int:
        """Wait until a client process has ended, and return its exit status."""
        self._socket.send(b"wait %d" % pid)
        return int(self._socket.recv(_PACKET))

    def close(self) -> None:
        """End all client processes, and the process that forked them."""
        for client in self._clients:
            client.close()
        self._socket.close()
        try:
            self._process.wait(_START_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> ClientProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ChildClient:
    """The checking process' handle of a client process."""

    def __init__(
        self, processes: ClientProcesses, pid: int, connection: socket.socket, pages: Path, patience_s: float
    ) -> None:
        self.pid = pid
        self._processes = processes
        self._socket: socket.socket | None = connection
        self._pages = pages
        self._patience_s = patience_s

    def start(self, operation: str, **arguments: Any) -> None:
        """Send an operation without waiting for the answer."""
        assert self._socket is not None
        try:
            self._socket.send(json.dumps([operation, arguments]).encode())
        except (BrokenPipeError, ConnectionResetError):
            self._died()

    def finish(self) -> Any:
        """Wait for the answer to :meth:`start` and return it.

        Raises:
            ClientDiedError, ClientHangsError, ClientRefusedError: there is no answer, or it is an exception.
        """
        assert self._socket is not None
        ready, _, _ = select.select([self._socket], [], [], self._patience_s)
        if not ready:
            os.kill(self.pid, signal.SIGKILL)
            self._end()
            raise ClientHangsError(f"hangs: no answer for {self._patience_s:g} s")
        try:
            text = self._socket.recv(_PACKET)
        except ConnectionResetError:
            text = b""
        if not text:
            self._died()
        well, answer = json.loads(text)
        if not well:
            raise ClientRefusedError(answer[0], answer[1])
        return answer

    def ask(self, operation: str, **arguments: Any) -> Any:
        """Send an operation and wait for its answer: :meth:`start` and :meth:`finish`."""
        self.start(operation, **arguments)
        return self.finish()

    def touch(self, area: str, pages: list[int], page_size: int) -> dict[int, bytes]:
        """Read these pages by touching them, in this order; each page whole."""
        self.ask("touch", area=area, pages=pages, out=str(self._pages))
        text = self._pages.read_bytes()
        return {page: text[index * page_size : (index + 1) * page_size] for index, page in enumerate(pages)}

    def read(self, area: str, run: range, page_size: int) -> dict[int, bytes]:
        """Read consecutive pages by ``Area.read``, which touches no page that is not present."""
        self.ask("read", area=area, first=run.start, pages=len(run), out=str(self._pages))
        text = self._pages.read_bytes()
        return {page: text[index * page_size :][:page_size].ljust(page_size, b"\0") for index, page in enumerate(run)}

    def _died(self) -> NoReturn:
        raise ClientDiedError(self._end())

    def _end(self) -> int:
        assert self._socket is not None
        self._socket.close()
        self._socket = None
        return self._processes.wait(self.pid)

    def close(self) -> None:
        """Ask the client process to end, and wait for that. Idempotent."""
        if self._socket is None:
            return
        try:
            self.ask("end")
        except (ClientDiedError, ClientHangsError):
            return
        except ClientRefusedError:
            pass  # an area could not be closed; the process ends all the same
        self._end()


# --- in the forking process and the client processes


def main(fd: int) -> None:
    """Fork client processes until the socket closes, and then kill those that are left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the checking process gets it as well, and ends this one
    import numpy  # once, and not in every client process

    from prefault.device import connect

    del numpy, connect
    parent = socket.socket(fileno=fd)
    running: set[int] = set()
    while True:
        request, descriptors, _, _ = socket.recv_fds(parent, _PACKET, 1)
        if not request:
            break
        if request == b"fork":
            pid = os.fork()
            if pid == 0:
                parent.close()
                _be_client(socket.socket(fileno=descriptors[0]))
            os.close(descriptors[0])
            running.add(pid)
            parent.send(b"%d" % pid)
        else:
            pid = int(request.split()[1])
            _, status = os.waitpid(pid, 0)
            running.discard(pid)
            parent.send(b"%d" % os.waitstatus_to_exitcode(status))
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _be_client(connection: socket.socket) -> NoReturn:
    status = 1
    try:
        state = _State()
        while True:
            request = connection.recv(_PACKET)
            if not request:
                break
            operation, arguments = json.loads(request)
            answer: tuple[bool, Any]
            try:
                answer = (True, state.run(operation, arguments))
            except BaseException as error:  # noqa: BLE001  any exception is the answer
                answer = (False, ([kind.__name__ for kind in type(error).__mro__], f"{error}"[:4000]))
            connection.send(json.dumps(answer).encode())
            if operation == "end":
                break
        status = 0
    finally:
        # Not sys.exit: this is a fork in the middle of the loop of main().
        os._exit(status)


class _State:
    """The state of a client process: a connection, and areas by name."""

    def __init__(self) -> None:
        self._client: DeviceClient | None = None
        self._areas: dict[str, Area] = {}

    def run(self, operation: str, arguments: dict[str, Any]) -> Any:
        return getattr(self, f"do_{operation}")(**arguments)

    def _span(self, area: str, first: int, pages: int) -> tuple[int, int]:
        """Return the offset and the length of pages in an area, in bytes, as far as they are mapped."""
        mapped = self._areas[area]
        offset = first * mapped.page_size - mapped.offset
        return offset, min(pages * mapped.page_size, len(mapped) - offset)

    def do_connect(self, path: str) -> dict[str, Any]:
        import prefault.device

        self._client = prefault.device.connect(path)
        return {name: getattr(self._client, name) for name in ("length", "page_size", "writable")}

    def do_map(self, area: str, offset: int = 0, length: int | None = None, **options: Any) -> int:
        assert self._client is not None
        self._areas[area] = mapped = self._client.map(length, offset, **options)
        return len(mapped)

    def do_touch(self, area: str, pages: list[int], out: str | None = None) -> int:
        import numpy

        mapped = self._areas[area]
        memory = mapped.ndarray("uint8")
        size, first = mapped.page_size, mapped.offset // mapped.page_size
        fd = -1 if out is None else os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        page = numpy.zeros(size, numpy.uint8)
        try:
            for index, number in enumerate(pages):
                here = memory[(number - first) * size : (number - first + 1) * size]
                page[len(here) :] = 0  # the last page of the device may be mapped only in part
                # numpy copies without the GIL, and a memoryview does not: other threads may then fault as well.
                numpy.copyto(page[: len(here)], here)
                if fd >= 0:
                    os.pwrite(fd, page.data, index * size)
        finally:
            if fd >= 0:
                os.close(fd)
        return len(pages)

    def do_read(self, area: str, first: int, pages: int, out: str) -> None:
        Path(out).write_bytes(self._areas[area].read(*self._span(area, first, pages)))

    def do_write(self, area: str, page: int, byte: int) -> None:
        """Fill a page."""
        start, length = self._span(area, page, 1)
        self._areas[area].ndarray("uint8")[start : start + length] = byte

    def do_populate(self, area: str, first: int, pages: int, access: str | None = None) -> int:
        from prefault.engine.populating import populate

        offset, length = self._span(area, first, pages)
        return populate(self._areas[area], offset=offset, length=length, access=access).bytes  # type: ignore[arg-type]

    def do_lock(self, area: str) -> None:
        from prefault.engine.locking import lock

        lock(self._areas[area])

    def do_protect(self, area: str) -> None:
        """Remove all access, and ask for it again together with the pages."""
        mapped = self._areas[area]
        mapped.protect("none")
        mapped.protect("read", populate=True)

    def do_discard(self, area: str, first: int, pages: int) -> None:
        from prefault.engine.discarding import discard

        offset, length = self._span(area, first, pages)
        discard(self._areas[area], offset=offset, length=length)

    def do_readonly(self, area: str) -> bool:
        return not self._areas[area].ndarray("uint8").flags.writeable

    def do_unmap(self, area: str) -> None:
        self._areas.pop(area).close()

    def do_together(self, threads: list[list[tuple[str, dict[str, Any]]]]) -> None:
        """Run each list of operations in a thread of its own; raise the first exception."""
        failed: list[BaseException] = []

        def work(operations: list[tuple[str, dict[str, Any]]]) -> None:
            try:
                for operation, arguments in operations:
                    self.run(operation, arguments)
            except BaseException as error:  # noqa: BLE001  raised again below
                failed.append(error)

        running = [threading.Thread(target=work, args=(operations,)) for operations in threads]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if failed:
            raise failed[0]

    def do_sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def do_end(self) -> None:
        for area in self._areas.values():
            area.close()
        if self._client is not None:
            with contextlib.suppress(OSError):  # the server has been killed
                self._client.close()
