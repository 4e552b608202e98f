"""A report of the doctor as text for a terminal or a file: rendered from plain records."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from prefault._system.hugetlb import HugetlbPool
from prefault.doctor.record import CapabilityAnswer, Reading, Report
from prefault.sizes import format_size

_LABELS = {
    "enabled": "enabled",
    "enabled_pmd": "  for the PMD size",
    "shmem_enabled": "shmem_enabled",
    "shmem_enabled_pmd": "  for the PMD size",
    "pmd_size": "PMD size",
    "process": "this process",
    "dev_shm_huge": "/dev/shm huge=",
    "mem_total": "memory",
    "mem_available": "memory available",
    "swap_total": "swap",
    "swap_free": "swap free",
    "overcommit_mode": "overcommit mode",
    "commit_limit": "commit limit",
    "committed": "committed",
    "memory_cgroup_limit": "memory cgroup limit",
    "memory_cgroup_high": "memory cgroup high",
    "memory_cgroup_usage": "memory cgroup usage",
    "rlimit_memlock": "RLIMIT_MEMLOCK",
    "rlimit_memlock_hard": "  hard limit",
    "memlock_enforced": "  is enforced",
    "rlimit_as": "RLIMIT_AS",
    "rlimit_as_hard": "  hard limit",
    "rlimit_data": "RLIMIT_DATA",
    "rlimit_data_hard": "  hard limit",
    "dev_shm_size": "/dev/shm size",
    "dev_shm_free": "/dev/shm free",
    "max_map_count": "vm.max_map_count",
    "mappings": "mappings in use",
    "unprivileged_userfaultfd": "userfaultfd for all",
    "userfaultfd_device": "/dev/userfaultfd",
    "proactive_reclaim": "cold memory goes after",
    "cpus_online": "CPUs online",
    "cpus_affinity": "CPUs by affinity",
    "cpu_quota": "CPU quota",
    "cpus_usable": "CPUs usable",
}
_LABEL_WIDTH = 2 + max(map(len, _LABELS.values()))
_VALUE_WIDTH = 13
_STYLES = {"yes": "green", "no": "bold red", "problem": "bold red", "warning": "yellow", "tip": "cyan"}


def show(report: Report, console: Console | None = None) -> None:
    """Print the report on ``console`` (None: stdout), with colours on a terminal only."""
    console = console or Console(highlight=False, markup=False, emoji=False)
    for line in render(report, console.width):
        # Lines are wrapped already. Commands stay in one piece, to be copied.
        console.print(line, soft_wrap=True)


def render(report: Report, width: int) -> Iterator[Text]:
    """Render the report as lines of at most ``width`` columns. Only commands may be longer."""
    record = report.record
    machine = record.machine
    yield Text(f"prefault {machine.prefault}, Python {machine.python}, {machine.date}")
    yield Text(f"Linux {machine.kernel} {machine.architecture}, {format_size(machine.page_size)} pages")
    yield Text(f"{machine.cpu_model or 'unknown CPU'}{', virtual machine' if machine.hypervisor else ''}")
    yield from _title("Capabilities")
    for answer in record.capabilities:
        yield from _capability(answer, width)
    yield from _title("Huge pages")
    for setting in record.settings:
        yield from _reading(setting, width)
    for pool in record.pools:
        yield Text(_pool(pool))
    if not record.pools:
        yield Text("  no hugetlb pools are visible")
    yield from _title("Limits")
    for limit in _worth_showing(record.limits):
        yield from _reading(limit, width)
    yield from _title("Advice")
    if not report.advice:
        yield Text("  none: this machine is fine as it is")
    for advice in report.advice:
        first, *others = _wrap(f"{advice.severity}: {advice.sentence}", width - 2)
        line = Text(f"  {first}")
        line.stylize(_STYLES[advice.severity], 2, 3 + len(advice.severity))
        yield line
        yield from (Text(f"  {other}") for other in others)
        yield Text(f"      {advice.remedy}")


def _title(name: str) -> Iterator[Text]:
    yield Text("")
    yield Text(name, "bold")


def _capability(answer: CapabilityAnswer, width: int) -> Iterator[Text]:
    answered = "yes" if answer.available else "no"
    head = [(f"{answer.name:22}", ""), (f"{answered:5}", _STYLES[answered]), (f"{answer.since:8}", "")]
    texts = [answer.question]
    if not answer.available:
        texts += [f"why: {answer.refusal}", f"without: {answer.without}"]
    yield from _row(head, texts, width)


def _reading(reading: Reading, width: int) -> Iterator[Text]:
    text = reading.meaning or reading.source
    if reading.unknown is not None:
        text = f"{reading.source}: {reading.unknown}"
    label = _LABELS.get(reading.name, reading.name)
    yield from _row([(f"{label:{_LABEL_WIDTH}}", ""), (f"{_value(reading):{_VALUE_WIDTH}}", "")], [text], width)


def _row(head: list[tuple[str, str]], texts: list[str], width: int) -> Iterator[Text]:
    """Render columns of fixed width, and texts that are wrapped in the rest of the line."""
    indent = 2 + sum(len(text) for text, _ in head)
    lines = [line for text in texts for line in _wrap(text, width - indent)]
    first = Text.assemble("  ", *head, lines[0])
    first.rstrip()
    yield first
    yield from (Text(" " * indent + line) for line in lines[1:])


def _wrap(text: str, width: int) -> list[str]:
    # A path that is longer than a line is broken after a slash.
    words = (word if len(word) <= width else word.replace("/", "/ ") for word in text.split(" "))
    lines = textwrap.wrap(" ".join(words), max(width, 20), break_on_hyphens=False)
    return [line.replace("/ ", "/") for line in lines] or [""]


def _pool(pool: HugetlbPool) -> str:
    return (
        f"  hugetlb pages of {format_size(pool.page_size)}: {pool.total} total, {pool.free} free,"
        f" {pool.reserved} reserved, {pool.surplus} surplus"
    )


def _worth_showing(limits: tuple[Reading, ...]) -> Iterator[Reading]:
    """Skip limits without information: a hard limit that equals the soft one, a parent cgroup without limits."""
    values = {limit.name: limit.value for limit in limits}
    limited = {_directory(limit) for limit in limits if limit.value is not None and not limit.name.endswith("_usage")}
    own: dict[str, str] = {}
    for limit in limits:
        soft = limit.name.removesuffix("_hard")
        if soft != limit.name and limit.value == values.get(soft):
            continue
        if limit.name.startswith(("memory_cgroup", "cpu_quota")) and limit.unknown is None:
            directory = _directory(limit)
            if directory != own.setdefault(limit.name, directory) and directory not in limited:
                continue
        yield limit


def _directory(limit: Reading) -> str:
    return limit.source.rpartition("/")[0]


def _value(reading: Reading) -> str:
    if reading.unknown is not None:
        return "unknown"
    if reading.value is None:
        return "no limit"
    if reading.unit == "bytes" and isinstance(reading.value, int):
        return format_size(reading.value)
    if reading.unit == "seconds" and not isinstance(reading.value, str):
        return f"{reading.value:g} s"
    if reading.unit == "flag":
        return "yes" if reading.value else "no"
    return f"{reading.value:g}" if isinstance(reading.value, float) else str(reading.value)
