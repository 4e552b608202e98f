"""Files of a Python environment: all that a Python of it opens to import a package is among them, before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prefault
from prefault.cli import main
from prefault.files.failures import FileError
from prefault.files.formats.elf_libraries import needed_libraries
from prefault.files.formats.python_environments import python_files

_LOADED = """
import json, re, sys, encodings.idna, sqlite3, numpy.linalg
specs = {each: getattr(each, "__spec__", None) for each in list(sys.modules.values())}
modules = [each for each, spec in specs.items() if getattr(spec, "origin", "frozen") != "frozen"]
files = [each.__dict__.get("__cached__") or each.__dict__.get("__file__") for each in modules]
maps = re.findall(r"(/\\S+)$", open("/proc/self/maps").read(), re.MULTILINE)
print(json.dumps([path for path in files + maps if path]))
"""


def test_all_that_an_import_loads_is_among_the_files() -> None:
    found = [os.path.realpath(path) for path in python_files(sys.prefix)]
    done = subprocess.run([sys.executable, "-c", _LOADED], capture_output=True, text=True, check=True, timeout=60)
    loaded = {os.path.realpath(path) for path in json.loads(done.stdout)}
    loaded = {path for path in loaded if "locale" not in path and "gconv" not in path and os.path.exists(path)}
    ours = str(Path(prefault.__file__).parent)  # an editable installation lies elsewhere
    missing = {path for path in loaded - set(found) if not path.startswith((ours, "/usr/lib", "/lib"))}
    assert not missing
    assert len(loaded) > 100


def test_the_order_of_use() -> None:
    found = list(python_files(sys.prefix))
    kinds = [
        next(at for at, path in enumerate(found) if sign in path) for sign in ("bin/python", "encodings", "site-packages")
    ]
    assert kinds == sorted(kinds)
    assert len(set(found)) == len(found)
    assert not any(".opt-" in path for path in found)


def test_a_fresh_virtual_environment(tmp_path: Path) -> None:
    made = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made)], check=True, timeout=60)
    site = next(made.glob("lib/python*/site-packages"))
    (site / "package").mkdir()
    (site / "package" / "source.py").write_text("x = 1")
    (site / "package" / "library.so.3").write_bytes(b"\x7fELF")
    (site / "more.pth").write_text("")
    found = list(python_files(str(made)))
    assert found[0] == str(made / "pyvenv.cfg")
    assert {str(site / "package" / "source.py"), str(site / "package" / "library.so.3"), str(site / "more.pth")} <= set(
        found
    )
    sites = {path.partition("/site-packages/")[0] for path in found if "/site-packages/" in path}
    assert sites == {str(site.parent)}  # it does not use the packages of the installation
    assert main(["warm", "-q", "--python-env", str(made)]) == 0


@pytest.mark.parametrize("made", [[], ["bin/python3"]])
def test_other_directories_are_refused(made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in made:
        (tmp_path / name).parent.mkdir()
        (tmp_path / "lib").mkdir()
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileError, match=r"no bin/python3|and needs one"):
        list(python_files(str(tmp_path)))
    assert main(["warm", "--python-env", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"prefault: {tmp_path}: ")


def test_libraries_as_ldd_lists_them() -> None:
    program = os.path.realpath(sys.executable)
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
    listed = {os.path.realpath(word) for word in done.stdout.split() if word.startswith("/")}
    found = {os.path.realpath(path) for path in needed_libraries(program, [os.path.join(sys.base_prefix, "lib")])}
    assert found == listed


@pytest.mark.parametrize(
    "damage", [b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + b"\xff" * 300, b"\x7fELF\x01" + bytes(100)]
)
def test_other_files_need_nothing(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(damage)
    assert list(needed_libraries(str(tmp_path / "file"), [])) == []
