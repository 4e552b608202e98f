"""What people read when something is not as it should be: one clear sentence that says what to do."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault import PAGE_SIZE, PopulateResult
from prefault._kernel import mman
from prefault._system import capabilities, own_process
from support import needs
from support.children import in_child
from support.regions import READ, WRITE, Region

_VERBS: dict[str, Callable[[Any], Any]] = {
    "populate": prefault.populate,
    "plan": prefault.plan,
    "residency": prefault.residency,
    "discard": prefault.discard,
    "lock": prefault.lock,
    "headroom": prefault.headroom,
}


# --- the process and the machine


def _exhaust_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with contextlib.suppress(OSError):  # EMFILE
        for _ in range(64):
            os.open("/dev/null", os.O_RDONLY)


@pytest.mark.parametrize("verb", _VERBS)
def test_no_descriptor_is_left(verb: str) -> None:
    def limited() -> tuple[int | None, str]:
        buffer = mmap.mmap(-1, 16 * PAGE_SIZE)
        _exhaust_descriptors()
        with pytest.raises(OSError) as caught:  # noqa: PT011
            _VERBS[verb](buffer)
        return caught.value.errno, str(caught.value)

    # A process of its own by fork: it has forgotten the descriptors that this one keeps open.
    number, text = in_child(limited)
    assert number == errno.EMFILE
    assert re.search(
        r"Too many open files: process \d+ has as many descriptors open as it may have, 64 \(RLIMIT_NOFILE\):"
        r" raise that \(ulimit -n\), or close some", text
    )  # fmt: skip


def test_no_descriptor_is_left_for_a_mapping(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE_SIZE))

    def limited() -> list[str]:
        import tempfile  # noqa: F401  now: a module cannot be loaded without a descriptor either

        _exhaust_descriptors()
        texts = []
        for backing in (prefault.Memfd(), prefault.TemporaryFile(tmp_path), prefault.File(path), prefault.Descriptor(0)):
            with pytest.raises(prefault.MappingError) as caught:
                prefault.Mapping(PAGE_SIZE, backing=backing)
            assert caught.value.errno == errno.EMFILE
            texts.append(str(caught.value))
        return texts

    for text in in_child(limited):
        assert "as many descriptors open as it may have, 64 (RLIMIT_NOFILE)" in text


def test_a_method_that_needs_a_descriptor_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    needs.capability(capabilities.PROCESS_MADVISE)
    monkeypatch.setattr(own_process, "has_constant", lambda: False)  # Linux before 6.15

    def limited() -> str:
        buffer = mmap.mmap(-1, 16 * PAGE_SIZE)
        assert prefault.populate(buffer, method="process_madvise").bytes == 16 * PAGE_SIZE
        prefault.discard(buffer)
        _exhaust_descriptors()
        with pytest.raises(OSError, match=r"RLIMIT_NOFILE\): raise that") as caught:
            prefault.populate(buffer, method="process_madvise")
        return str(caught.value)

    assert "Too many open files" in in_child(limited)


_WITHOUT_PROC = """
import sys, mmap, prefault
for verb in sys.argv[1:]:
    try:
        getattr(prefault, verb)(mmap.mmap(-1, 1 << 16))
    except OSError as error:
        print(error)
"""


def test_no_proc_is_mounted() -> None:
    needs.root("hide /proc in a mount namespace")
    command = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /proc; exec "$@"', "sh", sys.executable]
    done = subprocess.run([*command, "-c", _WITHOUT_PROC, *_VERBS], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(_VERBS)
    for line in lines:
        assert "cannot be opened: no /proc is mounted there" in line
        assert line.endswith("mount it (mount -t proc proc /proc)")


def test_python_itself_finds_no_memory() -> None:
    """Where an allocation of Python's own fails there is no text at all."""

    def exhausted(*_: Any) -> None:
        raise MemoryError

    with prefault.Mapping(16 * PAGE_SIZE) as mapping:
        with pytest.raises(
            prefault.OutOfMemoryError, match=r"Python found no memory .*; 16\.0 KiB of|; 64\.0 KiB of"
        ) as caught:
            prefault.populate(mapping, progress=exhausted)
        assert caught.value.errno == errno.ENOMEM
        assert caught.value.populated_bytes == 16 * PAGE_SIZE
        assert isinstance(caught.value.__cause__, MemoryError)

        def telling(*_: Any) -> None:
            raise MemoryError("the table of the caller")

        with pytest.raises(MemoryError, match="the table of the caller"):
            prefault.populate(mapping, progress=telling)


