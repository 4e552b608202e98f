"""prefault: make memory present before it is touched.

Layers, lowest first; each imports only from those before it (``tests/test_layering.py`` enforces it):

    sizes, ranges, errors              pure values
    _kernel                            one thin function per system call
    capabilities, selffile, cpus       what this kernel and process can do
    sockets                            Unix sockets between processes of one user
    memory, vma, backings              buffers, what is mapped where, what memory comes from
    mapping, residency, methods        memory of our own, what is present, the ways to populate
    plan, diagnose, discard, headroom  what to do, why it failed, giving back, the limits
    rollback, pace, needs, populate    the populate call
    lock, sparse                       populate and keep; reservations of which parts are populated
    pool, growable, virtio_mem         what stands on sparse memory
    device                             memory whose pages a driver supplies: client, server, warden
    drivers                            devices that ship
    doctor, bench, testing             reports, measurements, help for tests
    cli                                parse and print
"""

import typing as _typing

from prefault._version import __version__
from prefault.backings import Anonymous, BackingSource, Descriptor, File, Hugetlb, Memfd, TemporaryFile
from prefault.discard import DiscardResult, discard
from prefault.errors import (
    BackingFullError,
    BeyondEndError,
    DeviceError,
    DeviceGoneError,
    DiscardError,
    DriverError,
    GuardPageError,
    HeadroomError,
    HoleError,
    HugePagesError,
    MappingError,
    NoPopulateError,
    NotPopulatedError,
    OutOfMemoryError,
    PoisonedPageError,
    PoolFullError,
    PoolGoneError,
    PopulateError,
    PopulateInterrupted,
    ProtectionError,
    SpecialMappingError,
)
from prefault.headroom import Headroom, Limit, headroom
from prefault.lock import LockResult, lock, unlock
from prefault.mapping import Mapping
from prefault.plan import Plan, plan
from prefault.populate import PopulateResult, populate
from prefault.ranges import PageRange, RangeSet
from prefault.residency import PageState, Residency, residency
from prefault.sizes import PAGE_SIZE, format_size, parse_size

if _typing.TYPE_CHECKING:
    from prefault import device as device
    from prefault import drivers as drivers
    from prefault import pool as pool
    from prefault import virtio_mem as virtio_mem
    from prefault.drivers import open_remote
    from prefault.growable import GrowableArray
    from prefault.pool import Pool, PoolStatistics
    from prefault.sparse import SparseMemory

__all__ = [
    "PAGE_SIZE",
    "Anonymous",
    "BackingFullError",
    "BackingSource",
    "BeyondEndError",
    "Descriptor",
    "DeviceError",
    "DeviceGoneError",
    "DiscardError",
    "DiscardResult",
    "DriverError",
    "File",
    "GrowableArray",
    "GuardPageError",
    "Headroom",
    "HeadroomError",
    "HoleError",
    "HugePagesError",
    "Hugetlb",
    "Limit",
    "LockResult",
    "Mapping",
    "MappingError",
    "Memfd",
    "NoPopulateError",
    "NotPopulatedError",
    "OutOfMemoryError",
    "PageRange",
    "PageState",
    "Plan",
    "PoisonedPageError",
    "Pool",
    "PoolFullError",
    "PoolGoneError",
    "PoolStatistics",
    "PopulateError",
    "PopulateInterrupted",
    "PopulateResult",
    "ProtectionError",
    "RangeSet",
    "Residency",
    "SparseMemory",
    "SpecialMappingError",
    "TemporaryFile",
    "__version__",
    "discard",
    "format_size",
    "headroom",
    "lock",
    "open_remote",
    "parse_size",
    "plan",
    "populate",
    "residency",
    "unlock",
]

# A sixth of the import time, for those who only populate: loaded when they are first named.
_LATER = {
    "GrowableArray": "prefault.growable",
    "Pool": "prefault.pool",
    "PoolStatistics": "prefault.pool",
    "SparseMemory": "prefault.sparse",
    "open_remote": "prefault.drivers",
}
_LATER_MODULES = ("device", "drivers", "pool", "virtio_mem")


if not _typing.TYPE_CHECKING:  # which would take any name for one that is there

    def __getattr__(name: str) -> _typing.Any:
        if name not in _LATER and name not in _LATER_MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module(_LATER.get(name, f"{__name__}.{name}"))
        value = module if name in _LATER_MODULES else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LATER_MODULES})
