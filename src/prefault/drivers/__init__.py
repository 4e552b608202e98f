"""Devices that ship: drivers for :mod:`prefault.device`.

``CompressedMemory`` is memory whose cold pages are packed. ``RemoteFile`` maps a file that is somewhere else, and
``open_remote`` gives it as an array. ``VmPool`` is a pool of memory blocks for virtual machines, which ``VmPoolControl``
makes and limits.
"""

from prefault.drivers.compressed.compressed_memory import CompressedMemory
from prefault.drivers.remote.area_arrays import area_of
from prefault.drivers.remote.opened_arrays import open_remote
from prefault.drivers.remote.remote_file import RemoteFile
from prefault.drivers.remote.safetensors_files import SafeTensors
from prefault.drivers.remote.sharded_safetensors import ShardedSafeTensors
from prefault.drivers.remote.source import Patience, SourceChangedError, SourceError, SourceMissingError
from prefault.drivers.vmpool.vm_pool import VmPool
from prefault.drivers.vmpool.vm_pool_control import VmPoolControl

__all__ = [
    "CompressedMemory",
    "Patience",
    "RemoteFile",
    "SafeTensors",
    "ShardedSafeTensors",
    "SourceChangedError",
    "SourceError",
    "SourceMissingError",
    "VmPool",
    "VmPoolControl",
    "area_of",
    "open_remote",
]
