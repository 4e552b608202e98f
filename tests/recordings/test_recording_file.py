"""The file format: what is written is read again; anything else is an error that names the file."""

from __future__ import annotations

import errno
import os
import random
import signal
import stat
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from prefault.recordings import recording_file
from prefault.recordings.recording_file import (
    RecordedArea,
    RecordedFile,
    Recording,
    RecordingError,
    load,
)
from support import needs
from support.file_beds import PAGE

FILE = RecordedFile(b"/srv/caf\xe9", "", 1, 2, 10 * PAGE, -5, [0, PAGE, 3 * PAGE, 10 * PAGE])
BELOW = RecordedFile(b"model/x", "root", 1, 3, 1, 0, [0, PAGE])
AREA = RecordedArea("RemoteFile", "https://example.org/a.npy", 100 * PAGE, "tag", [5 * PAGE, PAGE, 0, PAGE])
RECORDING = Recording("trace", 1, [b"a", b"\xff"], True, ["a note"], [FILE, BELOW], [AREA])


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff.rec")
    RECORDING.save(path)
    assert load(path) == RECORDING
    assert (RECORDING.file_bytes, RECORDING.area_bytes) == (9 * PAGE, 2 * PAGE)
    assert os.listdir(tmp_path) == [path.name]


def test_a_recording_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    RECORDING.save(tmp_path / "a.rec")
    assert (tmp_path / "a.rec").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_recording_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    RECORDING.save(path)
    broken = Recording("trace", 1 << 70, [], True, [], [], [])  # MessagePack has no such number
    with pytest.raises(OverflowError):
        broken.save(path)
    assert load(path) == RECORDING
    assert os.listdir(tmp_path) == ["a.rec"]
    with pytest.raises(FileNotFoundError, match=r"nowhere/b\.rec"):
        RECORDING.save(tmp_path / "nowhere" / "b.rec")


def test_a_device_and_a_fifo_stay_what_they_are(tmp_path: Path) -> None:
    device, fifo = tmp_path / "null", tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    RECORDING.save(fifo)
    content = os.read(reader, 1 << 16)
    os.close(reader)
    (tmp_path / "copy").write_bytes(content)
    assert load(tmp_path / "copy") == RECORDING
    assert fifo.is_fifo()
    needs.root("make a device")
    os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    RECORDING.save(device)
    assert device.is_char_device()


def test_a_link_to_a_recording_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("other/a.rec")
    for _ in range(2):  # the file of the link is made, then replaced
        RECORDING.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert load(tmp_path / "other/a.rec") == RECORDING


