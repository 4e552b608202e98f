"""SharedMemory: as the standard class, and the memory is there when the constructor returns."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import pickle
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

import numpy
import pytest

import prefault
from prefault import SharedMemory
from prefault.shared_memory import named_memory, nameless_files
from support import oracle, own_dev_shm, processes
from support.cgroups import groups
from support.children import in_child
from support.machine_lock import MachineLock

_SIZE = 64 << 10
_DIRECTORY = Path("/dev/shm")

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture(autouse=True, scope="module")
def _tracker() -> Iterator[None]:
    """A resource tracker that runs before the first test, and ends after the last."""
    resource_tracker.ensure_running()
    yield
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory: Any = SharedMemory(create=True, size=_SIZE)
    yield memory
    memory.close()
    memory.unlink()


@pytest.fixture
def nothing_left(machine_lock: MachineLock) -> Iterator[Callable[[], set[str]]]:
    """The test leaves no name in /dev/shm. Its value tells which names there are of this test, and of programs it starts.

    Other tests make some meanwhile: the files of this one have a group of their own.
    """
    group = os.getegid()
    if os.geteuid():
        machine_lock.be_alone()
    else:
        os.setegid(0x6000_0000 + os.getpid())
    try:
        before = _names()
        yield lambda: _names() - before
        assert _names() <= before
    finally:
        if os.getegid() != group:
            os.setegid(group)


def _names() -> set[str]:
    found = set()
    for entry in os.scandir(_DIRECTORY):
        with contextlib.suppress(FileNotFoundError):
            if entry.stat(follow_symlinks=False).st_gid == os.getegid():
                found.add(entry.name)
    return found


def _own(name: str | None) -> str | None:
    """Return a name with the number of this process, as another one may run the same test; None stays None."""
    return name and f"prefault-test-{name}-{os.getpid()}"


def _address(memory: Any) -> int:
    return int(numpy.frombuffer(memory.buf, "uint8").ctypes.data)


def _allocated(name: str) -> int:
    return (_DIRECTORY / name).stat().st_blocks * 512


# --- what the constructor promises


def test_all_pages_are_present(memory: Any) -> None:
    assert all(oracle.present(_address(memory), _SIZE))
    assert _allocated(memory.name) == _SIZE
    assert memory.populated is not None
    assert memory.populated.bytes == _SIZE


def test_the_oracle_sees_that_the_standard_class_allocates_nothing() -> None:
    standard = shared_memory.SharedMemory(create=True, size=_SIZE)
    try:
        assert not any(oracle.present(_address(standard), _SIZE))
        assert _allocated(standard.name) == 0
    finally:
        standard.close()
        standard.unlink()


def test_memory_without_page_tables() -> None:
    memory = SharedMemory(create=True, size=_SIZE, populate=False)
    try:
        assert _allocated(memory.name) == _SIZE
        assert not any(oracle.present(_address(memory), _SIZE))
        assert memory.populated is None
    finally:
        memory.close()
        memory.unlink()


def test_no_fault_in_the_creator(memory: Any) -> None:
    array = numpy.frombuffer(memory.buf, "uint8")
    array[:1] = 1
    before = oracle.minor_faults()
    array[:] = 2
    assert oracle.minor_faults() - before <= 2  # 16 without, and one or two of numpy's own


@pytest.mark.parametrize("size", [1, 4096, 5000, "64 KiB"])
def test_size_is_not_rounded(size: int | str) -> None:
    expected = prefault.parse_size(size)
    memory: Any = SharedMemory(create=True, size=size)
    try:
        assert memory.size == len(memory.buf) == expected == (_DIRECTORY / memory.name).stat().st_size
    finally:
        memory.close()
        memory.unlink()


def test_it_is_locked(memory: Any) -> None:
    attached = SharedMemory(memory.name, locked=True)
    assert "lo" in oracle.vma_flags(_address(attached))
    assert oracle.smaps(_address(attached))["Rss"] == _SIZE
    assert "lo" not in oracle.vma_flags(_address(memory))
    attached.close()


@pytest.mark.parametrize("huge", ["never", "advise"])
def test_huge_pages(huge: str) -> None:
    code = f"""
