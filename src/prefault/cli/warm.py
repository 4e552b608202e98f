"""``prefault warm``: bring files into the page cache."""

from __future__ import annotations

from typing import Any

import click

from prefault.cli.json_output import print_json
from prefault.cli.options.file_options import FileArguments, failures_to_json, file_options, need_paths
from prefault.cli.options.option_types import CountType, SizeType, pid_option, rate_option
from prefault.files.selection import select
from prefault.files.warm_methods import METHOD_NAMES
from prefault.files.warm_result import WarmResult
from prefault.files.warming import warm as warm_files
from prefault.sizes import PAGE_SIZE, format_count, format_size


@click.command()
@file_options("prefault-warm")
@click.option("--method", type=click.Choice(METHOD_NAMES), help="Way of reading; default: the fastest, by measurement.")
@click.option("--threads", type=CountType(1, 1024), help="Number of threads; default: as many as pay.")
@click.option("--budget", type=SizeType(), metavar="SIZE", help="Bring in no more than that; default: as much as fits.")
@click.option(
    "--window", type=SizeType(), metavar="SIZE",
    help="Pass through files that are larger than memory: keep no more than that of each, and evict what lies behind.",
)  # fmt: skip
@rate_option
@click.option("--progress", is_flag=True, help="Show progress on stderr.")
@click.option("--touch", is_flag=True, help="Also read what is cached, which marks it as used.")
@click.option("--python-env", metavar="DIR", help="Warm a Python environment: the interpreter, its libraries and modules.")
@pid_option("Warm the memory of a process.")
@click.option("--mapping", "mappings", multiple=True, metavar="NAME", help="With --pid: only these mappings. Repeatable.")
@click.option("--untouched", is_flag=True, help="With --pid: also memory that the process has not touched yet.")
def warm(
    files: FileArguments, python_env: str | None, pid: int | None, mappings: tuple[str, ...], untouched: bool, touch: bool,
    progress: bool, rate: int | None, **options: Any,
) -> int:  # fmt: skip
    """Bring files into the page cache, so that reading them later waits for no disk and no server.

    Only what is missing is read, by the way that is fastest on its file system, and never more than memory cgroups and the
    machine leave.

    \b
    Examples:
      prefault warm /srv/models
      prefault warm --tensor 'model.layers.0.*' model.safetensors
      prefault warm --budget 20G --progress -I '*.safetensors' ~/models
      prefault warm --python-env /shared/venv
      prefault warm --pid 1234

    Exit status: 0; 1 if a file failed, or memory or the budget came to its end; 2 for a wrong command line.
    """
    if pid is not None:
        if files.named or files.ranges or python_env is not None:
            raise click.UsageError("--pid warms a process, and takes neither paths nor ranges of files")
        from prefault.cli.options.process_options import run_warm

        return run_warm(
            pid, mappings, as_json=files.output == "json", untouched=untouched, budget=options["budget"], rate=rate,
            progress=progress,
        )  # fmt: skip
    if mappings or untouched:
        raise click.UsageError("--mapping and --untouched are for --pid")
    if python_env is not None:
        if files.named or files.tensors:
            raise click.UsageError("--python-env names the files itself: give paths to a command of their own")
        from prefault.files.formats.python_environments import python_files

        files.selection = select(python_files(python_env))
    else:
        need_paths(files)
    try:
        result = warm_files(
            files.announced(), ranges=files.ranges, missing_only=not touch, rate=rate, progress=progress, **options
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    _print(result, files)
    return 1 if result.failures or result.stopped else 0


def _print(result: WarmResult, files: FileArguments) -> None:
    for failure in result.failures:
        files.fail(failure)
    if files.output == "json":
        members = {"page_size": PAGE_SIZE, **result._asdict(), "failures": failures_to_json(result.failures)}
        members |= {"directories": files.selection.directories, "skipped": files.selection.skipped}
        print_json("prefault-warm", 1, members)
    rows = [
        ("files", files.count(result.files)),
        ("brought in", f"{format_size(result.bytes)} in {result.seconds:.2f} s"),
        ("cached before", format_size(result.present_bytes)),
    ]
    if result.read_bytes:
        speed = format_size(int(result.bytes_per_second))
        rows.append(("read by", f"{result.method}, {format_count(result.threads, 'thread')}, {speed}/s"))
    if result.evicted_bytes:
        rows.append(("evicted again", format_size(result.evicted_bytes)))
    if result.unchecked_bytes:
        rows.append(("not checked", f"{format_size(result.unchecked_bytes)}, of which the kernel does not tell"))
    files.print_summary(rows)
    brought_in, total = -(-result.bytes // PAGE_SIZE), -(-(result.bytes + result.present_bytes) // PAGE_SIZE)
    files.print_key_values("Touched", result.files, brought_in, total)
