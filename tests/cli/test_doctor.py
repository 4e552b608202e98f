"""``prefault doctor`` as text and as JSON."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console

from prefault._system.hugetlb import HugetlbPool
from prefault.cli.doctor import doctor
from prefault.doctor import Advice, CapabilityAnswer, MachineFacts, Reading, Record, Report
from prefault.doctor.report import render, show

MACHINE = MachineFacts("6.1.0", "x86_64", None, True, 4096, "3.11.7", "0.1.0", "2026-01-01T00:00:00+00:00", 0, None)
REMEDY = "echo within_size > /sys/kernel/mm/transparent_hugepage/hugepages-2048kB/shmem_enabled && echo a_second_long_one"
REPORT = Report(
    Record(
        MACHINE,
        (
            CapabilityAnswer("madv_populate", True, "a question", "5.14", None, "nothing"),
            CapabilityAnswer("pagemap_scan", False, "another", "6.7", "it does not know it", "pagemap is read"),
        ),
        (Reading("enabled", None, "word", "/sys/x", "Permission denied"), Reading("process", 1, "flag", "/proc/y")),
        (HugetlbPool(2 << 20, 4, 3, 2, 1, 0),),
        (
            Reading("mem_total", 24 << 30, "bytes", "/proc/meminfo: MemTotal"),
            Reading("rlimit_as", 1 << 30, "bytes", "getrlimit(RLIMIT_AS)"),
            Reading("rlimit_as_hard", 1 << 30, "bytes", "getrlimit(RLIMIT_AS)"),
            Reading("rlimit_data", None, "bytes", "getrlimit(RLIMIT_DATA)"),
            Reading("cpu_quota", 1.5, "cpus", "/sys/fs/cgroup/" + "a_long_name/" * 8 + "cpu.max"),
        ),
    ),
    (Advice("a-rule", "warning", "a sentence of many words " * 8 + "ends", REMEDY),),
)


def lines(report: Report, width: int = 80) -> list[str]:
    return [line.plain for line in render(report, width)]


def run(*arguments: str, **environment: str) -> str:
    """The command on this machine, in another process, piped."""
    code = "from prefault.cli.doctor import doctor; doctor()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "80", **environment},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.fixture(scope="module")
def piped() -> str:
    return run()


def test_the_sections(piped: str) -> None:
    titles = [line for line in piped.splitlines() if line in ("Capabilities", "Huge pages", "Limits", "Advice")]
    assert titles == ["Capabilities", "Huge pages", "Limits", "Advice"]
    assert "madv_populate " in piped
    assert "memory available " in piped


def test_piped_it_has_no_escapes_and_fits_80_columns(piped: str) -> None:
    assert "\x1b" not in piped
    for line in piped.splitlines():
        assert line == line.rstrip()
        # Six blanks: a remedy, which stays in one piece.
        assert len(line) <= 80 or line.startswith(" " * 6), line


def test_colours_only_on_a_terminal() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=80)
    show(REPORT, terminal)
    text = terminal.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in text
    assert "yes" in text  # not by colour alone
    assert "no" in text


def test_a_missing_capability_says_why_and_what_then() -> None:
    text = lines(REPORT)
    at = next(index for index, line in enumerate(text) if line.startswith("  pagemap_scan"))
    assert text[at].split() == ["pagemap_scan", "no", "6.7", "another"]
    assert text[at + 1].strip() == "why: it does not know it"
    assert text[at + 2].strip() == "without: pagemap is read"
    assert next(line for line in text if line.startswith("  madv_populate")).split()[1] == "yes"


def test_values() -> None:
    text = lines(REPORT)

    def row(label: str) -> list[str]:
        return (
            next(line for line in text if line.startswith(f"  {label} ")).split(maxsplit=len(label.split()))[-1].split("  ")
        )

    assert row("enabled")[0] == "unknown"
    assert any("/sys/x: Permission denied" in line for line in text)
    assert row("memory")[0] == "24.0 GiB"
    assert row("RLIMIT_DATA")[0] == "no limit"
    assert row("CPU quota")[0] == "1.5"
    assert row("this process")[0] == "yes"
    assert not any("hard limit" in line for line in text)  # it equals the soft one
    assert "  hugetlb pages of 2.0 MiB: 4 total, 3 free, 2 reserved, 1 surplus" in text
    assert "unknown CPU, virtual machine" in text


def test_a_parent_cgroup_is_shown_only_with_a_limit() -> None:
    def shown(parent_limit: int | None) -> int:
        readings = tuple(
            Reading(name, value, "bytes", f"{directory}/{name}")
            for directory, limit in (("/c/a", None), ("/c", parent_limit))
            for name, value in (("memory_cgroup_limit", limit), ("memory_cgroup_usage", 1))
        )
        report = Report(Record(MACHINE, (), (), (), readings), ())
        return sum("memory cgroup" in line for line in lines(report))

    assert (shown(None), shown(1 << 30)) == (2, 4)


def test_columns_are_aligned() -> None:
    text = lines(REPORT)
    at = {
        line.index(word) for line in text for word in ("/proc/meminfo", "getrlimit(RLIMIT_DATA)", "/sys/x") if word in line
    }
    assert len(at) == 1


@pytest.mark.parametrize("width", [70, 80, 120])
def test_wrapping(width: int) -> None:
    text = lines(REPORT, width)
    assert f"      {REMEDY}" in text
    assert all(len(line) <= width for line in text if REMEDY not in line)
    # A broken path joins to what it was.
    assert "/sys/fs/cgroup/" + "a_long_name/" * 8 + "cpu.max" in "".join(line.strip() for line in text)


def test_nothing_to_advise() -> None:
    text = lines(Report(REPORT.record, ()))
    assert text[-2:] == ["Advice", "  none: this machine is fine as it is"]


def test_json(piped: str) -> None:
    found = json.loads(run("--json"))
    assert (found["schema"], found["kind"]) == (1, "prefault-doctor")
    for answer in found["capabilities"]:
        row = next(line for line in piped.splitlines() if line.startswith(f"  {answer['name']} "))
        assert row.split()[1] == ("yes" if answer["available"] else "no")


def test_switched_off() -> None:
    text = run(PREFAULT_WITHOUT="madv_populate")
    assert next(line for line in text.splitlines() if "madv_populate" in line).split()[1] == "no"
    assert "switched off by PREFAULT_WITHOUT" in text
    assert "      unset PREFAULT_WITHOUT\n" in text


def test_help_and_a_wrong_option() -> None:
    shown = CliRunner().invoke(doctor, ["--help"])
    assert (shown.exit_code, "--json" in shown.output) == (0, True)
    wrong = CliRunner().invoke(doctor, ["--xml"])
    assert (wrong.exit_code, "--xml" in wrong.output) == (2, True)
