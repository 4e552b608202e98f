"""A small HTTP server in its own process: ranges, ETags, latency, failures on demand, and a log of all requests.

A client that waits for a page of a device holds the GIL: a server in a thread of the same process would never answer it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

_CONTROL = "/_control"


class Request(NamedTuple):
    """A request in the log. ``first`` and ``last``: the range that it asked for; ``sent``: bytes of body in the answer."""

    path: str
    first: int
    last: int
    status: int
    sent: int
    headers: dict[str, str]


class HttpServer:
    """Server process that serves the files of a directory. A context manager."""

    def __init__(self, directory: Path, *, latency_s: float = 0.0) -> None:
        self.directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(directory), str(latency_s)],
            stdin=subprocess.PIPE,  # the server ends when this pipe is closed, also if this process is killed
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], 30)
        assert ready, "the HTTP server does not start"
        self.port = int(self._process.stdout.readline())

    @property
    def pid(self) -> int:
        return self._process.pid

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def _control(self, **what: Any) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", _CONTROL, body=json.dumps(what))
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def fail(self, action: str, *, count: int = 1, skip: int = 0, **details: Any) -> None:
        """Set the only rule: after ``skip`` requests, the next ``count`` get this action, see :class:`_Handler`."""
        self._control(op="fail", rule={"action": action, "count": count, "skip": skip, **details})

    def heal(self) -> None:
        self._control(op="heal")

    def set_latency(self, seconds: float) -> None:
        self._control(op="latency", seconds=seconds)

    def requests(self, *, clear: bool = False) -> list[Request]:
        """Return all requests since the last call with ``clear``."""
        return [Request(*entry) for entry in self._control(op="log", clear=clear)]

    def sent(self) -> int:
        """Return the bytes of all bodies since ``requests(clear=True)``."""
        return sum(request.sent for request in self.requests())

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> HttpServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _State:
    directory = ""
    latency_s = 0.0
    busy = 0
    rule: dict[str, Any] | None = None
    log: list[list[Any]] = []  # noqa: RUF012
    lock = threading.Lock()

    def next_rule(self) -> dict[str, Any]:
        with self.lock:
            rule = self.rule
            if rule is None:
                return {"action": "none"}
            if rule["skip"] > 0:
                rule["skip"] -= 1
                return {"action": "none"}
            if rule["count"] <= 0:
                return {"action": "none"}
            rule["count"] -= 1
            return rule


_state = _State()


class _Handler(BaseHTTPRequestHandler):
    """Handler that serves ranges of files. Actions of rules:

    status: answer with ``status`` (and ``headers``); reset: RST instead of an answer; garbage: ``text``, then hang up;
    short: announce all, send ``bytes``, hang up; stall: send ``bytes``, then nothing for ``seconds``; ignore: 200 with
    everything; shift: bytes ``by`` further on, said so; less: a Content-Range and Content-Length of fewer bytes; longer:
    chunked, with more than asked for; lie: fewer bytes announced by Content-Length than by Content-Range; plain: no ETag
    and no date; headers: as it is, but with these headers; redirect: to ``location``.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        return

    def do_POST(self) -> None:
        what = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer: Any = None
        if what["op"] == "log":
            # A client with all bytes of an answer may ask for the log before the answer is in it.
            until = time.monotonic() + 0.5
            while _state.busy and time.monotonic() < until:
                time.sleep(0.001)
        with _state.lock:
            match what["op"]:
                case "fail":
                    _state.rule = what["rule"]
                case "heal":
                    _state.rule = None
                case "latency":
                    _state.latency_s = what["seconds"]
                case "log":
                    answer = list(_state.log)
                    if what["clear"]:
                        _state.log.clear()
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        time.sleep(_state.latency_s)
        self._sent = 0
        self._status = 0
        self._range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        asked = (int(self._range[1]), int(self._range[2] or -1)) if self._range else (-1, -1)
        entry: list[Any] = [self.path, *asked, 0, 0, dict(self.headers)]
        with _state.lock:
            _state.log.append(entry)
            _state.busy += 1
        with contextlib.suppress(ConnectionError):
            try:
                self._answer(_state.next_rule())
            finally:
                entry[3:5] = self._status, self._sent
                with _state.lock:
                    _state.busy -= 1

    def do_HEAD(self) -> None:
        self.do_GET()

    def _answer(self, rule: dict[str, Any]) -> None:
        action = rule["action"]
        path = os.path.join(_state.directory, self.path.partition("?")[0].lstrip("/"))
        if action == "status":
            self._end(rule["status"], rule.get("headers", {}))
            return
        if action == "redirect":
            self._end(302, {"Location": rule["location"]})
            return
        if action == "reset":
            self._reset()
            return
        if action == "garbage":
            self.wfile.write(rule["text"].encode("latin-1"))
            self.close_connection = True
            return
        try:
            file = open(path, "rb")  # noqa: SIM115
        except OSError:
            self._end(404, {})
            return
        with file:
            self._send_file(file, rule, action)

    def _send_file(self, file: Any, rule: dict[str, Any], action: str) -> None:
        status = os.fstat(file.fileno())
        length = status.st_size
        headers = {
            "ETag": f'"{status.st_ino}-{status.st_mtime_ns}-{length}"',
            "Last-Modified": formatdate(status.st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if action == "plain":
            headers = {}
        condition = self.headers.get("If-Match")
        headers |= rule.get("headers", {})
        if condition is not None and condition != headers.get("ETag") and not rule.get("deaf"):
            self._end(412, {})
            return
        first, last = 0, length - 1
        match = self._range
        if match:
            first = int(match[1])
            last = min(last, int(match[2] or last))
            if first >= length:
                self._end(416, {"Content-Range": f"bytes */{length}"})
                return
        if match is None or action == "ignore":
            first, last = 0, length - 1
            self._status = 200
        else:
            self._status = 206
            if action == "shift":
                first, last = first + rule["by"], last + rule["by"]
            if action == "less":
                last -= rule["by"]
            headers["Content-Range"] = f"bytes {first}-{last}/{rule.get('total', length)}"
        count = last - first + 1
        self.send_response(self._status)
        for name, value in (headers | rule.get("headers", {})).items():
            self.send_header(name, value)
        if action == "longer":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            body = os.pread(file.fileno(), count, first) + b"more"
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            self._sent = len(body)
            return
        if action == "lie":
            count -= rule["by"]
        self.send_header("Content-Length", str(count))
        self.end_headers()
        if self.command == "HEAD":
            return
        if action in ("short", "stall"):
            count = min(count, rule["bytes"])
        self.wfile.flush()
        while self._sent < count:
            sent = os.sendfile(self.connection.fileno(), file.fileno(), first + self._sent, count - self._sent)
            if not sent:
                break
            self._sent += sent
        if action == "stall":
            time.sleep(rule["seconds"])
        if action in ("short", "stall"):
            self.close_connection = True

    def _end(self, status: int, headers: dict[str, str]) -> None:
        self._status = status
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _reset(self) -> None:
        # Closed with data unsent and no time to send it: RST.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True
        raise ConnectionAbortedError


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        return

    def shutdown_request(self, request: Any) -> None:
        with contextlib.suppress(OSError):
            super().shutdown_request(request)


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


def _main() -> None:
    _state.directory, _state.latency_s = sys.argv[1], float(sys.argv[2])
    server = _Server(("127.0.0.1", 0), _Handler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    server.serve_forever()


if __name__ == "__main__":
    _main()
