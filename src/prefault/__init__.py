"""prefault: make memory present before it is touched.

The folders are layers, lowest first; each imports only from those above it in this picture (``tests/test_layering.py``):

    sizes ranges intervals interval_index errors _version  values: no memory is touched
    _kernel                                 one thin function per system call, with the kernel's names and structures
    _system                                 this machine and process: capabilities, CPUs, cgroups, files of /proc
    ipc | memory                            Unix sockets; any buffer -> addresses, what is mapped there, what backs it
    inspection                              what is present now
    limits                                  every limit once; what a call demands; admission before and between chunks
    mapping                                 memory that prefault maps itself
    engine                                  populate: plan, methods, chunks, diagnosis, rollback; discard; lock
    sparse                                  a reservation of which parts are populated and discarded; growable arrays
    pool | virtio_mem                       a bounded store of memory, shared by processes; the device side of virtio-mem
    device                                  device memory: the driver's interface, and what client and server share
    device.client | device.pages            the process that maps a device; its pages in the process that runs the driver
    device.server                           that process: faults, requests, calls of the driver
    device.warden                           the process that starts the server again, or answers without it
    device.process                          how these processes are started
    device.opening                          map and connect
    device.__init__                         the public names of device memory
    drivers                                 devices that ship
    files | shared_memory | arrays          paths; multiprocessing's shared memory; arrays on populated memory
    recordings | processes | engines        what a program touched, brought back; running processes; for inference engines
    __init__                                the public names
    bench | doctor | testing | pictures     measure; examine and advise; contract checks for users; heat maps and reports
    cli __main__                            parse and print
"""

import typing as _typing

from prefault._version import __version__
from prefault.engine.discarding import DiscardResult, discard
from prefault.engine.locking import LockResult, lock, unlock
from prefault.engine.planning import Plan
from prefault.engine.populating import PopulateResult, plan, populate, populate_many
from prefault.engine.rate import RateLimit
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
    PageFaultsError,
    PoisonedPageError,
    PoolFullError,
    PoolGoneError,
    PopulateCancelled,
    PopulateError,
    PopulateInterrupted,
    ProtectionError,
    SpecialMappingError,
)
from prefault.inspection.result import PageState, Residency
from prefault.inspection.scan import residency
from prefault.limits.limit import Headroom, Limit
from prefault.limits.target import headroom
from prefault.mapping.mapping import Mapping
from prefault.memory.backings import Anonymous, BackingSource, Descriptor, File, Hugetlb, Memfd, TemporaryFile
from prefault.memory.file_verbs import FileVerbs as _FileVerbs
from prefault.memory.file_verbs import provide_file_verbs as _provide_file_verbs
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE, format_size, parse_size

if _typing.TYPE_CHECKING:
    from prefault import device as device
    from prefault import drivers as drivers
    from prefault import engines as engines
    from prefault import pool as pool
    from prefault import processes as processes
    from prefault import virtio_mem as virtio_mem
    from prefault.arrays import ReadyMemory, empty, full, ready, zeros
    from prefault.drivers import open_remote
    from prefault.engine.background.task import PopulateTask, populate_async
    from prefault.engine.collapsing import CollapseResult, NotCollapsed, collapse
    from prefault.files.evicting import EvictedFile, EvictResult, evict
    from prefault.files.failures import FileFailure
    from prefault.files.file_locks import FileLock
    from prefault.files.file_status import FilesStatus, FileStatus, status
    from prefault.files.selection import SelectedFile, Selection, SkippedFile, select
    from prefault.files.streaming import FileStream, stream
    from prefault.files.warm_result import WarmCancelled, WarmInterrupted, WarmResult
    from prefault.files.warm_task import WarmTask, warm_async
    from prefault.files.warming import warm
    from prefault.pool import Pool, PoolStatistics
    from prefault.recordings.own_recording import recording
    from prefault.recordings.recording_file import RecordedArea, RecordedFile, Recording, RecordingError
    from prefault.recordings.replaying import ReplayResult, replay
    from prefault.shared_memory import SharedMemory, SharedMemoryProtection, protect_shared_memory
    from prefault.sparse import SparseMemory
    from prefault.sparse.growable import GrowableArray

