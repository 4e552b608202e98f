"""The structures on the wire, against the kernel's header by the C compiler, and against garbage."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault import virtio_mem
from prefault.virtio_mem import BlockState, Config, Feature, Request, RequestType, Response, ResponseType, wire
from support import needs

_HEADERS = Path(sys.prefix) / "uapi" / "any-linux-any"

# Fills the structures with 0xff, assigns the fields, and prints sizes, constants and the bytes.
_PROGRAM = r"""
#include <stdio.h>
#include <string.h>
#include <linux/virtio_config.h>
#include <linux/virtio_ids.h>
#include <linux/virtio_mem.h>
static void dump(const char *name, const void *data, size_t size)
{
    printf("%s ", name);
    for (size_t i = 0; i < size; i++) printf("%02x", ((const unsigned char *) data)[i]);
    printf("\n");
}
#define NUMBER(name) printf("%s %x\n", #name, (unsigned) name)
int main(void)
{
    struct virtio_mem_req request;
    struct virtio_mem_resp response;
    struct virtio_mem_config config;
    memset(&request, 0xff, sizeof request);
    request.type = 0x1122; request.u.plug.addr = 0x0102030405060708; request.u.plug.nb_blocks = 0x3344;
    dump("plug", &request, sizeof request);
    memset(&request, 0xff, sizeof request);
    request.type = 0x1122; request.u.unplug.addr = 0x0102030405060708; request.u.unplug.nb_blocks = 0x3344;
    dump("unplug", &request, sizeof request);
    memset(&request, 0xff, sizeof request);
    request.type = 0x1122; request.u.state.addr = 0x0102030405060708; request.u.state.nb_blocks = 0x3344;
    dump("state", &request, sizeof request);
    memset(&response, 0xff, sizeof response);
    response.type = VIRTIO_MEM_RESP_ACK; response.u.state.state = VIRTIO_MEM_STATE_MIXED;
    dump("response", &response, sizeof response);
    memset(&config, 0xff, sizeof config);
    config.block_size = 0x200000; config.node_id = 0x5566; config.addr = 0x100000000; config.region_size = 0x80000000;
    config.usable_region_size = 0x70000000; config.plugged_size = 0x600000; config.requested_size = 0x50000000;
    dump("config", &config, sizeof config);
    NUMBER(VIRTIO_MEM_F_ACPI_PXM); NUMBER(VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE); NUMBER(VIRTIO_MEM_F_PERSISTENT_SUSPEND);
    NUMBER(VIRTIO_MEM_REQ_PLUG); NUMBER(VIRTIO_MEM_REQ_UNPLUG); NUMBER(VIRTIO_MEM_REQ_UNPLUG_ALL);
    NUMBER(VIRTIO_MEM_REQ_STATE);
    NUMBER(VIRTIO_MEM_RESP_ACK); NUMBER(VIRTIO_MEM_RESP_NACK); NUMBER(VIRTIO_MEM_RESP_BUSY); NUMBER(VIRTIO_MEM_RESP_ERROR);
    NUMBER(VIRTIO_ID_MEM); NUMBER(VIRTIO_F_VERSION_1); NUMBER(VIRTIO_TRANSPORT_F_START); NUMBER(VIRTIO_TRANSPORT_F_END);
    NUMBER(VIRTIO_MEM_STATE_PLUGGED); NUMBER(VIRTIO_MEM_STATE_UNPLUGGED); NUMBER(VIRTIO_MEM_STATE_MIXED);
    return 0;
}
"""


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The structures of ``linux/virtio_mem.h`` as C lays them out: bytes and numbers in hexadecimal, by name."""
    if sys.byteorder != "little":
        needs.missing("the compiler of this machine lays out big-endian structures")
    gcc = shutil.which("gcc")
    if gcc is None:
        needs.missing("gcc is not installed")
    if not (_HEADERS / "linux" / "virtio_mem.h").exists():
        needs.missing("recent kernel headers are not there: `make test` fetches them")
    directory = tmp_path_factory.mktemp("virtio")
    (directory / "wire.c").write_text(_PROGRAM)
    command = [gcc, "-isystem", str(_HEADERS), "-o", "wire", "wire.c"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = subprocess.run([directory / "wire"], capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(line.split() for line in lines)


def test_requests_are_the_kernels(header: dict[str, str]) -> None:
    ours = Request(0x1122, 0x0102030405060708, 0x3344)
    for name in ("plug", "unplug", "state"):
        theirs = bytes.fromhex(header[name])
        assert len(theirs) == wire.REQUEST_BYTES == 24
        assert Request.decode(theirs) == ours  # its padding is not zero
        padding = {2, 3, 4, 5, 6, 7, 18, 19, 20, 21, 22, 23}
        assert ours.encode() == bytes(0 if at in padding else byte for at, byte in enumerate(theirs))


def test_responses_are_the_kernels(header: dict[str, str]) -> None:
    ours = Response(ResponseType.ACK, BlockState.MIXED)
    theirs = bytes.fromhex(header["response"])
    assert len(theirs) == wire.RESPONSE_BYTES == 10
    assert Response.decode(theirs, RequestType.STATE) == ours
    assert ours.encode() == theirs[:2] + bytes(6) + theirs[8:]


def test_the_configuration_is_the_kernels(header: dict[str, str]) -> None:
    ours = Config(0x200000, 0x5566, 0x100000000, 0x80000000, 0x70000000, 0x600000, 0x50000000)
    theirs = bytes.fromhex(header["config"])
    assert len(theirs) == wire.CONFIG_BYTES == 56
    assert Config.decode(theirs) == ours
    assert ours.encode() == theirs[:10] + bytes(6) + theirs[16:]


def test_numbers_are_the_kernels(header: dict[str, str]) -> None:
    expected = {f"VIRTIO_MEM_F_{item.name}": item.bit_length() - 1 for item in Feature}
    expected |= {f"VIRTIO_MEM_REQ_{item.name}": int(item) for item in RequestType}
    expected |= {f"VIRTIO_MEM_RESP_{item.name}": int(item) for item in ResponseType}
    expected |= {f"VIRTIO_MEM_STATE_{item.name}": int(item) for item in BlockState}
    assert expected == {name: int(text, 16) for name, text in header.items() if name.startswith("VIRTIO_MEM_")}


def test_the_numbers_of_a_transport_are_the_kernels(header: dict[str, str]) -> None:
    kernels = {name: int(text, 16) for name, text in header.items() if not name.startswith("VIRTIO_MEM_") and name[0] == "V"}
    assert kernels["VIRTIO_ID_MEM"] == virtio_mem.DEVICE_ID
    assert 1 << kernels["VIRTIO_F_VERSION_1"] == virtio_mem.VERSION_1
    # The kernel knows those that are in use; the specification reserves 24 to 49.
    for bit in range(kernels["VIRTIO_TRANSPORT_F_START"], kernels["VIRTIO_TRANSPORT_F_END"] + 1):
        assert virtio_mem.TRANSPORT_FEATURES >> bit & 1


@given(st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**16 - 1))
def test_every_request_goes_there_and_back(number: int, addr: int, nb_blocks: int) -> None:
    request = Request(number, addr, nb_blocks)
    assert Request.decode(request.encode()) == request


@given(st.binary(min_size=24, max_size=24))
def test_any_24_bytes_are_a_request(data: bytes) -> None:
    request = Request.decode(data)
    assert request == Request.decode(bytearray(data)) == Request.decode(memoryview(data))
    again = request.encode()
    assert (again[:2], again[8:18]) == (data[:2], data[8:18])
    assert not any(again[2:8] + again[18:])


@given(st.binary(max_size=100))
def test_any_other_length_is_refused(data: bytes) -> None:
    decoders: list[tuple[int, Callable[[bytes], object]]] = [
        (24, Request.decode),
        (10, lambda data: Response.decode(data, RequestType.PLUG)),
        (56, Config.decode),
    ]
    for size, decode in decoders:
        if len(data) != size:
            with pytest.raises(ValueError, match=rf"has {size} bytes, not {len(data)}$"):
                decode(data)


@given(st.binary(min_size=10, max_size=10), st.sampled_from(RequestType))
def test_any_10_bytes_are_a_response_or_refused(data: bytes, request: RequestType) -> None:
    number, state = int.from_bytes(data[:2], "little"), int.from_bytes(data[8:], "little")
    has_state = request is RequestType.STATE and number == ResponseType.ACK
    if number > 3 or (has_state and state > 2):
        with pytest.raises(ValueError, match="is not a valid"):
            Response.decode(data, request)
    else:
        expected = Response(ResponseType(number), BlockState(state) if has_state else None)
        assert Response.decode(data, request) == expected


@pytest.mark.parametrize(
    "request_", [Request(-1), Request(2**16), Request(0, -1), Request(0, 2**64), Request(0, 0, -1), Request(0, 0, 2**16)]
)
def test_numbers_that_do_not_fit(request_: Request) -> None:
    with pytest.raises(ValueError, match="does not fit into a request"):
        request_.encode()


_GOOD = Config(4096, 3, 8192, 40960, 32768, 8192, 16384)


def _bad_configurations() -> Iterator[tuple[Config, str]]:
    for block in (0, -4096, 3, 4097, 12288, 2**64):
        yield _GOOD._replace(block_size=block), "block_size is a power of two"
    for node in (-1, 2**16):
        yield _GOOD._replace(node_id=node), "node_id is a number of 16 bits"
    for name in ("addr", "region_size", "usable_region_size", "plugged_size", "requested_size"):
        yield _GOOD._replace(**{name: -4096}), f"{name} is a number of 64 bits"
        yield _GOOD._replace(**{name: 2**64}), f"{name} is a number of 64 bits"
        yield _GOOD._replace(**{name: getattr(_GOOD, name) + 1}), f"{name} .* is not a multiple of the block size"
    yield _GOOD._replace(addr=2**64 - 36864), "ends beyond 64-bit addresses"
    yield _GOOD._replace(usable_region_size=45056), r"usable_region_size \(45056\) is more than region_size \(40960\)"
    yield _GOOD._replace(requested_size=36864), r"requested_size \(36864\) is more than usable_region_size \(32768\)"
    yield _GOOD._replace(plugged_size=36864), r"plugged_size \(36864\) is more than usable_region_size \(32768\)"


@pytest.mark.parametrize(("config", "complaint"), list(_bad_configurations()))
def test_bad_configurations(config: Config, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        config.encode()


def test_good_configurations() -> None:
    assert Config.decode(_GOOD.encode()) == _GOOD
    for config in (
        _GOOD._replace(addr=2**64 - 40960),  # up to the last byte
        _GOOD._replace(plugged_size=32768),  # more than requested: the driver has not unplugged it yet
        Config(1, 0, 0, 0, 0, 0, 0),
    ):
        assert config.check() is config


_SIZES = st.one_of(st.integers(0, 8).map(lambda blocks: blocks * 4096), st.integers(0, 2**64 - 1))


@given(st.sampled_from([0, 1, 512, 4096, 4097, 8192]), st.integers(0, 2**16 - 1), st.tuples(*[_SIZES] * 5))
def test_any_56_bytes_are_a_configuration_or_refused(block: int, node: int, sizes: tuple[int, ...]) -> None:
    raw = b"".join(number.to_bytes(8, "little") for number in (block, node, *sizes))
    addr, region, usable, plugged, requested = sizes
    good = (
        block in (1, 512, 4096, 8192)
        and not any(size % block for size in sizes)
        and addr + region <= 2**64
        and region >= usable >= max(plugged, requested)
    )
    if good:
        assert Config.decode(raw) == (block, node, *sizes)
        assert Config.decode(raw).encode() == raw
    else:
        with pytest.raises(ValueError, match=r"is more than|is not a multiple|power of two|ends beyond"):
            Config.decode(raw)
