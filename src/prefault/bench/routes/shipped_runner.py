"""Run all routes of the devices that ship; every cell ends in exactly one result, whatever happens."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress

from prefault import device as devices
from prefault.bench.obstacles import memory_obstacle
from prefault.bench.results import Status
from prefault.bench.routes import buffer_routes, enclave_routes
from prefault.bench.routes.device_routes import WrongError
from prefault.bench.routes.shipped_results import EnclaveRoute, Shipped, ShippedCell, ShippedResult, Taken
from prefault.bench.routes.shipped_routes import warm
from prefault.bench.runner import NOT_REACHED
from prefault.bench.stopping import StoppedError
from prefault.device import DeviceClient
from prefault.drivers.enclave import EnclavePageCache

_MEMORY: dict[Shipped, int] = {"enclave": 3, "buffers": 2}
"""Memory that a cell takes at most, in sizes of it. Enclave: the page cache, and sealed pages of two enclaves; buffers: the
object in both places while it moves."""


def run(
    cells: Sequence[ShippedCell], *, repeats: int, stopping: Callable[[], bool]
) -> Iterator[ShippedCell | ShippedResult]:  # fmt: skip
    """Measure the cells and yield an event at the beginning and the end of each. Close the generator, or exhaust it.

    Raises:
        ImportError: an enclave page cache is to be measured, and the package ``cryptography`` is not installed.
    """
    for (device, size), group in itertools.groupby(cells, key=lambda cell: cell.group):
        yield from _group(device, size, list(group), repeats, stopping)


def _group(
    device: Shipped, size: int, cells: list[ShippedCell], repeats: int, stopping: Callable[[], bool]
) -> Iterator[ShippedCell | ShippedResult]:  # fmt: skip
    needed = _MEMORY[device] * size
    if stopping():
        yield from (ShippedResult(cell, Status.STOPPED, reason=NOT_REACHED) for cell in cells)
        return
    reason = memory_obstacle(needed)
    if reason is not None:
        yield from (ShippedResult(cell, Status.UNAVAILABLE, reason=reason) for cell in cells)
        return
    with ExitStack() as stack:
        client: DeviceClient | None = None
        if device == "enclave":
            try:
                client = stack.enter_context(devices.open(EnclavePageCache(size)))
            except OSError as error:
                yield from (ShippedResult(cell, Status.UNAVAILABLE, reason=_text(error)) for cell in cells)
                return
        with suppress(OSError):  # a cell that finds no memory says so itself
            warm(needed)
        for cell in cells:
            yield cell
            yield _cell(client, cell, repeats, stopping)


def _cell(
    client: DeviceClient | None, cell: ShippedCell, repeats: int, stopping: Callable[[], bool]
) -> ShippedResult:  # fmt: skip
    done: list[Taken] = []
    status, reason = Status.MEASURED, None
    try:
        for _ in range(repeats):
            if stopping():
                raise StoppedError
            done.append(_repetition(client, cell, stopping))
    except StoppedError:
        status, reason = Status.STOPPED, f"stopped after {len(done)} of {repeats} repetitions"
    except WrongError as error:
        status, reason = Status.FAILED, str(error)
    except OSError as error:
        status, reason = Status.FAILED, _text(error)
    last = done[-1] if done else Taken(0, 0, 0, 0)
    return ShippedResult(
        cell,
        status,
        tuple(one.total_ns for one in done),
        reason,
        "; ".join(last.notes) or None,
        tuple(one.server_cpu_ns for one in done),
        last.pages,
        last.faults,
        last.evicted_bytes,
        last.bookkeeping_bytes,
    )


def _repetition(client: DeviceClient | None, cell: ShippedCell, stopping: Callable[[], bool]) -> Taken:
    if isinstance(cell.route, EnclaveRoute):
        assert client is not None
        return enclave_routes.repetition(client, cell.route, cell.size_bytes, stopping)
    return buffer_routes.repetition(cell.route, cell.size_bytes, stopping)


def _text(error: OSError) -> str:
    return error.strerror or str(error)
