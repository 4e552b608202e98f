"""Fork hooks of the whole package: one registration with :func:`os.register_at_fork`, whose hooks run layer by layer.

Hooks run in the order of their registration in the parent and in the child, and in the reverse order before the fork. A
module registers its hooks when it is imported, after the lower layers that it imports: before the fork the upper layers
come first, afterwards the lower ones, so that a hook finds what it stands on in order.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeVar

Hook: TypeAlias = Callable[[], object]

_T = TypeVar("_T")

_before: list[Hook] = []
_in_parent: list[Hook] = []
_in_child: list[Hook] = []


def register(*, before: Hook | None = None, in_parent: Hook | None = None, in_child: Hook | None = None) -> None:
    """Register functions that run before every fork, after it in the parent, and after it in the child."""
    for hooks, hook in ((_before, before), (_in_parent, in_parent), (_in_child, in_child)):
        if hook is not None:
            hooks.append(hook)


def instances(in_child: Callable[[_T], object]) -> weakref.WeakSet[_T]:
    """Return an empty weak set; ``in_child`` is called in a forked child for every object that is in the set then.

    An object adds itself when it is made. The set does not keep it alive.
    """
    objects: weakref.WeakSet[_T] = weakref.WeakSet()
    register(in_child=lambda: _run([_call(in_child, each) for each in list(objects)]))
    return objects


def _call(function: Callable[[_T], object], argument: _T) -> Hook:
    return lambda: function(argument)


def _run(hooks: Iterable[Hook]) -> None:
    """Call all hooks, in order, also those after one that raises; the interpreter prints what is raised in the end."""
    with contextlib.ExitStack() as stack:
        for hook in reversed(list(hooks)):
            stack.callback(hook)


os.register_at_fork(
    before=lambda: _run(reversed(_before)),
    after_in_parent=lambda: _run(_in_parent),
    after_in_child=lambda: _run(_in_child),
)
