"""Memory on NUMA nodes: /proc/self/numa_maps and the meminfo of the nodes are the oracle. `make numa` has two nodes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import prefault
from prefault._kernel import mempolicy, mman
from prefault._kernel.mempolicy import MPOL_DEFAULT, MPOL_PREFERRED
from prefault._system import numa
from prefault.limits import memory_limits
from prefault.sizes import MIB, PAGE_SIZE
from prefault.testing import without
from support import needs, nodes
from support.children import in_child

SIZE = 16 * MIB


@pytest.fixture(autouse=True)
def _numa() -> None:
    if not Path("/proc/self/numa_maps").exists():
        needs.missing("this kernel has NUMA (CONFIG_NUMA)")


@pytest.fixture(params=["anonymous", "memfd"])
def mapping(request: pytest.FixtureRequest) -> Iterator[prefault.Mapping]:
    with prefault.Mapping(SIZE, backing=request.param, huge="never") as mapping:
        yield mapping


def _on(memory: prefault.Mapping | prefault.SparseMemory) -> dict[int, int]:
    """Bytes by node, as numa_maps counts them."""
    return nodes.in_numa_maps(*memory.range)


# --- with any number of nodes


@pytest.mark.parametrize("arguments", [{"node": 0}, {"interleave": [0]}])
def test_the_policy_of_a_populate_call_ends_with_it(mapping: prefault.Mapping, arguments: dict[str, Any]) -> None:
    result = prefault.populate(mapping, length=8 * MIB, **arguments)
    assert result.bytes == 8 * MIB == _on(mapping)[0]
    assert nodes.policies(*mapping.range) == {"default"}


def test_the_policy_of_a_mapping_stays_and_is_put_back() -> None:
    with prefault.Mapping(SIZE, node=0) as mapping:
        mempolicy.mbind(mapping.range.start + 4 * MIB, 4 * MIB, MPOL_PREFERRED, (0,))
        prefault.populate(mapping, interleave=True)
        assert nodes.policies(*mapping.range) == {"bind:0", "prefer:0"}
        assert mempolicy.get_mempolicy(mapping.range.start + 4 * MIB) == (MPOL_PREFERRED, (0,))


@pytest.mark.parametrize("rollback", [False, True])
def test_the_policy_is_put_back_after_a_failure(mapping: prefault.Mapping, rollback: bool) -> None:
    mman.mprotect(mapping.range.start + 4 * MIB, PAGE_SIZE, mman.PROT_NONE)
    with pytest.raises(prefault.ProtectionError):
        prefault.populate(mapping, node=0, rollback=rollback)
    assert nodes.policies(*mapping.range) == {"default"}
    mman.mprotect(mapping.range.start + 4 * MIB, PAGE_SIZE, mman.PROT_READ | mman.PROT_WRITE)
    assert mempolicy.get_mempolicy(mapping.range.start) == (MPOL_DEFAULT, ())


@pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
def test_sparse_memory_has_its_policy_everywhere(unpopulated: Any) -> None:
    with prefault.SparseMemory(SIZE, reservation=2 * SIZE, unpopulated=unpopulated, node=0) as memory:
        memory.resize(2 * SIZE)
        memory.populate(SIZE - MIB, 2 * MIB)
        assert nodes.policies(*memory.range) == {"bind:0"}
        assert _on(memory)[0] == 2 * MIB


def test_residency_tells_the_node_of_each_page(mapping: prefault.Mapping) -> None:
    prefault.populate(mapping, offset=4 * MIB, length=MIB)
    found = prefault.residency(mapping, nodes=True)
    assert found.nodes is not None
    pages = found.nodes.tolist()
    first, last = 4 * MIB // PAGE_SIZE, 5 * MIB // PAGE_SIZE
    assert set(pages[:first] + pages[last:]) == {-1}
    assert found.node_bytes == _on(mapping)
    assert sum(found.node_bytes.values()) == MIB
    assert "on node" in str(found)


def test_the_pages_of_a_collection_are_counted_by_node(mapping: prefault.Mapping) -> None:
    array = mapping.ndarray("uint8")
    prefault.populate(array[4 * MIB : 5 * MIB])
    prefault.populate(array[8 * MIB : 10 * MIB])
    found = prefault.residency([array[: 6 * MIB], array[9 * MIB :]], nodes=True)
    assert found.nodes is None
    assert found.node_bytes == {0: 2 * MIB}


def test_the_zero_page_is_on_no_node() -> None:
    with prefault.Mapping(SIZE, huge="never") as mapping:
        prefault.populate(mapping, access="read")
        assert prefault.residency(mapping, nodes=True).node_bytes == {}


def test_nodes_that_nobody_asked_for_or_that_the_kernel_hides(mapping: prefault.Mapping) -> None:
    prefault.populate(mapping)
    assert prefault.residency(mapping).node_bytes is None
    with without("move_pages"):
        assert prefault.residency(mapping, nodes=True).nodes is None


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"node": 77}, ValueError, "node 77 has no memory here: this machine has node"),
        ({"node": -1}, ValueError, "node -1 has no memory"),
        ({"node": "0"}, TypeError, "by its number, not by str"),
        ({"node": True}, TypeError, "not by bool"),
        ({"interleave": [0, 77]}, ValueError, "node 77"),
        ({"interleave": []}, ValueError, "none"),
        ({"node": 0, "interleave": True}, ValueError, "one of the two"),
    ],
)
def test_bad_nodes_are_refused_before_anything_is_done(
    mapping: prefault.Mapping, arguments: dict[str, Any], error: type[Exception], text: str
) -> None:
    for call in (prefault.populate, prefault.plan):
        with pytest.raises(error, match=text):
            call(mapping, **arguments)
    for make in (prefault.Mapping, prefault.SparseMemory):
        with pytest.raises(error, match=text):
            make(SIZE, **arguments)
    assert _on(mapping) == {}


def test_a_sandbox_that_forbids_policies(mapping: prefault.Mapping) -> None:
    with without("mbind"), pytest.raises(OSError, match="memory policies are not available"):
        prefault.populate(mapping, node=0)


def test_more_than_the_node_has_is_refused_before_anything_is_touched() -> None:
    total = sum(numa.read_node_meminfo(0, "MemTotal"))
    for arguments in ({}, {"node": 0}):
        with prefault.Mapping(total, noreserve=True, **arguments) as mapping:  # type: ignore[arg-type]
            with pytest.raises(prefault.HeadroomError, match="nothing was populated"):
                prefault.populate(mapping, node=0)
            assert _on(mapping) == {}


@pytest.mark.parametrize("arguments", [{"node": 0}, {"interleave": True}])
def test_the_policy_of_a_collection_ends_with_the_call(mapping: prefault.Mapping, arguments: dict[str, Any]) -> None:
    array = mapping.ndarray("uint8")
    parts = {"a": array[: 4 * MIB], "b": [array[6 * MIB : 8 * MIB], array[12 * MIB :].reshape(-1, 4 * PAGE_SIZE)[:, :9]]}
    wanted = 4 * MIB + 2 * MIB + MIB
    seen = set()

    def look(done: int, total: int) -> None:
        seen.update(nodes.policies(*mapping.range))

    assert "memory comes" in str(prefault.plan(parts, **arguments))
    assert prefault.populate(parts, progress=look, **arguments).bytes == wanted == sum(_on(mapping).values())
    assert seen - {"default"} == ({"bind:0"} if "node" in arguments else seen - {"default"})
    assert len(seen) == 2
    assert nodes.policies(*mapping.range) == {"default"}


def test_more_ranges_than_there_can_be_mappings(mapping: prefault.Mapping) -> None:
    with prefault.Mapping(2 * 20_000 * PAGE_SIZE, huge="never") as many:
        rows = many.ndarray("uint8").reshape(-1, 2 * PAGE_SIZE)
        with pytest.raises(ValueError, match="a mapping of each separate range, and these are 20000"):
            prefault.populate(rows[:, :5], node=0)
        assert _on(many) == {}
        del rows


def test_a_node_that_fills_meanwhile_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reading of one number is replaced: `make numa` fills a node."""
    read = numa.read_node_meminfo

    def full(done: int, total: int) -> None:
        monkeypatch.setattr(memory_limits, "read_node_meminfo", lambda node, *names: [read(node, names[0])[0], 0, 0, 0, 0])

    with prefault.Mapping(64 * MIB, huge="never") as mapping:
        with pytest.raises(
            prefault.HeadroomError, match=r"stopped at offset \d+ .* MemFree of node 0 leaves 0 bytes"
        ) as caught:
            prefault.populate(mapping, node=0, threads=1, rate="1 GiB/s", progress=full)
        assert 0 < caught.value.populated_bytes < 64 * MIB
        assert _on(mapping) == {0: caught.value.populated_bytes}
        monkeypatch.undo()
        assert prefault.populate(mapping, node=0).bytes == 64 * MIB - caught.value.populated_bytes


