"""Capabilities: asked by doing, explained, and switched off by name."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import threading
import weakref

import pytest

from prefault._system import capabilities
from prefault._system.capabilities import Capability
from prefault.testing import without
from support import needs, oracle


@pytest.mark.parametrize("what", capabilities.ALL, ids=lambda what: what.name)
def test_each_is_explained(what: Capability) -> None:
    assert re.fullmatch(r"[a-z_]+", what.name)
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?", what.since)
    assert what.question
    assert (what.refusal is None) == what.available
    assert repr(what) == f"Capability({what.name!r}, available={what.available})"


def test_the_list_is_complete_and_names_are_unique() -> None:
    listed = [value for value in vars(capabilities).values() if isinstance(value, Capability)]
    assert set(listed) == set(capabilities.ALL)
    assert len({what.name for what in capabilities.ALL}) == len(capabilities.ALL)


@pytest.mark.parametrize(
    "what",
    # soft-dirty bits are a choice of the kernel's builder; the pools are filled by the tests that need them.
    [what for what in capabilities.ALL if what not in (capabilities.SOFT_DIRTY, capabilities.HUGE_PAGES)],
    ids=lambda what: what.name,
)
def test_this_machine_has_it(what: Capability) -> None:
    needs.capability(what)
    assert what.available


@pytest.mark.usefixtures("no_leaks")
def test_asking_leaves_nothing() -> None:
    for what in capabilities.ALL:
        assert isinstance(Capability(what.name, what.since, what.question, what._probe).available, bool)


def _refusing(number: int) -> Capability:
    def probe() -> None:
        raise OSError(number, os.strerror(number))

    return Capability("made_up", "9.9", "a question", probe)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOTTY, errno.EOPNOTSUPP])
def test_a_refusal_is_an_answer(number: int) -> None:
    what = _refusing(number)
    assert not what.available
    assert what.refusal is not None
    assert os.strerror(number) in what.refusal


@pytest.mark.parametrize("number", [errno.EFAULT, errno.EIO, errno.EMFILE, errno.EBUSY])
def test_anything_else_is_a_defect_and_not_an_answer(number: int) -> None:
    what = _refusing(number)
    for _ in range(2):  # it is not cached either
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            _ = what.available


def test_it_is_asked_once_by_however_many_threads() -> None:
    asked = []
    gate = threading.Barrier(8)

    def probe() -> None:
        asked.append(threading.get_ident())

    what = Capability("made_up", "9.9", "a question", probe)

    def ask() -> None:
        gate.wait(30)
        assert what.available

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asked) == 1


def test_advice_23_with_another_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some vendor kernels: the call succeeds, and nothing is populated.
    monkeypatch.setattr("prefault._kernel.mman.madvise", lambda *_: None)
    what = capabilities.MADV_POPULATE
    again = Capability(what.name, what.since, what.question, what._probe)
    assert not again.available
    assert "means something else" in (again.refusal or "")


def _off(*names: str) -> set[str]:
    """Which of these are not available now."""
    return {what.name for what in capabilities.ALL if what.name in names and not what.available}


def test_a_refusal_that_is_kept_keeps_nothing_alive() -> None:
    """Asked inside of an ``except``, its context would be an exception, with the frames of all that the caller works on."""

    class Held:
        pass

    def refused() -> None:
        raise OSError(errno.EPERM, "no")

    def ask(what: Capability) -> weakref.ref[Held]:
        held = Held()
        try:
            raise TypeError
        except TypeError:
            assert not what.available
        return weakref.ref(held)

    what = Capability("some_name", "6.0", "a question", refused)
    assert ask(what)() is None
    assert what.refusal


def test_without() -> None:
    needs.capability(capabilities.PAGEMAP)
    needs.capability(capabilities.PAGEMAP_SCAN)
    both = ("pagemap", "pagemap_scan")
    with without("pagemap"):
        assert _off(*both) == {"pagemap"}
        assert capabilities.PAGEMAP.refusal == "switched off by PREFAULT_WITHOUT or a test"
        with without(*both):
            assert _off(*both) == set(both)
        assert _off(*both) == {"pagemap"}  # what the inner one did not switch off, it does not switch on
    assert _off(*both) == set()


def _asked_in_a_fresh_process(without_names: str) -> str:
    code = (
        "from prefault._system import capabilities as c;"
        " print([w.name for w in c.ALL if w.name in c.disabled and not w.available])"
    )
    environment = {**os.environ, "PREFAULT_WITHOUT": without_names}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("names", "disabled"),
    [("", "[]"), ("pagemap", "['pagemap']"), ("madv_populate, cachestat,", "['madv_populate', 'cachestat']")],
)
def test_the_environment_variable(names: str, disabled: str) -> None:
    assert _asked_in_a_fresh_process(names) == disabled


def test_a_switch_costs_no_descriptor() -> None:
    before = oracle.descriptors()
    with without(*(what.name for what in capabilities.ALL)):
        assert not any(what.available for what in capabilities.ALL)
    assert oracle.descriptors() == before
