"""Remedies that prefault doctor advises: set, looked at, and set back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import prefault
from prefault._system import capabilities
from prefault.doctor import advise, examine
from support import needs, oracle
from support.examinations import MIB, advised, child, only, record, rules, unshared


@pytest.mark.parametrize("word", ["never", "deny"])
def test_the_remedy_for_shared_memory(word: str, thp_setting: Callable[[str, str], None]) -> None:
    needs.capability(capabilities.MADV_POPULATE)
    thp_setting("shmem_enabled", word)

    def huge_bytes(backing: str) -> int:
        with prefault.Mapping(4 * MIB, backing=backing, shared=True) as mapping:
            prefault.populate(mapping)
            return int(oracle.smaps(mapping.range.start)["ShmemPmdMapped"])

    assert huge_bytes("memfd") == 0
    advice = next(advice for advice in examine().advice if advice.rule == "shmem-never")
    subprocess.run(["sh", "-c", advice.remedy], check=True)
    assert huge_bytes("memfd") == huge_bytes("anonymous") == 4 * MIB
    assert "shmem-never" not in rules(examine().advice)


def test_the_remedy_for_private_memory(thp_setting: Callable[[str, str], None]) -> None:
    needs.capability(capabilities.MADV_POPULATE)
    thp_setting("enabled", "never")

    def huge_bytes() -> int:
        with prefault.Mapping(4 * MIB, huge="advise") as mapping:
            prefault.populate(mapping)
            return int(oracle.smaps(mapping.range.start)["AnonHugePages"])

    assert huge_bytes() == 0
    advice = next(advice for advice in examine().advice if advice.rule == "thp-never")
    subprocess.run(["sh", "-c", advice.remedy], check=True)
    assert huge_bytes() == 4 * MIB
    assert "thp-never" not in rules(examine().advice)


def test_the_remedy_for_files_in_memory() -> None:
    """What is advised for /dev/shm, done to a tmpfs of our own in a namespace of its own."""
    before = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import prefault
from support import oracle
with prefault.Mapping({4 * MIB}, backing=prefault.TemporaryFile("/dev/shm")) as mapping:
    prefault.populate(mapping)
    print(oracle.smaps(mapping.range.start)["ShmemPmdMapped"], file=sys.stderr)
"""
    small = "mount -t tmpfs -o size=64m,huge=never none /dev/shm"
    remedy = only(advise(record(dev_shm_huge="never")), "dev-shm-huge").remedy
    shown = []
    for prefix in (unshared(small), unshared(f"{small}\n{remedy}")):
        done = subprocess.run([*prefix, sys.executable, "-c", before], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shown.append(int(done.stderr))
    assert shown == [0, 4 * MIB]
    assert "dev-shm-huge" not in advised(child(*unshared(f"{small}\n{remedy}")))