__all__ = [
    "PAGE_SIZE",
    "Anonymous",
    "BackingFullError",
    "BackingSource",
    "BeyondEndError",
    "CollapseResult",
    "Descriptor",
    "DeviceError",
    "DeviceGoneError",
    "DiscardError",
    "DiscardResult",
    "DriverError",
    "EvictResult",
    "EvictedFile",
    "File",
    "FileFailure",
    "FileLock",
    "FileStatus",
    "FileStream",
    "FilesStatus",
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
    "NotCollapsed",
    "NotPopulatedError",
    "OutOfMemoryError",
    "PageFaultsError",
    "PageRange",
    "PageState",
    "Plan",
    "PoisonedPageError",
    "Pool",
    "PoolFullError",
    "PoolGoneError",
    "PoolStatistics",
    "PopulateCancelled",
    "PopulateError",
    "PopulateInterrupted",
    "PopulateResult",
    "PopulateTask",
    "ProtectionError",
    "RangeSet",
    "RateLimit",
    "ReadyMemory",
    "RecordedArea",
    "RecordedFile",
    "Recording",
    "RecordingError",
    "ReplayResult",
    "Residency",
    "SelectedFile",
    "Selection",
    "SharedMemory",
    "SharedMemoryProtection",
    "SkippedFile",
    "SparseMemory",
    "SpecialMappingError",
    "TemporaryFile",
    "WarmCancelled",
    "WarmInterrupted",
    "WarmResult",
    "WarmTask",
    "__version__",
    "collapse",
    "discard",
    "empty",
    "evict",
    "format_size",
    "full",
    "headroom",
    "lock",
    "open_remote",
    "parse_size",
    "plan",
    "populate",
    "populate_async",
    "populate_many",
    "protect_shared_memory",
    "ready",
    "recording",
    "replay",
    "residency",
    "select",
    "status",
    "stream",
    "unlock",
    "warm",
    "warm_async",
    "zeros",
]

# A sixth of the import time, for those who only populate: loaded when they are first named.
_LATER = {
    "CollapseResult": "prefault.engine.collapsing",
    "EvictResult": "prefault.files.evicting",
    "EvictedFile": "prefault.files.evicting",
    "FileFailure": "prefault.files.failures",
    "FileLock": "prefault.files.file_locks",
    "FileStatus": "prefault.files.file_status",
    "FileStream": "prefault.files.streaming",
    "FilesStatus": "prefault.files.file_status",
    "GrowableArray": "prefault.sparse.growable",
    "NotCollapsed": "prefault.engine.collapsing",
    "Pool": "prefault.pool",
    "PoolStatistics": "prefault.pool",
    "PopulateTask": "prefault.engine.background.task",
    "ReadyMemory": "prefault.arrays",
    "RecordedArea": "prefault.recordings.recording_file",
    "RecordedFile": "prefault.recordings.recording_file",
    "Recording": "prefault.recordings.recording_file",
    "RecordingError": "prefault.recordings.recording_file",
    "ReplayResult": "prefault.recordings.replaying",
    "SelectedFile": "prefault.files.selection",
    "Selection": "prefault.files.selection",
    "SharedMemory": "prefault.shared_memory",
    "SharedMemoryProtection": "prefault.shared_memory",
    "SkippedFile": "prefault.files.selection",
    "SparseMemory": "prefault.sparse",
    "WarmCancelled": "prefault.files.warm_result",
    "WarmInterrupted": "prefault.files.warm_result",
    "WarmResult": "prefault.files.warm_result",
    "WarmTask": "prefault.files.warm_task",
    "collapse": "prefault.engine.collapsing",
    "empty": "prefault.arrays",
    "evict": "prefault.files.evicting",
    "full": "prefault.arrays",
    "open_remote": "prefault.drivers",
    "populate_async": "prefault.engine.background.task",
    "protect_shared_memory": "prefault.shared_memory",
    "ready": "prefault.arrays",
    "recording": "prefault.recordings.own_recording",
    "replay": "prefault.recordings.replaying",
    "select": "prefault.files.selection",
    "status": "prefault.files.file_status",
    "stream": "prefault.files.streaming",
    "warm": "prefault.files.warming",
    "warm_async": "prefault.files.warm_task",
    "zeros": "prefault.arrays",
}


def _load_file_verbs() -> _FileVerbs:
    from prefault.files.in_place_of_memory import PagesOfFiles

    return PagesOfFiles()


_provide_file_verbs(_load_file_verbs)

_LATER_MODULES = ("device", "drivers", "engines", "pool", "processes", "virtio_mem")


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
