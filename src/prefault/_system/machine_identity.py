"""The identity of this machine, as the benchmark and the doctor record it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import NamedTuple


class MachineIdentity(NamedTuple):
    """Kernel, CPU and Python of a machine, without a name of a host, user or path.

    Attributes:
        kernel: name, release and build, as uname(2) gives them.
        release: of the kernel alone.
        architecture: such as ``x86_64``.
        cpu_model: model of the first CPU; None where /proc/cpuinfo has none.
        hypervisor: whether the CPU reports that a hypervisor runs it; None where it cannot (x86 only).
        python: version.
    """

    kernel: str
    release: str
    architecture: str
    cpu_model: str | None
    hypervisor: bool | None
    python: str


def identify_machine() -> MachineIdentity:
    """Describe this machine."""
    uname = os.uname()
    cpu = read_fields("/proc/cpuinfo")
    flags = cpu.get("flags")
    return MachineIdentity(
        kernel=f"{uname.sysname} {uname.release} {uname.version}",
        release=uname.release,
        architecture=uname.machine,
        cpu_model=cpu.get("model name") or cpu.get("Processor"),
        hypervisor=None if flags is None else "hypervisor" in flags.split(),
        python=platform.python_version(),
    )


def read_fields(path: str) -> dict[str, str]:
    """Read the first paragraph of a file of ``key: value`` lines; empty where the file cannot be read."""
    try:
        text = Path(path).read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
