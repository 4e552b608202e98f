"""A remote array: mapped at once, and downloaded page by page as it is touched.

    python examples/remote_array.py            an array on a web server that the example starts
    python examples/remote_array.py URL        a .npy file on http(s), s3, gs, in a zip archive, ...

The first run saves a log of the pages that it touched. The second downloads those in parallel before it starts.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

import prefault
from prefault.drivers import area_of


def use(url: str, plan: Path) -> None:
    """Read from the array as if it were local."""
    array = prefault.open_remote(url, plan=plan)
    print(f"{array.dtype}{array.shape}, {prefault.format_size(array.nbytes)}, is mapped")

    row = array[len(array) // 2]  # until here only the header was downloaded
    print(f"mean of one row: {row.mean():.4f}")

    part = array[: len(array) // 8]
    print(prefault.populate(part))  # in parallel; a failure is an exception
    print(f"mean of an eighth: {part.mean():.4f}")

    area = area_of(array)
    print(f"in memory: {prefault.format_size(area.residency().present_bytes)}; {area.stats()}")
    area.access_log().save(plan)


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """The standard library's file server, with range requests added."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:  # noqa: D102
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        status = path.stat()
        first, last = int(asked[1]), min(int(asked[2]), status.st_size - 1)
        self.send_response(http.HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {first}-{last}/{status.st_size}")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", f'"{status.st_mtime_ns}"')
        self.end_headers()
        with path.open("rb") as file:
            self.wfile.write(os.pread(file.fileno(), last - first + 1, first))

    def log_message(self, *_: Any) -> None:  # noqa: D102
        return


def serve() -> None:
    """Serve the working directory."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeServer)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextlib.contextmanager
def an_array_on_a_server() -> Iterator[str]:
    """Serve 64 MiB of numbers from a process of its own, and yield the URL."""
    with tempfile.TemporaryDirectory() as directory:
        numpy.save(Path(directory) / "numbers.npy", numpy.random.default_rng(1).random((1024, 8192)))
        with subprocess.Popen(
            [sys.executable, __file__, "--serve"], cwd=directory, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            try:
                yield f"http://127.0.0.1:{server.stdout.readline().strip()}/numbers.npy"
            finally:
                server.kill()


def main() -> None:
    """Run twice, the second time with the log of the first."""
    with contextlib.ExitStack() as stack:
        url = sys.argv[1] if len(sys.argv) > 1 else stack.enter_context(an_array_on_a_server())
        plan = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "plan.json"
        for run in ("first", "second"):
            print(f"--- {run} run")
            use(url, plan)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
