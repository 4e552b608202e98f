"""Limits of the system: each is one sentence with its number and what to do."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault._system import cgroups, hugetlb
from prefault.device import Device, DeviceArea
from prefault.device.device_pool import Access
from prefault.device.driver import Supplied
from prefault.device.frames import Frames
from prefault.errors import BackingFullError, DeviceError
from prefault.sizes import MIB, PAGE_SIZE, format_size
from support import needs, oracle, processes
from support.children import in_child
from support.devices import Pattern, Remade

HUGE = 2 * MIB


def _maps(device: Device) -> tuple[int | None, str]:
    """What becomes of mapping a device: errno 0, or that of the DeviceError and its message."""
    try:
        with prefault.device.map(device) as area:
            assert len(area) == device.length
    except DeviceError as error:
        return error.errno, str(error)
    return 0, ""


# --- processes


@contextmanager
def _pids(most: int) -> Iterator[Path]:
    """A cgroup for so many processes and threads."""
    needs.root("make a cgroup")
    found = cgroups.governing("pids")
    if not found.directories:
        needs.missing("no hierarchy of the pids controller is mounted")
    directory = Path(found.directories[0]) / f"prefault-test-{os.getpid()}"
    directory.mkdir()
    try:
        (directory / "pids.max").write_text(str(most))
        yield directory
    finally:
        assert processes.eventually(lambda: not (directory / "cgroup.procs").read_text())
        directory.rmdir()


@pytest.mark.parametrize(
    ("most", "device"),
    [
        (1, Pattern(4)),
        (2, Pattern(4)),
        (1, Remade(4)),
        (2, Remade(4)),
        (3, Pattern(4, workers=4)),
    ],
    ids=["warden", "server", "warden, by recipe", "server, by recipe", "first worker"],
)
def test_a_limit_of_processes_is_named(most: int, device: Device) -> None:
    with _pids(most) as directory:

        def limited() -> tuple[int | None, str]:
            (directory / "cgroup.procs").write_text(str(os.getpid()))
            return _maps(device)

        number, message = in_child(limited)
    assert number == errno.EAGAIN
    assert f"{directory}/pids.max allows {most} processes and threads, and there are {most}: raise that" in message


def test_a_device_goes_on_with_the_workers_that_can_be_started(capfd: pytest.CaptureFixture[str]) -> None:
    """Workers start when there is work for them."""
    with _pids(6) as directory:

        def limited() -> int:
            (directory / "cgroup.procs").write_text(str(os.getpid()))
            with prefault.device.map(Pattern(64, workers=8, batch_pages=1)) as area:
                return prefault.populate(area).bytes

        assert in_child(limited) == 64 * PAGE_SIZE
        named = f"{directory}/pids.max allows 6 processes and threads, and there are 6: raise that"
    assert re.search(r"\d of its 8 workers could be started: .*" + re.escape(named), capfd.readouterr().err)


def test_the_users_own_limit_of_processes_is_named() -> None:
    needs.root("become another user")

    def limited() -> tuple[int | None, str]:
        os.setgid(63_211)
        os.setuid(63_211)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        return _maps(Pattern(4))

    number, message = in_child(limited)
    assert number == errno.EAGAIN
    assert "RLIMIT_NPROC allows user 63211 1 processes and threads (ulimit -u)" in message
    assert "raise the limit" in message


# --- descriptors


def _limits_of_descriptors() -> Iterator[int]:
    """Set one limit after the other, from one that leaves enough free numbers to one that leaves none."""
    free = os.dup(2)
    os.close(free)
    for most in range(free + 24, free - 1, -1):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        yield most


@pytest.mark.parametrize("device", [Pattern(4), Remade(4)], ids=["fork", "recipe"])
def test_a_limit_of_descriptors_is_named_wherever_it_is_met(device: Device) -> None:
    """In the client, the warden or the server, which begin with others."""

    def limited() -> list[tuple[int, int | None, str]]:
        assert _maps(device) == (0, "")  # what is opened once is open
        return [(most, *_maps(device)) for most in _limits_of_descriptors()]

    found = in_child(limited)
    assert found[0][1] == 0
    assert found[-1][1] == errno.EMFILE
    for most, number, message in found:
        if number:
            assert number == errno.EMFILE, message
            assert f"as it may have, {most} (RLIMIT_NOFILE): raise that (ulimit -n)" in message


def test_a_client_without_a_descriptor_for_the_frames(tmp_path: Path) -> None:
    path = tmp_path / "s"

    def limited() -> list[tuple[int, Any, str]]:
        found: list[tuple[int, Any, str]] = []
        for most in _limits_of_descriptors():
            try:
                with prefault.device.connect(path) as client, client.map() as area:
                    assert area.read(0, 1)
                    found.append((most, 0, ""))
            except DeviceError as error:
                found.append((most, error.errno, str(error)))
        return found

    with prefault.device.serve(Pattern(4), path):
        found = in_child(limited)
    assert found[0][1] == 0
    assert any("the frames of Pattern cannot be mapped" in message for _, _, message in found)
    for most, number, message in found:
        if number:
            assert number == errno.EMFILE, message
            assert f"as it may have, {most} (RLIMIT_NOFILE): raise that (ulimit -n)" in message


def test_the_command_names_the_limit(tmp_path: Path) -> None:
    root = Path(prefault.__file__).parent.parent
    command = (
        f"ulimit -n 10; exec {sys.executable} -m prefault device serve support.devices:Pattern --socket {tmp_path / 's'}"
    )
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": f"{root}:{Path(__file__).parent.parent}"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "as it may have, 10 (RLIMIT_NOFILE): raise that (ulimit -n)" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s").exists()


# --- memory


@pytest.mark.parametrize(
    ("limit", "number", "sentence"),
    [
        (resource.RLIMIT_FSIZE, errno.EFBIG, "files of this process have at most {} (RLIMIT_FSIZE): raise that (ulimit -f)"),
        (resource.RLIMIT_AS, errno.ENOMEM, "this process may map {} in all (RLIMIT_AS): raise that (ulimit -v)"),
    ],
    ids=["file size", "address space"],
)
def test_a_limit_on_the_size_of_the_frames_is_named(limit: int, number: int, sentence: str) -> None:
    most = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_SIZE + 64 * MIB

    def limited() -> tuple[int | None, str]:
        resource.setrlimit(limit, (most, most))
        with pytest.raises(DeviceError) as caught:
            Frames.create(1 << 40, PAGE_SIZE)
        return caught.value.errno, str(caught.value)

    found, message = in_child(limited)
    assert found == number
    assert "cannot create frames of 1.0 TiB for the device: " + sentence.format(format_size(most)) in message


class _Huge(Device):
    page_size = HUGE
    length = 8 * HUGE
    batch = HUGE

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def fault(self, area: DeviceArea, page: int, access: Access) -> Supplied:
        area.frame(page)[:8] = b"supplied"
        return None


@pytest.mark.parametrize("workers", [0, 4])
def test_an_empty_pool_is_named_with_the_first_page_that_failed(hugetlb_pool: Callable[[int], None], workers: int) -> None:
    hugetlb_pool(8)
    with prefault.device.map(_Huge(workers)) as area:
        assert not area.notes
        hugetlb_pool(3)
        with pytest.raises(BackingFullError) as caught:
            prefault.populate(area, headroom="ignore")
        error = caught.value
        present = oracle.present(area.address, 8 * HUGE)[:: HUGE // PAGE_SIZE]
        assert error.errno == errno.ENOSPC
        assert sum(present) * HUGE == error.populated_bytes == 3 * HUGE
        assert error.offset == present.index(False) * HUGE
        assert f"page {present.index(False)} of the device" in str(error)
        pool = hugetlb.read_pool(HUGE)
        assert f"the pool has 0 of {pool.total}; write a larger number to {pool.setting}" in str(error)
        assert "6.0 MiB of 16.0 MiB populated" in str(error)
