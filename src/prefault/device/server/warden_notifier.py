"""What a server tells its warden, so that what a new server needs outlives the old one."""

from __future__ import annotations

import abc

from prefault.device.registry import AreaRecord, ClientRecord, Registry


class WardenNotifier(abc.ABC):
    """Each call returns when the warden has it; OSError: the warden is gone, and :meth:`orphaned` is the next call."""

    def started(self) -> None:  # noqa: B027  only a warden wants to know
        """The server is about to answer."""

    @abc.abstractmethod
    def admitted(self, client: ClientRecord) -> None:
        """A client said Hello; its descriptors go along."""

    @abc.abstractmethod
    def added(self, client: ClientRecord, area: AreaRecord) -> None:
        """A client mapped an area."""

    @abc.abstractmethod
    def removed(self, client_number: int, area_number: int) -> None:
        """A client gave up an area."""

    @abc.abstractmethod
    def left(self, client_number: int) -> None:
        """A client is gone, with all of its areas."""

    @abc.abstractmethod
    def orphaned(self, registry: Registry) -> int:
        """The warden is gone: start another and hand it all of ``registry``.

        Returns:
            A pidfd of the new one, the caller's to close; -1: there is none, and the server goes on alone.
        """
