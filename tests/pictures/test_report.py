"""The report as text and data: nothing in a name becomes markup, and its data are those of the rows."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest

from prefault.pictures.heat_rows import ALL, HeatRow, Stretch, levels
from prefault.pictures.html_report import report_page, write_report
from prefault.pictures.report_data import MOST_ROWS, recording_to_json, rows_to_json, visible
from prefault.pictures.watch_recording import RecordedFrame
from prefault.ranges import PageRange, RangeSet

HOSTILE = [
    "</script><script>document.title='hacked'</script>",
    "<img src=x onerror=\"document.title='hacked'\">",
    "<!--<script>",
    "{{data}}{{script}}",
    "\u202egnp.exe",
    "caf\udce9\udcff",
    "line\nfeed\x1b[2J\x00",
    "]]>&lt;&#60;\u2028\u2029",
    "'\"`${document.title}",
    "\ud800",
]


def row(name: str, size: int = 8192, present: int | None = 4096, group: str = "") -> HeatRow:
    if present is None:
        return HeatRow(name, "file", group, 0, size, None, None, (), f"not told of {name}")
    stretch = Stretch(0, size, min(256, -(-size // 4096)))
    ranges = RangeSet([PageRange(0, present)] if present else [])
    return HeatRow(name, "file", group, 0, size, present, levels(ranges, [stretch]), (stretch,))


def data_of(page: str) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_cannot_become_markup(name: str) -> None:
    page = report_page(name, rows=[row(name, group=name), row(name, present=None)])
    assert page.isascii()
    assert page.lower().count("<script") == 2
    assert page.lower().count("</script") == 2
    assert page.lower().count("<img") == 0
    assert page.count("<!--") == 0
    rows = data_of(page)["rows"]
    assert rows["names"] == [visible(name)] * 2
    assert rows["groups"] == [visible(name), ""]


@pytest.mark.parametrize("name", HOSTILE)
def test_visible_names_have_no_controls_and_are_text(name: str) -> None:
    shown = visible(name)
    shown.encode()
    assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


def test_the_policy_allows_nothing_but_the_page_itself() -> None:
    page = report_page("x", rows=[row("a")])
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    parts = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert parts["default-src"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", parts["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/=]{44}'", parts["style-src"])
    assert not re.search(r"https?:|//[a-z]|@import|url\(", page.replace("{{", ""))


def test_the_page_is_small_beside_its_data() -> None:
    page = report_page("x", rows=[row("a")])
    assert len(page) < 300_000 // 4


def test_rows_stand_by_missing_bytes_and_keep_their_numbers() -> None:
    rows = [row("all", 8192, 8192), row("none", 1 << 20, 0), row("half"), row("unknown", present=None)]
    columns = rows_to_json(rows)
    assert columns["names"] == ["none", "half", "all", "unknown"]
    assert columns["present"] == [0, 4096, 8192, -1]
    assert columns["cells"] == ["0", "_0", "_", ""]
    assert columns["unknown"] == {3: "not told of unknown"}


@pytest.mark.parametrize("seed", range(10))
def test_letters_are_none_and_all_exactly(seed: int) -> None:
    numbers = random.Random(seed)
    pages = numbers.randrange(2, 4000)
    some = RangeSet(
        PageRange(at * 4096, (at + 1) * 4096) for at in range(pages) if numbers.random() < numbers.choice([0.02, 0.98])
    )
    stretch = Stretch(0, pages * 4096, min(256, pages))
    drawn = levels(some, [stretch])
    one = HeatRow("x", "file", "", 0, pages * 4096, some.length, drawn, (stretch,))
    (text,) = rows_to_json([one])["cells"]
    if len(text) > 1:
        assert [letter == "_" for letter in text] == [level == ALL for level in drawn]
        assert [letter == "0" for letter in text] == [level == 0 for level in drawn]


def test_many_rows_have_fewer_cells_and_the_rest_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefault.pictures.report_data.MOST_ROWS", 50)
    columns = rows_to_json([row(str(at), 1 << 20, 4096 * (at % 200)) for at in range(60)])
    assert len(columns["names"]) == 50
    assert columns["names"][-1] == "11 more, of which 0 are not known"
    assert sum(columns["sizes"]) == 60 << 20
    assert MOST_ROWS >= 100_000


def test_a_recording_has_the_changes_of_each_frame() -> None:
    first, second = row("a", 8192, 0), row("b", 8192, 4096)
    frames = [
        RecordedFrame(0.0, {0: first}),
        RecordedFrame(1.0, {0: row("a", 8192, 8192), 1: second}),
        RecordedFrame(2.0, {1: second}),
    ]
    columns, changes = recording_to_json(frames)
    at = {name: place for place, name in enumerate(columns["names"])}
    assert columns["absent"] == [at["b"]]
    assert columns["present"][at["a"]] == 0
    assert changes[0] == {"seconds": 0.0, "rows": [], "gone": []}
    assert sorted(changes[1]["rows"]) == sorted(
        [[at["a"], 8192, 8192, "_", None], [at["b"], 8192, 4096, "_0", None]]
    )  # fmt: skip
    assert changes[2] == {"seconds": 2.0, "rows": [], "gone": [at["a"]]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({}, "a report of nothing"), ({"rows": [row("a")], "recording": [RecordedFrame(0.0, {})]}, "not both")],
)
def test_a_report_of_nothing_or_of_both(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report_page("x", **arguments)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_report(tmp_path / "r.html", "new")
    assert (tmp_path / "r.html").read_text() == "new"
    with pytest.raises(FileNotFoundError, match="where"):
        write_report(tmp_path / "where" / "r.html", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]


def test_a_report_goes_through_a_link_and_into_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "link.html").symlink_to("report.html")
    write_report(tmp_path / "link.html", "new")
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "report.html").read_text() == "new"

    # As /dev/null and /dev/stdout, which a superuser would have replaced by a file.
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_report(tmp_path / "pipe", "page")
        assert os.read(reader, 100) == b"page"
        read_end, write_end = os.pipe()
        write_report(f"/proc/self/fd/{write_end}", "page")  # what /dev/stdout is in a pipeline
        assert os.read(read_end, 100) == b"page"
        os.close(read_end)
        os.close(write_end)
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.html", "pipe", "report.html"]


def test_a_report_may_have_the_longest_name(tmp_path: Path) -> None:
    name = "n" * 250 + ".html"
    write_report(tmp_path / name, "page")
    assert [each.name for each in tmp_path.iterdir()] == [name]