# --- with two nodes


@pytest.fixture
def two() -> None:
    nodes.two_needed()


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("node", [0, 1])
@pytest.mark.parametrize("backing", ["anonymous", "memfd", "tmpfs"])
@pytest.mark.parametrize("huge", ["never", "advise"])
def test_all_pages_come_from_the_node(node: int, backing: str, huge: Any) -> None:
    with prefault.Mapping(SIZE, backing=backing, huge=huge) as mapping:
        result = prefault.populate(mapping, node=node)
        assert result.bytes == SIZE
        assert _on(mapping) == {node: SIZE} == prefault.residency(mapping, nodes=True).node_bytes
        assert not any("in place of" in note for note in result.notes)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_a_mapping_and_sparse_memory_on_a_node(backing: str) -> None:
    with prefault.Mapping(SIZE, backing=backing, node=1) as mapping:
        mapping.memoryview()[5 * MIB] = 1
        prefault.populate(mapping)
        assert _on(mapping) == {1: SIZE}
    with prefault.SparseMemory(SIZE, backing=backing, unpopulated="fault", node=1) as memory:
        memory.populate(MIB, 2 * MIB)
        assert _on(memory) == {1: 2 * MIB}


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("arguments", [{"interleave": True}, {"interleave": (1, 0)}])
def test_pages_alternate_between_nodes(arguments: dict[str, Any]) -> None:
    with prefault.Mapping(SIZE, huge="never") as mapping:
        prefault.populate(mapping, **arguments)
        assert _on(mapping) == {0: SIZE // 2, 1: SIZE // 2} == prefault.residency(mapping, nodes=True).node_bytes
        found = prefault.residency(mapping, nodes=True).nodes
        assert found is not None
        pages = found.tolist()
        assert all(one != other for one, other in pairwise(pages))
    with prefault.Mapping(SIZE, huge="never", **arguments) as mapping:
        prefault.populate(mapping)
        assert _on(mapping) == {0: SIZE // 2, 1: SIZE // 2}


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("backing", ["anonymous", "memfd"])
def test_pages_that_are_elsewhere_stay_there_and_are_named(backing: str) -> None:
    with prefault.Mapping(SIZE, backing=backing) as mapping:
        prefault.populate(mapping, length=4 * MIB, node=0)
        result = prefault.populate(mapping, node=1)
        assert _on(mapping) == {0: 4 * MIB, 1: SIZE - 4 * MIB}
        assert "4.0 MiB on node 0, in place of node 1: pages do not move" in result.notes


@pytest.mark.usefixtures("two")
def test_pages_that_only_the_file_has_are_named_as_well() -> None:
    with prefault.Mapping(SIZE, backing="memfd") as mapping:
        prefault.populate(mapping, length=4 * MIB, node=0)
        assert mapping.fd is not None
        with prefault.Mapping(backing=prefault.Descriptor(mapping.fd)) as again:
            assert "4.0 MiB on node 0" in str(prefault.populate(again, node=1))


@pytest.mark.usefixtures("two")
def test_a_full_node_is_refused_though_the_machine_has_memory() -> None:
    free, total = numa.read_node_meminfo(1, "MemFree", "MemTotal")
    with prefault.Mapping(free + 64 * MIB, huge="never") as mapping:
        assert prefault.headroom(mapping).available_bytes > free + 64 * MIB  # type: ignore[operator]
        with pytest.raises(prefault.HeadroomError, match="MemFree of node 1 leaves") as caught:
            prefault.populate(mapping, node=1)
        assert caught.value.limit == "MemFree of node 1"
        assert free // 2 < caught.value.available_bytes < total
        assert _on(mapping) == {}
        result = prefault.populate(mapping, node=1, headroom="ignore")
        assert set(_on(mapping)) == {0, 1}
        assert any(re.search(r"MiB on node 0, in place of node 1", note) for note in result.notes)
    with (
        prefault.Mapping(free + 64 * MIB, huge="never", node=1) as mapping,
        pytest.raises(prefault.HeadroomError, match="MemFree of node 1 leaves"),
    ):
        prefault.populate(mapping)


@pytest.mark.usefixtures("two")
def test_a_node_that_is_filled_meanwhile_ends_the_call() -> None:
    (free,) = numa.read_node_meminfo(1, "MemFree")
    with prefault.Mapping(free // 2, huge="never") as mapping, prefault.Mapping(free, huge="never") as other:

        def fill(done: int, total: int) -> None:
            if not prefault.residency(other).present_bytes:
                prefault.populate(other, length=free - free // 8, node=1, headroom="ignore")

        with pytest.raises(prefault.HeadroomError, match=r"stopped at offset .* MemFree of node 1 leaves"):
            prefault.populate(mapping, node=1, threads=1, progress=fill)
        assert set(_on(mapping)) == {1}


@pytest.mark.usefixtures("two")
def test_the_buffers_of_a_collection_come_from_the_node() -> None:
    with prefault.Mapping(SIZE, huge="never") as one, prefault.Mapping(SIZE, backing="memfd") as other:
        rows = other.ndarray("uint8").reshape(-1, 4 * PAGE_SIZE)
        prefault.populate({"one": one, "rows": rows[:, :5]}, node=1)
        assert _on(one) == {1: SIZE}
        assert _on(other) == {1: SIZE // 4}
        del rows


@pytest.fixture
def node_pools(hugetlb_pool: Callable[[int], None], two: None) -> None:
    """8 huge pages on node 0 and 4 on node 1."""
    hugetlb_pool(0)
    for node, pages in ((0, 8), (1, 4)):
        setting = Path(numa.node_pool(node, 2 * MIB), "nr_hugepages")
        setting.write_text(str(pages))
        if int(setting.read_text()) != pages:
            needs.missing("each node finds its huge pages")


@pytest.mark.usefixtures("node_pools")
@pytest.mark.parametrize("backing", ["hugetlb", "memfd-hugetlb"])
def test_huge_pages_come_from_the_pool_of_the_node(backing: str) -> None:
    with prefault.Mapping(8 * MIB, backing=backing, noreserve=True) as mapping:
        prefault.populate(mapping, node=1)
        assert _on(mapping) == {1: 8 * MIB} == prefault.residency(mapping, nodes=True).node_bytes
    with prefault.Mapping(10 * MIB, backing=backing, noreserve=True) as mapping:
        with pytest.raises(prefault.HeadroomError, match=r"on node 1 leaves 8\.0 MiB"):
            prefault.populate(mapping, node=1)
        assert _on(mapping) == {}
        prefault.populate(mapping, node=1, headroom="ignore")
        assert "fallocate" not in prefault.plan(mapping, node=1).method
        assert _on(mapping) == {0: 2 * MIB, 1: 8 * MIB}


@pytest.mark.usefixtures("two")
def test_the_cpuset_of_the_process_is_named() -> None:
    with nodes.cpuset(0) as directory:

        def inside() -> str:
            (directory / "cgroup.procs").write_text(str(os.getpid()))
            try:
                with pytest.raises(ValueError, match="cpuset") as caught, prefault.Mapping(SIZE, node=1):
                    pass
                with prefault.Mapping(SIZE, interleave=True) as mapping:
                    prefault.populate(mapping)
                    assert _on(mapping) == {0: SIZE}
                return str(caught.value)
            finally:
                (directory.parent / "cgroup.procs").write_text(str(os.getpid()))

        assert "forbids node 1: it leaves node 0" in in_child(inside)


@pytest.mark.parametrize("wrong", [3, "0,1", 0.5, object])
def test_what_interleave_takes(wrong: Any) -> None:
    with pytest.raises(TypeError, match="interleave is True or numbers of nodes, such as"):
        prefault.Mapping(PAGE_SIZE, interleave=wrong)
