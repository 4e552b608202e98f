"""``prefault evict``: drop files from the page cache."""

from __future__ import annotations

import click

from prefault.cli.json_output import print_json
from prefault.cli.messages import complain
from prefault.cli.options.file_options import FileArguments, failures_to_json, file_options, need_paths
from prefault.files.evicting import EvictedFile, each_evicted
from prefault.files.evicting import evict as evict_all
from prefault.sizes import PAGE_SIZE, format_count, format_size


@click.command()
@file_options("prefault-evict")
@click.option("--sync", is_flag=True, help="Write dirty pages to the disk first, and wait for that.")
def evict(files: FileArguments, sync: bool) -> int:
    """Drop files from the page cache: they are read from the disk again. Nothing is lost.

    Pages stay that a process has mapped or locked, and those that are still to be written to the disk.

    \b
    Examples:
      prefault evict /srv/models/old
      prefault evict --sync -p 1G-2G data.bin

    Exit status: 0; 1 if a file failed, or pages are left; 2 for a wrong command line.
    """
    need_paths(files)
    if files.output == "json":
        result = evict_all(files.selection, ranges=files.ranges, sync=sync)
        members = {"page_size": PAGE_SIZE, **result._asdict()}
        members["failures"] = failures_to_json(result.failures)
        members["skipped"] = files.selection.skipped
        print_json("prefault-evict", 1, members)
        return 1 if result.failures or result.left else 0
    count = pages = evicted = left = kept = 0
    for found in each_evicted(files.selection, ranges=files.ranges, sync=sync):
        if not isinstance(found, EvictedFile):
            files.fail(found)
            continue
        count += 1
        pages += found.pages
        evicted += found.evicted_pages or 0
        left += found.left_pages or 0
        if found.reason:
            kept += 1
            if not files.quiet:
                complain(str(found))
        files.print_file(found.path, f"{format_size((found.evicted_pages or 0) * PAGE_SIZE)} evicted")
    rows = [
        ("files", files.count(count)),
        ("evicted", f"{format_size(evicted * PAGE_SIZE)} of {format_size(pages * PAGE_SIZE)}"),
    ]
    if kept:
        rows.append(("left", f"{format_size(left * PAGE_SIZE)} in {format_count(kept, 'file')}"))
    files.print_summary(rows)
    files.print_key_values("Evicted", count, evicted, pages)
    return 1 if files.failures or kept else 0