def test_a_full_disk_is_an_error_that_names_the_file(small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("4k")
    (directory / "filler").write_bytes(bytes(PAGE))
    with pytest.raises(OSError, match=r"No space left on device.*a\.rec"):
        RECORDING.save(directory / "a.rec")
    assert os.listdir(directory) == ["filler"]


def test_a_recording_that_is_too_long_to_be_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.rec"
    RECORDING.save(path)
    monkeypatch.setattr(recording_file, "_MOST_BYTES", 100)
    with pytest.raises(OSError, match=r"more than the limit of 100.*a\.rec"):
        RECORDING.save(path)
    with pytest.raises(RecordingError, match="longer than any"):
        load(path)
    monkeypatch.undo()
    assert load(path) == RECORDING


def test_a_saver_that_is_killed_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    RECORDING.save(path)

    program = (
        "import os, signal, sys\nfrom prefault.recordings.recording_file import load\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "load(sys.argv[1]).save(sys.argv[1])\n"
    )
    assert subprocess.run([sys.executable, "-c", program, path], check=False).returncode == -signal.SIGKILL
    assert load(path) == RECORDING
    assert os.listdir(tmp_path) == ["a.rec"]


def test_a_recording_is_saved_where_files_have_a_name_from_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS and FUSE, which refuse O_TMPFILE."""
    open_file = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return open_file(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    RECORDING.save(tmp_path / "a.rec")
    monkeypatch.undo()
    assert load(tmp_path / "a.rec") == RECORDING
    assert os.listdir(tmp_path) == ["a.rec"]


def _sealed(body: bytes) -> bytes:
    content = b"prefault recording 1\n" + body
    return content + zlib.crc32(content).to_bytes(4, "little")


def _changed(**fields: object) -> bytes:
    return _sealed(msgspec.msgpack.encode({**msgspec.to_builtins(RECORDING, builtin_types=(bytes,)), **fields}))


def _with_file(**fields: object) -> bytes:
    return _changed(files=[{**msgspec.to_builtins(FILE, builtin_types=(bytes,)), **fields}])


def _with_area(**fields: object) -> bytes:
    return _changed(areas=[{**msgspec.to_builtins(AREA, builtin_types=(bytes,)), **fields}])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no recording"),
        (b"\x7fELF", "no recording"),
        (b"prefault recording 2\nxxxx", "version '2'"),
        (b"prefault recording 1\n", "cut off"),
        (b"prefault recording 1\nabcdefgh", "checksum"),
        (_sealed(b"\xc1"), "damaged"),
        (_sealed(b"\x91" * 100_000 + b"\x90"), "damaged"),
        (_sealed(b"\xdd\xff\xff\xff\xff"), "damaged"),
        (_changed(way="guess"), "damaged"),
        (_changed(made_ns="now"), "damaged"),
        (_changed(more=1), "damaged"),
        (_changed(notes=[b"\xff"]), "damaged"),
        (_with_file(path=b""), "damaged"),
        (_with_file(path=b"/a\0b"), "NUL"),
        (_with_file(path=b"relative"), "absolute"),
        (_with_file(root="r"), "below its root"),
        (_with_file(root="r", path=b"../../etc/shadow"), "below its root"),
        (_with_file(edges=[0]), "ascend"),
        (_with_file(edges=[0, 0]), "ascend"),
        (_with_file(edges=[PAGE, 0]), "ascend"),
        (_with_file(edges=[0, PAGE, PAGE, 2 * PAGE]), "ascend"),
        (_with_file(edges=[-PAGE, PAGE]), "damaged"),
        (_with_file(edges=[0, (1 << 64) - 1]), "damaged"),
        (_with_file(edges=[0, (1 << 63) - 1]), "end at byte"),
        (_with_file(size=-1), "damaged"),
        (_with_area(runs=[0]), "lie outside"),
        (_with_area(runs=[1 << 40, PAGE]), "lie outside"),
        (_with_area(runs=[1 << 62, 1 << 62]), "lie outside"),
        (_with_area(runs=[0, -1]), "damaged"),
    ],
)
def test_what_is_no_recording_is_an_error_that_names_it(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "some.rec"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=rf"some\.rec: .*{says}"):
        load(path)


def test_hostile_recordings_pass_the_checks_or_are_an_error(tmp_path: Path) -> None:
    """Any change of the bytes with a right checksum: an error, or a recording whose numbers can be worked with."""
    path = tmp_path / "a.rec"
    RECORDING.save(path)
    body = path.read_bytes()[21:-4]
    source = random.Random(7)
    passed = 0
    for _ in range(3000):
        changed = bytearray(body)
        for _ in range(source.randint(1, 4)):
            at = source.randrange(len(changed))
            action = source.randrange(3)
            if action == 0:
                changed[at] = source.randrange(256)
            elif action == 1:
                del changed[at : at + source.randint(1, 8)]
            else:
                changed[at:at] = source.randbytes(source.randint(1, 8))
        path.write_bytes(_sealed(bytes(changed)))
        says = ""
        try:
            got = load(path)
        except RecordingError as error:
            says = str(error)
        if says:
            assert str(path) in says
        else:
            passed += 1
            for file in got.files:
                assert file.ranges.length <= file.size + (4 << 20)
                assert file.shown_path
    assert passed < 3000


def test_damaged_recordings_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    RECORDING.save(path)
    whole = path.read_bytes()
    source = random.Random(8)
    for _ in range(500):
        changed = bytearray(whole)
        changed[source.randrange(len(whole))] ^= 1 << source.randrange(8)
        path.write_bytes(changed[: source.randint(0, len(whole))] if source.random() < 0.3 else changed)
        with pytest.raises(RecordingError, match=r"a\.rec"):
            load(path)
