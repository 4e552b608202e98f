"""RemoteFile on a real HTTP server: the right bytes in few requests, and an error for everything else."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import prefault
from drivers.remote.conftest import QUICK
from prefault.device import FaultAround
from prefault.drivers import Patience, RemoteFile, SourceChangedError, SourceError, SourceMissingError
from prefault.sizes import MIB, PAGE_SIZE
from support import needs
from support.fake_area import FakeArea
from support.http_server import HttpServer

Served = tuple[Path, bytes]


def _remote(server: HttpServer, name: str = "file.bin") -> RemoteFile:
    return RemoteFile(server.url(name), patience=QUICK)


def test_bytes_from_anywhere(server: HttpServer, file: Served) -> None:
    _, expected = file
    device = _remote(server)
    assert device.length == len(expected)
    generator = random.Random(1)
    with FakeArea(device) as area:
        for _ in range(30):
            start, stop = sorted(generator.sample(range(len(expected) + 1), 2))
            assert area.get(start, stop) == expected[start:stop]
        last = len(expected) // PAGE_SIZE
        area.fill(range(last, last + 1))
        page = area.content(last * PAGE_SIZE, (last + 1) * PAGE_SIZE)
        assert page == expected[last * PAGE_SIZE :].ljust(PAGE_SIZE, b"\0")


def test_each_call_sends_one_request_over_one_connection(server: HttpServer, file: Served) -> None:
    device = _remote(server)
    with FakeArea(device) as area:
        server.requests(clear=True)
        area.fill(range(10, 300))
        area.device.fault(area, 3, "read")
    asked = [(request.first, request.last) for request in server.requests()]
    assert asked == [(10 * PAGE_SIZE, 300 * PAGE_SIZE - 1), (3 * PAGE_SIZE, 4 * PAGE_SIZE - 1)]
    # A server that has another version says so before it sends any of it.
    assert [request.headers["If-Match"] for request in server.requests()] == [device.version.tag] * 2


def test_making_the_device_moves_one_byte(server: HttpServer, file: Served) -> None:
    device = _remote(server)
    assert server.sent() == 1
    made = device.recipe()
    assert made is not None
    from prefault.drivers.remote import remote_file

    again = remote_file.make_remote_file(**made.arguments)
    assert (again.length, again.version) == (device.length, device.version)
    assert again.recipe() == made
    assert server.sent() == 1  # what is in the recipe is not asked for again


def test_device_attributes() -> None:
    device = RemoteFile("/proc/self/exe", capacity="8 MiB")
    assert device.fault_around == FaultAround(MIB, 8 * MIB)
    assert not device.writable
    assert device.restartable
    assert device.capacity == 8 * MIB
    assert device.workers > 1
    assert RemoteFile("/proc/self/exe", fault_around=(0, 0)).fault_around is None


def test_threads_fill_different_pages(server: HttpServer, file: Served) -> None:
    _, expected = file
    device = _remote(server)
    with FakeArea(device) as area:
        pieces = [range(first, min(first + 64, len(area.pages))) for first in range(0, len(area.pages), 64)]
        threads = [threading.Thread(target=area.fill, args=(piece,)) for piece in pieces]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert area.content(0, len(expected)) == expected


@pytest.mark.parametrize(
    ("status", "kind", "number"),
    [
        (404, SourceMissingError, errno.ENOENT), (410, SourceMissingError, errno.ENOENT),
        (401, SourceError, errno.EACCES), (403, SourceError, errno.EACCES), (416, SourceError, errno.EIO),
        (400, SourceError, errno.EIO), (412, SourceChangedError, errno.ESTALE), (501, SourceError, errno.EIO),
        (304, SourceError, errno.EIO), (204, SourceError, errno.EIO),
    ],
)  # fmt: skip
def test_permanent_failures_are_not_retried(
    server: HttpServer, file: Served, status: int, kind: type[SourceError], number: int
) -> None:
    device = _remote(server)
    with FakeArea(device) as area:
        server.requests(clear=True)
        server.fail("status", status=status, count=100)
        with pytest.raises(kind, match=f"HTTP {status}" if status != 412 else "changed") as caught:
            area.fill(range(4))
        assert caught.value.errno == number
        assert len(server.requests()) == 1
        assert area.content(0, 4 * PAGE_SIZE) == bytes(4 * PAGE_SIZE)
        server.heal()
        assert area.get(0, PAGE_SIZE) == file[1][:PAGE_SIZE]


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_transient_failures_are_retried(server: HttpServer, file: Served, status: int) -> None:
    device = _remote(server)
    with FakeArea(device) as area:
        server.requests(clear=True)
        server.fail("status", status=status, count=2)
        assert area.get(0, PAGE_SIZE) == file[1][:PAGE_SIZE]
        assert [request.status for request in server.requests(clear=True)] == [status, status, 206]
        server.fail("status", status=status, count=100)
        with pytest.raises(SourceError, match=f"given up after 4 tries: HTTP {status}"):
            area.fill(range(4))
        assert len(server.requests()) == 1 + QUICK.retries


def test_retry_after_is_respected(server: HttpServer, file: Served) -> None:
    device = _remote(server)
    with FakeArea(device) as area:
        server.fail("status", status=429, headers={"Retry-After": "1"})
        began = time.monotonic()
        assert area.get(0, PAGE_SIZE) == file[1][:PAGE_SIZE]
        assert time.monotonic() - began >= 1
        server.fail("status", status=503, headers={"Retry-After": "3600"})
        with pytest.raises(SourceError, match=r"next try in 3600.0 s would exceed the 5 s"):
            area.fill(range(4))


@pytest.mark.parametrize("action", ["reset", "short", "stall"])
def test_connections_that_break(server: HttpServer, file: Served, action: str) -> None:
    details: dict[str, Any] = {"bytes": 1_100_000, "seconds": 20}
    patience = Patience(retries=2, timeout_s=0.15, total_s=5, first_pause_s=0.01)
    device = RemoteFile(server.url("file.bin"), patience=patience)
    with FakeArea(device) as area:
        server.requests(clear=True)
        server.fail(action, count=2, **details)
        assert area.get(0, len(file[1])) == file[1]
        starts = [request.first for request in server.requests()]
        assert len(starts) == 3
        if action != "reset":  # what had arrived is not asked for again
            assert starts[1] >= MIB
            assert starts[2] >= starts[1] + MIB
        server.fail(action, count=1000, bytes=0, seconds=20)
        with pytest.raises(SourceError, match="given up after 3 tries"):
            area.fill(range(4))


def test_a_server_that_is_gone(file: Served, server: HttpServer, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a" * PAGE_SIZE)
    with HttpServer(tmp_path) as other:
        device = RemoteFile(other.url("a"), patience=QUICK)
        area = FakeArea(device)
        device.open(area)
    with pytest.raises(SourceError, match=r"given up .*Connection"):
        area.fill()
    device.stop()
    with pytest.raises(SourceError, match="Connection refused"):
        RemoteFile(other.url("a"), patience=QUICK)


def _rewrite(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _replace(path: Path, content: bytes) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(content)
    other.rename(path)


@pytest.mark.parametrize("how", [_rewrite, _replace])
@pytest.mark.parametrize("length", ["same", "shorter", "longer"])
def test_a_source_that_changes(server: HttpServer, file: Served, how: object, length: str) -> None:
    path, expected = file
    device = _remote(server)
    with FakeArea(device) as area:
        assert area.get(0, PAGE_SIZE) == expected[:PAGE_SIZE]
        other = {"same": expected[::-1], "shorter": expected[:MIB], "longer": expected * 2}[length]
        assert callable(how)
        how(path, other)
        for pages in (range(1, 2), range(700, 720)):
            with pytest.raises(SourceChangedError, match="changed while it was mapped") as caught:
                area.fill(pages)
            assert caught.value.errno == errno.ESTALE
            start = pages.start * PAGE_SIZE
            assert area.content(start, pages.stop * PAGE_SIZE) == bytes(len(pages) * PAGE_SIZE)
    # A new server process, after a crash, goes on with the version of before or not at all.
    made = device.recipe()
    assert made is not None
    from prefault.drivers.remote import remote_file

    with FakeArea(remote_file.make_remote_file(**made.arguments)) as area, pytest.raises(SourceChangedError):
        area.fill(range(1))


def test_each_answer_is_checked_even_if_the_server_ignores_conditions(server: HttpServer, file: Served) -> None:
    device = _remote(server)
    with FakeArea(device) as area:
        server.fail("headers", headers={"ETag": '"other"'}, deaf=True)
        with pytest.raises(SourceChangedError, match=r'and is "other" now'):
            area.fill(range(4))
        server.fail("headers", headers={"Last-Modified": "Thu, 01 Jan 1970 00:00:00 GMT"})
        with pytest.raises(SourceChangedError, match="1970"):
            area.fill(range(4))
        server.fail("headers", total=5)
        with pytest.raises(SourceChangedError, match="has 5 now"):
            area.fill(range(4))
        server.fail("plain", deaf=True)
        with pytest.raises(SourceChangedError, match="does not tell its version"):
            area.fill(range(4))
        assert area.content(0, 4 * PAGE_SIZE) == bytes(4 * PAGE_SIZE)


def test_weak_tags_are_compared_though_they_cannot_be_a_condition(server: HttpServer, file: Served) -> None:
    server.fail("headers", count=2, headers={"ETag": 'W/"1"'})
    device = _remote(server)
    with FakeArea(device) as area:
        assert area.get(0, PAGE_SIZE) == file[1][:PAGE_SIZE]
        assert "If-Match" not in server.requests()[-1].headers
        server.fail("headers", headers={"ETag": 'W/"2"'})
        with pytest.raises(SourceChangedError):
            area.fill(range(4))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"action": "ignore"}, "ignores range requests"),
        ({"action": "shift", "by": 7}, "asked for bytes 0 to 16383, answered with 7 to 16390"),
        ({"action": "less", "by": 7}, "answered with 0 to 16376"),
        ({"action": "lie", "by": 7}, "asked for 16384 bytes, answered with 16377"),
        ({"action": "longer"}, "was longer"),
        ({"action": "headers", "headers": {"Content-Encoding": "gzip"}}, "Content-Encoding 'gzip'"),
        ({"action": "headers", "headers": {"Content-Range": "bytes nonsense"}}, "not tell its bytes"),
    ],
)
def test_answers_that_are_wrong(server: HttpServer, file: Served, rule: dict[str, object], message: str) -> None:
    device = _remote(server)
    with FakeArea(device) as area:
        server.requests(clear=True)
        server.fail(**rule, count=100)  # type: ignore[arg-type]
        with pytest.raises(SourceError, match=message):
            area.fill(range(4))
        assert len(server.requests()) == 1
        server.heal()
        assert area.get(0, PAGE_SIZE) == file[1][:PAGE_SIZE]


_GARBAGE = [
    "", "nonsense", "HTTP/1.1", "HTTP/1.1 two\r\n\r\n", "HTTP/1.1 206 \r\n", "\x00" * 1000, "HTTP/9.9 206 OK\r\n\r\n",
    "HTTP/1.1 206 OK\r\nContent-Length: -5\r\nContent-Range: bytes 0-16383/{length}\r\n\r\n",
    "HTTP/1.1 206 OK\r\nContent-Length: 16384\r\nContent-Range: bytes 0-16383/" + "9" * 5000 + "\r\n\r\n",
    "HTTP/1.1 206 OK\r\nTransfer-Encoding: chunked\r\nETag: {tag}\r\nContent-Range: bytes 0-16383/{length}\r\n\r\nzz\r\n",
    "HTTP/1.1 206 OK\r\nContent-Range: bytes 0-16383/{length}\r\nETag: {tag}\r\n\r\nfew",
    "HTTP/1.1 206 OK\r\nX: " + "x" * 70_000 + "\r\n\r\n", "HTTP/1.1 206 OK\r\n" + "X: y\r\n" * 200 + "\r\n",
    "HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 302 Found\r\nLocation: http://[\r\nContent-Length: 0\r\n\r\n",
    "HTTP/1.1 302 Found\r\nLocation: http://\r\n\r\n", "HTTP/1.1 100 Continue\r\n\r\n",
    "HTTP/1.1 302 Found\r\nLocation: http://h:99999/\r\n\r\n",
]  # fmt: skip


@pytest.mark.parametrize("text", _GARBAGE, ids=lambda text: text[:40])
def test_garbage_is_an_error(server: HttpServer, file: Served, text: str) -> None:
    patience = Patience(retries=1, timeout_s=0.3, total_s=2, first_pause_s=0.01)
    device = RemoteFile(server.url("file.bin"), patience=patience)
    text = text.replace("{length}", str(len(file[1]))).replace("{tag}", device.version.tag)
    with FakeArea(device) as area:
        server.fail("garbage", count=100, text=text)
        with pytest.raises(SourceError):
            area.fill(range(4))
        with pytest.raises(SourceError):
            RemoteFile(server.url("file.bin"), patience=patience)
        server.heal()
        assert area.get(0, PAGE_SIZE) == file[1][:PAGE_SIZE]


def test_random_garbage(server: HttpServer, file: Served) -> None:
    """Damage the head of right answers at random: the driver supplies the right bytes or raises."""
    device = RemoteFile(server.url("file.bin"), patience=Patience(retries=0, timeout_s=0.2, total_s=2))
    expected = file[1][:PAGE_SIZE]
    head = (
        f"HTTP/1.1 206 Partial Content\r\nContent-Length: 4096\r\nContent-Range: bytes 0-4095/{len(file[1])}\r\n"
        f"ETag: {device.version.tag}\r\nLast-Modified: {device.version.modified}\r\n\r\n"
    )
    generator = random.Random(3)
    right = 0
    with FakeArea(device) as area:
        for _ in range(150):
            at = generator.randrange(len(head))
            spoilt = head[:at] + chr(generator.randrange(256)) + head[at + generator.randrange(3) :]
            server.fail("garbage", text=spoilt + expected.decode("latin-1"))
            try:
                area.fill(range(1))
            except SourceError:
                continue
            assert area.content(0, PAGE_SIZE) == expected
            right += 1
    assert 5 < right < 145


def test_huge_pages(server: HttpServer, file: Served) -> None:
    device = RemoteFile(server.url("file.bin"), page_size=2 * MIB, patience=QUICK)
    with FakeArea(device) as area:
        area.fill(range(1, 2))
        assert area.content(2 * MIB, 4 * MIB) == file[1][2 * MIB :].ljust(2 * MIB, b"\0")


def test_a_server_without_ranges_is_refused_before_it_is_mapped(server: HttpServer, file: Served) -> None:
    server.fail("ignore", count=100)
    with pytest.raises(SourceError, match=f"ignores range requests .*{len(file[1])} bytes.*download"):
        _remote(server)


def test_sources_and_arguments_that_are_refused(server: HttpServer) -> None:
    (server.directory / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        _remote(server, "empty")
    with pytest.raises(SourceMissingError, match=r"HTTP 404.*no such file") as caught:
        _remote(server, "missing")
    assert isinstance(caught.value, FileNotFoundError)
    with pytest.raises(ValueError, match="names no host"):
        RemoteFile("http:///x")
    with pytest.raises(ValueError, match="storage_options"):
        RemoteFile(server.url("empty"), storage_options={"a": 1})
    with pytest.raises(ValueError, match="at least 1"):
        RemoteFile(server.url("empty"), workers=0)


_EMPTY = {
    "206 of nothing": "HTTP/1.1 206 P\r\nContent-Range: bytes */0\r\nContent-Length: 0\r\n\r\n",
    "206 with a byte of nothing": "HTTP/1.1 206 P\r\nContent-Range: bytes 0-0/0\r\nContent-Length: 0\r\n\r\n",
    "206 with an odd range": "HTTP/1.1 206 P\r\nContent-Range: bytes 0--1/0\r\nContent-Length: 0\r\n\r\n",
    "206 without a range": "HTTP/1.1 206 P\r\nContent-Length: 0\r\n\r\n",
    "416 without a length": "HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n",
    "416 of any length": "HTTP/1.1 416 R\r\nContent-Range: bytes */*\r\nContent-Length: 0\r\n\r\n",
    "200 without a length": "HTTP/1.1 200 OK\r\n\r\n",
    "200 of HTTP/1.0": "HTTP/1.0 200 OK\r\n\r\n",
    "200 in chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "200 of 00 bytes": "HTTP/1.1 200 OK\r\nContent-Length: 00\r\n\r\n",
    "204": "HTTP/1.1 204 No Content\r\n\r\n",
}


@pytest.mark.parametrize("answer", _EMPTY)
def test_an_empty_file_whatever_the_server_says_of_its_first_byte(server: HttpServer, answer: str, tmp_path: Path) -> None:
    (server.directory / "empty").write_bytes(b"")
    for cache in (None, tmp_path):
        server.fail("garbage", text=_EMPTY[answer])
        with pytest.raises(ValueError, match=r"/empty\): it is empty: there is nothing to map"):
            RemoteFile(server.url("empty"), patience=QUICK, cache_dir=cache)
    server.heal()
    with pytest.raises(ValueError, match=r"/empty\): it is empty: there is nothing to map"):
        prefault.open_remote(server.url("empty"), patience=QUICK)


def test_a_file_that_is_not_empty_is_not_taken_for_empty(server: HttpServer, file: Served) -> None:
    for answer in ("416 without a length", "416 of any length", "206 with an odd range", "206 without a range"):
        server.fail("garbage", text=_EMPTY[answer])
        with pytest.raises(
            SourceError, match="does not return byte 0 of a file that is not empty: it answers range requests wrongly"
        ):
            _remote(server)
    server.fail("status", status=416, headers={"Content-Range": "bytes */5"})
    with pytest.raises(SourceError, match=r"HTTP 416 .*: the server does not return byte 0 of 5 bytes"):
        _remote(server)
    server.fail("status", status=416, count=2)
    with pytest.raises(
        SourceError, match=r"HTTP 416 .* also to a request for the whole file: it may be empty \(0 bytes cannot"
    ):
        _remote(server)
    server.fail("garbage", text="HTTP/1.1 200 OK\r\n\r\nhello")
    with pytest.raises(SourceError, match=r"ignores range requests .*200 with the whole file"):
        _remote(server)
    server.fail("garbage", text="HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", count=2)
    assert _remote(server).length == len(file[1])  # cut short before the first byte: asked again


# --- proxies


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove all proxies from the environment."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("scheme", ["socks5", "socks5h", "SOCKS4", "socks"])
@pytest.mark.parametrize("variable", ["all_proxy", "ALL_PROXY", "http_proxy"])
def test_a_socks_proxy_is_refused(
    server: HttpServer, file: Served, proxies: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    proxies.setenv(variable, f"{scheme}://me:secret@proxy.example:1080")
    with pytest.raises(SourceError, match="SOCKS proxies are not supported") as caught:
        _remote(server)
    assert caught.value.strerror == (
        f"http://127.0.0.1: SOCKS proxies are not supported ({variable.lower()} is {scheme}://proxy.example:1080): set"
        " http_proxy to an HTTP proxy, or no_proxy to 127.0.0.1 to connect without one"
    )
    if variable == "http_proxy":
        with pytest.raises(SourceError, match="given up"):  # http_proxy is not for https, and this server does not speak TLS
            RemoteFile(server.url("file.bin").replace("http:", "https:"), patience=Patience(retries=0))
    proxies.setenv("no_proxy", "example.org,127.0.0.1")
    assert _remote(server).length == len(file[1])


@pytest.mark.parametrize("variable", ["http_proxy", "all_proxy", "https_proxy"])
def test_a_proxy_named_https_is_refused_and_gets_no_connection(proxies: pytest.MonkeyPatch, variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        proxies.setenv(variable, f"https://me:secret@127.0.0.1:{listener.getsockname()[1]}")
        scheme = "https" if variable == "https_proxy" else "http"
        with pytest.raises(SourceError, match=rf"HTTPS proxies are not supported \({variable} is https://127") as caught:
            RemoteFile(f"{scheme}://host.example/f", patience=Patience(retries=0, timeout_s=0.5))
        assert "secret" not in str(caught.value)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("without", ["*", "127.0.0.1", "127.0.0.1:{port}", "other, 127.0.0.1"])
def test_no_proxy_is_respected(server: HttpServer, file: Served, proxies: pytest.MonkeyPatch, without: str) -> None:
    proxies.setenv("http_proxy", "http://127.0.0.1:1")
    quick = Patience(retries=0)
    with pytest.raises(SourceError, match="Connection refused"):
        RemoteFile(server.url("file.bin"), patience=quick)
    proxies.setenv("no_proxy", "127.0.0.1:1")
    with pytest.raises(SourceError, match="Connection refused"):
        RemoteFile(server.url("file.bin"), patience=quick)
    proxies.setenv("no_proxy", without.format(port=server.port))
    assert RemoteFile(server.url("file.bin"), patience=quick).length == len(file[1])


def test_a_proxy_for_the_scheme_goes_before_one_for_all(
    server: HttpServer, file: Served, proxies: pytest.MonkeyPatch
) -> None:
    proxies.setenv("all_proxy", "socks5://proxy.example")
    proxies.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    with pytest.raises(SourceMissingError):  # this one serves no absolute names: it was asked as a proxy
        _remote(server)
    assert server.requests()[-1].path == server.url("file.bin")


def test_redirects(server: HttpServer, file: Served) -> None:
    server.fail("redirect", location="/file.bin?signed=1")
    device = _remote(server, "elsewhere")
    with FakeArea(device) as area:
        server.fail("redirect", location="/file.bin?signed=2")
        assert area.get(0, PAGE_SIZE) == file[1][:PAGE_SIZE]
        server.requests(clear=True)
        server.heal()
        assert area.get(PAGE_SIZE, 2 * PAGE_SIZE) == file[1][PAGE_SIZE : 2 * PAGE_SIZE]
        # The target that was signed has expired: the way there is asked for anew, and only then it is gone.
        server.fail("status", status=403)
        with pytest.raises(SourceMissingError):
            area.fill(range(4))
        assert [request.path for request in server.requests()] == ["/file.bin?signed=2"] * 2 + ["/elsewhere"]
        server.fail("redirect", location="/elsewhere", count=100)
        with pytest.raises(SourceError, match="redirects"):
            area.fill(range(4))
        server.fail("redirect", location="ftp://host/x")
        with pytest.raises(SourceError, match="not an HTTP URL"):
            area.fill(range(4))


def test_headers_go_to_their_host_alone(server: HttpServer, file: Served, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(file[1])
    with HttpServer(tmp_path) as other:
        server.fail("redirect", location=other.url("file.bin"))
        url = server.url("file.bin").replace("://", "://me:se%20cret@") + "?token=hidden"
        device = RemoteFile(url, headers={"X-Key": "1"}, patience=QUICK)
        mine, theirs = server.requests()[-1].headers, other.requests()[-1].headers
    assert mine["Authorization"] == "Basic bWU6c2UgY3JldA=="
    assert mine["X-Key"] == "1"
    assert "Authorization" not in theirs
    assert "X-Key" not in theirs
    assert "secret" not in str(device)
    assert "hidden" not in str(device)


def test_headers_never_go_unencrypted_to_the_host_that_they_were_given_for_with_encryption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "key", "-out", "certificate"]
    if shutil.which("openssl") is None:
        needs.missing("openssl, which makes a certificate, is not installed")
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    heads: list[bytes] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")

    def answer(connection: socket.socket, *lines: str) -> None:
        with connection:
            heads.append(connection.recv(65536))
            connection.sendall("\r\n".join(["HTTP/1.1 " + lines[0], "Connection: close", *lines[1:], "", "x"]).encode())

    def serve() -> None:
        with contextlib.suppress(ssl.SSLError):  # who does not know the certificate hangs up
            context.wrap_socket(listener.accept()[0], server_side=True)
        answer(context.wrap_socket(listener.accept()[0], server_side=True), "302 Found", f"Location: http://{place}/b")
        answer(listener.accept()[0], "206 Partial Content", "Content-Range: bytes 0-0/5", "Content-Length: 1")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        place = f"127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(SourceError, match="self-signed certificate"):
            RemoteFile(f"https://me:pw@{place}/a", headers={"X-Key": "1"}, patience=QUICK)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
        assert RemoteFile(f"https://me:pw@{place}/a", headers={"X-Key": "1"}, patience=QUICK).length == 5
        thread.join()
    assert [(b"Authorization" in head, b"X-Key" in head) for head in heads] == [(True, True), (False, False)]


def test_a_header_with_a_line_break_is_refused_without_its_value() -> None:
    with pytest.raises(ValueError, match="a line break in the header 'Authorization'") as caught:
        RemoteFile("http://127.0.0.1:1/a", headers={"Authorization": "Bearer secret\n"}, patience=QUICK)
    assert "secret" not in str(caught.value)


def test_an_idle_connection_that_the_server_closed_is_no_failure(server: HttpServer, file: Served) -> None:
    device = RemoteFile(server.url("file.bin"), patience=QUICK.__class__(retries=0, total_s=5))
    with FakeArea(device) as area:
        server.fail("reset", skip=1)
        assert area.get(0, PAGE_SIZE) == file[1][:PAGE_SIZE]
        assert area.get(0, PAGE_SIZE) == file[1][:PAGE_SIZE]


def test_no_descriptor_is_left_open(server: HttpServer, file: Served) -> None:
    before = len(os.listdir("/proc/self/fd"))
    device = _remote(server)
    with FakeArea(device) as area:
        area.fill()
        server.fail("status", status=404)
        with pytest.raises(SourceError):
            area.fill()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("drop", "end"), [(b"a", b"\r\n\r\n"), (b"\r\nHTTP/1.1 100 Continue\r\n", b"\r\n")])
def test_a_head_that_never_ends_is_given_up_in_time(drop: bytes, end: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as accepted:

        def drip() -> None:
            with contextlib.suppress(OSError):  # the listener is closed, or who asked has given up
                connection = accepted.enter_context(listener.accept()[0])
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 100 Continue\r\nX: ")
                for _ in range(20):
                    connection.sendall(drop)
                    time.sleep(0.1)
                connection.sendall(end + b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-0/5\r\nContent-Length: 1\r\n\r\na")

        thread = threading.Thread(target=drip)
        thread.start()
        patience = Patience(retries=0, timeout_s=0.5, total_s=1.0)
        with pytest.raises(SourceError, match=r"given up|took longer"):
            RemoteFile(f"http://127.0.0.1:{listener.getsockname()[1]}/x", patience=patience)
        thread.join()


@pytest.mark.parametrize(
    "interim",
    [
        "HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\nContent-Length: 7\r\n\r\n",
        'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nETag: "x"\r\n\r\n',
        "HTTP/1.1 199 Unheard Of\r\nConnection: close\r\n\r\n" * 30,
    ],
    ids=["103", "100-102-103", "199"],
)
def test_interim_answers_are_skipped(server: HttpServer, file: Served, interim: str) -> None:
    device = _remote(server)
    expected = file[1][:PAGE_SIZE]
    head = (
        f"HTTP/1.1 206 Partial Content\r\nContent-Length: 4096\r\nContent-Range: bytes 0-4095/{len(file[1])}\r\n"
        f"ETag: {device.version.tag}\r\nLast-Modified: {device.version.modified}\r\n\r\n"
    )
    with FakeArea(device) as area:
        server.requests(clear=True)
        server.fail("garbage", text=interim + head + expected.decode("latin-1"))
        area.fill(range(1))
        assert area.content(0, PAGE_SIZE) == expected
        assert len(server.requests()) == 1
        server.fail("garbage", text="HTTP/1.1 101 Switching Protocols\r\nUpgrade: other\r\n\r\n")
        with pytest.raises(SourceError, match="HTTP 101"):
            area.fill(range(1))


def test_an_invalid_retry_after_is_ignored(server: HttpServer, file: Served) -> None:
    when = "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"
    server.fail("status", status=503, count=1, headers={"Retry-After": when})
    _remote(server)
