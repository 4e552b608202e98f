"""check_device passes drivers that keep the contract: each of these in a way of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device.driver import Device, FaultAround
from prefault.sizes import PAGE_SIZE
from prefault.testing import check_device
from support.devices import HUGE, Enclave, Failing, Pattern, Remade, Slow, WithoutPopulate, WritesWholePages, expected

_LOADED = (prefault.device.serve, prefault.device.connect)  # what they import is mapped before a test counts mappings

_GOOD: dict[str, tuple[Callable[[], Device], dict[str, Any]]] = {
    "pattern": (lambda: Pattern(48), {"expected": lambda page: expected(Pattern(48), page)}),
    "one page": (lambda: Pattern(1), {}),
    "part of a page": (lambda: Pattern(1, tail=PAGE_SIZE - 1), {}),
    "partial last page": (lambda: Pattern(17, tail=1000), {}),
    "whole frames of a partial page": (lambda: WritesWholePages(16, tail=1000), {}),
    "large": (lambda: Pattern(1 << 20), {}),
    "writable": (lambda: Pattern(40, writable=True), {}),
    "workers": (lambda: Slow(48, workers=4), {}),
    "slow": (lambda: Slow(24, delay_s=0.004), {}),
    "small batches": (lambda: Pattern(48, batch_pages=5), {}),
    "fault around": (lambda: Pattern(64, fault_around=FaultAround(4 * PAGE_SIZE, 16 * PAGE_SIZE)), {}),
    "2 MiB pages": (lambda: Pattern(5, page_size=HUGE, tail=5000), {}),
    "without populate": (WithoutPopulate, {}),
    "populate is meaningless": (lambda: Pattern(24, populates=False), {}),
    "read-only with a capacity": (lambda: Pattern(64, capacity_pages=20), {}),
    "enclave": (Enclave, {"after_discard": "zeros"}),
    "enclave with workers": (lambda: Enclave(workers=2, capacity_pages=24), {"after_discard": "zeros"}),
    "failing pages": (lambda: Failing(32, bad=(3, 31)), {"failing": (3, 31)}),
    "restartable, by a recipe": (lambda: Remade(40, workers=2), {}),
}


# These differ little from others, and are left to the long form.
_ONLY_LONG = {"one page", "slow", "small batches", "enclave with workers"}


@pytest.mark.parametrize("name", [name for name in _GOOD if name not in _ONLY_LONG])
def test_a_good_driver_passes(name: str, no_leaks: None) -> None:
    factory, options = _GOOD[name]
    check_device(factory, seed=1, **options)


def test_a_driver_that_keeps_its_pages_in_a_file(tmp_path: Path, no_leaks: None) -> None:
    from support.devices import Saved

    numbers = iter(range(1000))
    checked = check_device(
        lambda: Saved(str(tmp_path / f"saved-{next(numbers)}")), seed=1, after_discard="zeros", persistent=True
    )
    assert checked.scenes[-5:] == (
        "clients write, and it is stopped after its clients",
        "it was written to, stopped after its clients, and is served again",
        "clients write, and it is stopped with clients that are left",
        "it was written to, stopped with clients that are left, and is served again",
        "it was written to and stopped, and is made by its recipe",
    )


@pytest.mark.stress
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", _GOOD)
def test_a_good_driver_passes_with_every_seed(name: str) -> None:
    factory, options = _GOOD[name]
    for seed in range(20):
        check_device(factory, seed=seed, **options)


def test_it_needs_no_test_framework(tmp_path: Path) -> None:
    """It runs in a script, without a main guard. It says what it checked, and logs nothing; and nothing is left behind."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from support.devices import Failing, Pattern\n"
        "from prefault.testing import check_device\n"
        "print(check_device(lambda: Pattern(8)))\n"
        "print(len(check_device(lambda: Failing(8, bad=(3,), restartable=True), failing=[3]).scenes) > 8)\n"
        "assert 'pytest' not in sys.modules\n"
    )
    root = Path(prefault.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": f"{root}:{Path(__file__).parent.parent}", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    first, *scenes, last = done.stdout.splitlines()
    assert (done.stderr, last) == ("", "True")
    assert first == "Pattern passes (seed 0, 8 pages looked at) when"
    assert "  its pages are touched one after the other" in scenes
    assert any(scene.endswith("fails for the sake of the check") for scene in scenes)
    assert os.listdir(tmp_path) == ["script.py"]
