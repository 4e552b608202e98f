"""``prefault report``: from files, a process, a recording and a benchmark to a page; and what it refuses."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from prefault.cli import main
from prefault.pictures import sampling
from support.mapped_process import MappedProcess

_RESULTS = Path(__file__).parent.parent.parent / "docs" / "results" / "quick.json"


def _data(page: Path) -> Any:
    found = re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "one").write_bytes(os.urandom(1 << 20))
    name = os.fsdecode(b"<b>\xff\n")
    (tmp_path / "tree" / name).write_bytes(b"x")
    page = tmp_path / "r.html"
    assert main(["report", "-o", str(page), str(tmp_path / "tree")]) == 0
    assert capsys.readouterr().out == f"{page}: 2 rows\n"
    rows = _data(page)["rows"]
    assert {os.path.basename(one) for one in rows["names"]} == {"one", "<b>\\xff\\x0a"}
    assert sorted(rows["present"]) == [1, 1 << 20]


def test_one_row_is_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").write_bytes(b"x")
    assert main(["report", "-o", str(tmp_path / "r.html"), str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'r.html'}: 1 row\n"


def test_model_files_by_tensor(tmp_path: Path) -> None:
    import numpy

    numpy.save(tmp_path / "weights.npy", numpy.ones((512, 512)))
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 64)
    page = tmp_path / "m.html"
    assert main(["report", "-o", str(page), str(tmp_path / "weights.npy"), str(tmp_path / "damaged.safetensors")]) == 0
    data = _data(page)
    rows = data["rows"]
    kinds = [rows["kinds"][kind] for kind in rows["kind"]]
    tensors = {name: at for at, (name, kind) in enumerate(zip(rows["names"], kinds, strict=True)) if kind == "tensor"}
    assert set(tensors) == {"weights", "tensors"}
    assert rows["sizes"][tensors["weights"]] == 512 * 512 * 8
    assert rows["groups"][rows["group"][tensors["weights"]]] == str(tmp_path / "weights.npy")
    assert "no tensors" in rows["unknown"][str(tensors["tensors"])]
    assert data["first"] == "tensor"


def test_models_among_thousands_of_files_are_shown_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy

    monkeypatch.setattr(sampling, "MOST_FILES_BY_PAGE", 2)
    for name, count in (("small", 8), ("large", 4096), ("middle", 1024)):
        numpy.save(tmp_path / f"{name}.npy", numpy.ones(count))
    (tmp_path / "other").write_bytes(b"x")
    rows = sampling.rows_of_models([tmp_path])
    assert sorted(row.name for row in rows if row.kind == "tensor") == ["large", "middle"]
    assert len([row for row in rows if row.kind == "file"]) == 4


def test_a_process_with_its_gaps(tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    with MappedProcess() as other:
        start = other.map(1 << 40, flags=0x4022)
        other.do(f"store({start} + (1 << 39))")
        assert main(["report", "-o", str(page), "--pid", str(other.pid)]) == 0
    rows = _data(page)["rows"]
    place = next(at for at, size in enumerate(rows["sizes"]) if size >= 1 << 40)
    assert sum(stop - start for start, stop, _ in rows["parts"][str(place)]) < 1 << 36
    assert rows["start"][str(place)] <= start


def test_a_recording(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(os.urandom(1 << 20))
    record, page = tmp_path / "frames", tmp_path / "w.html"
    assert main(["watch", "-n", "2", "-i", "0.05", "-r", str(record), str(tmp_path / "one")]) == 0
    assert main(["report", "-o", str(page), "--watch", str(record), "--bench", str(_RESULTS), "--title", "both"]) == 0
    data = _data(page)
    assert len(data["frames"]) == 2
    assert data["title"] == "both"
    assert data["bench"]["tables"][0]["rows"]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "give PATHs, --pid, --watch or --bench"),
        (["--pid", "1", "/"], 2, "one of them only"),
        (["--bench", "/dev/null"], 1, "/dev/null"),
        (["--watch", "/dev/null"], 1, "/dev/null is empty"),
        (["/no/such/file"], 2, "does not exist"),
    ],
)
def test_wrong_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert main(["report", "-o", str(tmp_path / "x.html"), *arguments]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one").write_bytes(b"x")
    assert main(["report", "-o", str(tmp_path / "no" / "x.html"), str(tmp_path / "one")]) == 1
    assert str(tmp_path / "no") in capsys.readouterr().err