import numpy, prefault
from support import oracle
memory = prefault.SharedMemory(create=True, size="8 MiB", huge={huge!r})
print(oracle.smaps(numpy.frombuffer(memory.buf, "uint8").ctypes.data)["ShmemPmdMapped"])
memory.close()
memory.unlink()
"""
    expected = 8 << 20 if huge == "advise" else 0
    assert own_dev_shm.output(code, size="32m", options="huge=advise") == f"{expected}\n"


def test_huge_pages_that_the_mount_forbids() -> None:
    code = """
import os, prefault
try:
    prefault.SharedMemory(create=True, size="8 MiB", huge="advise")
except prefault.HugePagesError as error:
    print(error, os.listdir("/dev/shm"))
"""
    assert "remount it (mount -o remount,huge=advise /dev/shm)" in own_dev_shm.output(code, size="32m", options="huge=never")


# --- as the standard class


def test_attributes_are_those_of_the_standard_class(memory: Any) -> None:
    standard = shared_memory.SharedMemory(create=True, size=_SIZE)
    try:
        extra = {"populated"} | ({"_track"} if sys.version_info < (3, 13) else set())
        assert vars(memory).keys() - extra == vars(standard).keys()
        for key, value in vars(standard).items():
            assert type(vars(memory)[key]) is type(value), key
        assert vars(memory)["_flags"] == standard._flags  # type: ignore[attr-defined]
        assert (_DIRECTORY / memory.name).stat().st_mode == (_DIRECTORY / standard.name).stat().st_mode
        assert repr(memory) == f"SharedMemory({memory.name!r}, size={_SIZE})"
    finally:
        standard.close()
        standard.unlink()


@pytest.mark.parametrize(
    ("creator", "attacher"), [(SharedMemory, shared_memory.SharedMemory), (shared_memory.SharedMemory, SharedMemory)]
)  # fmt: skip
def test_both_classes_attach_to_each_other(creator: Any, attacher: Any) -> None:
    name = f"prefault-test-both-{os.getpid()}"
    first = creator(name, create=True, size=_SIZE)
    try:
        second: Any = attacher(name)
        first.buf[100] = 7
        assert (second.buf[100], second.size, second.name) == (7, _SIZE, name)
        second.close()
    finally:
        first.close()
        first.unlink()
    assert not (_DIRECTORY / name).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"create": True, "size": 0},
        {"create": True, "size": -1},
        {"create": True},
        {},
        {"size": 4096},
        {"name": "missing"},
        {"name": "a/b", "create": True, "size": 4096},
        {"name": "x" * 256, "create": True, "size": 4096},
        {"name": "", "create": True, "size": 4096},
        {"name": "taken", "create": True, "size": 4096},
        {"name": "none", "create": True, "size": 1 << 62},
    ],
    ids=str,
)
@pytest.mark.usefixtures("nothing_left")
def test_errors_are_of_the_same_kind(arguments: dict[str, Any]) -> None:
    taken = shared_memory.SharedMemory(_own("taken"), create=True, size=1)
    if arguments.get("name") in ("missing", "taken", "none"):
        arguments = arguments | {"name": _own(arguments["name"])}
    try:
        with pytest.raises((OSError, ValueError)) as theirs:
            shared_memory.SharedMemory(**arguments)
        with pytest.raises(theirs.type) as ours:
            SharedMemory(**arguments)
        if isinstance(theirs.value, OSError) and arguments.get("size") != 1 << 62 and len(arguments["name"]) < 256:
            assert isinstance(ours.value, OSError)
            assert ours.value.errno == theirs.value.errno
    finally:
        taken.close()
        taken.unlink()


def test_pickles(memory: Any) -> None:
    memory.buf[5] = 9
    copy: Any = pickle.loads(pickle.dumps(memory))
    assert (copy.name, copy.size, copy.buf[5], copy._track) == (memory.name, _SIZE, 9, True)
    assert type(copy) is SharedMemory
    copy.close()


def test_pickles_keep_that_it_is_not_tracked() -> None:
    memory = SharedMemory(create=True, size=_SIZE, track=False)
    copy: Any = pickle.loads(pickle.dumps(memory))
    assert copy._track is False
    copy.close()
    memory.close()
    memory.unlink()


def _write(memory: Any, at: int) -> None:
    memory.buf[at] = at
    memory.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_that_is_given_it(memory: Any, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=_write, args=(memory, 77))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    process.close()
    assert memory.buf[77] == 77


def test_a_shareable_list_in_it() -> None:
    listed: Any = shared_memory.ShareableList([1, "two", 3.0])
    attached = SharedMemory(listed.shm.name, populate=True)
    again: Any = shared_memory.ShareableList(name=attached.name)
    assert list(again) == [1, "two", 3.0]
    attached.close()
    again.shm.close()
    listed.shm.close()
    listed.shm.unlink()


def test_closing_while_there_is_a_view(memory: Any) -> None:
    view = memory.buf[:16]
    with pytest.raises(BufferError):
        memory.close()
    view.release()


# --- failures


_STANDARD_DIES = """
from multiprocessing import resource_tracker, shared_memory
memory = shared_memory.SharedMemory(create=True, size=8 << 20)
print("created", flush=True)
for at in range(0, memory.size, 4096):
    memory.buf[at] = 1
