"""Devices that ship: drivers for :mod:`prefault.device`.

``RemoteFile`` maps a file that is somewhere else, and ``open_remote`` gives it as an array.
"""

from prefault.drivers.formats import SafeTensors
from prefault.drivers.held import area_of
from prefault.drivers.opening import open_remote
from prefault.drivers.remote import RemoteFile
from prefault.drivers.source import Patience, SourceChangedError, SourceError, SourceMissingError

__all__ = [
    "Patience",
    "RemoteFile",
    "SafeTensors",
    "SourceChangedError",
    "SourceError",
    "SourceMissingError",
    "area_of",
    "open_remote",
]
