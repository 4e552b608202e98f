"""The commands on files: output, JSON, exit statuses, errors, signals in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefault.cli import main
from prefault.cli.status import draw_chart
from prefault.ranges import PageRange, RangeSet
from support import file_beds, processes
from support.file_beds import PAGE
from support.json_schemas import check_output


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "tree"
    top.mkdir()
    file_beds.make(top / "one", 5 * PAGE)
    file_beds.evict(file_beds.make(top / "two", 3 * PAGE))
    (top / "link").symlink_to("one")
    return top


def _call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_status_as_text(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(capsys, "status", tree) == (
        0,
        "   files: 2 in 1 directory\n  cached: 20.0 KiB of 32.0 KiB (62.5 %)\nleft out: 1 path (-v names them)\n",
        "",
    )
    status, out, err = _call(capsys, "status", "-v", tree)
    assert status == 0
    assert f"{tree}/two: 0 bytes of 12.0 KiB (0 %) [   ]\n" in out
    assert err == f"prefault: {tree}/link: is a symbolic link: --follow-links follows it\n"


@pytest.mark.parametrize("command", ["status", "evict", "warm"])
def test_json(command: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _call(capsys, command, "--json", tree, "/nowhere")
    assert status == 1
    found = check_output(out, f"prefault-{command}")
    (failure,) = found["failures"]
    assert failure["path"] == "/nowhere"
    if command == "status":
        assert found["totals"] == {
            "files": 2, "directories": 1, "skipped": 1, "pages": 8, "cached_pages": 5, "unknown_files": 0,
        }  # fmt: skip
        assert {file["path"]: file["cached_pages"] for file in found["files"]} == {f"{tree}/one": 5, f"{tree}/two": 0}
    elif command == "warm":
        assert (found["bytes"], found["present_bytes"]) == (3 * PAGE, 5 * PAGE)
        assert (found["files"], found["skipped"], found["stopped"]) == (2, 1, "")
    else:
        assert (found["evicted_pages"], found["left_pages"], found["left"]) == (5, 0, [])


def test_json_of_pages_that_are_left(tmp_path: Path, small_tmpfs: object, capsys: pytest.CaptureFixture[str]) -> None:
    path = small_tmpfs("1m") / "file"  # type: ignore[operator]
    path.write_bytes(b"x" * PAGE)
    status, out, _ = _call(capsys, "evict", "--json", path)
    assert status == 1
    (left,) = check_output(out, "prefault-evict")["left"]
    assert left["left_pages"] == 1
    status, out, err = _call(capsys, "evict", path)
    assert status == 1
    assert "in memory alone" in err
    assert "left: 4.0 KiB in 1 file" in out


def test_ranges_out_and_in(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ranges that --missing prints are taken by --range."""
    file_beds.evict(tree / "one")
    file_beds.touch(tree / "one", 1, 3)
    status, out, _ = _call(capsys, "status", "--cached", tree / "one")
    assert (status, out) == (0, f"{tree}/one\t4096-8192\n{tree}/one\t12288-16384\n")
    _, out, _ = _call(capsys, "status", "--missing", tree / "one")
    parts = [line.split("\t")[1] for line in out.splitlines()]
    assert parts == ["0-4096", "8192-12288", "16384-20480"]
    options = [word for part in parts for word in ("-p", part)]
    _, out, _ = _call(capsys, "status", "--json", *options, tree / "one")
    assert check_output(out, "prefault-status")["totals"]["pages"] == 3
    assert check_output(out, "prefault-status")["totals"]["cached_pages"] == 0
    _, out, _ = _call(capsys, "status", "--json", "--cached", tree / "one")
    assert check_output(out, "prefault-status")["files"][0]["ranges"] == [[4096, 8192], [12288, 16384]]


