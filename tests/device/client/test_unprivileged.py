"""An ordinary user, and a sandbox: what then works, what fails, and what is said of it."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefault
import prefault.device
from prefault.device.client.fault_descriptor import open_userfaultfd
from prefault.errors import DeviceError
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE
from prefault.testing import without
from support import needs
from support.children import in_child
from support.devices import Pattern, expected

_NOBODY = 65534

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_SECCOMP_RET_ALLOW, _SECCOMP_RET_ERRNO = 0x7FFF0000, 0x00050000


def _forbid(number: int, answer: int) -> None:
    """From now on the system call ``number`` fails with the errno ``answer``, as a container's seccomp profile does it."""
    program = b"".join(
        struct.pack("=HBBI", code, yes, no, value)
        for code, yes, no, value in (
            (0x20, 0, 0, 0),  # load the number of the call
            (0x15, 0, 1, number),  # equal?
            (0x06, 0, 0, _SECCOMP_RET_ERRNO | answer),
            (0x06, 0, 0, _SECCOMP_RET_ALLOW),
        )
    )
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("=H6xQ", 4, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header)) == 0


def _become_nobody() -> None:
    os.setgroups([])
    os.setgid(_NOBODY)
    os.setuid(_NOBODY)


def _as_nobody(function: Callable[[], Any]) -> Any:
    if os.geteuid() != 0:
        return function()

    def run() -> Any:
        _become_nobody()
        return function()

    return in_child(run)


def test_an_ordinary_user_maps_devices_and_is_told_what_fails() -> None:
    def use() -> tuple[bool, tuple[str, ...], int, int, bytes]:
        device = Pattern(4)
        with prefault.device.map(device) as area:
            reader, writer = os.pipe()
            view = area.memoryview()
            try:
                os.write(writer, view[:PAGE_SIZE])
                failed = 0
            except OSError as error:
                failed = error.errno or -1
            area.populate()
            wrote = os.write(writer, view[:PAGE_SIZE])
            content = os.read(reader, PAGE_SIZE)
            view.release()
            return area.user_mode_only, area.notes, failed, wrote, content

    user_mode_only, notes, failed, wrote, content = _as_nobody(use)
    assert wrote == PAGE_SIZE
    assert content == expected(Pattern(4), 0)
    if user_mode_only:
        assert failed == errno.EFAULT
        assert any("EFAULT" in note and "vm.unprivileged_userfaultfd" in note for note in notes)
    else:  # the administrator allows it
        assert failed == 0
        assert not any("EFAULT" in note for note in notes)


def test_root_answers_faults_of_the_kernel_too() -> None:
    needs.root("answer page faults that the kernel raises")
    with prefault.device.map(Pattern(4)) as area:
        assert not area.user_mode_only
        reader, writer = os.pipe()
        try:
            with area.memoryview() as view:
                assert os.write(writer, view[:PAGE_SIZE]) == PAGE_SIZE
            assert os.read(reader, PAGE_SIZE) == expected(Pattern(4), 0)
        finally:
            os.close(reader)
            os.close(writer)


@pytest.mark.parametrize("answer", [errno.EPERM, errno.ENOSYS])
def test_where_a_sandbox_forbids_it_the_message_names_the_setting(answer: int) -> None:
    from prefault._kernel.userfaultfd import NR_USERFAULTFD

    needs.root("become another user, who may not open /dev/userfaultfd")

    def refused() -> tuple[str, int | None]:
        _become_nobody()
        _forbid(NR_USERFAULTFD, answer)
        try:
            prefault.device.map(Pattern(4))
        except DeviceError as error:
            return str(error), error.errno
        return "", 0

    message, number = in_child(refused)
    assert "seccomp profile" in message
    assert "/dev/userfaultfd" in message
    assert number == answer


def test_as_on_a_kernel_without_userfaultfd() -> None:
    with without("userfaultfd"), pytest.raises(DeviceError, match="CONFIG_USERFAULTFD"):
        prefault.device.map(Pattern(4))


def test_a_connection_that_finds_no_userfaultfd_is_closed(tmp_path: Path, no_leaks: None) -> None:
    server = prefault.device.serve(Pattern(4), tmp_path / "s")
    with server, without("userfaultfd"), pytest.raises(DeviceError, match="CONFIG_USERFAULTFD"):
        prefault.device.connect(server.path)


def test_the_handshake_asks_for_what_there_is() -> None:
    from prefault._kernel.userfaultfd import UffdFeature

    for tracking in (False, True):
        opened = open_userfaultfd(tracking=tracking)
        try:
            assert opened.features & UffdFeature.MISSING_SHMEM
            assert not opened.features & UffdFeature.WP_ASYNC or tracking
            assert not os.get_inheritable(opened.fd)
            assert not os.get_blocking(opened.fd)
        finally:
            os.close(opened.fd)


@pytest.mark.parametrize(("name", "lacks"), [("uffd_poison", "UFFDIO_POISON"), ("uffd_minor_shmem", "minor faults")])
def test_a_kernel_without_a_needed_feature_is_refused(name: str, lacks: str) -> None:
    with without(name), pytest.raises(DeviceError, match=lacks):
        prefault.device.map(Pattern(4))


def test_as_on_a_kernel_that_answers_no_faults_of_its_own() -> None:
    with without("uffd_kernel_faults"), prefault.device.map(Pattern(4)) as area:
        assert area.user_mode_only
        assert area.notes


@pytest.mark.parametrize("name", ["uffd_wp_async", "pagemap_scan"])
def test_dirty_pages_where_the_kernel_does_not_note_them(name: str) -> None:
    with without(name), prefault.device.map(Pattern(4, writable=True), track_dirty=True) as area:
        with area.memoryview() as view:
            view[PAGE_SIZE] = 1
            assert area.dirty_pages(clear=True) == RangeSet([PageRange(PAGE_SIZE, 2 * PAGE_SIZE)])
            assert not area.dirty_pages()
            view[PAGE_SIZE] = 2
            assert area.dirty_pages() == RangeSet([PageRange(PAGE_SIZE, 2 * PAGE_SIZE)])
        assert area.stats().write_protect == 1  # the server answered a fault for it


def test_as_on_a_kernel_without_write_protection_of_shared_memory() -> None:
    with without("uffd_wp_shmem"), prefault.device.map(Pattern(4, writable=True)) as area:
        assert area.read(0, 8) == expected(Pattern(4), 0)[:8]
        with pytest.raises(DeviceError, match="write-protection of shared memory"):
            prefault.device.map(Pattern(4, writable=True), track_dirty=True)
