"""No write to an enclave is lost, and no old page comes back, however much is evicted and killed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from prefault.sizes import MIB
from support import enclave_integrity
from support.cgroups import groups
from support.children import in_child

_LIMIT = 96 * MIB
_SECONDS = 4.0
_LONG_S = 600.0


@pytest.mark.parametrize("kills", [False, True], ids=["", "killed"])
def test_c5_writes_survive_eviction(tmp_path: Path, no_leaks: None, kills: bool) -> None:
    counts = enclave_integrity.run(tmp_path / "socket", 1, _SECONDS, kills=kills)
    assert min(counts["written"], counts["read"], counts["evicted at least"]) > 0
    assert (counts["kills"] > 0) is kills


def _in_a_tight_cgroup(path: Path, seed: int, seconds: float) -> Counter[str]:
    with groups() as make:
        group = make(_LIMIT)
        counts: Counter[str] = in_child(group.inside(lambda: enclave_integrity.run(path, seed, seconds)), seconds + 60)
        assert group.killed == 0
        return counts


def test_c5_writes_survive_eviction_in_a_tight_memory_cgroup(tmp_path: Path) -> None:
    assert _in_a_tight_cgroup(tmp_path / "socket", 2, _SECONDS)["written"] > 0


@pytest.mark.stress
@pytest.mark.timeout(_LONG_S + 120)
def test_c5_writes_survive_eviction_for_ten_minutes(tmp_path: Path) -> None:
    print(dict(enclave_integrity.run(tmp_path / "socket", 3, _LONG_S)))


@pytest.mark.stress
@pytest.mark.timeout(_LONG_S + 120)
def test_c5_writes_survive_eviction_for_ten_minutes_in_a_tight_memory_cgroup(tmp_path: Path) -> None:
    print(dict(_in_a_tight_cgroup(tmp_path / "socket", 4, _LONG_S)))
