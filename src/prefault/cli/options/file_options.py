"""Options and output that the commands on files share; their short letters are those of vmtouch(8)."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from time import perf_counter
from typing import Any, BinaryIO, TypeVar

import click

from prefault.cli.json_output import json_option
from prefault.cli.messages import complain, printable
from prefault.cli.options.option_types import SizeType
from prefault.files.failures import FileFailure
from prefault.files.file_status import ByteRange, Ranges
from prefault.files.selection import SelectedFile, Selection, SkippedFile, read_list, select
from prefault.sizes import PAGE_SIZE, format_count, format_size, parse_size

Command = TypeVar("Command", bound=Callable[..., Any])


class RangeType(click.ParamType):  # type: ignore[type-arg]  # a class without types before click 8.3
    """A byte range: ``A-B``, ``A-``, ``-B``, or ``B`` for the first B bytes."""

    name = "range"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ByteRange:
        """Return the first byte and the one after the last; None for the end of the file."""
        if isinstance(value, tuple):
            return value
        first, hyphen, last = str(value).partition("-")
        try:
            if not hyphen:
                return 0, parse_size(first)
            start, stop = parse_size(first) if first.strip() else 0, parse_size(last) if last.strip() else None
        except ValueError as error:
            self.fail(f"{value!r}: {error}; examples: 4k-50k, 100M-, -5M", param, ctx)
        if stop is not None and stop <= start:
            self.fail(f"{value!r} ends before it starts", param, ctx)
        return start, stop


class FileArguments:
    """Files that a command line names: their selection, the ranges, and how the outcome is printed.

    Attributes:
        selection: the files, to be iterated over once.
        ranges: byte ranges of each file, or a function that finds them; None: the whole files.
        tensors: shell patterns for the names of tensors; the ranges are theirs.
        verbose: print each file, and each path that is left out.
        quiet: print nothing, not even failures: the exit status tells.
        output: the form of the output: ``"text"``, ``"kv"`` or ``"json"``.
        failures: number of files that failed; :meth:`fail` counts them.
        named: whether the command line names any path or list.
    """

    def __init__(
        self, paths: Iterable[str], ranges: tuple[ByteRange, ...], *, named: bool, tensors: tuple[str, ...], verbose: bool,
        quiet: bool, output: str, **rules: Any,
    ) -> None:  # fmt: skip
        self.named = named
        self.tensors = tensors
        self.ranges: Ranges | None = list(ranges) or None
        if tensors:
            from prefault.files.formats.tensor_ranges import named_tensors

            self.ranges = named_tensors(tensors)
        self.verbose = verbose
        self.quiet = quiet
        self.output = output
        self.failures = 0
        self.selection: Selection = select(paths, on_skip=self._skip, **rules)
        self._began = perf_counter()

    def _skip(self, skipped: SkippedFile) -> None:
        if self.verbose:
            complain(str(skipped))

    def fail(self, failure: FileFailure) -> None:
        """Count a failure, and print it unless it is not wanted."""
        self.failures += 1
        if not self.quiet:
            complain(str(failure))

    def print_file(self, path: str, text: str) -> None:
        """Print a line about a file, if each file is to be printed."""
        if self.verbose and self.output == "text":
            click.echo(f"{printable(path)}: {text}")

    def announced(self) -> Selection:
        """Return the selection; each file is printed when its turn comes, if each file is to be printed."""
        if not self.verbose or self.output != "text":
            return self.selection

        def announce(_: Selection) -> Iterator[SelectedFile | FileFailure]:
            for found in self.selection:
                if isinstance(found, SelectedFile):
                    click.echo(printable(found.path))
                yield found

        return Selection(announce)

    def count(self, files: int) -> str:
        """Return how many files were worked on, in how many directories."""
        return f"{files} in {format_count(self.selection.directories, 'directory', 'directories')}"

    def print_summary(self, rows: Iterable[tuple[str, str]]) -> None:
        """Print the sum of all: titles and values, one a line."""
        if self.quiet or self.output != "text":
            return
        shown = list(rows)
        if self.selection.skipped:
            names = "" if self.verbose else " (-v names them)"
            shown.append(("left out", f"{format_count(self.selection.skipped, 'path')}{names}"))
        if self.failures:
            shown.append(("failed", str(self.failures)))
        width = max(len(title) for title, _ in shown)
        for title, value in shown:
            click.echo(f"{title.rjust(width)}: {value}")

    def print_key_values(self, verb: str, files: int, pages: int, total: int) -> None:
        """Print one line of key=value pairs, with the keys of ``vmtouch -o kv``."""
        if self.quiet or self.output != "kv":
            return
        percent = 100 * pages / total if total else 0.0
        click.echo(
            f"Files={files} Directories={self.selection.directories} {verb}Pages={pages} TotalPages={total}"
            f" {verb}Size={pages * PAGE_SIZE} TotalSize={total * PAGE_SIZE} {verb}Percent={percent:.3g}"
            f" Elapsed={self.seconds:.5g}"
        )

    @property
    def seconds(self) -> float:
        """Time since the command line was read."""
        return perf_counter() - self._began


def file_options(kind: str) -> Callable[[Command], Command]:
    """Return a decorator that gives a command the options on files; it gets ``files``, a :class:`FileArguments`.

    Args:
        kind: the kind of the JSON that the command prints.
    """

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(
            *, paths: tuple[str, ...], batch: BinaryIO | None, nul: bool, ranges: tuple[ByteRange, ...],
            tensors: tuple[str, ...], verbose: bool, quiet: bool, output: str | None, as_json: bool, **rest: Any,
        ) -> Any:  # fmt: skip
            if nul and batch is None:
                raise click.UsageError("--nul is how the paths of a --batch are separated: give that, too")
            if as_json and output:
                raise click.UsageError("--json and --output kv are two forms of one output: give one of them")
            if verbose and quiet:
                raise click.UsageError("--verbose and --quiet exclude each other")
            if ranges and tensors:
                raise click.UsageError("--range and --tensor both say which bytes: give one of them")
            rules = {name: rest.pop(name) for name in _RULES}
            if rules["max_size"] is not None and rules["min_size"] > rules["max_size"]:
                raise click.UsageError("--min-size is larger than --max-size, so that no file has a size between them")
            files = FileArguments(
                paths if batch is None else _all_paths(paths, batch, nul), ranges, named=bool(paths or batch),
                tensors=tensors, verbose=verbose, quiet=quiet, output="json" if as_json else output or "text", **rules,
            )  # fmt: skip
            return command(files=files, **rest)

        for option in reversed((*_OPTIONS, json_option(kind))):
            run = option(run)
        return run  # type: ignore[return-value]

    return decorate


def _all_paths(paths: tuple[str, ...], batch: BinaryIO | None, nul: bool) -> Iterator[str]:
    """Yield the paths of the list, while it is read, and then those of the command line."""
    try:
        listed = iter(()) if batch is None else read_list(batch, nul=nul)
        yield from itertools.chain(listed, paths)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


_RULES = ("follow_links", "same_file_system", "include", "exclude", "min_size", "max_size", "each_link")

_OPTIONS = (
    click.argument("paths", nargs=-1, type=click.Path()),
    click.option("-f", "--follow-links", is_flag=True, help="Follow symbolic links inside of directories, too."),
    click.option("-F", "--one-file-system", "same_file_system", is_flag=True, help="Stay on the file system of each path."),
    click.option(
        "-I", "--include", multiple=True, metavar="PATTERN",
        help="Only files whose name matches; with a slash, whose path does. Repeatable.",
    ),
    click.option(
        "-i", "--exclude", multiple=True, metavar="PATTERN",
        help="No files and directories whose name (with a slash: path) matches. Repeatable.",
    ),
    click.option("-m", "--max-size", type=SizeType(), help="No files that are larger."),
    click.option("--min-size", type=SizeType(), default=0, help="No files that are smaller."),
    click.option("--each-link", is_flag=True, help="Count a file under each of its names, not once (vmtouch -h)."),
    click.option("-b", "--batch", type=click.File("rb"), metavar="FILE", help="Also the paths that FILE lists; - is stdin."),
    click.option("-0", "--nul", is_flag=True, help="The list separates paths by NUL, as find -print0 does."),
    click.option(
        "-p", "--range", "ranges", multiple=True, type=RangeType(), metavar="A-B",
        help="Only these bytes of each file: 4k-50k, 100M-, -5M. Repeatable.",
    ),
    click.option(
        "--tensor", "tensors", multiple=True, metavar="PATTERN",
        help="Only the tensors whose name matches, in .safetensors, .gguf and .npy files. Repeatable.",
    ),
    click.option("-v", "--verbose", is_flag=True, help="Print each file, and each path that is left out."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing; the exit status tells."),
    click.option(
        "-o", "--output", type=click.Choice(["kv"]), help="Print one line of key=value pairs, as vmtouch does."
    ),
)  # fmt: skip


def need_paths(files: FileArguments) -> None:
    """Refuse a command line without any path."""
    if not files.named:
        raise click.UsageError("name files or directories, or give a list of them with --batch")


def failures_to_json(failures: Iterable[FileFailure]) -> list[dict[str, Any]]:
    """Return failures as they stand in JSON."""
    return [failure._asdict() for failure in failures]


def share(pages: int, total: int) -> str:
    """Return how much of a total that is, for people: ``"1.0 GiB of 4.0 GiB (25 %)"``."""
    percent = f" ({100 * pages / total:.3g} %)" if total else ""
    return f"{format_size(pages * PAGE_SIZE)} of {format_size(total * PAGE_SIZE)}{percent}"


def flush() -> None:
    """Have all that was printed on its way, before a wait or a fork."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
