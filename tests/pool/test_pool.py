"""Pool in one process: what is charged against what the kernel says is there."""

from __future__ import annotations

import gc
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy  # noqa: F401  here, so that its mappings are no leak of the first test
import pytest

import prefault
from prefault import PAGE_SIZE, Memfd, TemporaryFile
from prefault._system import hugetlb
from prefault.errors import HugePagesError, MappingError, PoolFullError, PoolGoneError
from prefault.pool import Pool, PoolStatistics
from prefault.sparse import SparseMemory
from support import needs, oracle
from support.children import in_child

_BLOCK = 4 * PAGE_SIZE
_MIB = 1 << 20


def _allocated(memory: SparseMemory) -> int:
    """Bytes in the member's file."""
    assert memory.fd is not None
    return os.fstat(memory.fd).st_blocks * 512


def _numbers(pool: Pool) -> list[tuple[int, int]]:
    return [(member.charged, member.allocated_bytes) for member in pool.statistics().members]


# --- charge, discard, close


@pytest.mark.parametrize("backing", ["memfd", "tmpfs", Memfd("named")])
def test_the_accounting_and_the_kernel_agree(no_leaks: None, backing: Any) -> None:
    with Pool(16 * _BLOCK, backing=backing, block=_BLOCK) as pool:
        memory = pool.sparse("1 GiB", name="guest")
        assert len(memory) == 1 << 30
        assert _numbers(pool) == [(0, 0)]
        memory.populate(0, 3 * _BLOCK)
        memory.populate(_BLOCK, 4 * _BLOCK)  # two of them are there
        memory.populate(100 * _BLOCK + 1, 1)  # rounded outward to a block
        assert _numbers(pool) == [(6 * _BLOCK, 6 * _BLOCK)]
        assert _allocated(memory) == 6 * _BLOCK
        memory.discard(_BLOCK - 1, 2 * _BLOCK + 1)  # rounded inward
        assert _numbers(pool) == [(4 * _BLOCK, 4 * _BLOCK)]
        prefault.populate(memory, offset=_BLOCK, length=_BLOCK)  # the same verbs, the same books
        prefault.discard(memory, offset=0, length=_BLOCK)
        assert _numbers(pool) == [(4 * _BLOCK, 4 * _BLOCK)]
        (member,) = pool.statistics().members
        assert (member.name, member.pid, member.size, member.orphaned) == ("guest", os.getpid(), 1 << 30, False)
        memory.close()
        statistics = pool.statistics()
        assert (statistics.charged, statistics.peak, statistics.available) == (0, 6 * _BLOCK, 16 * _BLOCK)
        assert statistics.members == ()


def test_full_is_an_error_before_a_page_is_touched(no_leaks: None) -> None:
    with Pool(8 * _BLOCK, block=_BLOCK) as pool, pool.sparse(64 * _BLOCK) as one, pool.sparse(64 * _BLOCK) as two:
        one.populate(0, 5 * _BLOCK)
        one.write(0, b"kept")
        with pytest.raises(PoolFullError, match=r"member 2 .*needs 64\.0 KiB more: of a capacity of 128\.0 KiB, 80"):
            two.populate(0, 4 * _BLOCK)
        assert _allocated(two) == 0
        assert oracle.present_bytes(two.range.start, 64 * _BLOCK) == 0
        with pytest.raises(PoolFullError):
            one.populate_many([(0, _BLOCK), (10 * _BLOCK, 4 * _BLOCK)])
        assert _numbers(pool) == [(5 * _BLOCK, 5 * _BLOCK), (0, 0)]
        two.populate(0, 3 * _BLOCK)
        one.discard(_BLOCK, _BLOCK)
        two.populate(32 * _BLOCK, _BLOCK)  # at once
        assert _numbers(pool) == [(4 * _BLOCK, 4 * _BLOCK), (4 * _BLOCK, 4 * _BLOCK)]
        assert one.read(0, 4) == b"kept"


