"""Programs that run with a /dev/shm of their own: a small tmpfs in a mount namespace."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support import needs

_TESTS = Path(__file__).parent.parent


def run(code: str, *, size: str, options: str = "", timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own whose /dev/shm has ``size`` (``"2m"``), and return how it ended.

    A return code below 0 is the signal that ended it.
    """
    needs.root("mount a tmpfs in a namespace of its own")
    mount = f'mount -t tmpfs -o size={size}{options and "," + options} prefault-test /dev/shm && exec "$@"'
    path = os.pathsep.join([str(_TESTS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh", sys.executable, "-c", code],
        capture_output=True, text=True, timeout=timeout_s, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        needs.missing(f"no tmpfs in a mount namespace: {done.stderr.strip()}")
    return done


def output(code: str, *, size: str, options: str = "") -> str:
    """Return the output of such a program, which has to end without an error."""
    done = run(code, size=size, options=options)
    if done.returncode:
        pytest.fail(f"exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout
