"""The report in a browser: what is drawn, keys, the slider, hostile names, and no request that leaves the page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prefault.pictures.heat_rows import HeatRow, Stretch, by_missing
from prefault.pictures.html_report import report_page, write_report
from prefault.pictures.watch_recording import RecordedFrame
from support.chromium import Browser, CountingProxy, browser

from .test_report import HOSTILE, row

_MIB = 1 << 20
_CHANGE = """(id, value) => {
  const control = document.getElementById(id); control.value = value; control.dispatchEvent(new Event('input')); }"""

_CELL = {"size_bytes": 2 << 20, "sharing": "private", "backing": "Anon 4 KiB", "status": "measured", "doubts": []}
_BENCH = {
    "started": "2026",
    "machine": {"kernel": "Linux 6", "cpu": "<x>", "cpus": 2, "usable_cpus": 2, "virtual": True},
    "cells": [
        {**_CELL, "method": "write", "best_ms": 1.0, "ratio_to_write": 1.0, "published_ratio_to_write": 1.0},
        {**_CELL, "method": "populate_write", "best_ms": 0.25, "ratio_to_write": 0.25, "published_ratio_to_write": 0.8},
        {**_CELL, "method": "fallocate", "best_ms": 0.001, "ratio_to_write": 0.001, "published_ratio_to_write": 0.8},
        {**_CELL, "method": "read/write", "best_ms": 9.0, "ratio_to_write": 90.0, "published_ratio_to_write": None},
        {**_CELL, "method": "<b>no</b>", "status": "unavailable", "reason": "this <i>kernel</i> lacks it"},
    ],
}


@pytest.fixture(scope="module")
def started() -> Iterator[tuple[Browser, CountingProxy]]:
    with browser() as both:
        yield both


@pytest.fixture
def chromium(started: tuple[Browser, CountingProxy]) -> Browser:
    return started[0]


def _open(chromium: Browser, path: Path, *, dark: bool = False, title: str = "A report", **keywords: Any) -> None:
    write_report(path / "report.html", report_page(title, **keywords))
    chromium.open(path / "report.html", dark=dark)
    assert chromium.seen("Runtime.exceptionThrown") == []
    assert chromium.value("document.documentElement.dataset.drawn > 0")


def _pixel(chromium: Browser, canvas: str, share: float) -> list[int]:
    """Return red, green, blue and alpha in the middle of a canvas, at a share of its width."""
    found: list[int] = chromium.value(
        f"(() => {{ const c = document.querySelector('{canvas}');"
        f" return [...c.getContext('2d').getImageData(Math.floor(c.width * {share}), c.height / 2, 1, 1).data]; }})()"
    )
    return found


def _names(chromium: Browser) -> list[str]:
    found: list[str] = chromium.value(
        "[...document.querySelectorAll('.row:not([hidden])')].sort((a, b) => a.getAttribute('aria-posinset')"
        " - b.getAttribute('aria-posinset')).map(row => row.querySelector('.name').textContent)"
    )
    return found


def test_rows_numbers_and_shades(chromium: Browser, tmp_path: Path) -> None:
    rows = [row("/data/all", _MIB, _MIB), row("/data/half", 2 * _MIB, _MIB), row("/data/secret", present=None)]
    _open(chromium, tmp_path, rows=rows)
    assert _names(chromium) == ["/data/half", "/data/all", "/data/secret"]
    text = chromium.value("document.getElementById('residency').innerText")
    for words in ("2.0 MiB", "66.7 %", "1.0 MiB", "3.0 MiB", "50.0 %", "100.0 %", "cannot tell", "2.0 MiB missing"):
        assert words in text or words == "2.0 MiB missing"
    everything, nothing = _pixel(chromium, "#row-0 canvas", 0.25), _pixel(chromium, "#row-0 canvas", 0.75)
    assert everything != nothing
    assert _pixel(chromium, "#row-1 canvas", 0.75) == everything
    assert sum(everything[:3]) < sum(nothing[:3])  # dark on light


def test_the_legend_has_the_shades_of_the_rows(chromium: Browser, tmp_path: Path) -> None:
    shown = "['has-unknown', 'has-gap'].filter((id) => document.getElementById(id).offsetParent)"
    _open(chromium, tmp_path, rows=[row("/data/half", 2 * _MIB, _MIB)])
    assert _pixel(chromium, "#key-none", 0.5) == _pixel(chromium, "#row-0 canvas", 0.75)
    assert _pixel(chromium, "#key-ramp", 0.99) == _pixel(chromium, "#row-0 canvas", 0.25)
    assert chromium.value(shown) == []
    parts = (Stretch(1 << 30, (1 << 30) + _MIB, 1),)
    gap = HeatRow("m", "mapping", "", 0x7F0000000000, 1 << 31, _MIB, b"\xff", parts)
    _open(chromium, tmp_path, rows=[row("/secret", present=None), gap])
    assert chromium.value(shown) == ["has-unknown", "has-gap"]


@pytest.mark.parametrize("count", [2, 200])
def test_titles_stand_above_their_columns(chromium: Browser, tmp_path: Path, count: int) -> None:
    _open(chromium, tmp_path, rows=[row(f"/data/{at}", 2 * _MIB, _MIB) for at in range(count)])
    edges = chromium.value(
        "['#head', '#row-0'].map((id) => [...document.querySelector(id).children].map((e, at) => {"
        " const place = e.getBoundingClientRect(); return Math.round(at < 2 ? place.left : place.right); }))"
    )
    assert edges[0] == edges[1]


def test_in_a_narrow_window_names_differ_and_nothing_is_cut_off(chromium: Browser, tmp_path: Path) -> None:
    rows = [row(f"/a/directory/model.layers.{at}.weight", _MIB, at * 4096) for at in range(12)]
    write_report(tmp_path / "report.html", report_page("A report", rows=rows))
    chromium.open(tmp_path / "report.html", width=360, height=700)
    assert chromium.value("document.documentElement.scrollWidth") <= 360
    # The directory takes no room from the name, of which two thirds can be read.
    shown = chromium.value(
        "(() => { const [dir, base] = document.querySelector('#row-0 .name').children;"
        " return [dir.offsetWidth, base.clientWidth / base.scrollWidth]; })()"
    )
    assert shown[0] == 0
    assert shown[1] > 0.66


def test_dark_and_light_follow_the_system(chromium: Browser, tmp_path: Path) -> None:
    _open(chromium, tmp_path, rows=[row("half", 2 * _MIB, _MIB)], dark=True)
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark_ground, dark_full = chromium.value(ground), _pixel(chromium, "#row-0 canvas", 0.25)
    chromium.dark(False)
    light_full, deadline = dark_full, time.monotonic() + 20
    while light_full == dark_full and time.monotonic() < deadline:  # the page is told after the call returns
        light_full = _pixel(chromium, "#row-0 canvas", 0.25)
    light_ground = chromium.value(ground)
    assert light_ground == "rgb(255, 255, 255)"
    assert dark_ground != light_ground
    assert sum(dark_full[:3]) > sum(light_full[:3])


def test_every_text_has_contrast(chromium: Browser, tmp_path: Path) -> None:
    """WCAG 2.1, 1.4.3: 4.5 to 1 for text."""
    for dark in (False, True):
        rows = [row("/a/half", 2 * _MIB, _MIB), row("no", present=None)]
        _open(chromium, tmp_path, rows=rows, bench=_BENCH, dark=dark)
        worst = chromium.value("""(() => {
          const light = (text) => { const [r, g, b] = text.match(/[\\d.]+/g).map((c) => {
            const v = c / 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const ground = (e) => { if (!e) return [255, 255, 255];
            const [r, g, b, a = 1] = getComputedStyle(e).backgroundColor.match(/[\\d.]+/g).map(Number);
            return a === 1 ? [r, g, b] : ground(e.parentElement).map((under, i) => under + ([r, g, b][i] - under) * a); };
          const found = [...document.querySelectorAll('body *')].filter((e) => e.offsetParent && e.tagName !== 'OPTION'
            && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())).map((e) => {
            const [a, b] = [light(getComputedStyle(e).color), light(ground(e).join(" "))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 80)]; });
          return found.sort((a, b) => a[0] - b[0])[0]; })()""")
        assert worst[0] >= 4.5, worst


def test_keys_choose_rows_and_cells(chromium: Browser, tmp_path: Path) -> None:
    _open(chromium, tmp_path, rows=[row(f"file{at:04}", _MIB, 4096 * (at % 100)) for at in range(1000)])
    chromium.value("document.getElementById('list').focus()")
    assert chromium.value("document.getElementById('detail-name').textContent") == "file0000"
    for key, at in (("ArrowDown", 1), ("End", 999), ("ArrowUp", 998), ("Home", 0), ("PageDown", None)):
        chromium.press(key)
        active = chromium.value("document.getElementById('list').getAttribute('aria-activedescendant')")
        assert chromium.value(f"document.getElementById('{active}').getAttribute('aria-selected')") == "true"
        if at is not None:
            assert active == f"row-{at}"
    chromium.press("End")
    assert len(_names(chromium)) < 80
    chromium.press("ArrowRight")
    cell = chromium.value("document.getElementById('detail-cell').textContent")
    assert cell.startswith("Cell 1 of 256: from 0 bytes, 4.0 KiB long, all present")
    assert chromium.value("document.querySelector('[aria-selected=true]').getAttribute('aria-label')").startswith("file0")


def test_every_control_is_reached_by_the_tab_key(chromium: Browser, tmp_path: Path) -> None:
    frames = [RecordedFrame(0.0, {0: row("a")}), RecordedFrame(1.0, {0: row("a", present=8192)})]
    _open(chromium, tmp_path, recording=frames)
    reached = []
    for _ in range(8):
        chromium.press("Tab")
        reached.append(chromium.value("document.activeElement.id"))
    for control in ("play", "time", "find", "order", "list"):
        assert control in reached


def test_finding_and_ordering(chromium: Browser, tmp_path: Path) -> None:
    rows = [row("b/small", 8192, 0), row("a/large", _MIB, _MIB), row("c/other", 16384, 4096)]
    _open(chromium, tmp_path, rows=rows)
    for order, names in (
        ("name", ["a/large", "b/small", "c/other"]),
        ("size", ["a/large", "c/other", "b/small"]),
        ("share", ["b/small", "c/other", "a/large"]),
        ("missing", ["c/other", "b/small", "a/large"]),
    ):
        chromium.value(f"({_CHANGE})('order', '{order}')")
        assert _names(chromium) == names
    chromium.value(f"({_CHANGE})('find', 'SMALL')")
    assert _names(chromium) == ["b/small"]
    chromium.value(f"({_CHANGE})('find', 'nowhere')")
    assert chromium.value("document.getElementById('none').hidden") is False
    assert chromium.seen("Runtime.exceptionThrown") == []


def test_the_slider_of_a_recording(chromium: Browser, tmp_path: Path) -> None:
    frames = [
        RecordedFrame(0.0, {0: row("a", 8192, 0)}),
        RecordedFrame(1.5, {0: row("a", 8192, 4096), 1: row("b", 8192, 0)}),
        RecordedFrame(3.0, {1: row("b", 8192, 8192)}),
    ]
    _open(chromium, tmp_path, recording=frames)
    for at, names, tile in (
        (0, ["a"], "0 bytes"),
        (2, ["b"], "8.0 KiB"),
        (1, ["b", "a"], "4.0 KiB"),
        (0, ["a"], "0 bytes"),
    ):
        chromium.value(f"({_CHANGE})('time', {at})")
        assert _names(chromium) == names
        assert chromium.value("document.querySelector('#sums dd').firstChild.data") == tile
        seconds = frames[at].seconds
        assert chromium.value("document.getElementById('at').textContent") == f"{seconds:.1f} s, frame {at + 1} of 3"
    chromium.value("document.getElementById('play').click()")
    deadline = time.monotonic() + 20
    while chromium.value("document.getElementById('time').value") != "2":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_tensors_come_first_where_there_are_some(chromium: Browser, tmp_path: Path) -> None:
    file = row("m.safetensors", _MIB, _MIB // 2)
    tensors = [
        HeatRow(name, "tensor", file.name, start, _MIB // 2, present, None, ())
        for name, start, present in (("model.embed", 0, _MIB // 2), ("model.head", _MIB // 2, 0))
    ]
    _open(chromium, tmp_path, rows=[file, *tensors])
    assert _names(chromium) == ["model.head", "model.embed"]
    chromium.value(
        "(() => { const e = document.getElementById('kind'); e.value = 'all'; e.dispatchEvent(new Event('input')); })()"
    )
    assert len(_names(chromium)) == 3
    assert "1.0 MiB" in chromium.value("document.getElementById('sums').innerText")  # tensors do not count twice


def test_files_beside_models_are_not_hidden(chromium: Browser, tmp_path: Path) -> None:
    file = row("m.npy", _MIB, _MIB)
    tensor = HeatRow("m", "tensor", file.name, 128, _MIB - 128, _MIB - 128, None, ())
    _open(chromium, tmp_path, rows=[file, tensor, row("large.bin", 64 * _MIB, 0)])
    assert _names(chromium) == ["large.bin", "m.npy", "m"]
    _open(chromium, tmp_path, rows=[file, tensor, row("config.json", 4096, 0)])
    assert _names(chromium) == ["m"]


def test_gaps_are_left_out(chromium: Browser, tmp_path: Path) -> None:
    parts = (Stretch(0, _MIB, 1), Stretch(1 << 39, (1 << 39) + _MIB, 1))
    one = HeatRow("reservation", "area", "", 0x7F0000000000, 1 << 40, 2 * _MIB, b"\xff\xff", parts)
    _open(chromium, tmp_path, rows=[one])
    full = _pixel(chromium, "#row-0 canvas", 0.2)
    assert _pixel(chromium, "#row-0 canvas", 0.8) == full
    assert "0x7f0000000000" in chromium.value("document.getElementById('detail-text').textContent")


def test_the_grid_of_a_benchmark(chromium: Browser, tmp_path: Path) -> None:
    _open(chromium, tmp_path, bench=_BENCH)
    table = [line.split() for line in chromium.value("document.querySelector('table').innerText").splitlines()]
    words = [word for line in table for word in line]
    for word in ("write", "populate_write", "<b>no</b>", "0.25", "(0.80)", "unavailable"):
        assert word in words
    assert chromium.value("document.getElementById('residency').hidden") is True


# --- bad input


def test_hostile_names_are_text_and_nothing_runs(started: tuple[Browser, CountingProxy], tmp_path: Path) -> None:
    chromium, _ = started
    rows = [row(name, group=name) for name in HOSTILE] + [row(name + "?", present=None) for name in HOSTILE]
    for name in HOSTILE:
        _open(chromium, tmp_path, title=name, rows=rows)
        assert "hacked" not in chromium.value("document.title") or chromium.value("document.title") == name
        assert chromium.value("document.querySelectorAll('script').length") == 2
        assert chromium.value("document.querySelectorAll('img').length") == 0
    assert len(_names(chromium)) == len(rows)
    chromium.value("document.getElementById('list').focus()")
    for _ in rows:
        assert chromium.value("document.querySelectorAll('img, .row span span *, #detail h2 *, #detail p *').length") == 0
        chromium.press("ArrowDown")
    assert chromium.seen("Log.entryAdded") == []


def test_no_request_leaves_the_page(started: tuple[Browser, CountingProxy], tmp_path: Path) -> None:
    chromium, proxy = started
    open_page = tmp_path / "open.html"
    open_page.write_text("<!doctype html><title>x</title><script>fetch('http://prefault.invalid/').catch(() => 0)</script>")
    before = len(proxy.requests)
    chromium.open(open_page)
    deadline = time.monotonic() + 20
    while len(proxy.requests) == before:  # the proxy would notice
        assert time.monotonic() < deadline
        time.sleep(0.02)
    before = len(proxy.requests)
    _open(chromium, tmp_path, rows=[row(name) for name in HOSTILE])
    requested = {event["request"]["url"] for event in chromium.seen("Network.requestWillBeSent")}
    assert requested == {(tmp_path / "report.html").as_uri()}
    # Its policy stops what a defect might ask for.
    assert chromium.value("fetch('http://prefault.invalid/').then(() => 'left', () => 'stopped')") == "stopped"
    chromium.value(
        "(() => { const i = document.createElement('img'); i.src = 'http://prefault.invalid/x.png'; document.body.append(i);"
        " const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        " document.body.insertAdjacentHTML('beforeend', '<b style=\"color:red\" onclick=\"window.ran = 1\">x</b>');"
        " document.body.lastChild.click(); })()"
    )
    time.sleep(0.3)
    assert chromium.value("window.ran === undefined")
    assert [request for request in proxy.requests[before:] if b"prefault.invalid" in request] == []


def test_a_hundred_thousand_files_and_a_tebibyte(chromium: Browser, tmp_path: Path) -> None:
    rows = [
        HeatRow(f"/data/shard-{at:06}.bin", "file", "", 0, 16384, 4096 * (at % 5),
                bytes([255] * (at % 5) + [0] * (4 - at % 5)), (Stretch(0, 16384, 4),))
        for at in range(100_000)
    ]  # fmt: skip
    rows.append(row("/data/large", 1 << 40, 1 << 39))
    _open(chromium, tmp_path, rows=rows)
    assert chromium.value("document.querySelectorAll('.row').length") < 80
    assert _names(chromium)[0] == "/data/large"
    chromium.value("document.getElementById('list').focus()")
    chromium.press("End")
    assert by_missing(rows)[-1].name in _names(chromium)
