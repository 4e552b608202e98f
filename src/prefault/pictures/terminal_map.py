"""A heat map in the terminal: a row of shades for each file or mapping, its numbers, and its rate."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prefault.pictures.heat_rows import ALL, HeatRow, level_of, resampled
from prefault.pictures.sampling import Frame
from prefault.sizes import format_size

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

_SHADES = "·░▒▓█"
"""Nothing, up to a third, up to two thirds, not all, and all: legible without colours."""

_STYLES = ("dim", "color(25)", "color(32)", "color(38)", "color(44)")
_GAP = "┊"
_NUMBERS = 38
_HEADER_LINES = 5


def picture(frame: Frame, width: int, height: int, printable: Callable[[str], str]) -> Group:
    """Draw a frame for a terminal of so many columns and lines: the rows that fit, and all others in one line.

    Args:
        frame: the frame.
        width: columns.
        height: lines.
        printable: returns a name as the terminal may show it.
    """
    from rich.console import Group
    from rich.text import Text

    most = max(1, height - _HEADER_LINES)
    shown = frame.rows if len(frame.rows) <= most else frame.rows[: most - 1]
    names = max(12, min(max((len(printable(row.name)) for row in shown), default=0), (width - _NUMBERS) // 2))
    cells = max(8, width - _NUMBERS - names - 3)
    lines = [_line(row, frame.rates.get(row.key), names, cells, printable) for row in shown]
    rest = frame.rows[len(shown) :]
    if rest:
        size = sum(row.size_bytes for row in rest if row.present_bytes is not None)
        present = sum(row.present_bytes or 0 for row in rest)
        lines.append(Text(f"{len(rest)} more: {format_size(present)} of {format_size(size)}", style="dim"))
    return Group(Text(summary(frame), style="bold"), *lines, _legend())


def summary(frame: Frame) -> str:
    """Return the sums of a frame on one line: ``"1.0 GiB of 4.0 GiB present (25.0 %), +12.0 MiB/s, 3 rows"``."""
    share = f" ({100 * frame.present_bytes / frame.size_bytes:.1f} %)" if frame.size_bytes else ""
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
    return f"{_percent(row):>7}  {format_size(row.present_bytes):>10} of {size:>10}  {name}"


def _line(row: HeatRow, rate: float | None, names: int, cells: int, printable: Callable[[str], str]) -> Text:
    from rich.cells import set_cell_size
    from rich.text import Text

    line = Text(no_wrap=True, overflow="crop")
    line.append(set_cell_size(_shortened(printable(row.name), names), names) + " ")
    level = level_of(row)
    if row.present_bytes is None or level is None:
        return line.append(f"? {printable(row.unknown)}"[: cells + _NUMBERS], style="dim italic")
    for shade, style in _strip(row, level, cells):
        line.append(shade, style=style)
    line.append(f" {_percent(row):>7} {format_size(row.present_bytes):>10}")
    if rate:
        line.append(f" {_rate(rate):>15}", style="green" if rate > 0 else "red")
    return line


def _strip(row: HeatRow, level: int, cells: int) -> Iterator[tuple[str, str]]:
    """Yield runs of shades, with their styles: about so many cells, and a mark for each gap that is left out."""
    marks: list[int] = []
    drawn = bytes([level]) * cells
    if row.levels is not None:
        drawn, marks = _parts_drawn(row, row.levels, cells)
    at = 0
    while at < len(drawn) or marks:
        if marks and marks[0] <= at:
            marks.pop(0)
            yield _GAP, "dim"
            continue
        end = at + 1
        while end < (marks[0] if marks else len(drawn)) and drawn[end] == drawn[at]:
            end += 1
        shade = 0 if drawn[at] == 0 else 4 if drawn[at] == ALL else 1 + 3 * (drawn[at] - 1) // (ALL - 1)
        yield _SHADES[shade] * (end - at), _STYLES[shade]
        at = end


def _parts_drawn(row: HeatRow, levels: bytes, cells: int) -> tuple[bytes, list[int]]:
    """Return the levels of all parts as about so many cells, and the cells before which a gap is left out."""
    drawn, first, end = b"", 0, 0
    marks: list[int] = []
    room = max(len(row.parts), cells - len(row.parts) - 1 if len(row.parts) > 1 else cells)
    for part in row.parts:
        if part.start > end:
            marks.append(len(drawn))
        drawn += resampled(levels[first : first + part.cells], max(1, room * part.cells // len(levels)))
        first, end = first + part.cells, part.stop
    if end < row.size_bytes:
        marks.append(len(drawn))
    return drawn, marks


def _percent(row: HeatRow) -> str:
    """Return the share in percent, never rounded to 0 or 100 where it is neither."""
    share = row.share
    if share is None:
        return "?"
    if 0 < share < 1:
        share = min(max(share, 0.001), 0.999)
    return f"{100 * share:.1f} %"


def _rate(rate: float) -> str:
    sign = "+" if rate >= 0 else "-"
    return f"{sign}{format_size(int(abs(rate)))}/s"


def _shortened(name: str, width: int) -> str:
    """Cut a name in the middle: its end tells files of one directory apart."""
    if len(name) <= width:
        return name
    tail = (width - 1) * 2 // 3
    return f"{name[: width - 1 - tail]}…{name[-tail:]}"


def _legend() -> Text:
    from rich.text import Text

    line = Text("\n", style="dim")
    for shade, word in zip(_SHADES, ("nothing", "some", "half", "most", "all of a cell is present"), strict=True):
        line.append(f"{shade} {word}   ")
    line.append(f"{_GAP} a gap left out")
    return line
