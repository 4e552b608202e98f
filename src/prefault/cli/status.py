"""``prefault status``: show how much of files is in the page cache."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import click

from prefault.cli.json_output import print_json
from prefault.cli.messages import printable
from prefault.cli.options.file_options import FileArguments, failures_to_json, file_options, need_paths, share
from prefault.cli.options.option_types import pid_option
from prefault.files.failures import FileFailure
from prefault.files.file_status import FilesStatus, FileStatus, each_status
from prefault.files.file_status import status as status_of
from prefault.files.open_file import OpenFile
from prefault.ranges import PageRange, RangeSet
from prefault.sizes import PAGE_SIZE, format_count, format_size

if TYPE_CHECKING:
    from prefault.files.formats.tensor_ranges import TensorStatus

_CHART = 60
"""Characters of a chart."""


@click.command()
@file_options("prefault-status")
@click.option("--cached", "show", flag_value="cached", help="Print the cached ranges of each file, in bytes, a line each.")
@click.option(
    "--missing", "show", flag_value="missing",
    help="Print the ranges that are not cached: PATH, a tab, and A-B, as --range takes it.",
)  # fmt: skip
@pid_option("Show the memory of a process, mapping by mapping.")
def status(files: FileArguments, show: str | None, pid: int | None) -> int:
    """Show how much of files is in the page cache. Nothing is read in.

    PATHS are files, block devices, and directories with all that is in them. A file with several names counts once.

    \b
    Examples:
      prefault status /srv/models
      prefault status -v -I '*.safetensors' .
      find / -name '*.so' -print0 | prefault status -b - -0
      prefault status --pid 1234

    Exit status: 0; 1 if a file could not be looked at, or the kernel does not tell; 2 for a wrong command line.
    """
    if pid is not None:
        if files.named or files.ranges:
            raise click.UsageError("--pid shows a process, and takes neither paths nor ranges of files")
        from prefault.cli.options.process_options import run_status

        return run_status(pid, as_json=files.output == "json", ranges=show is not None or files.verbose)
    need_paths(files)
    if files.output == "json":
        found = status_of(files.selection, ranges=files.ranges, pages=show is not None or files.verbose)
        _print_json(found, files)
        return 1 if found.failures or found.unknown else 0
    return _print_text(files, show)


def _print_text(files: FileArguments, show: str | None) -> int:
    count = pages = cached = dirty = unknown = 0
    for found in each_status(files.selection, ranges=files.ranges, pages=files.verbose or show is not None):
        if not isinstance(found, FileStatus):
            files.fail(found)
            continue
        count += 1
        pages += found.pages
        cached += found.cached_pages or 0
        dirty += found.dirty_pages or 0
        unknown += found.cached_pages is None
        if show is not None:
            _print_ranges(found, show)
        elif files.verbose:
            files.print_file(found.path, _describe(found))
            for tensor in _tensors(found, files):
                told = "cannot tell" if tensor.cached_pages is None else share(tensor.cached_pages, tensor.pages)
                click.echo(f"  {printable(tensor.name)}: {told}")
    rows = [("files", files.count(count)), ("cached", share(cached, pages))]
    if dirty:
        rows.append(("dirty", format_size(dirty * PAGE_SIZE)))
    if unknown:
        silent = f"{format_count(unknown, 'file')}, of which the kernel does not tell (--json has the reasons)"
        rows.append(("unknown", silent))
    if show is None:
        files.print_summary(rows)
    files.print_key_values("Resident", count, cached, pages)
    return 1 if files.failures or unknown else 0


def _tensors(found: FileStatus, files: FileArguments) -> list[TensorStatus]:
    """Return the status of each tensor that was asked for, if any was."""
    if not files.tensors:
        return []
    from prefault.files.formats.tensor_ranges import tensor_statuses

    try:
        with OpenFile(found.path) as file:
            return tensor_statuses(file, files.tensors)
    except OSError as error:  # it was well a moment ago
        files.fail(FileFailure.of(found.path, error))
        return []


def _describe(found: FileStatus) -> str:
    if found.cached_pages is None:
        return f"cannot tell: {found.reason}"
    chart = "" if found.ranges is None or not found.pages else f" [{draw_chart(found.ranges, found.size, found.looked_at)}]"
    return f"{share(found.cached_pages, found.pages)}{chart}"


def draw_chart(cached: RangeSet, size: int, looked_at: RangeSet | None = None, width: int = _CHART) -> str:
    """Draw which parts of a file are cached: ``O`` whole, ``o`` in part, a blank not at all, ``.`` was not looked at."""
    total = -(-size // PAGE_SIZE)
    cells = min(width, total)
    cuts = [PAGE_SIZE * (total * cell // max(1, cells)) for cell in range(cells + 1)]
    chart = []
    for start, stop in itertools.pairwise(cuts):
        cell = RangeSet([PageRange(start, stop)])
        looked = cell if looked_at is None else cell & looked_at
        length = (cached & looked).length
        chart.append("." if not looked else "O" if length == looked.length else "o" if length else " ")
    return "".join(chart)


def _print_ranges(found: FileStatus, show: str) -> None:
    ranges = found.ranges if show == "cached" else found.missing()
    for part in ranges or ():
        click.echo(f"{printable(found.path)}\t{part.start}-{part.stop}")


def _print_json(found: FilesStatus, files: FileArguments) -> None:
    print_json(
        "prefault-status", 1,
        {
            "page_size": PAGE_SIZE,
            "files": (
                {**_facts(one), "ranges": _plain(one.ranges), "tensors": _tensors(one, files)} for one in found.files
            ),
            "failures": failures_to_json(found.failures),
            "totals": {
                "files": len(found.files), "directories": found.directories, "skipped": files.selection.skipped,
                "pages": found.pages, "cached_pages": found.cached_pages, "unknown_files": found.unknown,
            },
            "seconds": found.seconds,
        },
    )  # fmt: skip


def _facts(one: FileStatus) -> dict[str, object]:
    """Return the fields but what the command line itself asked for."""
    return {name: value for name, value in one._asdict().items() if name != "looked_at"}


def _plain(ranges: RangeSet | None) -> list[list[int]] | None:
    return None if ranges is None else [[part.start, part.stop] for part in ranges]