def test_reservations_are_kept_from_others_and_limits_are_kept(no_leaks: None) -> None:
    with Pool(10 * _BLOCK, block=_BLOCK) as pool:
        safe = pool.sparse(64 * _BLOCK, reserved=4 * _BLOCK - 1)
        other = pool.sparse(64 * _BLOCK, limit=5 * _BLOCK + 1)
        greedy = pool.sparse(64 * _BLOCK)
        statistics = pool.statistics()
        assert (statistics.reserved_free, statistics.available) == (4 * _BLOCK, 6 * _BLOCK)
        assert [(member.reserved, member.limit) for member in statistics.members] == [
            (4 * _BLOCK, None), (0, 5 * _BLOCK), (0, None),
        ]  # fmt: skip
        with pytest.raises(PoolFullError, match=r"beyond its limit of 80\.0 KiB, of which 0 bytes are charged"):
            other.populate(0, 6 * _BLOCK)
        other.populate(0, 5 * _BLOCK)
        with pytest.raises(PoolFullError, match=r"64\.0 KiB are reserved for others, which leaves 16\.0 KiB"):
            greedy.populate(0, 2 * _BLOCK)
        greedy.populate(0, _BLOCK)
        safe.populate(0, 4 * _BLOCK)
        with pytest.raises(PoolFullError):
            safe.populate(8 * _BLOCK, _BLOCK)
        with pytest.raises(PoolFullError, match=r"cannot reserve 16\.0 KiB for late: of a capacity of 160\.0 KiB"):
            pool.sparse(_BLOCK, reserved=1, name="late")
        for memory in (safe, other, greedy):
            memory.close()
        pool.sparse(10 * _BLOCK, reserved=10 * _BLOCK).close()


