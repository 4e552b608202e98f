"""The machine that a figure was measured on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata

from prefault._system import hugetlb, thp
from prefault._system.cpus import usable_cpus
from prefault._system.machine_identity import identify_machine
from prefault._system.meminfo import read_meminfo
from prefault._version import __version__
from prefault.limits.memory_limits import memory_limits
from prefault.sizes import PAGE_SIZE, format_size

_THP_SETTINGS = ("enabled", "defrag", "shmem_enabled")


@dataclass(frozen=True, slots=True)
class BenchMachine:
    """The machine that figures come from. It has no name of a host, user or path.

    Attributes:
        kernel: the release and build that uname(2) gives.
        architecture: such as ``x86_64``.
        cpu: the model, as /proc/cpuinfo names it.
        cpus: CPUs that are online.
        usable_cpus: CPUs that this process may keep busy.
        memory_bytes: MemTotal.
        page_bytes: a base page.
        virtual: True if the CPU says that a hypervisor runs it.
        thp: the settings of transparent huge pages; None where the kernel has no such setting.
        hugetlb_pages: the pool of each page size (bytes, as text) before anything was changed.
        python, numpy, prefault: versions.
    """

    kernel: str
    architecture: str
    cpu: str
    cpus: int
    usable_cpus: int
    memory_bytes: int
    page_bytes: int
    virtual: bool
    thp: dict[str, str | None]
    hugetlb_pages: dict[str, int]
    python: str
    numpy: str
    prefault: str

    def differences(self, other: BenchMachine) -> list[str]:
        """List the differences that make times of the two machines incomparable, each in a few words."""
        pairs = (
            ("kernel", self.kernel, other.kernel),
            ("architecture", self.architecture, other.architecture),
            ("CPU", self.cpu, other.cpu),
            ("CPUs", self.usable_cpus, other.usable_cpus),
            ("memory", format_size(self.memory_bytes), format_size(other.memory_bytes)),
            ("base page", self.page_bytes, other.page_bytes),
            ("transparent huge pages", self.thp, other.thp),
        )
        return [f"{name}: {mine} and {others}" for name, mine, others in pairs if mine != others]


def this_machine() -> BenchMachine:
    """Describe this machine as it is now."""
    here = identify_machine()
    return BenchMachine(
        kernel=here.kernel,
        architecture=here.architecture,
        cpu=here.cpu_model or here.architecture,
        cpus=os.cpu_count() or 1,
        usable_cpus=usable_cpus(),
        memory_bytes=read_meminfo("MemTotal")[0],
        page_bytes=PAGE_SIZE,
        virtual=bool(here.hypervisor),
        thp={name: thp.read_setting(name) for name in _THP_SETTINGS},
        hugetlb_pages={str(size): hugetlb.read_pool(size).total for size in hugetlb.page_sizes()},
        python=here.python,
        numpy=metadata.version("numpy"),
        prefault=__version__,
    )


def available_memory_bytes() -> int:
    """Return the bytes that may be taken without swapping: by the machine, or less where a memory cgroup is tighter."""
    return min(limit.available_bytes for limit in memory_limits(swap=False))
