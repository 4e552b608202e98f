"""The heat map in the terminal: what is drawn for known rows."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from prefault.cli.messages import printable
from prefault.pictures.heat_rows import ALL, HeatRow, Stretch
from prefault.pictures.sampling import Frame
from prefault.pictures.terminal_map import picture, plain_row, summary

_MIB = 1 << 20


def _row(name: str, levels: bytes, present: int) -> HeatRow:
    return HeatRow(name, "file", "", 0, _MIB, present, levels, (Stretch(0, _MIB, len(levels)),))


def _drawn(frame: Frame, width: int = 100, height: int = 20) -> list[str]:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(picture(frame, width, height, printable))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_shades_and_numbers() -> None:
    rows = [_row("half", bytes([ALL] * 8 + [0] * 8), _MIB // 2), _row("all", bytes([ALL] * 16), _MIB)]
    frame = Frame(1.0, rows, {rows[0].key: 2.0 * _MIB}, 2.0 * _MIB)
    lines = _drawn(frame)
    assert lines[0] == "1.5 MiB of 2.0 MiB present (75.0 %), +2.0 MiB/s, 2 rows"
    strip = lines[1].split()[1]
    assert strip.count("█") + strip.count("·") >= len(strip) - 1  # the cell in the middle may be both
    assert strip.startswith("███")
    assert strip.endswith("···")
    assert abs(strip.count("█") - strip.count("·")) <= 1
    assert "50.0 %" in lines[1]
    assert "+2.0 MiB/s" in lines[1]
    assert set(lines[2].split()[1]) == {"█"}


def test_rows_that_do_not_fit_are_one_line() -> None:
    frame = Frame(0.0, [_row(f"file{at}", bytes(4), 0) for at in range(500)], {}, None)
    lines = _drawn(frame, height=12)
    assert len(lines) <= 12
    assert any("494 more: 0 bytes of 494.0 MiB" in line for line in lines)


def test_a_name_cannot_control_the_terminal() -> None:
    frame = Frame(0.0, [_row("evil\x1b[2J\n\udcff\u202e", bytes(4), 0)], {}, None)
    text = "\n".join(_drawn(frame))
    assert "evil\\x1b[2J\\x0a\\xff\\u202e" in text
    assert "\x1b" not in text


def test_gaps_are_marked() -> None:
    parts = (Stretch(0, 4096, 1), Stretch(_MIB // 2, _MIB // 2 + 8192, 2))
    row = HeatRow("m", "mapping", "", 0, _MIB, 12288, bytes([ALL, ALL, 0]), parts)
    (line,) = (line for line in _drawn(Frame(0.0, [row], {}, None)) if line.startswith("m "))
    assert line.split()[1].count("┊") == 2


def test_nearly_all_is_not_all() -> None:
    row = HeatRow("m", "file", "", 0, 1 << 40, (1 << 40) - 4096, None, ())
    assert plain_row(row, str).startswith(" 99.9 %")
    assert plain_row(row._replace(present_bytes=1), str).startswith("  0.1 %")
    assert "(99.9 %)" in summary(Frame(0.0, [row], {}, None))
    assert "(0.1 %)" in summary(Frame(0.0, [row._replace(present_bytes=1)], {}, None))


def test_what_is_not_known_says_why() -> None:
    row = HeatRow("m", "file", "", 0, 4096, None, None, (), "another user's")
    frame = Frame(0.0, [row], {}, None)
    assert summary(frame) == "0 bytes of 0 bytes present, 1 row, 1 not known"
    assert any("? another user's" in line for line in _drawn(frame))


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120])
def test_numbers_are_whole_or_left_out(width: int) -> None:
    """At the right edge a number that is cut off would be another number."""
    parts = tuple(Stretch(at << 20, (at << 20) + 8192, 2) for at in range(1, 32))
    rows = [
        HeatRow("many", "mapping", "", 0, 1 << 30, 31 * 8192, bytes([ALL] * 62), parts),
        HeatRow("one/of/a/rather/long/name", "file", "", 0, 1 << 40, 1 << 39, None, ()),
        HeatRow("cut", "mapping", "", 0, 1 << 30, 12288, bytes([ALL] * 3), (Stretch(1 << 29, (1 << 29) + 12288, 3),)),
    ]
    frame = Frame(1.0, rows, {row.key: 1000.0 * _MIB for row in rows}, 1.0)
    _, *lines = _drawn(frame, width=width)
    ends = {line.index("%") for line in lines[:3]}
    assert len(ends) == 1  # one below the other
    for line, size in zip(lines, ("248.0 KiB", "512.0 GiB", "12.0 KiB"), strict=False):
        words = line[line.index("%") + 1 :].split()
        assert " ".join(words) in ("", size, f"{size} +1000.0 MiB/s")
    assert bool(words) == (width > 45)
    assert len(lines) == 5  # rows, a blank line, and the legend on one line


def test_narrow_terminals_and_wide_letters() -> None:
    frame = Frame(0.0, [_row("模型" * 40, bytes([ALL] * 9), _MIB)], {}, None)
    for width in (20, 60, 200):
        lines = _drawn(frame, width=width)
        assert any("模" in line for line in lines)
        assert all(cell_len(line) <= width for line in lines)
