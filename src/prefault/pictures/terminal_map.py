"""A heat map in the terminal: a row of shades for each file or mapping, its numbers, and its rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from prefault.pictures.heat_rows import ALL, HeatRow, level_of, resampled
from prefault.pictures.sampling import Frame
from prefault.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text


class _Signs(NamedTuple):
    """Characters of a picture.

    Attributes:
        shades: nothing, up to a third, up to two thirds, not all, and all: legible without colours.
        gap: a gap that is left out.
        cut: the middle of a long name.
    """

    shades: str
    gap: str
    cut: str


_SIGNS = _Signs("·░▒▓█", "┊", "…")
_ASCII_SIGNS = _Signs(".-+*#", "|", "~")

_STYLES = ("dim", "color(25)", "color(32)", "color(38)", "color(44)")
_NUMBERS = ((72, 35), (46, 19), (0, 8))
"""Columns of the numbers (share, size and rate; the first two; the share), by the width of the terminal from which on."""
_HEADER_LINES = 5


class _Places(NamedTuple):
    """Columns of a line: of the name, of the shades, and of the numbers with a blank before each; and its signs."""

    names: int
    cells: int
    numbers: int
    signs: _Signs


def picture(frame: Frame, width: int, height: int, printable: Callable[[str], str], *, ascii_only: bool = False) -> Group:
    """Draw a frame for a terminal of so many columns and lines: the rows that fit, and all others in one line.

    Args:
        frame: the frame.
        width: columns.
        height: lines.
        printable: returns a name as the terminal may show it.
        ascii_only: draw by characters of ASCII; the terminal has no others.
    """
    from rich.console import Group
    from rich.text import Text

    most = max(1, height - _HEADER_LINES)
    shown = frame.rows if len(frame.rows) <= most else frame.rows[: most - 1]
    numbers = next(columns for least, columns in _NUMBERS if width >= least)
    names = max(8, min(max((len(printable(row.name)) for row in shown), default=0), (width - numbers) // 2))
    signs = _ASCII_SIGNS if ascii_only else _SIGNS
    places = _Places(names, max(4, width - 1 - numbers - names - 1), numbers, signs)
    lines = [_line(row, frame.rates.get(row.key), places, printable) for row in shown]
    rest = frame.rows[len(shown) :]
    if rest:
        size = sum(row.size_bytes for row in rest if row.present_bytes is not None)
        present = sum(row.present_bytes or 0 for row in rest)
        lines.append(Text(f"{len(rest)} more: {format_size(present)} of {format_size(size)}", style="dim", no_wrap=True))
    title = Text(summary(frame), style="bold", no_wrap=True, overflow="ellipsis")
    return Group(title, *lines, _legend(width, signs))


def summary(frame: Frame) -> str:
    """Return the sums of a frame on one line: ``"1.0 GiB of 4.0 GiB present (25.0 %), +12.0 MiB/s, 3 rows"``."""
    share = f" ({_percent(frame.present_bytes / frame.size_bytes)})" if frame.size_bytes else ""
    text = f"{format_size(frame.present_bytes)} of {format_size(frame.size_bytes)} present{share}"
    if frame.rate is not None:
        text += f", {_rate(frame.rate)}"
    text += f", {len(frame.rows)} row{'' if len(frame.rows) == 1 else 's'}"
    return f"{text}, {frame.unknown} not known" if frame.unknown else text


def plain_row(row: HeatRow, printable: Callable[[str], str]) -> str:
    """Return a row without shades, for output that is no terminal: numbers and name."""
    name, size = printable(row.name), format_size(row.size_bytes)
    if row.present_bytes is None:
        return f"{'?':>7}  {'?':>10} of {size:>10}  {name}: {printable(row.unknown)}"
    return f"{_percent(row.share):>7}  {format_size(row.present_bytes):>10} of {size:>10}  {name}"


def _line(row: HeatRow, rate: float | None, places: _Places, printable: Callable[[str], str]) -> Text:
    from rich.cells import set_cell_size
    from rich.text import Text

    names, cells, numbers, signs = places
    line = Text(no_wrap=True, overflow="crop")
    line.append(set_cell_size(_shortened(printable(row.name), names, signs.cut), names) + " ")
    level = level_of(row)
    if row.present_bytes is None or level is None:
        return line.append(f"? {printable(row.unknown)}"[: cells + numbers], style="dim italic")
    drawn = 0
    for shade, style in _strip(row, level, places):
        line.append(shade, style=style)
        drawn += len(shade)
    line.append(f"{' ' * (cells - drawn)} {_percent(row.share):>7}")
    if numbers > 8:
        line.append(f" {format_size(row.present_bytes):>10}")
    if rate and numbers > 19:
        line.append(f" {_rate(rate):>15}", style="green" if rate > 0 else "red")
    return line


def _strip(row: HeatRow, level: int, places: _Places) -> Iterator[tuple[str, str]]:
    """Yield runs of shades, with their styles: at most so many columns, marks for gaps that are left out among them."""
    marks: list[int] = []
    drawn = bytes([level]) * places.cells
    if row.levels is not None:
        drawn, marks = _parts_drawn(row, row.levels, places.cells)
    at = 0
    while at < len(drawn) or marks:
        if marks and marks[0] <= at:
            marks.pop(0)
            yield places.signs.gap, "dim"
            continue
        end = at + 1
        while end < (marks[0] if marks else len(drawn)) and drawn[end] == drawn[at]:
            end += 1
        shade = 0 if drawn[at] == 0 else 4 if drawn[at] == ALL else 1 + 3 * (drawn[at] - 1) // (ALL - 1)
        yield places.signs.shades[shade] * (end - at), _STYLES[shade]
        at = end


def _parts_drawn(row: HeatRow, levels: bytes, cells: int) -> tuple[bytes, list[int]]:
    """Return the levels of all parts as at most so many cells, and the cells before which a gap is left out.

    With more parts than there is room for they are drawn as one, without marks.
    """
    if 2 * len(row.parts) + 1 > cells and len(row.parts) > 1:
        return resampled(levels, cells), []
    drawn, first, end = b"", 0, 0
    marks: list[int] = []
    edges = (0, *(edge for part in row.parts for edge in part[:2]), row.size_bytes)
    gaps = sum(stop > start for start, stop in zip(edges[::2], edges[1::2], strict=True))
    room = cells - gaps - len(row.parts)
    for part in row.parts:
        if part.start > end:
            marks.append(len(drawn))
        drawn += resampled(levels[first : first + part.cells], 1 + room * part.cells // len(levels))
        first, end = first + part.cells, part.stop
    if end < row.size_bytes:
        marks.append(len(drawn))
    return drawn, marks


def _percent(share: float | None) -> str:
    """Return a share in percent, never rounded to 0 or 100 where it is neither."""
    if share is None:
        return "?"
    if 0 < share < 1:
        share = min(max(share, 0.001), 0.999)
    return f"{100 * share:.1f} %"


def _rate(rate: float) -> str:
    sign = "+" if rate >= 0 else "-"
    return f"{sign}{format_size(int(abs(rate)))}/s"


def _shortened(name: str, width: int, cut: str) -> str:
    """Cut a name in the middle: its end tells files of one directory apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}{cut}{name[-tail:]}"


def _legend(width: int, signs: _Signs) -> Text:
    from rich.text import Text

    line = Text("\n", style="dim", no_wrap=True, overflow="crop")
    shades, gap = signs.shades, signs.gap
    if width < 90:
        return line.append(f"{shades[0]} none {shades[1:4]} part {shades[4]} all present {gap} gap")
    for shade, word in zip(shades, ("nothing", "some", "half", "most", "all of a cell is present"), strict=True):
        line.append(f"{shade} {word}   ")
    line.append(f"{gap} a gap left out")
    return line
