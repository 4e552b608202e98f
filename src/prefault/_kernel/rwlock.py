"""A lock of the C library, for which a thread waits in one call that no signal interrupts (pthread_rwlock_wrlock(3)).

``threading.Lock.acquire`` and ``Thread.join`` end early when a signal handler raises an exception, and Ctrl-C can stop the
Python code around them between any two steps.
"""

from __future__ import annotations

import ctypes
from functools import partial

from prefault._kernel._call import POINTER, declare

_tryrdlock = declare("pthread_rwlock_tryrdlock", POINTER)
_unlock = declare("pthread_rwlock_unlock", POINTER)
_wrlock = declare("pthread_rwlock_wrlock", POINTER)

_RWLOCK_BYTES = 64
"""Room for a ``pthread_rwlock_t``: 56 bytes on 64-bit machines. All zeros are ``PTHREAD_RWLOCK_INITIALIZER``."""


class Attendance:
    """A barrier between threads that work and one thread that waits for all of them; for one use.

    Attributes:
        enter: called by a thread before it works. It returns 0, or an errno once ``wait`` has returned: the thread must not
            work then.
        leave: called by the thread after its work.
        wait: returns when no thread is at work, and lets no other begin. It is called once.
    """

    __slots__ = ("_memory", "enter", "leave", "wait")

    def __init__(self) -> None:
        self._memory = (ctypes.c_char * _RWLOCK_BYTES)()
        address = ctypes.addressof(self._memory)
        # Partials, not methods: a partial is called in one step from C to C, which Ctrl-C cannot split.
        self.enter = partial(_tryrdlock, address)
        self.leave = partial(_unlock, address)
        self.wait = partial(_wrlock, address)
