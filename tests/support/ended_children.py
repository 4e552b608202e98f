"""Forks that may be killed: how they ended is the result."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from support.children import die_with_parent


def exit_code(function: Callable[[], object]) -> int:
    """Run a function in a fork; return 0, 1 if it raised, or below 0 the signal that killed it."""
    pid = os.fork()
    if not pid:
        try:
            die_with_parent()
            function()
            os._exit(0)
        except BaseException:  # noqa: BLE001  no code of pytest may run here
            traceback.print_exc()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
