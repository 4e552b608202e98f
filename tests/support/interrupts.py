"""Ctrl-C at a chosen line: a trace function that raises KeyboardInterrupt there."""

from __future__ import annotations

import linecache
import types
from collections.abc import Callable, Collection
from typing import Any


def strike_at(
    count: int, files: Collection[str], *, spared: Collection[str] = (), at_line: Callable[[], object] = lambda: None
) -> Callable[..., Any]:
    """Return a function for sys.settrace that raises KeyboardInterrupt at the ``count``-th line that runs in ``files``.

    Args:
        count: number of the line, from 1 on. Fewer lines run: nothing is raised.
        files: paths of modules.
        spared: texts of lines that are not counted. Python handles signals after calls: none comes between the end of a
            block and the first call of what ends it, where a trace function could strike.
        at_line: called at each line, counted or not.
    """
    left = count

    def trace(frame: types.FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            at_line()
            if not any(text in linecache.getline(frame.f_code.co_filename, frame.f_lineno) for text in spared):
                left -= 1
                if left == 0:
                    raise KeyboardInterrupt
        return trace

    return trace
