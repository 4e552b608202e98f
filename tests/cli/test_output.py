"""An output that cannot be written is one sentence, whichever command writes it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from prefault.bench import jsonfile


def _run(*arguments: str, output: str) -> subprocess.CompletedProcess[str]:
    with open(output, "w") as stdout:
        return subprocess.run(
            [sys.executable, "-m", "prefault", *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60,
            check=False,
        )  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["--version"], ["doctor"], ["doctor", "--json"], ["doctor", "--help"], ["bench", "--help"],
        ["bench", "--list"], ["bench", "--size", "2 MiB", "--repeats", "1", "--backing", "tmpfs"],
        ["bench", "device", "--help"], ["device", "--help"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_full_disk(arguments: list[str]) -> None:
    done = _run(*arguments, output="/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "prefault: the output cannot be written: No space left on device"
    assert "Errno" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_document_that_cannot_be_written_is_named(small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("16k")
    with pytest.raises(OSError, match=re.escape(f"No space left on device: '{directory / 'run.json'}'")):
        jsonfile.write({"run": "x" * 100_000}, directory / "run.json")
    assert list(directory.iterdir()) == []


def test_the_help_says_what_happens_to_the_hugetlb_pool(tmp_path: Path) -> None:
    path = tmp_path / "help"
    assert _run("bench", "--help", output=str(path)).returncode == 0
    text = " ".join(path.read_text().split())
    assert "the pool is enlarged for them (vm.nr_hugepages)" in text
    assert "both are put back at the end" in text