"""

_OURS_RAISES = """
import os, prefault
try:
    prefault.SharedMemory(create=True, size=8 << 20, headroom={headroom!r}, populate={populate})
except prefault.PopulateError as error:
    print(type(error).__name__, os.listdir("/dev/shm"), os.statvfs("/dev/shm").f_bfree * 4096, error)
memory = prefault.SharedMemory(create=True, size=1 << 20)
memory.buf[:] = bytes([1]) * (1 << 20)
memory.close()
memory.unlink()
"""


def test_full_dev_shm_kills_the_standard_class() -> None:
    done = own_dev_shm.run(_STANDARD_DIES, size="2m")
    assert (done.stdout, done.returncode) == ("created\n", -signal.SIGBUS)


@pytest.mark.parametrize("populate", [True, False])
@pytest.mark.parametrize(("headroom", "error"), [("check", "HeadroomError"), ("ignore", "BackingFullError")])
def test_full_dev_shm_is_an_exception(headroom: str, error: str, populate: bool) -> None:
    text = own_dev_shm.output(_OURS_RAISES.format(headroom=headroom, populate=populate), size="2m")
    assert text.startswith(f"{error} [] {2 << 20} ")
    assert "/dev/shm" in text
    assert "2.0 MiB" in text
    assert "mount -o remount,size=" in text


@pytest.mark.usefixtures("nothing_left")
def test_a_memory_cgroup_is_an_exception() -> None:
    def create() -> str:
        with pytest.raises(prefault.HeadroomError) as caught:
            SharedMemory(create=True, size="256 MiB")
        return str(caught.value)

    with groups() as make:
        group = make(64 << 20)
        text = in_child(group.inside(create))
        assert group.killed == 0
    assert str(group.directory) in text


def _stop_at_populate(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", [None, "stopped"])
@pytest.mark.parametrize("nameless", [True, False])
@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_leaves_nothing(monkeypatch: pytest.MonkeyPatch, name: str | None, nameless: bool) -> None:
    if not nameless:
        monkeypatch.setattr(nameless_files, "create_nameless", lambda: None)
    monkeypatch.setattr(named_memory, "populate", _stop_at_populate)
    with pytest.raises(KeyboardInterrupt):
        SharedMemory(_own(name), create=True, size=_SIZE)


@pytest.mark.parametrize("name", [None, "named"])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.usefixtures("nothing_left")
def test_ctrl_c_right_after_it_got_its_name(monkeypatch: pytest.MonkeyPatch, name: str | None, track: bool) -> None:
    def give_name(fd: int, chosen: str) -> None:
        named(fd, chosen)
        raise KeyboardInterrupt

    named = nameless_files.give_name
    monkeypatch.setattr(nameless_files, "give_name", give_name)
    with pytest.raises(KeyboardInterrupt):
        SharedMemory(_own(name), create=True, size=_SIZE, track=track)


@pytest.mark.parametrize("name", [None, "plain"])
def test_without_o_tmpfile(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.setattr(os, "O_TMPFILE", os.O_RDWR | os.O_DIRECTORY)  # EISDIR: the answer of old kernels
    assert nameless_files.create_nameless() is None
    memory = SharedMemory(_own(name), create=True, size=_SIZE)
    assert all(oracle.present(_address(memory), _SIZE))
    memory.close()
    memory.unlink()
    assert not (_DIRECTORY / memory.name).exists()


_KILLED = """
import os, signal
import prefault
from prefault.shared_memory import nameless_files
give_name = nameless_files.give_name
def kill(fd, name):
    if {after}:
        give_name(fd, name)
    print(os.fstat(fd).st_blocks * 512, os.path.exists("/dev/shm" + name), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
nameless_files.give_name = kill
prefault.SharedMemory(create=True, size={size})
"""


@pytest.mark.parametrize("after", [False, True])
def test_sigkill_leaves_nothing(after: bool, nothing_left: Callable[[], set[str]]) -> None:
    code = _KILLED.format(after=after, size=_SIZE)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == f"{_SIZE} {after}\n"
    # The resource tracker, which outlives it for a moment, removes the name.
    assert processes.eventually(lambda: not nothing_left())


# --- the resource tracker


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("module", ["prefault", "multiprocessing.shared_memory"])
def test_a_forgotten_name_is_removed_and_told(module: str) -> None:
    name = f"prefault-test-leak-{os.getpid()}"
    errors = _run(f"from {module} import SharedMemory; SharedMemory({name!r}, create=True, size=4096)")
    assert "leaked shared_memory objects" in errors
    assert not (_DIRECTORY / name).exists()


def test_a_name_that_is_not_tracked_stays() -> None:
    name = _DIRECTORY / f"prefault-test-stays-{os.getpid()}"
    errors = _run(f"import prefault; prefault.SharedMemory({name.name!r}, create=True, size=4096, track=False)")
    try:
        assert errors == ""
        assert name.exists()
        # Another program attaches, and ends: the memory stays.
        assert _run(f"import prefault; prefault.SharedMemory({name.name!r}, track=False)") == ""
        assert name.exists()
        assert _run(f"import prefault; prefault.SharedMemory({name.name!r}, track=False).unlink()") == ""
        assert not name.exists()
    finally:
        name.unlink(missing_ok=True)


_ATTACHES_UNTRACKED = """
import os, prefault
memory = prefault.SharedMemory(create=True, size=4096)
if os.fork() == 0:
    prefault.SharedMemory(memory.name, track=False).close()
    os._exit(0)
os.wait()
memory.close()
memory.unlink()
"""


def test_attaching_untracked_leaves_the_creators_registration() -> None:
    assert _run(_ATTACHES_UNTRACKED) == ""  # else the tracker writes a KeyError


@pytest.mark.parametrize("track", [True, False])
def test_use_and_unlink_is_silent(track: bool) -> None:
    assert _run(f"import prefault as p; m = p.SharedMemory(create=True, size=1, track={track}); m.close(); m.unlink()") == ""


@pytest.mark.usefixtures("nothing_left")
def test_a_name_that_is_no_utf8_leaves_no_file() -> None:
    with pytest.raises(UnicodeEncodeError):  # as the standard class, for the resource tracker could not remove it
        SharedMemory("prefault-test-\udcff", create=True, size=_SIZE)


@pytest.mark.usefixtures("nothing_left")
def test_a_size_beyond_the_address_space() -> None:
    with pytest.raises(prefault.MappingError, match=r"shared memory of 4.0 EiB cannot be mapped: RLIMIT_AS .* \[ENOMEM"):
        SharedMemory(create=True, size=1 << 62)


def test_a_name_with_a_null_character() -> None:
    with pytest.raises(ValueError, match="null"):  # the standard class of 3.11 takes what comes before it
        SharedMemory("prefault-test-\0", create=True, size=1)


@pytest.mark.parametrize(
    "options",
    [{"huge": "always"}, {"populate": False, "locked": True}, {"populate": False, "huge": "advise"}, {"headroom": "no"}],
    ids=str,
)
@pytest.mark.usefixtures("nothing_left")
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"huge is|take effect|headroom is"):
        SharedMemory(create=True, size=_SIZE, **options)


def test_attaching_populates_when_asked(memory: Any) -> None:
    plain, populated = SharedMemory(memory.name), SharedMemory(memory.name, populate=True)
    assert not any(oracle.present(_address(plain), _SIZE))
    assert all(oracle.present(_address(populated), _SIZE))
    plain.close()
    populated.close()


def _collisions() -> Callable[[int], str]:
    words = itertools.chain([f"{_own('psm')}"] * 3, itertools.repeat(f"{_own('psm')}-new"))
    return lambda _: next(words)


def test_a_random_name_that_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", _collisions())
    first = SharedMemory(create=True, size=1)
    second = SharedMemory(create=True, size=1)
    assert (first.name, second.name) == (f"psm_{_own('psm')}", f"psm_{_own('psm')}-new")
    for memory in (first, second):
        memory.close()
        memory.unlink()
