"""Extract the Linux user-space headers of a recent kernel from the ziglang wheel.

The distribution's own headers are often older than the interfaces that prefault uses. Usage: uapi_headers.py DIRECTORY
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_REQUIREMENTS = Path(__file__).parent.parent / "requirements" / "headers.txt"
_ROOT = "ziglang/lib/libc/include/"
_TREES = ("any-linux-any/", "x86-linux-any/", "aarch64-linux-any/")


def main(target: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--dest", scratch, "--requirement", str(_REQUIREMENTS)],
            check=True,
        )  # fmt: skip
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                inside = name.removeprefix(_ROOT)
                if inside.startswith(_TREES) and not name.endswith("/"):
                    path = target / inside
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(archive.read(name))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
