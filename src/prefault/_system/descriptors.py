"""Descriptors that Ctrl-C does not leak."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import Self


@contextmanager
def opened(function: Callable[..., int], *arguments: object) -> Iterator[int]:
    """Open a descriptor for the length of a block; the arguments are those of :meth:`Descriptors.open`.

    For the way of every call: it has no ``__del__``, in which Ctrl-C would be lost.
    """
    numbers: list[int] = []
    try:
        numbers.extend(map(function, *((argument,) for argument in arguments)))  # see Descriptors.open
        yield numbers[0]
    finally:
        if numbers:
            os.close(numbers[0])


class Descriptors:
    """Owns descriptors from the moment that the kernel returns them; a context manager that closes them.

    ``fd = os.open(...)`` leaks the descriptor where a signal handler raises (Ctrl-C) between the call and the assignment.
    """

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers: list[int] = []

    def open(self, function: Callable[..., int], *arguments: object) -> int:
        """Call a function, own the descriptor that it returns, and return that too.

        Args:
            function: one that is written in C and raises OSError itself, such as ``os.open``. Within one that is written in
                Python Ctrl-C could strike.
            arguments: of the function, at least one.
        """
        # One call from C to C: CPython runs signal handlers only between the steps of Python code.
        self._numbers.extend(map(function, *((argument,) for argument in arguments)))
        return self._numbers[-1]

    def pop(self) -> int:
        """Give up the ownership of the descriptor that was opened last, and return it."""
        return self._numbers.pop()

    def close(self) -> None:
        """Close all of them. Idempotent."""
        numbers = self._numbers
        list(map(os.close, map(list.pop, repeat(numbers, len(numbers)))))  # from C to C again

    @property
    def first(self) -> int | None:
        """The descriptor that was opened first; None where none is open."""
        return self._numbers[0] if self._numbers else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        # After Ctrl-C at the entry of __exit__ or close; before __init__ has run there is no list. At interpreter exit the
        # functions may be gone.
        with contextlib.suppress(TypeError, AttributeError):
            if self._numbers:
                self.close()