# --- the pages


class _Address:
    """Addresses as a buffer, whatever is mapped there."""

    def __init__(self, start: int, length: int) -> None:
        self.__array_interface__ = {"data": (start, False), "shape": (length,), "typestr": "|u1", "version": 3}


def test_a_hole_is_not_a_lack_of_memory() -> None:
    with Region(3) as region:
        mman.munmap(region.address + PAGE_SIZE, PAGE_SIZE)
        with pytest.raises(prefault.HoleError) as caught:
            prefault.populate(_Address(region.address, 3 * PAGE_SIZE))
    assert caught.value.errno == errno.ENOMEM
    assert "nothing is mapped there: map it first (mmap), or populate only what is mapped" in str(caught.value)
    assert "Cannot allocate memory" not in str(caught.value)
    assert "no memory is lacking" in str(caught.value)


@pytest.mark.parametrize(
    ("prot", "access", "text"),
    [
        (0, None, "may be neither read nor written (PROT_NONE): permit it first (mprotect), or leave these pages out"),
        (0, "read", "may be neither read nor written (PROT_NONE): permit it first (mprotect), or leave these pages out"),
        (0, "write", "may be neither read nor written (PROT_NONE): permit it first (mprotect), or leave these pages out"),
        (READ, "write", "is not writable (PROT_WRITE is missing): populate it with access='read', or permit it (mprotect)"),
    ],
)
def test_a_missing_permission_says_what_to_do(prot: int, access: Any, text: str) -> None:
    with Region(2, prot) as region, pytest.raises(prefault.ProtectionError) as caught:
        prefault.populate(_Address(region.address, 2 * PAGE_SIZE), access=access)
    assert text in str(caught.value)


def test_a_guard_region_says_what_to_do() -> None:
    needs.capability(capabilities.GUARD_REGIONS)
    with Region(2, READ | WRITE) as region:
        mman.madvise(region.address + PAGE_SIZE, PAGE_SIZE, mman.MADV_GUARD_INSTALL)
        with pytest.raises(prefault.GuardPageError, match=r"leave it out, or remove the guard first \(MADV_GUARD_REMOVE\)"):
            prefault.populate(_Address(region.address, 2 * PAGE_SIZE))


# --- arguments and results


@pytest.mark.parametrize("progress", ["yes", None, 1, 0])
def test_progress_is_a_bool_or_a_function(progress: Any) -> None:
    buffer = bytearray(64 * PAGE_SIZE)
    for verb in (prefault.populate, prefault.lock):
        with pytest.raises(TypeError, match=f"progress is True, False or a function, not {type(progress).__name__}"):
            verb(buffer, progress=progress)
    with pytest.raises(TypeError, match="progress is"):
        prefault.SparseMemory("1 MiB").populate(progress=progress)


@pytest.mark.parametrize(
    ("count", "seconds", "text"),
    [
        (1 << 30, 0.1, "10.0 GiB/s"),
        (1 << 20, 0.01, "100.0 MiB/s"),
        (PAGE_SIZE, 0.0005, "7.8 MiB/s"),
        (PAGE_SIZE, 0.05, "80.0 KiB/s"),
        (1 << 20, 0.0, " TiB/s"),
    ],
)
def test_the_rate_has_the_binary_units_of_sizes(count: int, seconds: float, text: str) -> None:
    written = str(PopulateResult(count, 0, seconds, "write", "populate_write", 1))
    assert text in written


def test_a_read_only_buffer_of_writable_memory() -> None:
    """It is read by default, and populated writable where that is asked for: no byte changes either way."""
    array = numpy.empty(64 * PAGE_SIZE, "u1")
    array.flags.writeable = False
    for buffer in (array, bytes(64 * PAGE_SIZE)):
        before = ctypes.string_at(buffer, 64) if isinstance(buffer, bytes) else array.tobytes()
        assert prefault.plan(buffer).access == "read"
        assert prefault.populate(buffer, access="write").access == "write"
        assert (ctypes.string_at(buffer, 64) if isinstance(buffer, bytes) else array.tobytes()) == before
