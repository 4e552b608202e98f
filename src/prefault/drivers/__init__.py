"""Devices that ship: drivers for :mod:`prefault.device`, each loaded when it is first named.

``CompressedMemory`` is memory whose cold pages are packed. ``RemoteFile`` maps a file that is somewhere else, and
``open_remote`` gives it as an array. ``VmPool`` is a pool of memory blocks for virtual machines, which ``VmPoolControl``
makes and limits. ``prefault.drivers.enclave`` and ``prefault.drivers.buffers`` are an enclave page cache and buffer objects.
"""

import typing as _typing

if _typing.TYPE_CHECKING:
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

# The server of one driver, in a fresh process, need not load the others.
_MODULES = {
    "CompressedMemory": "compressed.compressed_memory",
    "Patience": "remote.source",
    "RemoteFile": "remote.remote_file",
    "SafeTensors": "remote.safetensors_files",
    "ShardedSafeTensors": "remote.sharded_safetensors",
    "SourceChangedError": "remote.source",
    "SourceError": "remote.source",
    "SourceMissingError": "remote.source",
    "VmPool": "vmpool.vm_pool",
    "VmPoolControl": "vmpool.vm_pool_control",
    "area_of": "remote.area_arrays",
    "open_remote": "remote.opened_arrays",
}


if not _typing.TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> _typing.Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
