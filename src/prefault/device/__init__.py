"""Device memory: drivers in Python, page faults answered by a server process, one populate hook for every route.

:func:`map` and :func:`connect` return an :class:`Area`; a driver is a :class:`Device`. See docs/device-memory.md.
"""

import typing as _typing

from prefault.device.device_pool import ClientProcess, DeviceObject, DevicePool, ShootDown
from prefault.device.driver import READ_ONLY, RETRY, ZERO, Device, DeviceArea, FaultAround, Recipe

if _typing.TYPE_CHECKING:
    from prefault.device.access_log import AccessLog
    from prefault.device.client.area import Area, AreaStatistics
    from prefault.device.opening import DeviceClient, connect, map, open  # noqa: A004
    from prefault.device.process.serving import DeviceServer, serve

__all__ = [
    "READ_ONLY",
    "RETRY",
    "ZERO",
    "AccessLog",
    "Area",
    "AreaStatistics",
    "ClientProcess",
    "Device",
    "DeviceArea",
    "DeviceClient",
    "DeviceObject",
    "DevicePool",
    "DeviceServer",
    "FaultAround",
    "Recipe",
    "ShootDown",
    "connect",
    "map",
    "open",
    "serve",
]

# Imported on first use: the module of a driver, and the server that runs it, need none of this.
_LATER = {
    "AccessLog": "prefault.device.access_log",
    "Area": "prefault.device.client.area",
    "AreaStatistics": "prefault.device.client.area",
    "DeviceClient": "prefault.device.opening",
    "DeviceServer": "prefault.device.process.serving",
    "connect": "prefault.device.opening",
    "map": "prefault.device.opening",
    "open": "prefault.device.opening",
    "serve": "prefault.device.process.serving",
}


if not _typing.TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> _typing.Any:
        if name not in _LATER:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(_LATER[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
