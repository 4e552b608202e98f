"""Devices that ship: drivers for :mod:`prefault.device`.

``RemoteFile`` maps a file that is somewhere else, and ``open_remote`` gives it as an array.
"""

from prefault.drivers.remote.area_arrays import area_of
from prefault.drivers.remote.opened_arrays import open_remote
from prefault.drivers.remote.remote_file import RemoteFile
from prefault.drivers.remote.safetensors_files import SafeTensors
from prefault.drivers.remote.sharded_safetensors import ShardedSafeTensors
from prefault.drivers.remote.source import Patience, SourceChangedError, SourceError, SourceMissingError

__all__ = [
    "Patience",
    "RemoteFile",
    "SafeTensors",
    "ShardedSafeTensors",
    "SourceChangedError",
    "SourceError",
    "SourceMissingError",
    "area_of",
    "open_remote",
]
