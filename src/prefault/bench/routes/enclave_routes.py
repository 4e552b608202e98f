"""One repetition of one route to the pages of an enclave."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import prefault
from prefault.bench.routes.shipped_results import INSTRUCTION_BYTES, EnclaveRoute, Taken
from prefault.bench.routes.shipped_routes import check, never, take, touch
from prefault.device import Area, DeviceClient
from prefault.drivers.enclave import Enclave, statistics
from prefault.sizes import PAGE_SIZE

_NAME, _OTHER = "measured", "other"


def repetition(
    client: DeviceClient, route: EnclaveRoute, size_bytes: int, stopping: Callable[[], bool] = never
) -> Taken:  # fmt: skip
    """Measure a route once, on new enclaves.

    Args:
        client: a connection to an enclave page cache of ``size_bytes`` without enclaves.
        route: how pages come in.
        size_bytes: of the enclave; at least 2 MiB.
        stopping: asked every 32 MiB of faults.

    Raises:
        StoppedError: ``stopping`` returned True in the middle.
        WrongError: not all pages came in, or not with the right bytes.
        OSError: the route failed.
    """
    with _mapped(client, route, size_bytes, stopping) as area:
        before = statistics(client).evicted
        if route in (EnclaveRoute.FAULTS, EnclaveRoute.FAULTS_RECLAIM):
            taken = take(area, lambda: touch(area, stopping))
            check(area, 1)
        elif route is EnclaveRoute.INSTRUCTIONS:
            taken = take(area, lambda: _by_instructions(client, area))._replace(pages=INSTRUCTION_BYTES // PAGE_SIZE)
            check(area, 1, INSTRUCTION_BYTES)
        else:
            taken = take(area, lambda: prefault.populate(area))
            check(area, 1 if route is EnclaveRoute.LOAD else 0)
        return taken._replace(evicted_bytes=(statistics(client).evicted - before) * PAGE_SIZE)


@contextmanager
def _mapped(
    client: DeviceClient, route: EnclaveRoute, size_bytes: int, stopping: Callable[[], bool]
) -> Iterator[Area]:  # fmt: skip
    """Yield the area to bring in, of a new enclave; where the route reclaims, another enclave has filled the page cache."""
    if route in (EnclaveRoute.FAULTS, EnclaveRoute.POPULATE, EnclaveRoute.INSTRUCTIONS):
        with _enclave(client, _NAME, size_bytes, explicit=route is EnclaveRoute.INSTRUCTIONS) as area:
            yield area
        return
    scattered = route is EnclaveRoute.SCATTERED_RECLAIM
    with _enclave(client, _OTHER, size_bytes * (2 if scattered else 1), overcommit=True) as other:
        offsets = list(range(0, len(other), len(other) // size_bytes * PAGE_SIZE))
        if scattered:
            random.Random(1).shuffle(offsets)
        touch(other, stopping, offsets)
        overcommit = route is not EnclaveRoute.FAULTS_RECLAIM
        with _enclave(client, _NAME, size_bytes, overcommit=overcommit) as area:
            if route is EnclaveRoute.LOAD:
                prefault.populate(area)
            yield other if route is EnclaveRoute.LOAD else area


@contextmanager
def _enclave(
    client: DeviceClient, name: str, size_bytes: int, *, explicit: bool = False, overcommit: bool = False
) -> Iterator[Area]:
    enclave = Enclave.create(
        client, name, size_bytes, accept="explicit" if explicit else "auto", overcommit=overcommit
    )  # fmt: skip
    try:
        with enclave.map() as area:
            yield area
    finally:
        enclave.delete()


def _by_instructions(client: DeviceClient, area: Area) -> None:
    enclave = Enclave(client, _NAME)
    with area.memoryview() as memory:
        for offset in range(0, INSTRUCTION_BYTES, PAGE_SIZE):
            enclave.eaug(offset, PAGE_SIZE)
            enclave.eaccept(offset, PAGE_SIZE, pending=True)
            memory[offset] = 1
