"""The exceptions as values: what they say, what they carry, and that they travel between processes."""

from __future__ import annotations

import concurrent.futures
import copy
import errno
import inspect
import multiprocessing
import pickle

import pytest

import prefault
from prefault import PAGE_SIZE, PageRange, RangeSet, errors

_POPULATED = RangeSet([PageRange(0, 3 * PAGE_SIZE), PageRange(8 * PAGE_SIZE, 9 * PAGE_SIZE)])
_POPULATE_ERRORS = [
    kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, prefault.PopulateError)
]


def test_whose_subclass_each_is() -> None:
    for kind in _POPULATE_ERRORS:
        assert issubclass(kind, OSError)
    assert {kind.__name__ for kind in _POPULATE_ERRORS} == {
        "PopulateError", "HoleError", "ProtectionError", "SpecialMappingError", "BackingFullError", "BeyondEndError",
        "GuardPageError", "PoisonedPageError", "OutOfMemoryError", "HeadroomError", "PoolFullError", "PoolGoneError",
        "DriverError", "NoPopulateError", "DeviceGoneError", "PopulateCancelled",
    }  # fmt: skip
    assert issubclass(prefault.PopulateInterrupted, KeyboardInterrupt)
    assert not issubclass(prefault.PopulateInterrupted, Exception)  # `except Exception` must not swallow Ctrl-C
    assert issubclass(prefault.DiscardError, OSError)
    assert issubclass(prefault.HugePagesError, prefault.MappingError)
    assert issubclass(prefault.MappingError, OSError)


@pytest.mark.parametrize("kind", _POPULATE_ERRORS)
def test_populate_errors(kind: type[prefault.PopulateError]) -> None:
    error = kind(errno.EFAULT, "no page", address=0x7000, offset=-17, populated=_POPULATED)
    assert (error.errno, error.strerror, error.address, error.offset) == (errno.EFAULT, "no page", 0x7000, -17)
    assert error.populated == _POPULATED
    assert error.populated_bytes == 4 * PAGE_SIZE
    assert str(error) == "no page [EFAULT: Bad address]"
    bare = kind(errno.EINVAL, "no")
    assert (bare.address, bare.offset, bare.populated_bytes) == (0, 0, 0)


def test_the_others() -> None:
    interrupted = prefault.PopulateInterrupted("interrupted: 16.0 KiB", _POPULATED)
    assert str(interrupted) == "interrupted: 16.0 KiB"
    assert interrupted.populated == _POPULATED
    assert interrupted.populated_bytes == 4 * PAGE_SIZE
    faults = pickle.loads(pickle.dumps(prefault.PageFaultsError(3, 1, "3 minor and 1 major")))
    assert (faults.minor_faults, faults.major_faults, str(faults)) == (3, 1, "3 minor and 1 major")
    discard = prefault.DiscardError(errno.EINVAL, "locked", address=0x5000)
    assert discard.address == 0x5000
    assert str(discard) == "locked [EINVAL: Invalid argument]"
    assert str(prefault.MappingError(errno.ENOSPC, "full")) == "full [ENOSPC: No space left on device]"
    assert str(prefault.HugePagesError(errno.ENOMEM, "pool")) == "pool [ENOMEM: Cannot allocate memory]"


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (errno.EFAULT, "EFAULT: Bad address"),
        (133, "errno 133: Memory page has hardware error"),  # EHWPOISON, of which Python does not know the name
        (0, "errno 0: Success"),
        (4095, "errno 4095: Unknown error 4095"),
        (None, "no errno"),
    ],
)
def test_errno_name(number: int | None, name: str) -> None:
    assert errors.errno_name(number) == name


def _samples() -> list[BaseException]:
    return [
        *(kind(errno.EFAULT, "no page", address=0x7000, offset=12, populated=_POPULATED) for kind in _POPULATE_ERRORS),
        prefault.PopulateInterrupted("interrupted", _POPULATED),
        prefault.DiscardError(errno.EINVAL, "locked", address=0x5000),
        prefault.MappingError(errno.ENOSPC, "full"),
        prefault.HugePagesError(errno.ENOMEM, "pool"),
    ]


def _same(one: BaseException, other: BaseException) -> bool:
    return type(one) is type(other) and one.args == other.args and str(one) == str(other) and vars(one) == vars(other)


@pytest.mark.parametrize("error", _samples(), ids=lambda error: type(error).__name__)
def test_pickle_and_copy_keep_everything(error: BaseException) -> None:
    error.add_note("while loading the model")
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert _same(pickle.loads(pickle.dumps(error, protocol)), error)
    assert _same(copy.copy(error), error)
    assert _same(copy.deepcopy(error), error)


def _fail(index: int) -> None:
    raise _samples()[index]


def test_through_a_process_pool() -> None:
    samples = _samples()
    # spawn: the exception is all that the two processes share
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        for index, sample in enumerate(samples):
            if isinstance(sample, Exception):  # a pool's worker ends on an interruption
                with pytest.raises(type(sample)) as caught:
                    pool.submit(_fail, index).result(60)
                assert caught.value.args == sample.args
                assert str(caught.value) == str(sample)
                assert getattr(caught.value, "populated", None) == getattr(sample, "populated", None)
                assert getattr(caught.value, "address", None) == getattr(sample, "address", None)