def test_a_name_that_is_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n\x1b")
    Path(path).write_bytes(b"x")
    _, out, _ = _call(capsys, "status", "-v", path)
    assert r"\xff\x0a\x1b: 4.0 KiB" in out
    _, out, _ = _call(capsys, "status", "--json", path)
    assert set(check_output(out, "prefault-status")["files"][0]["path"]) == {"base64", "text"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["evict"],
        ["lock"],
        ["status", "-0", "/"],
        ["status", "--json", "-o", "kv", "/"],
        ["status", "-v", "-q", "/"],
        ["status", "-p", "5-4", "/"],
        ["status", "-p", "1-2-3", "/"],
        ["status", "-m", "much", "/"],
        ["status", "-b", "/nowhere"],
        ["status", "--pid", "1", "/"],
        ["lock", "--rate", "fast", "/etc/passwd"],
        ["lock", "--rate", "500", "/etc/passwd"],
        ["status", "--pid", "self"],
        ["warm", "--pid", "0"],
        ["warm"],
        ["warm", "--rate", "fast", "/etc/passwd"],
        ["warm", "--rate", "500", "/etc/passwd"],
        ["warm", "--budget", "-1", "/etc/passwd"],
        ["warm", "--method", "hope", "/etc/passwd"],
        ["warm", "--threads", "0", "/etc/passwd"],
        ["warm", "--pid", "1", "/etc/passwd"],
        ["warm", "--untouched", "/etc/passwd"],
        ["warm", "--python-env", "/usr", "/etc/passwd"],
    ],
)
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = _call(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("prefault: ")
    assert err.count("\n") == 1


def test_a_list_with_the_wrong_separator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list").write_bytes(b"name\0" * 30_000)
    status, _, err = _call(capsys, "status", "-b", tmp_path / "list")
    assert status == 2
    assert "--nul" in err


def test_failures_are_a_line_each(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = _call(capsys, "status", "/nowhere", tree, "/dev/null")
    assert status == 1
    assert "failed: 2" in out
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("prefault: /nowhere: ENOENT")
    assert lines[1].startswith("prefault: /dev/null: is a character device, which has no page cache: ")


def test_warm_as_text(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = _call(capsys, "warm", "-v", tree)
    assert status == 0
    assert f"{tree}/two\n" in out
    assert "brought in: 12.0 KiB in " in out
    assert "cached before: 20.0 KiB" in out
    assert file_beds.cached_pages(tree / "two") == 3
    assert "is a symbolic link" in err


def test_a_budget_that_ends_the_warming(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = file_beds.make(tree / "large", 4 << 20)
    file_beds.evict(path)
    status, _, err = _call(capsys, "warm", "--budget", "1 MiB", path)
    assert status == 1
    assert err.count("\n") == err.count("and before all files that follow: the budget is 1.0 MiB: raise it") == 1
    assert file_beds.cached_pages(path) * PAGE <= 2 << 20


@pytest.mark.parametrize("command", ["warm", "lock"])
def test_a_rate_without_its_unit(command: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _call(capsys, command, "--rate", "500", tree) == (
        2, "",
        "prefault: Invalid value for '--rate': a rate of 500 bytes a second is below the smallest, 64.0 KiB a second:"
        " give a unit, such as '500 MiB/s', or no rate for no limit\n",
    )  # fmt: skip


@pytest.mark.parametrize("command", ["status", "warm", "watch", "report"])
@pytest.mark.parametrize("pid", ["self", "0", "-1", "1e3", "٣"])
def test_a_pid_that_is_none(command: str, pid: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["-o", "/nowhere/page.html"] if command == "report" else []
    assert _call(capsys, command, *more, "--pid", pid) == (
        2, "",
        f"prefault: Invalid value for '--pid': {pid!r} is no number of a process: give one such as 1234 (pgrep NAME prints"
        " them)\n",
    )  # fmt: skip


@pytest.mark.parametrize("command", ["status", "warm", "evict", "lock"])
def test_an_empty_path(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = _call(capsys, command, "")
    assert status == 1
    assert err.splitlines()[0] == "prefault: '': the path is empty: name a file; a variable in the command may be unset"


def test_warm_of_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy
    from safetensors.numpy import save_file

    path = tmp_path / "model.safetensors"
    save_file({f"layers.{number}": numpy.full(8 * PAGE, number, "u1") for number in range(8)}, path)
    file_beds.evict(path)
    status, _, _ = _call(capsys, "warm", "--method", "pread", "--tensor", "layers.3", path)
    assert status == 0
    _, out, _ = _call(capsys, "status", "--json", "--tensor", "layers.*", path)
    tensors = {each["name"]: each for each in check_output(out, "prefault-status")["files"][0]["tensors"]}
    assert tensors["layers.3"]["cached_pages"] == tensors["layers.3"]["pages"]
    assert tensors["layers.7"]["cached_pages"] < tensors["layers.7"]["pages"]


def test_warm_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        _, out, err = _call(capsys, "warm", "--json", "--pid", child.pid)
        assert json.loads(out)["kind"] == "prefault-warm-process", err
        child.kill()


def test_lock_of_nothing_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = _call(capsys, "lock", tmp_path)
    assert status == 1
    assert "nothing was locked" in err
    status, _, err = _call(capsys, "lock", "/nowhere")
    assert status == 1
    assert "/nowhere" in err
    assert _call(capsys, "lock", "-d", tmp_path)[0] == 1


def test_lock_json_and_the_end_by_ctrl_c(tree: Path) -> None:
    running = subprocess.Popen(
        [sys.executable, "-m", "prefault", "lock", "--json", str(tree), "/nowhere"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert running.stdout is not None
    assert running.stderr is not None
    try:
        text = ""
        while not text.endswith("}\n") or text.count("{") != text.count("}"):
            text += running.stdout.readline()
        found = check_output(text, "prefault-lock")
        assert (found["files"], found["bytes"], found["pid"]) == (2, 8 * PAGE, running.pid)
        assert len(found["failures"]) == 1
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 1  # one file was not locked
    finally:
        running.kill()
        running.wait()
        running.stdout.close()
        running.stderr.close()


def test_a_daemon_that_is_not_waited_for_finds_relative_paths_and_those_of_stdin(tree: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    (names := [path.name for path in tree.iterdir() if path.is_file()]).sort()
    for arguments, listed in ((names[:1], ""), (["-b", "-"], names[0])):
        command = [sys.executable, "-m", "prefault", "lock", "-d", "-W", "-P", str(pid_file), *arguments]
        done = subprocess.run(command, cwd=tree, input=listed, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert processes.eventually(lambda: pid_file.exists() and pid_file.read_text().strip() != "")
        os.kill(int(pid_file.read_text()), signal.SIGTERM)
        assert processes.eventually(lambda: not pid_file.exists())


def test_a_file_that_is_no_pid_file_is_not_overwritten(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tree.parent / "precious"
    for content in ("text\n", "1" * 100):
        precious.write_text(content)
        status, _, err = _call(capsys, "lock", "-P", precious, tree)
        assert status == 1
        assert f"{precious}: is there already, and is no pid file: name another" in err
        assert precious.read_text() == content


def test_sigterm_while_files_are_locked_leaves_nothing_behind(tmp_path: Path) -> None:
    """A daemon that is still bringing files in ends with its parent, and so does its pid file."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(8 << 30)  # a hole: its pages take memory, but no disk
    running = subprocess.Popen(
        [sys.executable, "-m", "prefault", "lock", "-d", "--rate", "20 MiB/s", "-P", "pid", "large"], cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 30
        while not (children := _children(running.pid)):
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(0.3)
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 143
        assert not any(Path(f"/proc/{child}").exists() for child in children)
        assert not (tmp_path / "pid").exists()
    finally:
        running.kill()
        running.wait()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_parent_that_is_killed_takes_the_daemon_with_it(tmp_path: Path) -> None:
    path = file_beds.make(tmp_path / "file", 4 << 20)
    running = subprocess.Popen(
        [sys.executable, "-m", "prefault", "lock", "-d", "--rate", "4 MiB/s", str(path)], stderr=subprocess.DEVNULL
    )
    limit = time.monotonic() + 30
    try:
        while not (children := _children(running.pid)):
            assert time.monotonic() < limit
            time.sleep(0.005)
    finally:
        running.kill()
        running.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < limit, "the daemon lives on, and no one knows of it"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("ranges", "pages", "chart"),
    [
        ([(0, 4)], 4, "OOOO"),
        ([(1, 2)], 4, " O  "),
        ([(0, 60)], 120, "O" * 30 + " " * 30),
        ([(1, 2)], 600, "o" + " " * 59),
        ([], 0, ""),
    ],
)
def test_charts(ranges: list[tuple[int, int]], pages: int, chart: str) -> None:
    cached = RangeSet(PageRange(start * PAGE, stop * PAGE) for start, stop in ranges)
    assert draw_chart(cached, pages * PAGE) == chart


def test_parts_that_were_not_asked_for_are_not_missing(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file_beds.evict(tree / "one")
    file_beds.touch(tree / "one", 1, 3)
    asked = ("-p", "4096-12288", tree / "one")
    _, out, _ = _call(capsys, "status", "-v", *asked)
    assert "[.O ..]" in out
    _, out, _ = _call(capsys, "status", "--missing", *asked)
    assert out == f"{tree}/one\t8192-12288\n"
    _, out, _ = _call(capsys, "status", "--cached", *asked)
    assert out == f"{tree}/one\t4096-8192\n"
    _, out, _ = _call(capsys, "status", "--json", *asked)
    assert "looked_at" not in check_output(out, "prefault-status")["files"][0]


def test_status_of_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _call(capsys, "status", "--json", "--pid", os.getpid())
    assert status == 0
    assert json.loads(out)["kind"] == "prefault-status-process"
