"""The report: residency, a recording, and a benchmark in one HTML file that needs no network."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefault._version import __version__
from prefault.pictures.heat_rows import HeatRow
from prefault.pictures.report_data import bench_to_json, recording_to_json, rows_to_json, to_script, visible
from prefault.pictures.watch_recording import RecordedFrame

_PAGE = Path(__file__).parent / "report_page"
_PLACE = re.compile(r"\{\{(\w+)\}\}")


def report_page(
    title: str,
    *,
    rows: Iterable[HeatRow] = (),
    recording: Sequence[RecordedFrame] = (),
    bench: Mapping[str, Any] | None = None,
) -> str:
    """Return the HTML of a report, as text of ASCII characters.

    Args:
        title: its heading.
        rows: files, tensors, mappings and areas as they are.
        recording: frames of `prefault watch --record`, in place of ``rows``.
        bench: the content of a file of `prefault bench --json`.

    Raises:
        ValueError: there is nothing to show, or both rows and a recording.
    """
    rows = list(rows)
    if rows and recording:
        raise ValueError("a report shows rows or a recording, not both")
    if not rows and not recording and bench is None:
        raise ValueError("a report of nothing: give files, a process, a recording or a benchmark")
    now = datetime.now(UTC).astimezone()
    document: dict[str, Any] = {
        "title": visible(title),
        "made": f"Made by prefault {__version__} on {now:%Y-%m-%d at %H:%M %Z}.",
    }
    if recording:
        document["rows"], document["frames"] = recording_to_json(recording)
    elif rows:
        document["rows"] = rows_to_json(rows)
    if document.get("rows"):
        document["first"] = "tensor" if _is_of_models(rows) else "all"
    if bench is not None:
        document["bench"] = bench_to_json(bench)
    style, script = ((_PAGE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    values = {
        "title": html.escape(visible(title)).encode("ascii", "xmlcharrefreplace").decode(),
        "style": style,
        "script": script,
        "style_hash": _hash(style),
        "script_hash": _hash(script),
        "data": to_script(document),
    }
    # One pass: a name that looks like a place is not one.
    return _PLACE.sub(lambda place: values[place[1]], (_PAGE / "report.html").read_text(encoding="utf-8"))


def _is_of_models(rows: Iterable[HeatRow]) -> bool:
    """Return whether nearly all bytes of the files are model files', so that their tensors show what is of interest."""
    rows = list(rows)
    models = {row.group for row in rows if row.kind == "tensor"}
    others = sum(row.size_bytes for row in rows if row.kind == "file" and row.name not in models)
    return bool(models) and 20 * others <= sum(row.size_bytes for row in rows if row.kind == "file")


def write_report(path: str | os.PathLike[str], page: str) -> None:
    """Write a report to a file, whole or not at all; a symbolic link stays, and what it points to is replaced.

    What is no regular file (a pipe, ``/dev/stdout``) is written to.

    Raises:
        OSError: the file cannot be written; an earlier file is unchanged.
    """
    target = Path(path)
    try:
        if target.exists() and not target.is_file():
            target.write_text(page, encoding="utf-8")  # a device must not be replaced by a file
            return
        target = target.resolve()
        draft = target.with_name(f".{os.getpid()}.prefault-report")  # shorter than many a name at the limit of 255 bytes
        try:
            draft.write_text(page, encoding="utf-8")
            draft.replace(target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _hash(text: str) -> str:
    """Return the hash by which a Content-Security-Policy allows one script or style (CSP level 2)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
