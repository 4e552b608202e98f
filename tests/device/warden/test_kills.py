"""kill -9 of the server, the warden, a client, at any moment: no client hangs or reads wrong bytes, and nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

import prefault
from support import processes

_ROOT = Path(prefault.__file__).parent.parent


def _killing(tmp_path: Path, seed: int, seconds: float, hang_s: float) -> dict[str, Any]:
    """Return the findings of ``support.random_kills``."""
    mark = uuid.uuid4().hex
    environment = {
        **os.environ,
        "PYTHONPATH": f"{_ROOT}:{Path(__file__).parents[2]}",
        "PREFAULT_KILLING": mark,
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "support.random_kills", str(seed), str(seconds), str(hang_s)]
    with (tmp_path / "stderr").open("wb") as file:
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=file, timeout=seconds + 120)
    stderr = (tmp_path / "stderr").read_text()[-4000:]
    assert done.returncode == 0, stderr
    assert processes.eventually(lambda: not processes.with_environment(f"PREFAULT_KILLING={mark}"))
    found: dict[str, Any] = json.loads(done.stdout)
    assert not found["wrong"], "\n".join([*found["wrong"], stderr])
    return found


def test_processes_are_killed(tmp_path: Path) -> None:
    found = _killing(tmp_path, seed=1, seconds=2.5, hang_s=20.0)
    assert found["counts"]["operations"] > 0


@pytest.mark.stress
@pytest.mark.timeout(1200)
def test_processes_are_killed_for_ten_minutes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("PREFAULT_SEED", "4"))
    found = _killing(tmp_path, seed=seed, seconds=float(os.environ.get("PREFAULT_KILLING_S", "600")), hang_s=2.0)
    with capsys.disabled():
        print(f"\n{json.dumps(found)}")
    counts = found["counts"]
    for role in ("server", "warden", "client"):
        assert counts[f"killed {role}"] > 20
