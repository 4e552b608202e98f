"""The findings of ``prefault doctor``: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from prefault._system.hugetlb import HugetlbPool

Severity: TypeAlias = Literal["problem", "warning", "tip"]
"""A problem: something fails or is killed. A warning: slower, weaker, or a limit is near. A tip: could be better."""

Unit: TypeAlias = Literal["bytes", "count", "cpus", "seconds", "mode", "flag", "word"]

NOT_MOUNTED = "nothing is mounted there"
"""The reason for an unknown size of ``/dev/shm`` where that is not a file system of its own."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A number or word of the machine, and its source.

    Attributes:
        name: such as ``"mem_available"``; ``docs/doctor-json.md`` lists them. The memory and CPU cgroups' names occur once
            for every directory of the hierarchy.
        value: None where there is no limit, or where ``unknown`` says why it is not known.
        unit: the unit of the value. A ``flag`` is 0 or 1, a ``mode`` a number that the kernel documents.
        source: a file, a file and its line, or a system call.
        unknown: the reason why it could not be read; None where it was.
        meaning: for settings, what the value does to population.
    """

    name: str
    value: int | float | str | None
    unit: Unit
    source: str
    unknown: str | None = None
    meaning: str | None = None


@dataclass(frozen=True, slots=True)
class MachineFacts:
    """The machine and the time of the examination.

    Attributes:
        kernel: the release, as uname(2) gives it.
        architecture: the machine's architecture, as uname(2) gives it.
        cpu_model: the ``model name`` of the first CPU; None where ``/proc/cpuinfo`` has none.
        hypervisor: True if the CPU says that it is a virtual one; None where it cannot say (x86 only).
        page_size: bytes in a base page.
        python: version.
        prefault: version.
        date: the time of the examination, ISO 8601 with seconds, in UTC.
        user_id: effective; 0 is root (perhaps of a container).
        seccomp: 0 none, 1 strict, 2 a filter; None where ``/proc/self/status`` does not tell.
    """

    kernel: str
    architecture: str
    cpu_model: str | None
    hypervisor: bool | None
    page_size: int
    python: str
    prefault: str
    date: str
    user_id: int
    seccomp: int | None


@dataclass(frozen=True, slots=True)
class CapabilityAnswer:
    """The answer to one capability of :data:`prefault._system.capabilities.ALL`.

    Attributes:
        name: the name for PREFAULT_WITHOUT.
        available: True if it works here.
        question: the call that asked the kernel.
        since: the Linux version that first answers yes.
        refusal: the reason why it is not available, in plain words; None where it is.
        without: the consequence for prefault where it is not available.
    """

    name: str
    available: bool
    question: str
    since: str
    refusal: str | None
    without: str


@dataclass(frozen=True, slots=True)
class Record:
    """All findings: machine, capabilities, settings of transparent huge pages, hugetlb pools, limits."""

    machine: MachineFacts
    capabilities: tuple[CapabilityAnswer, ...]
    settings: tuple[Reading, ...]
    pools: tuple[HugetlbPool, ...]
    limits: tuple[Reading, ...]

    def readings(self, name: str) -> tuple[Reading, ...]:
        """Return the known settings and limits of that name."""
        return tuple(r for r in (*self.settings, *self.limits) if r.name == name and r.unknown is None)

    def number(self, name: str) -> float | None:
        """Return the first value of that name as a number; None where it is unknown or unlimited."""
        value = next((reading.value for reading in self.readings(name)), None)
        return value if isinstance(value, int | float) else None

    def size(self, name: str) -> int | None:
        """Return the first value of that name as bytes or a count; None where it is unknown or unlimited."""
        number = self.number(name)
        return None if number is None else int(number)

    def word(self, name: str) -> str | None:
        """Return the first value of that name as a word; None where it is unknown."""
        value = next((reading.value for reading in self.readings(name)), None)
        return value if isinstance(value, str) else None

    def lacks(self, name: str) -> CapabilityAnswer | None:
        """Return the answer to a capability that is missing; None where it is available or was not asked about."""
        return next((answer for answer in self.capabilities if answer.name == name and not answer.available), None)


@dataclass(frozen=True, slots=True)
class Advice:
    """One piece of advice.

    Attributes:
        rule: the name of the rule, at most once in a report; stable, for programs.
        severity: see :data:`Severity`.
        sentence: the finding, with its numbers.
        remedy: a command, or a setting.
    """

    rule: str
    severity: Severity
    sentence: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Report:
    """A record and the advice that follows from it, the gravest first."""

    record: Record
    advice: tuple[Advice, ...]
