"""Output about a process, for commands with the option ``--pid``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import click

from prefault.cli.json_output import print_json
from prefault.cli.messages import complain, printable
from prefault.processes import MappingStatus, ProcessStatus, ProcessWarmResult, status, warm
from prefault.sizes import Size, format_size

_MOST_NAMED = 8
"""Mappings that are named for one reason; a process that unmaps meanwhile may have lost thousands."""

_COLUMNS = ("address", "", "size", "present", "allocated", "huge", "swapped", "locked", "mapping")


def run_status(pid: int, *, as_json: bool, ranges: bool = False) -> int:
    """Print the status of a process, and return the exit status: 1 where its mappings may not be read.

    Args:
        pid: the process.
        as_json: print one JSON object (docs/schemas/prefault-status-process.json).
        ranges: with JSON, list the present ranges of each mapping as well.
    """
    found = status(pid)
    if as_json:
        members = found._asdict()
        members["mappings"] = (_mapping_to_json(mapping, ranges) for mapping in found.mappings)
        print_json("prefault-status-process", 1, members)
    else:
        _show_status(found)
    if found.unknown:
        complain(found.unknown)
    return 1 if found.unknown else 0


def run_warm(
    pid: int, names: Iterable[str], *, as_json: bool, untouched: bool = False, budget: Size | None = None,
    rate: Size | None = None, progress: bool = False,
) -> int:  # fmt: skip
    """Warm a process, print what came in, and return the exit status: 1 where pages that were wanted did not.

    Arguments are those of :func:`prefault.processes.warm`; no names: all mappings.
    """
    try:
        result = warm(
            pid, list(names) or None, untouched=untouched, budget=budget, rate=rate, progress=progress and not as_json
        )  # fmt: skip
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if as_json:
        members = result._asdict()
        members["skipped"] = [
            {**_place(one.mapping), "reason": one.reason, "failed": one.failed} for one in result.skipped
        ]  # fmt: skip
        print_json("prefault-warm-process", 1, members)
    else:
        _show_warmed(result)
    failed: dict[str, list[MappingStatus]] = {}
    for one in result.skipped:
        if one.failed:
            failed.setdefault(one.reason, []).append(one.mapping)
    for reason, mappings in failed.items():
        for mapping in mappings[:_MOST_NAMED]:
            complain(f"{_where(mapping)} of process {pid}: {reason}")
        if len(mappings) > _MOST_NAMED:
            complain(f"{len(mappings) - _MOST_NAMED} more mappings of process {pid}: {reason}")
    if result.stopped:
        left = format_size(result.wanted_bytes - result.bytes)
        complain(f"process {pid} was not warmed whole, {left} are left: {result.stopped}")
    return 0 if result.complete else 1


def _place(mapping: MappingStatus) -> dict[str, Any]:
    return {"start": mapping.start, "stop": mapping.stop, "name": mapping.name, "permissions": mapping.permissions}


def _mapping_to_json(mapping: MappingStatus, ranges: bool) -> dict[str, Any]:
    members = {
        **_place(mapping),
        "size_bytes": mapping.size_bytes,
        "present_bytes": mapping.present_bytes,
        "allocated_bytes": mapping.allocated_bytes,
        "huge_bytes": mapping.huge_bytes,
        "swapped_bytes": mapping.swapped_bytes,
        "locked_bytes": mapping.locked_bytes,
        "page_size": mapping.page_size,
        "file_offset": mapping.file_offset,
        "unknown": mapping.unknown,
    }
    if ranges:
        members["present"] = None if mapping.present is None else [list(pages) for pages in mapping.present]
    return members


def _where(mapping: MappingStatus) -> str:
    return f"{mapping.start:x}-{mapping.stop:x} {printable(mapping.label)}"


def _size(count: int | None) -> str:
    if count is None:
        return "?"
    return format_size(count) if count else "-"


def _row(found: ProcessStatus | MappingStatus) -> list[str]:
    return [
        _size(count)
        for count in (
            found.size_bytes, found.present_bytes, found.allocated_bytes, found.huge_bytes, found.swapped_bytes,
            found.locked_bytes,
        )
    ]  # fmt: skip


def _show_status(found: ProcessStatus) -> None:
    rows: list[Sequence[str]] = [
        (f"{one.start:x}", one.permissions, *_row(one), printable(one.label)) for one in found.mappings
    ]
    rows.append(("", "", *_row(found), f"all of process {found.pid} ({printable(found.name)})"))
    widths = [max(len(row[column]) for row in [_COLUMNS, *rows]) for column in range(len(_COLUMNS))]
    for row in [_COLUMNS, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]))
    unknown = dict.fromkeys(one.unknown for one in found.mappings if one.unknown)
    for reason in unknown:
        click.echo(f"?: {reason}")


def _show_warmed(result: ProcessWarmResult) -> None:
    click.echo(
        f"process {result.pid} ({printable(result.name)}): {format_size(result.bytes)} brought in to {result.mappings}"
        f" mapping{'' if result.mappings == 1 else 's'} in {result.seconds:.2g} s"
    )
    reasons: dict[str, list[MappingStatus]] = {}
    for one in result.skipped:
        if not one.failed and one.mapping.present_bytes != one.mapping.size_bytes:
            reasons.setdefault(one.reason, []).append(one.mapping)
    for reason, mappings in reasons.items():
        names = ", ".join(dict.fromkeys(printable(mapping.label) for mapping in mappings))
        click.echo(f"left out: {names}: {reason}")
