"""Fixtures that change the machine, and put it back; the table of skipped tests."""

from __future__ import annotations

import gc
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from prefault._system import hugetlb, thp
from support import needs, oracle, run_again, signals
from support.cgroups import Group, groups
from support.machine_lock import MachineLock, put_first, runs_alone
from support.reclaim_trace import ReclaimTrace, TakenAwayError
from support.run_again import pytest_report_teststatus, pytest_runtest_protocol
from support.skips import pytest_terminal_summary

__all__ = ["pytest_report_teststatus", "pytest_runtest_protocol", "pytest_terminal_summary"]


# No timed assertions, of a library neither: the machine may be busy.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")

_reclaim_trace = pytest.StashKey[ReclaimTrace]()


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_reclaim_trace] = ReclaimTrace()


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_reclaim_trace].close()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Have a failed test run again if the kernel took cached pages of its files away meanwhile."""
    began = time.monotonic()
    try:
        return (yield)
    except AssertionError as error:
        directory = pyfuncitem.funcargs.get("tmp_path")
        if isinstance(directory, Path):
            taken = pyfuncitem.config.stash[_reclaim_trace].taken(directory, began)
            if taken:
                run_again.allow(pyfuncitem)
                raise TakenAwayError(f"proactive reclaim took {taken} pages of this test's files away") from error
        raise


@pytest.fixture(scope="session", autouse=True)
def _signals_are_not_ignored() -> Iterator[None]:
    """Ctrl-C and a hangup do in every test, and in every program that a test starts, what they do at a terminal."""
    with signals.not_ignored():
        yield


@pytest.fixture(scope="session")
def _session_lock() -> Iterator[MachineLock]:
    lock = MachineLock(Path(tempfile.gettempdir()))
    yield lock
    lock.close()


_keeps_lock = pytest.StashKey[bool]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    put_first(items)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # tests and their modules stay to the end: else each gc.collect() of a test looks at them again


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    item.session.stash[_keeps_lock] = nextitem is not None and runs_alone(item) and runs_alone(nextitem)


@pytest.fixture(autouse=True)
def machine_lock(_session_lock: MachineLock, request: pytest.FixtureRequest) -> Iterator[MachineLock]:
    """The lock by which a fixture that changes settings of the machine has its test run alone."""
    if runs_alone(request.node):
        _session_lock.be_alone()
    else:
        _session_lock.share()
    yield _session_lock
    if not request.session.stash[_keeps_lock]:
        _session_lock.release()


@pytest.fixture
def thp_setting(machine_lock: MachineLock) -> Iterator[Callable[[str, str], None]]:
    """A function that changes a setting of transparent huge pages; restored afterwards."""
    needs.root("change the settings of transparent huge pages")
    machine_lock.be_alone()
    before: dict[str, str] = {}

    def change(name: str, word: str) -> None:
        chosen = thp.read_setting(name)
        if chosen is None:
            needs.missing(f"the kernel has no setting {name} of transparent huge pages")
        before.setdefault(name, chosen)
        _write_thp_setting(name, word)

    yield change
    for name, word in before.items():
        _write_thp_setting(name, word)


def _write_thp_setting(name: str, word: str) -> None:
    Path("/sys/kernel/mm/transparent_hugepage", name).write_text(word)


@pytest.fixture
def make_group() -> Iterator[Callable[..., Group]]:
    """A function that makes a memory cgroup with a limit; removed afterwards."""
    with groups() as make:
        yield make


@pytest.fixture
def hugetlb_pool(machine_lock: MachineLock) -> Iterator[Callable[[int], None]]:
    """A function that makes the pool of 2 MiB pages exactly as large as asked; restored afterwards."""
    if needs.HUGE not in hugetlb.page_sizes():
        needs.missing("the kernel has no huge pages of 2 MiB")
    needs.root("resize the hugetlb pool")
    machine_lock.be_alone()
    before = hugetlb.read_pool(needs.HUGE)
    in_use = before.total - before.free

    def resize(pages: int) -> None:
        gc.collect()
        got = hugetlb.resize_pool(needs.HUGE, in_use + before.reserved + pages)
        if got < in_use + pages:
            needs.missing(f"the kernel found no {pages} huge pages: memory is fragmented")

    yield resize
    gc.collect()
    hugetlb.resize_pool(needs.HUGE, before.total)


@pytest.fixture
def small_tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts a tmpfs of a size (``"64k"``) and gives its directory; unmounted afterwards."""
    needs.root("mount a tmpfs")
    mounted: list[Path] = []

    def mount(size: str) -> Path:
        directory = tmp_path / f"tmpfs{len(mounted)}"
        directory.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "prefault-test", directory], capture_output=True, text=True
        )
        if done.returncode:
            needs.missing(f"a tmpfs cannot be mounted: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount
    gc.collect()
    for directory in mounted:
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """The test leaves no descriptor and no mapping behind."""
    gc.collect()
    gc.freeze()  # what is there by now: else to collect takes 50 ms, twice a test
    before, mappings = oracle.descriptors(), oracle.mappings()
    yield
    gc.collect()
    # Some files of /proc and of our cgroups are opened once and kept (prefault._system.kept_files).
    left = {line for line in oracle.descriptors() - before if not re.search(r" (/proc|/sys/fs/cgroup)/", line)}
    assert not left
    # The allocator and the interpreter may map an arena or two of their own.
    assert oracle.mappings() <= mappings + 8
