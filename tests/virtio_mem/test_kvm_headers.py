"""The numbers, structures and program of tests/support/kvm.py against kernel headers and assembler, without /dev/kvm."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import kvm, needs

_HEADERS = Path(sys.prefix) / "uapi"

_STRUCTS: dict[str, type[ctypes.Structure]] = {
    "kvm_userspace_memory_region": kvm.UserMemoryRegion,
    "kvm_regs": kvm.Regs,
    "kvm_segment": kvm.Segment,
    "kvm_dtable": kvm.Dtable,
    "kvm_sregs": kvm.Sregs,
    "kvm_pre_fault_memory": kvm.PreFaultMemory,
    "kvm_stats_header": kvm.StatsHeader,
    "kvm_stats_desc": kvm.StatsDesc,
}
_NUMBERS = {name: value for name, value in vars(kvm).items() if name.startswith("KVM_")}


def _expressions() -> dict[str, int]:
    """Return C expressions, each with the number that we take it for."""
    expected = dict(_NUMBERS)
    for name, kind in _STRUCTS.items():
        expected[f"sizeof(struct {name})"] = ctypes.sizeof(kind)
        for field, *_ in kind._fields_:
            place = getattr(kind, field)
            expected[f"offsetof(struct {name}, {field})"] = place.offset
            expected[f"sizeof(((struct {name} *) 0)->{field})"] = place.size
    expected["offsetof(struct kvm_run, exit_reason)"] = kvm.RUN_EXIT_REASON.size - 4
    expected["sizeof(((struct kvm_run *) 0)->exit_reason)"] = 4
    expected["offsetof(struct kvm_run, io.port)"] = kvm.RUN_IO_PORT.size - 2
    expected["sizeof(((struct kvm_run *) 0)->io.port)"] = 2
    return expected


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        needs.missing("gcc is not installed")
    if platform.machine() != "x86_64":
        pytest.skip("the structures are those of x86-64")
    return tmp_path_factory.mktemp("kvm")


def test_numbers_and_structures_are_the_kernels(scratch: Path) -> None:
    if not (_HEADERS / "x86-linux-any" / "asm" / "kvm.h").exists():
        needs.missing("recent kernel headers are not there: `make test` fetches them")
    expected = _expressions()
    lines = "".join(f'    printf("%lx\\n", (unsigned long) ({expression}));\n' for expression in expected)
    (scratch / "kvm.c").write_text(
        f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void)\n{{\n{lines}    return 0;\n}}\n"
    )
    trees = (argument for tree in ("any-linux-any", "x86-linux-any") for argument in ("-isystem", str(_HEADERS / tree)))
    done = subprocess.run(["gcc", *trees, "-o", "kvm", "kvm.c"], cwd=scratch, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([scratch / "kvm"], capture_output=True, text=True, check=True).stdout.split()
    assert {name: int(text, 16) for name, text in zip(expected, printed, strict=True)} == expected


def test_the_program_is_what_its_comments_say(scratch: Path) -> None:
    (scratch / "program.s").write_text(
        ".code32\n"
        "write: mov %eax, (%edi)\n inc %eax\n add $4096, %edi\n loop write\n mov %cs, %ebp\n out %al, $0x10\n"
        "sum: add (%edi), %ebx\n add $4096, %edi\n loop sum\n mov %cs, %ebp\n out %al, $0x11\n"
    )
    subprocess.run(["gcc", "-m32", "-c", "-o", "program.o", "program.s"], cwd=scratch, check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", "program.o", "program"], cwd=scratch, check=True)
    assert (scratch / "program").read_bytes() == kvm.PROGRAM
