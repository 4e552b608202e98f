"""Sizes: exact, or refused with a message that says what to write."""

from __future__ import annotations

import mmap
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefault import PAGE_SIZE, format_size, parse_size
from prefault.sizes import format_count

_BINARY = {"k": 1, "m": 2, "g": 3, "t": 4, "p": 5, "e": 6}
_LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (0, 0),
        (4096, 4096),
        ("0", 0),
        ("4096", 4096),
        ("4096 b", 4096),
        ("64 MiB", 64 << 20),
        ("64MiB", 64 << 20),
        ("64M", 64 << 20),
        ("64 m", 64 << 20),
        ("64 MB", 64_000_000),
        ("64mb", 64_000_000),
        ("1.5 GiB", 3 << 29),
        ("1.5GB", 1_500_000_000),
        ("0.5K", 512),
        ("0.001 kB", 1),
        ("2 TiB", 2 << 40),
        ("1 PiB", 1 << 50),
        ("7 EiB", 7 << 60),
        ("9 EB", 9 * 10**18),
        ("  12 KiB\n", 12 << 10),
        ("9223372036854775807", _LARGEST),
        (_LARGEST, _LARGEST),
    ],
)
def test_sizes_as_text(text: int | str, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.3 B", "not a whole number of bytes"),
        ("0.3", "not a whole number of bytes"),
        ("1.0001 KiB", "not a whole number of bytes"),
        ("64 MiBs", "unknown unit 'MiBs'"),
        ("64 ZiB", "unknown unit 'ZiB'"),
        ("64 pages", "unknown unit 'pages'"),
        ("", "is not a size"),
        ("MiB", "is not a size"),
        ("-1", "is not a size"),
        ("+1", "is not a size"),
        ("1e3", "is not a size"),
        ("0x1000", "is not a size"),
        ("1_000", "is not a size"),
        ("1,5 GiB", "is not a size"),
        (".5 GiB", "is not a size"),
        ("1. GiB", "is not a size"),
        ("1 GiB 2", "is not a size"),
        ("nan", "is not a size"),
        ("\u0663 MiB", "is not a size"),  # an Arabic digit, which int() would take
        ("\uff16\uff14 MiB", "is not a size"),  # full width digits
        ("64\u00a0MiB", "is not a size"),  # a no-break space
        ("8 EiB", "8 EiB is beyond"),
        ("9223372036854775808", "beyond what the kernel can address"),
        (-1, "cannot be negative: -1"),
        (_LARGEST + 1, "beyond what the kernel can address"),
    ],
)
def test_refused_texts_and_numbers(text: int | str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_size(text)


def test_numbers_too_long_for_python_to_write_or_read() -> None:
    with pytest.raises(ValueError, match="a number of 16610 bits is beyond"):
        parse_size(10**5000)
    with pytest.raises(ValueError, match="cannot be negative: a number of 16610 bits"):
        parse_size(-(10**5000))
    with pytest.raises(ValueError, match="a text of 5000 characters is not a size"):
        parse_size("1" * 5000)


@pytest.mark.parametrize("wrong", [None, True, False, 1.0, 4096.0, b"64 MiB", [4096], 1j, Fraction(4096), object()])
def test_refused_types(wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"not {type(wrong).__name__}"):
        parse_size(wrong)


def test_numbers_of_other_libraries() -> None:
    import numpy

    for kind in (numpy.int64, numpy.uint32, numpy.intp):
        number: Any = kind(4096)
        size = parse_size(number)
        assert size == 4096
        assert type(size) is int
    with pytest.raises(TypeError):
        parse_size(numpy.float64(4096))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        parse_size(numpy.bool_(True))  # type: ignore[arg-type]


@given(st.integers(0, _LARGEST))
def test_whole_bytes_come_back(size: int) -> None:
    assert parse_size(size) == size
    assert parse_size(str(size)) == size
    assert parse_size(f"{size}B") == size


@given(
    whole=st.integers(0, 10**7),
    fraction=st.text("0123456789", max_size=12),
    letter=st.sampled_from("kmgtpe"),
    suffix=st.sampled_from(["", "b", "ib"]),
    upper=st.booleans(),
    gap=st.sampled_from(["", " ", "\t"]),
)
def test_against_exact_fractions(whole: int, fraction: str, letter: str, suffix: str, upper: bool, gap: str) -> None:
    number = f"{whole}.{fraction}" if fraction else str(whole)
    unit = letter + suffix
    text = number + gap + (unit.upper() if upper else unit)
    base = 1000 if suffix == "b" else 1024
    exact = Fraction(number) * base ** _BINARY[letter]
    if exact.denominator == 1 and exact <= _LARGEST:
        assert parse_size(text) == exact
    else:
        with pytest.raises(ValueError, match=r"whole number of bytes|beyond"):
            parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (4096, "4.0 KiB"),
        (1536 << 10, "1.5 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),  # not "1024.0 KiB"
        (4 << 30, "4.0 GiB"),
        (1 << 60, "1.0 EiB"),
        (_LARGEST, "8.0 EiB"),
        (-4096, "-4.0 KiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, _LARGEST))
def test_format_is_right_to_a_tenth_of_its_unit(size: int) -> None:
    number, unit = format_size(size).split(" ")
    scale = 1 if unit.startswith("byte") else 1024 ** _BINARY[unit[0].lower()]
    assert abs(Fraction(number) * scale - size) <= Fraction(scale, 20) + 2**10  # half a tenth, and the float's own error
    assert Fraction(number) < 1024


def test_page_size() -> None:
    assert mmap.PAGESIZE == PAGE_SIZE


def test_count_has_the_noun_in_the_number_it_needs() -> None:
    assert [format_count(count, "file") for count in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert [format_count(count, "directory", "directories") for count in (1, 0)] == ["1 directory", "0 directories"]
