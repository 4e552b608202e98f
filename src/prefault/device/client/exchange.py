"""A request of a client under way, and its replies so far."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

from prefault.device import protocol


class Exchange:
    """A request, and the replies so far.

    Attributes:
        request: the request; it is sent by the first :meth:`Channel.wait`.
        descriptors: descriptors that are sent along with it.
        due: True until the request is sent, and again once a new server asks for it.
        sent: the bytes of each send: empty until the request is sent.
        reply: the last reply; None until it is there.
        pages: pages that are done, by the last Progress.
        runs: the list so far, of a reply in several messages.
        at_end: unmaps the memory of an area that the server no longer has. Called by the thread that reads the reply,
            once; or again, if Ctrl-C interrupts the call. On a Map that was abandoned, it belongs to the Unmap that follows.
        wakeup: a lock that the waiting thread sleeps on, and that another thread releases when there is news.
    """

    __slots__ = ("at_end", "descriptors", "due", "pages", "reply", "request", "runs", "sent", "wakeup")

    def __init__(
        self, request: protocol.Request, at_end: Callable[[], None] | None = None, descriptors: Sequence[int] = ()
    ) -> None:
        self.request = request
        self.descriptors = descriptors
        self.due = True
        self.sent: list[int] = []
        self.reply: protocol.Reply | None = None
        self.pages = 0
        self.runs: list[protocol.Run] = []
        self.at_end = at_end
        # A plain lock, and no Event: Ctrl-C that strikes in the methods of one, which are Python, leaves it locked.
        self.wakeup = threading.Lock()

    def wake(self) -> None:
        """Wake the thread that waits for the reply."""
        if self.wakeup.locked():
            with contextlib.suppress(RuntimeError):  # another thread has released it meanwhile
                self.wakeup.release()

    def finish(self) -> None:
        """Call :attr:`at_end`."""
        if self.at_end is not None:
            self.at_end()  # which may be called twice
            self.at_end = None
