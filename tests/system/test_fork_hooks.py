"""Fork hooks: their order, weak instances, and that one that raises stops no other."""

from __future__ import annotations

import ast
import gc
import os
from functools import partial
from pathlib import Path

import pytest

import prefault
from prefault._system import fork_hooks
from support.children import in_child


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hooks of two layers, registered for this test only; the calls of them in this process."""
    for name in ("_before", "_in_parent", "_in_child"):
        monkeypatch.setattr(fork_hooks, name, list(getattr(fork_hooks, name)))
    made: list[str] = []
    for layer in ("lower", "upper"):
        moments = (f"{layer} {moment}" for moment in ("before", "in parent", "in child"))
        before, in_parent, after = (partial(made.append, moment) for moment in moments)
        fork_hooks.register(before=before, in_parent=in_parent, in_child=after)
    return made


def test_the_upper_layer_comes_first_before_a_fork_and_last_after_it(calls: list[str]) -> None:
    assert in_child(lambda: calls) == ["upper before", "lower before", "lower in child", "upper in child"]
    assert calls == ["upper before", "lower before", "lower in parent", "upper in parent"]


class _Thing:
    def __init__(self, name: str) -> None:
        self.name = name
        self.forked = False

    def after_fork(self) -> None:
        self.forked = True


def test_instances_are_called_in_the_child_and_not_kept_alive(calls: list[str]) -> None:
    things = fork_hooks.instances(_Thing.after_fork)
    kept, lost = _Thing("kept"), _Thing("lost")
    things.add(kept)
    things.add(lost)
    assert in_child(lambda: sorted(thing.name for thing in things if thing.forked)) == ["kept", "lost"]
    assert not kept.forked
    del lost
    gc.collect()
    assert [thing.name for thing in things] == ["kept"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_hook_that_raises_stops_no_other(calls: list[str]) -> None:
    def fail() -> None:
        raise RuntimeError("of a hook")

    fork_hooks.register(before=fail, in_parent=fail, in_child=fail)
    fork_hooks.register(in_child=lambda: calls.append("last"))
    assert in_child(lambda: calls)[-3:] == ["lower in child", "upper in child", "last"]
    assert calls[-1] == "upper in parent"


def test_nothing_else_registers_at_fork() -> None:
    root = Path(os.path.dirname(prefault.__file__))
    found = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "register_at_fork"
    ]
    assert found == ["_system/fork_hooks.py"]
