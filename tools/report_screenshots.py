"""Make docs/pictures/report-*.png: reports of real files and of a process, as a headless Chromium draws them.

Run as: PYTHONPATH=tests .venv/bin/python tools/report_screenshots.py
"""

from __future__ import annotations

import base64
import os
import random
import sys
import tempfile
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from prefault.bench.jsonfile import load, to_json
from prefault.files.evicting import evict
from prefault.pictures.heat_rows import HeatRow
from prefault.pictures.html_report import report_page, write_report
from prefault.pictures.sampling import frames, rows_of_models, rows_of_pid
from prefault.pictures.watch_recording import FrameWriter, read_recording
from support.chromium import Browser, browser
from support.mapped_process import MappedProcess

_ROOT = Path(__file__).parent.parent
_PICTURES = _ROOT / "docs" / "pictures"
_MIB = 1 << 20
_LAYER = {"self_attn.qkv_proj": 768, "self_attn.o_proj": 256, "mlp.up_proj": 1024, "mlp.down_proj": 1024}


def _model(directory: Path) -> Path:
    """Write a small model whose parts are cached to different shares."""
    numbers = random.Random(7)
    tensors = {"model.embed_tokens.weight": numpy.zeros((2048, 1024), "f4")}
    for layer in range(8):
        for name, rows in _LAYER.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = numpy.zeros((rows, 1024), "f4")
    path = directory / "model-00001-of-00001.safetensors"
    save_file(tensors, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    evict(path)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 40 * _MIB, 0)
    for _ in range(300):
        os.pread(fd, numbers.choice((4096, 65536, 262144)), numbers.randrange(40 * _MIB, path.stat().st_size) & ~4095)
    os.close(fd)
    return path


def _as_anywhere(page: str, directory: Path) -> str:
    """Return a page that shows no path of the machine on which it is made.

    Raises:
        AssertionError: one is left.
    """
    for trace, name in ((str(directory), "/models"), (sys.prefix, "/usr"), (sys.base_prefix, "/usr")):
        page = page.replace(trace, name)
    for place in (_ROOT, Path.home()):
        assert f"{place}/" not in page, f"the page shows {place}"
    return page


def _take(
    chromium: Browser, name: str, page: str, directory: Path, height: int, *, dark: bool = False, script: str = ""
) -> None:
    write_report(directory / "page.html", _as_anywhere(page, directory))
    chromium.open(directory / "page.html", width=1060, height=height, dark=dark)
    if script:
        chromium.value(script)
    shot = chromium.call("Page.captureScreenshot", format="png")
    (_PICTURES / name).write_bytes(base64.b64decode(shot["data"]))


def _recording(directory: Path, path: Path) -> Path:
    evict(path)
    fd = os.open(path, os.O_RDONLY)
    source = frames(lambda: rows_of_models([path]))
    with open(directory / "frames", "w") as file:
        writer = FrameWriter(file)
        for step in range(12):
            writer.add(next(source))
            os.pread(fd, 8 * _MIB, step * 8 * _MIB)
    os.close(fd)
    return directory / "frames"


def _process(other: MappedProcess, path: Path) -> list[HeatRow]:
    start = other.map(64 << 30, flags=0x4022)
    other.do(f"for page in range(2000): store({start} + (20 << 30) + page * 12288)")
    other.do(f"fd = os.open({str(path)!r}, os.O_RDONLY); at = mapped({path.stat().st_size}, prot=1, flags=1, fd=fd)")
    other.do("for page in range(0, 6000, 3): load(at + page * 4096)")
    return rows_of_pid(other.pid)


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, browser() as (chromium, _), MappedProcess() as other:
        directory = Path(name)
        path = _model(directory)
        rows = rows_of_models([directory])
        choose = "document.getElementById('list').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}))"
        _take(chromium, "report-model.png", report_page("Residency of /models", rows=rows), directory, 900, script=choose)
        page = report_page("Memory of a process", rows=_process(other, path))
        _take(chromium, "report-process.png", page, directory, 860, dark=True)
        recorded = list(read_recording(_recording(directory, path)))
        move = "(() => { const e = document.getElementById('time'); e.value = 6; e.dispatchEvent(new Event('input')); })()"
        page = report_page("Loading a model", recording=recorded)
        _take(chromium, "report-recording.png", page, directory, 640, script=move)
        run = to_json(load(_ROOT / "docs" / "results" / "grid-4gib.json"))
        _take(chromium, "report-bench.png", report_page("prefault bench", bench=run), directory, 620)


if __name__ == "__main__":
    main()
