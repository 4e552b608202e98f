"""Opening of files: kinds, names, permissions, access times."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefault.files.failures import FileError, FileFailure
from prefault.files.open_file import OpenFile
from support import file_beds, needs, oracle
from support.children import Child


def test_facts_of_a_file(tmp_path: Path) -> None:
    path = file_beds.make(tmp_path / "file", 10_000)
    with OpenFile(path) as file:
        status = path.stat()
        assert (file.path, file.size, file.identity) == (str(path), 10_000, (status.st_dev, status.st_ino))
        assert file.modified_ns == status.st_mtime_ns
        told = subprocess.run(["stat", "--file-system", "--format=%T", path], capture_output=True, text=True, check=True)
        assert file.file_system == told.stdout.strip().replace("ext2/ext3", "ext4")
        assert not os.get_inheritable(file.fd)
        path.write_bytes(b"less")
        assert (file.size, file.current_size(), file.size) == (10_000, 4, 4)
    assert file.fd == -1
    file.close()


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/a\xff\xfe\nb"
    Path(os.fsdecode(name)).write_bytes(b"x")
    for path in (name, os.fsdecode(name), Path(os.fsdecode(name))):
        with OpenFile(path) as file:
            assert os.fsencode(file.path) == name


def test_what_is_no_file_is_refused_without_being_opened(tmp_path: Path) -> None:
    before = oracle.descriptors()
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name, word in (
            ("fifo", "a FIFO"),
            ("socket", "a socket"),
            ("", "a directory"),
            ("/dev/null", "a character device"),
        ):
            with pytest.raises(FileError, match=word) as caught:
                OpenFile(tmp_path / name)
            assert str(tmp_path / name) in str(caught.value)
    assert oracle.descriptors() == before


def test_missing_and_unreadable_files_and_loops_name_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, word in (("none", "check the path"), ("loop", "loop")):
        with pytest.raises(OSError) as caught:  # noqa: PT011  the remedy is checked
            OpenFile(tmp_path / name)
        failure = FileFailure.of(name, caught.value)
        assert failure.path == name
        assert word in failure.remedy
        assert str(failure).startswith(f"{name}: E")


def test_another_users_file(tmp_path: Path) -> None:
    needs.root("become another user")
    path = file_beds.make(tmp_path / "file", 1)
    secret = file_beds.make(tmp_path / "secret", 1)
    secret.chmod(0o600)
    for directory in (tmp_path, *tmp_path.parents):
        if directory == tmp_path or directory.name.startswith(("pytest-", "popen-")):
            directory.chmod(0o755)

    def look() -> tuple[int, int]:
        os.setresuid(file_beds.NOBODY, file_beds.NOBODY, file_beds.NOBODY)
        with OpenFile(path) as file:  # O_NOATIME is refused: opened without
            size = file.size
        try:
            OpenFile(secret)
        except PermissionError as error:
            return size, error.errno or 0
        return size, 0

    with Child(look) as child:
        assert child.result() == (1, 13)


def test_access_time_stays(tmp_path: Path) -> None:
    with file_beds.mounted(tmp_path / "strict", "-t", "tmpfs", "-o", "strictatime,size=1m", "prefault-test") as directory:
        path = file_beds.make(directory / "file", 10)
        before = path.stat().st_atime_ns
        time.sleep(0.02)
        with OpenFile(path) as file:
            os.pread(file.fd, 10, 0)
        assert path.stat().st_atime_ns == before
        path.read_bytes()
        assert path.stat().st_atime_ns > before  # the file system does keep access times


def test_block_devices_have_a_size(tmp_path: Path) -> None:
    image = file_beds.make(tmp_path / "image", 1 << 20)
    with file_beds.loop_device(image) as device, OpenFile(device) as file:
        assert (file.size, file.file_system, file.current_size()) == (1 << 20, "block device", 1 << 20)


def test_ranges_are_rounded_to_pages_and_cut_at_the_end(tmp_path: Path) -> None:
    page = file_beds.PAGE
    with OpenFile(file_beds.make(tmp_path / "file", 3 * page + 1)) as file:
        assert file.pages() == (0, 4 * page)
        assert file.pages(1, 2) == (0, page)
        assert file.pages(page, 2**62) == (page, 4 * page)
        assert not file.pages(2**62)
        assert not file.pages(5, 5)
        for start, stop in ((-1, 5), (6, 5), (0, 2**63)):
            with pytest.raises(ValueError, match="not a range"):
                file.pages(start, stop)


def test_hugetlbfs(tmp_path: Path, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    with file_beds.mounted(tmp_path / "huge", "-t", "hugetlbfs", "prefault-test") as directory:
        path = directory / "file"
        with path.open("wb") as made:
            made.truncate(2 * needs.HUGE)
        with OpenFile(path) as file:
            assert (file.file_system, file.page_size) == ("hugetlbfs", needs.HUGE)
            assert file.pages(1, 2) == (0, needs.HUGE)
