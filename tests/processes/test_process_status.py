"""Status of a running process: against its pagemap and smaps, read by other code; and processes that cannot be read."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefault import processes
from prefault.processes import MappingStatus
from prefault.testing import without
from support import needs, oracle
from support.children import die_with_parent, in_child
from support.mapped_process import MappedProcess

_PAGE = oracle.PAGE
_MIB = 1 << 20


@pytest.fixture
def other() -> Iterator[MappedProcess]:
    with MappedProcess() as process:
        yield process


def _mapping(pid: int, address: int) -> MappingStatus:
    (found,) = (one for one in processes.status(pid).mappings if one.start <= address < one.stop)
    return found


def _smaps(pid: int) -> dict[int, dict[str, int]]:
    """The counters of each mapping by its start, in bytes."""
    found: dict[int, dict[str, int]] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if head:
            now = found[int(head[1], 16)] = {}
        elif line.endswith(" kB"):
            key, _, value = line.partition(":")
            now[key] = int(value[:-3]) * 1024
    return found


@pytest.mark.parametrize("lacking", [(), ("pagemap_scan",)])
def test_present_pages_are_those_of_pagemap(other: MappedProcess, lacking: tuple[str, ...]) -> None:
    start = other.map(64 * _PAGE)
    other.do(f"for page in (0, 3, 4, 63): store({start} + page * {_PAGE})")
    other.do(f"load({start} + 10 * {_PAGE})")  # the zero page
    with without(*lacking):
        found = _mapping(other.pid, start)
    at = (start - found.start) // _PAGE
    pages = {page for first, last in found.present or () for page in range(first // _PAGE, last // _PAGE)}
    expected = oracle.present(found.start, found.size_bytes, other.pid)
    assert pages == {page for page, there in enumerate(expected) if there}
    assert {at, at + 3, at + 4, at + 10, at + 63} <= pages
    assert found.present_bytes == len(pages) * _PAGE
    assert found.present_bytes - found.allocated_bytes >= _PAGE  # the zero page takes no memory


def test_every_row_agrees_with_smaps(other: MappedProcess) -> None:
    before = _smaps(other.pid)
    found = processes.status(other.pid)
    after = _smaps(other.pid)  # the kernel may reclaim pages of shared libraries at any time
    assert {one.start for one in found.mappings} == {start for start in before if start < 1 << 63}
    for one in found.mappings:
        sides = before[one.start], after[one.start]
        assert one.size_bytes == sides[0]["Size"]
        for value, counter in ((one.allocated_bytes, "Rss"), (one.swapped_bytes, "Swap")):
            assert min(side[counter] for side in sides) <= value <= max(side[counter] for side in sides)
    assert found.allocated_bytes == sum(one.allocated_bytes for one in found.mappings)
    assert found.size_bytes == sum(one.size_bytes for one in found.mappings)
    assert "mapped" in str(found)


def test_locked_memory(other: MappedProcess) -> None:
    start = other.map(4 * _MIB)
    other.do(f"checked(libc.mlock2({start}, {_MIB}, 0))")
    found = _mapping(other.pid, start)
    assert (found.size_bytes, found.locked_bytes) == (_MIB, _MIB)
    assert _mapping(other.pid, start + _MIB).locked_bytes == 0


def test_huge_pages_of_hugetlb(other: MappedProcess, hugetlb_pool: Any) -> None:
    hugetlb_pool(2)
    start = other.map(2 * needs.HUGE, flags=0x40022)
    other.do(f"store({start})")
    found = _mapping(other.pid, start)
    assert (found.present_bytes, found.allocated_bytes, found.huge_bytes) == (needs.HUGE,) * 3
    assert found.page_size == needs.HUGE


def test_huge_pages_of_anonymous_memory(other: MappedProcess, thp_setting: Any) -> None:
    thp_setting("enabled", "madvise")
    start = other.map(4 * needs.HUGE)
    aligned = -start % needs.HUGE + start
    other.do(f"checked(libc.madvise({aligned}, {needs.HUGE}, 14)); store({aligned})")
    found = _mapping(other.pid, aligned)
    if _smaps(other.pid)[found.start]["AnonHugePages"] == 0:
        needs.missing("the kernel found no huge page")
    assert found.huge_bytes == needs.HUGE
    assert found.present_bytes is not None
    assert found.present_bytes >= needs.HUGE


def test_device_memory_is_not_known(other: MappedProcess) -> None:
    (found,) = (one for one in processes.status(other.pid).mappings if one.name == "[vvar]")
    assert found.present_bytes is None
    assert found.present is None
    assert "VM_PFNMAP" in found.unknown


def test_this_process() -> None:
    found = processes.status(os.getpid())
    assert found.pid == os.getpid()
    assert found.present_bytes


def test_a_million_mebibytes_of_nothing(other: MappedProcess) -> None:
    start = other.map(1 << 40, prot=0, flags=0x4022)
    found = _mapping(other.pid, start)
    assert (found.size_bytes, found.present_bytes) == (1 << 40, 0)


# --- pids that are none


@pytest.mark.parametrize("pid", [True, "1", 1.0, None])
def test_no_number(pid: Any) -> None:
    with pytest.raises(TypeError, match="a pid is an int"):
        processes.status(pid)


@pytest.mark.parametrize("pid", [0, -1])
def test_no_pid(pid: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        processes.status(pid)


@pytest.mark.parametrize("pid", [1 << 22, (1 << 22) + 1, 1 << 40])
def test_a_pid_that_no_process_has(pid: int) -> None:
    with pytest.raises(ProcessLookupError, match=f"no process has the pid {pid}"):
        processes.status(pid)


def test_a_process_that_is_gone(other: MappedProcess) -> None:
    other.kill()
    with pytest.raises(ProcessLookupError, match="it has ended"):
        processes.status(other.pid)


def test_a_process_that_was_not_waited_for() -> None:
    with subprocess.Popen(["true"]) as child:
        deadline = time.monotonic() + 20
        while ") Z " not in Path(f"/proc/{child.pid}/stat").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(ProcessLookupError, match="zombie"):
            processes.status(child.pid)


def test_a_thread(other: MappedProcess) -> None:
    thread = other.do("import threading; t = threading.Thread(target=lambda: __import__('time').sleep(60), daemon=True)\n"
                      "t.start(); answer = t.native_id")  # fmt: skip
    with pytest.raises(OSError, match=f"{thread} is a thread of the process {other.pid}"):
        processes.status(thread)


_LEADER_ENDS = """
import ctypes, sys, threading
thread = threading.Thread(target=lambda: (print("ready", flush=True), sys.stdin.read()))
thread.start()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_process_whose_main_thread_has_ended() -> None:
    """It runs on, but /proc shows no memory by its pid: that is no zombie."""
    with subprocess.Popen(
        [sys.executable, "-c", _LEADER_ENDS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_parent
    ) as running:
        try:
            limit = time.monotonic() + 30
            while "VmSize" in Path(f"/proc/{running.pid}/status").read_text():
                assert time.monotonic() < limit
                time.sleep(0.01)
            for call in (processes.status, processes.warm):
                with pytest.raises(OSError, match=r"the main thread of process .* has ended while others run"):
                    call(running.pid)
        finally:
            running.kill()


def test_a_kernel_thread() -> None:
    if not Path("/proc/2/comm").exists() or Path("/proc/2/comm").read_text() != "kthreadd\n":
        needs.missing("no kernel thread is visible in this pid namespace")
    with pytest.raises(OSError, match=r"process 2 \(kthreadd\) is a kernel thread"):
        processes.status(2)


def test_the_process_of_another_user(other: MappedProcess) -> None:
    needs.root("become another user")

    def look() -> tuple[processes.ProcessStatus, str]:
        os.setuid(65534)
        with pytest.raises(PermissionError) as caught:
            processes.warm(other.pid)
        return processes.status(other.pid), str(caught.value)

    found, refusal = in_child(look)
    for text in (found.unknown, refusal):
        assert f"process {other.pid} (" in text
        assert "of user 0 is not permitted to user 65534" in text
        assert text.endswith(" without CAP_SYS_PTRACE: run it as root (sudo) or as user 0")
    assert found.mappings == ()
    assert found.present_bytes is None
    assert found.allocated_bytes
    assert found.size_bytes