def test_a_million_bytes_of_scattered_blocks(no_leaks: None) -> None:
    blocks = 20_000
    with Pool(blocks * PAGE_SIZE, block=PAGE_SIZE) as pool, pool.sparse(4 * blocks * PAGE_SIZE) as memory:
        ranges = [(2 * number * PAGE_SIZE, PAGE_SIZE) for number in range(blocks)]
        memory.populate_many(ranges)
        assert _numbers(pool) == [(blocks * PAGE_SIZE, blocks * PAGE_SIZE)]
        with pytest.raises(PoolFullError):
            memory.populate_many([(PAGE_SIZE, PAGE_SIZE)])
        memory.discard_many(ranges[::2])
        assert _numbers(pool) == [(blocks // 2 * PAGE_SIZE, blocks // 2 * PAGE_SIZE)]


def test_an_overdraft_is_shown() -> None:
    with Pool(4 * _BLOCK, block=_BLOCK) as pool, pool.sparse(64 * _BLOCK, unpopulated="zeros") as memory:
        memory.populate(0, _BLOCK)
        memory.write(32 * _BLOCK, b"x" * 6 * _BLOCK)
        assert _numbers(pool) == [(_BLOCK, 7 * _BLOCK)]


def test_a_fork_while_another_thread_holds_the_lock() -> None:
    """The child can close its copies, and gets an error that the pool is its parent's."""
    with Pool(8 * _BLOCK, block=_BLOCK) as pool, pool.sparse(64 * _BLOCK) as memory:
        memory.populate(0, _BLOCK)
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with pool._table._lock:
                held.set()
                done.wait(30)

        thread = threading.Thread(target=hold)
        thread.start()
        assert held.wait(30)

        def child() -> str:
            with pytest.raises(PoolGoneError) as caught:
                pool.statistics()
            memory.close()
            pool.close()
            return str(caught.value)

        try:
            assert "of which this one is a fork" in in_child(child)
        finally:
            done.set()
            thread.join()
        assert _numbers(pool) == [(_BLOCK, _BLOCK)]


def test_what_fails_in_the_kernel_is_refunded(small_tmpfs: Callable[[str], Path]) -> None:
    """The accounting has room, the tmpfs has none: another process wrote to it."""
    directory = small_tmpfs("1m")
    with Pool(_MIB, backing=TemporaryFile(directory), block=_BLOCK) as pool, pool.sparse(_MIB) as memory:
        memory.populate(0, 4 * _BLOCK)
        (directory / "other").write_bytes(b"x" * (_MIB // 2))
        for headroom, error in (("check", prefault.HeadroomError), ("ignore", prefault.BackingFullError)):
            with pytest.raises(error):
                memory.populate(0, _MIB, headroom=headroom)  # type: ignore[arg-type]
            assert _numbers(pool) == [(4 * _BLOCK, 4 * _BLOCK)]
        memory.populate(0, _MIB // 4)


def test_the_memory_really_returns_to_a_tmpfs(small_tmpfs: Callable[[str], Path]) -> None:
    directory = small_tmpfs("2m")

    def used() -> int:
        found = os.statvfs(directory)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    with Pool(_MIB, backing=TemporaryFile(directory), block=_BLOCK) as pool:
        before = used()
        memory = pool.sparse("1 GiB")
        memory.populate(0, _MIB)
        assert used() - before == _MIB
        memory.discard(0, _MIB // 2)
        assert used() - before == _MIB // 2
        memory.close()
        assert used() == before
        assert os.listdir(directory) == []


def test_the_memory_really_returns_to_the_hugetlb_pool(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(6)
    block = needs.HUGE
    free = hugetlb.read_pool(block).free
    with Pool(6 * block, backing="memfd-hugetlb") as pool:
        memory = pool.sparse(64 * block)
        memory.populate(10 * block, 4 * block)
        assert hugetlb.read_pool(block).free == free - 4
        assert _numbers(pool) == [(4 * block, 4 * block)]
        with pytest.raises(PoolFullError):
            memory.populate(0, 3 * block)
        memory.discard(10 * block, block)
        assert hugetlb.read_pool(block).free == free - 3
        memory.populate(0, 3 * block)
        assert hugetlb.read_pool(block).free == free - 6
        memory.close()
        assert hugetlb.read_pool(block).free == free
    assert hugetlb.read_pool(block).available == free


def test_huge_pages_are_set_aside_for_the_pool(hugetlb_pool: Callable[[int], None], no_leaks: None) -> None:
    """The kernel reserves them: no other process on this machine gets them."""
    hugetlb_pool(6)
    block = needs.HUGE
    before = hugetlb.read_pool(block)
    with Pool(4 * block, backing="memfd-hugetlb") as pool:
        assert hugetlb.read_pool(block).available == before.available - 4
        with pytest.raises(HugePagesError, match=r"takes 3 huge pages of .*, and 2 of \d+ are free and not"):
            Pool(3 * block, backing="memfd-hugetlb")
        with prefault.Mapping(6 * block, backing="memfd-hugetlb", noreserve=True) as thief:
            with pytest.raises(prefault.PopulateError):
                prefault.populate(thief)  # two pages, and no more
            with pool.sparse(64 * block) as memory:
                memory.populate(60 * block, 4 * block)
                assert pool.statistics().allocated_bytes == 4 * block
                assert hugetlb.read_pool(block).reserved == before.reserved
                memory.discard(60 * block, 2 * block)
                assert pool.statistics().unbacked == 0
                assert hugetlb.read_pool(block).reserved == before.reserved + 2
                with pytest.raises(prefault.PopulateError):
                    prefault.populate(thief)
            assert hugetlb.read_pool(block).reserved == before.reserved + 4
    assert hugetlb.read_pool(block).available == before.available


def test_lost_huge_pages_are_reported_and_reserved_again(hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(4)
    block = needs.HUGE
    with Pool(4 * block, backing="memfd-hugetlb") as pool, pool.sparse(64 * block) as memory:
        memory.populate(0, 4 * block)
        hugetlb_pool(2)  # two of them become surplus, which are freed and not given again
        memory.discard()
        assert pool.statistics().unbacked == 4 * block
        hugetlb_pool(4)
        memory.populate(0, block)
        memory.discard()
        assert pool.statistics().unbacked == 0


def test_a_mapping_in_another_process_cannot_allocate_uncharged_memory() -> None:
    """A closed member's file is truncated: its memory is gone even where another process maps it."""
    with Pool(4 * _BLOCK, block=_BLOCK) as pool:
        memory = pool.sparse(8 * _BLOCK)
        assert memory.fd is not None
        fd = os.dup(memory.fd)
        memory.populate(0, 4 * _BLOCK)
        memory.close()
        assert (os.fstat(fd).st_blocks, os.fstat(fd).st_size) == (0, 0)
        os.close(fd)


def test_a_view_keeps_its_memory(no_leaks: None) -> None:
    """A view outlives the sparse memory and the pool."""
    pool = Pool(4 * _BLOCK, block=_BLOCK)
    memory = pool.sparse(8 * _BLOCK)
    memory.populate(0, _BLOCK)
    view = memory.view(0, _BLOCK)
    view[:5] = b"alive"
    with pytest.raises(BufferError):
        memory.close()
    assert pool.statistics().charged == _BLOCK
    del memory
    gc.collect()
    assert bytes(view[:5]) == b"alive"
    assert pool.statistics().charged == _BLOCK
    pool.close()
    assert bytes(view[:5]) == b"alive"
    del view
    gc.collect()


def test_a_pool_that_is_closed_leaves_the_memory(no_leaks: None) -> None:
    pool = Pool(4 * _BLOCK, block=_BLOCK)
    memory = pool.sparse(8 * _BLOCK)
    memory.populate(0, _BLOCK)
    memory.write(0, b"still here")
    pool.close()
    pool.close()
    assert memory.read(0, 10) == b"still here"
    with pytest.raises(PoolGoneError, match="the pool is closed"):
        memory.populate(_BLOCK, _BLOCK)
    for forbidden in (pool.statistics, lambda: pool.sparse(_BLOCK)):
        with pytest.raises(ValueError, match="the pool is closed"):
            forbidden()
    memory.discard(0, _BLOCK)
    memory.close()
    assert "closed" in repr(pool)


def test_a_pool_that_is_forgotten(no_leaks: None, hugetlb_pool: Callable[[int], None]) -> None:
    hugetlb_pool(2)
    before = hugetlb.read_pool(needs.HUGE).available
    Pool(2 * needs.HUGE, backing="memfd-hugetlb").sparse(64 * needs.HUGE).populate(0, needs.HUGE)
    gc.collect()
    assert hugetlb.read_pool(needs.HUGE).available == before


def test_resize_within_the_reservation() -> None:
    with Pool(4 * _BLOCK, block=_BLOCK) as pool, pool.sparse(_BLOCK, reservation=32 * _BLOCK) as memory:
        memory.resize(16 * _BLOCK)
        memory.populate(15 * _BLOCK, _BLOCK)
        assert _numbers(pool) == [(_BLOCK, _BLOCK)]


# --- what cannot be


@pytest.mark.parametrize(
    ("capacity", "options", "error", "complaint"),
    [
        (0, {}, ValueError, "positive multiple of the block"),
        (-1, {}, ValueError, "negative"),
        ("3 MiB", {}, ValueError, "multiple of the block of 2097152 bytes"),
        ("2 MiB", {"block": 0}, ValueError, "a block of 0 bytes"),
        ("2 MiB", {"block": 1000}, ValueError, "multiple"),
        ("2 MiB", {"block": 2048}, ValueError, "multiple of the page of 4096 bytes, not 2048"),
        ("2 MiB", {"backing": "anonymous"}, ValueError, "a pool makes its files itself"),
        ("2 MiB", {"backing": "hugetlb"}, ValueError, "a pool makes its files itself"),
        ("2 MiB", {"backing": prefault.File("/etc/passwd")}, ValueError, "a pool makes its files itself"),
        ("2 MiB", {"backing": "gold"}, ValueError, "unknown backing"),
        ("2 MiB", {"backing": TemporaryFile("/nowhere")}, MappingError, "No such file"),
        ("2 MiB", {"high_water": 0.0}, ValueError, "fraction"),
        ("2 MiB", {"high_water": 1.5}, ValueError, "fraction"),
        ("2 MiB", {"high_water": "4 MiB"}, ValueError, "up to the capacity"),
        ("2 MiB", {"on_high_water": print}, ValueError, "needs a mark"),
    ],
)
def test_invalid_pools(
    no_descriptors: None, capacity: Any, options: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        Pool(capacity, **options)


@pytest.mark.parametrize(
    ("size", "options", "complaint"),
    [
        (0, {}, "between 1 and"),
        (-1, {}, "negative"),
        ("8191 PiB", {}, "do not fit"),
        (_BLOCK, {"reserved": 2 * _BLOCK}, "reserved for a member of"),
        (8 * _BLOCK, {"reserved": 2 * _BLOCK, "limit": _BLOCK}, "whose limit is"),
        (8 * _BLOCK, {"limit": _BLOCK - 1}, "a limit is at least one block"),
        (8 * _BLOCK, {"limit": 0}, "a limit is at least one block"),
        (8 * _BLOCK, {"name": ""}, "a name has"),
        (8 * _BLOCK, {"name": "a\0b"}, "a name has"),
        (8 * _BLOCK, {"unpopulated": "maybe"}, "'zeros' or 'fault'"),
        (8 * _BLOCK, {"reservation": _BLOCK}, "smaller than the size"),
    ],
)
def test_invalid_members(no_descriptors: None, size: Any, options: dict[str, Any], complaint: str) -> None:
    with Pool(4 * _BLOCK, block=_BLOCK) as pool:
        with pytest.raises(ValueError, match=complaint):
            pool.sparse(size, **options)
        assert pool.statistics() == PoolStatistics(4 * _BLOCK, 0, 0, 4 * _BLOCK, 0, ())


def test_a_directory_on_a_disk_is_no_pool(tmp_path: Path) -> None:
    from support.regions import filesystem_of

    if filesystem_of(tmp_path) == "tmpfs":
        needs.missing("the temporary directory is on tmpfs")
    with pytest.raises(ValueError, match="a pool is memory, its directory is on tmpfs or hugetlbfs"):
        Pool("2 MiB", backing=TemporaryFile(tmp_path))


def test_a_tmpfs_that_is_too_small(small_tmpfs: Callable[[str], Path], no_leaks: None) -> None:
    directory = small_tmpfs("4m")
    with pytest.raises(MappingError, match=r"holds 4\.0 MiB, the pool is to hold 6\.0 MiB: mount it larger"):
        Pool("6 MiB", backing=TemporaryFile(directory))
    Pool("4 MiB", backing=TemporaryFile(directory)).close()
    (directory / "other").write_bytes(bytes(_MIB))
    with Pool("4 MiB", backing=TemporaryFile(directory)) as pool:
        assert len(pool.notes) == 1
        assert "3.0 MiB of" in pool.notes[0]


def test_more_than_the_machine_has_is_noted() -> None:
    with Pool("1 PiB") as pool:
        assert len(pool.notes) == 1
        assert "can never be populated in full" in pool.notes[0]
    with Pool("2 MiB") as pool:
        assert pool.notes == ()


def test_too_few_huge_pages(hugetlb_pool: Callable[[int], None], no_leaks: None) -> None:
    hugetlb_pool(3)
    with pytest.raises(HugePagesError, match=r"takes 4 huge pages of 2\.0 MiB, and 3 of \d+ are free"):
        Pool("8 MiB", backing="memfd-hugetlb")
    with pytest.raises(ValueError, match="multiple of the page of 2097152 bytes"):
        Pool("6 MiB", backing="memfd-hugetlb", block="1 MiB")
    Pool("6 MiB", backing="memfd-hugetlb").close()


# --- the high-water mark


class _Calls:
    """Collects the statistics that the callback gets."""

    def __init__(self) -> None:
        self.seen: list[PoolStatistics] = []
        self._some = threading.Semaphore(0)

    def __call__(self, statistics: PoolStatistics) -> None:
        self.seen.append(statistics)
        self._some.release()

    def wait(self) -> PoolStatistics:
        assert self._some.acquire(timeout=30), "the callback was not called"
        return self.seen[-1]

    @contextmanager
    def none(self) -> Iterator[None]:
        before = len(self.seen)
        yield
        for thread in threading.enumerate():
            if thread.name == "prefault-high-water":
                thread.join()
        assert len(self.seen) == before


@pytest.mark.parametrize("mark", [0.75, 6 * _BLOCK])
def test_once_for_each_crossing(mark: float) -> None:
    calls = _Calls()
    with (
        Pool(8 * _BLOCK, block=_BLOCK, high_water=mark, on_high_water=calls) as pool,
        pool.sparse(64 * _BLOCK) as memory,
    ):
        with calls.none():
            memory.populate(0, 5 * _BLOCK)
        memory.populate(0, 6 * _BLOCK)
        assert calls.wait().charged == 6 * _BLOCK
        with calls.none():
            memory.populate(0, 8 * _BLOCK)
            memory.discard(0, 2 * _BLOCK)
        memory.discard(2 * _BLOCK, _BLOCK)
        memory.populate(0, 2 * _BLOCK)
        assert calls.wait().charged == 7 * _BLOCK


def test_a_balloon_can_work_in_the_callback() -> None:
    done = threading.Event()

    def shrink(statistics: PoolStatistics) -> None:
        cache.discard(0, 4 * _BLOCK)
        cache.populate(0, _BLOCK)
        done.set()

    with (
        Pool(8 * _BLOCK, block=_BLOCK, high_water=1.0, on_high_water=shrink) as pool,
        pool.sparse(8 * _BLOCK) as cache,
    ):
        cache.populate(0, 8 * _BLOCK)
        assert done.wait(30)
        for thread in threading.enumerate():
            if thread.name == "prefault-high-water":
                thread.join()
        assert pool.statistics().charged == 5 * _BLOCK


def test_an_exception_of_the_callback_reaches_the_excepthook_only(monkeypatch: pytest.MonkeyPatch) -> None:
    raised = list[str]()
    monkeypatch.setattr(threading, "excepthook", lambda hook: raised.append(str(hook.exc_value)))
    calls = _Calls()

    def fail(statistics: PoolStatistics) -> None:
        calls(statistics)
        raise RuntimeError(f"no {len(calls.seen)}")

    with Pool(8 * _BLOCK, block=_BLOCK, high_water=1, on_high_water=fail) as pool, pool.sparse(8 * _BLOCK) as memory:
        for _ in range(2):
            memory.populate(0, 8 * _BLOCK)
            calls.wait()
            memory.discard()
        with calls.none():
            assert pool.statistics().charged == 0
    assert raised == ["no 1", "no 2"]


# --- threads and forks


def _churn(pool: Pool, memories: list[SparseMemory], seed: int, steps: int, errors: list[BaseException]) -> None:
    rng = random.Random(seed)
    try:
        for _ in range(steps):
            memory = rng.choice(memories)
            start = rng.randrange(24)
            length = rng.randrange(1, 6)
            try:
                if rng.random() < 0.55:
                    memory.populate(start * _BLOCK, length * _BLOCK)
                else:
                    memory.discard(start * _BLOCK, length * _BLOCK)
            except PoolFullError:
                pass
            statistics = pool.statistics()
            assert statistics.charged + statistics.reserved_free + statistics.available == statistics.capacity
            assert statistics.charged == sum(member.charged for member in statistics.members)
            assert statistics.allocated_bytes <= statistics.capacity
    except BaseException as error:  # noqa: BLE001  raised again by the test
        errors.append(error)


def _churned(threads: int, steps: int) -> None:
    errors: list[BaseException] = []
    with Pool(32 * _BLOCK, block=_BLOCK) as pool:
        memories = [pool.sparse(32 * _BLOCK, reserved=4 * _BLOCK, limit=20 * _BLOCK) for _ in range(3)]
        workers = [threading.Thread(target=_churn, args=(pool, memories, seed, steps, errors)) for seed in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]
        for memory, member in zip(memories, pool.statistics().members, strict=True):
            assert memory.populated.length == member.charged == member.allocated_bytes == _allocated(memory)
            memory.close()
        assert pool.statistics().charged == 0


def test_threads() -> None:
    _churned(4, 60)


@pytest.mark.stress
def test_threads_for_long() -> None:
    _churned(8, 3000)


def test_a_fork_uses_the_memory_and_not_the_pool(no_leaks: None) -> None:
    with Pool(8 * _BLOCK, block=_BLOCK) as pool, pool.sparse(16 * _BLOCK) as memory:
        memory.populate(0, 2 * _BLOCK)
        memory.write(0, b"before")

        def child() -> bytes:
            with pytest.raises(PoolGoneError, match="of which this one is a fork"):
                memory.populate(4 * _BLOCK, _BLOCK)
            with pytest.raises(PoolGoneError, match="fork"):
                pool.sparse(_BLOCK)
            found = memory.read(0, 6)
            memory.write(0, b"after.")
            memory.close()
            pool.close()
            return found

        assert in_child(child) == b"before"
        assert memory.read(0, 6) == b"after."
        assert _numbers(pool) == [(2 * _BLOCK, 2 * _BLOCK)]
        memory.populate(4 * _BLOCK, _BLOCK)


@pytest.mark.parametrize("unpopulated", ["zeros", "fault"])
@pytest.mark.parametrize("many", [False, True])
def test_what_a_limit_refuses_is_not_charged(
    small_tmpfs: Callable[[str], Path], unpopulated: Literal["zeros", "fault"], many: bool
) -> None:
    """No mark is reached, and nobody has to make room, for a populate that cannot take place."""
    calls: list[object] = []
    directory = small_tmpfs("1m")
    with (
        Pool(_MIB, backing=TemporaryFile(directory), block=_BLOCK, high_water=0.3, on_high_water=calls.append) as pool,
        pool.sparse(_MIB, unpopulated=unpopulated) as memory,
    ):
        (directory / "other").write_bytes(b"x" * (_MIB // 2))
        with pytest.raises(prefault.HeadroomError, match="nothing was populated"):
            memory.populate_many([(0, _MIB // 2), (_MIB * 5 // 8, _BLOCK)]) if many else memory.populate()
        assert not calls
        assert _numbers(pool) == [(0, 0)]
        assert pool.statistics().peak == 0
        memory.populate(0, _BLOCK)
