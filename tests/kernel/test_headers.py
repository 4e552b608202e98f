"""Every number and every layout that we tell the kernel, against the kernel's own headers, by the C compiler.

The headers are those of a recent kernel that ``make test`` puts into the virtual environment, else the system's. A name that
they do not have is skipped. What no header says is proven by behaviour at the end.
"""

from __future__ import annotations

import ast
import ctypes
import enum
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import prefault._kernel
from prefault._kernel import _call, fanotify, futex, ioprio, mempolicy, mman, pagemap, quick, rwlock, userfaultfd
from prefault._kernel.pagemap import PageCategory
from prefault._system import capabilities
from support import needs, oracle
from support.children import Child
from support.regions import PAGE, Region, file_of
from support.userfaultfd import opened

UAPI = Path(sys.prefix) / "uapi"

HEADERS = (
    "asm/socket.h",
    "asm/statfs.h",
    "linux/errno.h",
    "linux/falloc.h",
    "linux/fanotify.h",
    "linux/fcntl.h",
    "linux/fiemap.h",
    "linux/fs.h",
    "linux/futex.h",
    "linux/ioprio.h",
    "linux/memfd.h",
    "linux/mempolicy.h",
    "linux/mman.h",
    "linux/mount.h",
    "linux/stat.h",
    "linux/uio.h",
    "linux/unistd.h",
    "linux/userfaultfd.h",
)

# Names in our modules whose C name is another one.
C_NAMES = {
    "futex._ADD_ZERO": "FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, -2048)",
    "mman.IOV_MAX": "UIO_MAXIOV",
    "userfaultfd.MESSAGE_BYTES": "sizeof(struct uffd_msg)",
    **{f"userfaultfd.UffdIoctl.{name}": f"1ULL << _UFFDIO_{name}" for name in userfaultfd.UffdIoctl.__members__},
}

# Constants that no header of the kernel has.
NOT_IN_HEADERS = {
    "pagemap.ENTRY_BYTES": "pagemap.rst; test_pagemap_entry_has_eight_bytes",
    "pagemap.PM_SOFT_DIRTY": "pagemap.rst; test_pagemap_soft_dirty",
    "pagemap.PM_MMAP_EXCLUSIVE": "pagemap.rst; test_pagemap_exclusive",
    "pagemap.PM_UFFD_WP": "pagemap.rst; test_pagemap_write_protected",
    "pagemap.PM_GUARD_REGION": "pagemap.rst; test_pagemap_guard",
    "pagemap.PM_FILE": "pagemap.rst; test_pagemap_file",
    "pagemap.PM_SWAP": "pagemap.rst; test_pagemap_swap",
    "pagemap.PM_PRESENT": "pagemap.rst; test_pagemap_present",
    "pagemap.PM_PFRAME_MASK": "pagemap.rst; test_pagemap_frame",
    "mman._MAP_FAILED": "the C library's (void *) -1: test_syscalls sees mmap fail",
    "fiemap._EXTENTS": "how many are asked for at once",
    "mempolicy._MAX_NODES": "CONFIG_NODES_SHIFT; test_a_mask_of_all_nodes_is_taken",
    "futex._UNWAITED": "an address",
    "rwlock._RWLOCK_BYTES": "the C library's; test_a_read_write_lock_of_the_c_library_fits_and_begins_as_zeros",
    "userfaultfd._RUN_ANSWER_AT": "where the last field of a proven layout begins",
    "userfaultfd._TRANSFER_ANSWER_AT": "where the last field of a proven layout begins",
}

C_STRUCTS = {
    "cachestat.Cachestat": "cachestat",
    "cachestat.CachestatRange": "cachestat_range",
    "fiemap.Fiemap": "fiemap",
    "fiemap.FiemapExtent": "fiemap_extent",
    "mman.IoVec": "iovec",
    "pagemap.PageRegion": "page_region",
    "pagemap.PmScanArg": "pm_scan_arg",
    "procmap.ProcmapQuery": "procmap_query",
    "statfs.Statfs": "statfs",
}
C_FIELDS = {"mman.IoVec.base": "iov_base", "mman.IoVec.length": "iov_len"}

C_PREFIXES = {"pagemap.PageCategory": "PAGE_IS_", "userfaultfd.UffdFeature": "UFFD_FEATURE_"}

# Structures that are packed with `struct`: for each, the module's format and the fields that it stands for, in order.
_RUN = ("range.start", "range.len", "mode")
_TRANSFER = ("dst", "src", "len", "mode")
C_FORMATS = {
    "fanotify_event_metadata": (
        fanotify.METADATA,
        ("event_len", "vers", "reserved", "metadata_len", "mask", "fd", "pid"),
    ),
    "statx": (quick.STATX, ("stx_ino", "stx_dev_major", "stx_dev_minor")),
    "uffdio_api": (userfaultfd.UFFDIO_API_ARGUMENT, ("api", "features", "ioctls")),
    "uffdio_range": (userfaultfd.UFFDIO_RANGE_ARGUMENT, ("start", "len")),
    "uffdio_register": (userfaultfd.UFFDIO_RUN_ARGUMENT, (*_RUN, "ioctls")),
    "uffdio_zeropage": (userfaultfd.UFFDIO_RUN_ARGUMENT, (*_RUN, "zeropage")),
    "uffdio_continue": (userfaultfd.UFFDIO_RUN_ARGUMENT, (*_RUN, "mapped")),
    "uffdio_poison": (userfaultfd.UFFDIO_RUN_ARGUMENT, (*_RUN, "updated")),
    "uffdio_writeprotect": (userfaultfd.UFFDIO_WRITEPROTECT_ARGUMENT, _RUN),
    "uffdio_copy": (userfaultfd.UFFDIO_TRANSFER_ARGUMENT, (*_TRANSFER, "copy")),
    "uffdio_move": (userfaultfd.UFFDIO_TRANSFER_ARGUMENT, (*_TRANSFER, "move")),
    "uffd_msg": (userfaultfd.MESSAGE, ("event", "arg.pagefault.flags", "arg.pagefault.address", "arg.pagefault.feat.ptid")),
    "uffd_msg#fork": (userfaultfd._FORK, ("event", "arg.fork.ufd")),
    "uffd_msg#remap": (userfaultfd._THREE, ("event", "arg.remap.from", "arg.remap.to", "arg.remap.len")),
    "uffd_msg#remove": (userfaultfd._THREE, ("event", "arg.remove.start", "arg.remove.end", "")),
}


def _modules() -> list[ModuleType]:
    """The modules whose numbers are to be proven."""
    names = [info.name for info in pkgutil.iter_modules(prefault._kernel.__path__)]
    return [importlib.import_module(f"prefault._kernel.{name}") for name in names]


def _short(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _own_names(module: ModuleType) -> Iterator[str]:
    """Names that the module itself assigns at its top level, not those it imports."""
    for statement in ast.parse(inspect.getsource(module)).body:
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        for target in targets:
            for node in ast.walk(target):
                if isinstance(node, ast.Name):
                    yield node.id


def _constants() -> dict[str, int]:
    """Every upper-case integer of the modules, members of flags included."""
    found: dict[str, int] = {}
    for module in _modules():
        for name in _own_names(module):
            value = getattr(module, name)
            if name.isupper() and isinstance(value, int):
                found[f"{_short(module)}.{name}"] = value
        for name, kind in vars(module).items():
            if isinstance(kind, type) and issubclass(kind, enum.Enum) and kind.__module__ == module.__name__:
                for label, member in kind.__members__.items():
                    found[f"{_short(module)}.{name}.{label}"] = int(member.value)
    return found


def _structs() -> dict[str, type[ctypes.Structure]]:
    return {
        f"{_short(module)}.{name}": kind
        for module in _modules()
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, ctypes.Structure) and kind.__module__ == module.__name__
    }


def _c_name(constant: str) -> str:
    if constant in C_NAMES:
        return C_NAMES[constant]
    owner, _, name = constant.rpartition(".")
    if owner in C_PREFIXES:
        return C_PREFIXES[owner] + name
    return f"__NR_{name[3:].lower()}" if name.startswith("NR_") else name


CONSTANTS = _constants()
STRUCTS = _structs()
PROVEN = sorted(set(CONSTANTS) - set(NOT_IN_HEADERS))


class Layout(NamedTuple):
    """Where a field lies."""

    offset: int
    size: int


def _run_gcc(directory: Path, architecture: str, *arguments: str) -> str:
    gcc = shutil.which("gcc")
    if gcc is None:
        needs.missing("gcc is not installed")
    # The headers of the architecture go before the generic ones.
    trees = [UAPI / f"{architecture}-linux-any", UAPI / "any-linux-any"]
    paths = [argument for tree in trees if UAPI.is_dir() for argument in ("-isystem", str(tree))]
    done = subprocess.run([gcc, *paths, *arguments], cwd=directory, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Headers:
    """What the headers know, and what the C compiler says of it."""

    def __init__(self, directory: Path) -> None:
        architecture = "aarch64" if os.uname().machine == "aarch64" else "x86"
        includes = "".join(f"#include <{name}>\n" for name in HEADERS)
        (directory / "headers.c").write_text(includes)
        text = _run_gcc(directory, architecture, "-E", "-dD", "headers.c")
        self.words = set(re.findall(r"[A-Za-z_]\w*", text))
        lines = [f'printf("{name} %llu\\n", (unsigned long long) ({_c_name(name)}));' for name in PROVEN if self.has(name)]
        for name, kind in STRUCTS.items():
            struct = f"struct {C_STRUCTS[name]}"
            if C_STRUCTS[name] not in self.words:
                continue
            lines.append(f'printf("{name} %zu\\n", sizeof({struct}));')
            for field, _ in fields(kind):
                member = C_FIELDS.get(f"{name}.{field}", field)
                # A field that these headers do not have yet has no size; the compiler would stop at its name.
                if member in self.words:
                    place = f"offsetof({struct}, {member}), sizeof((({struct} *) 0)->{member})"
                    lines.append(f'printf("{name}.{field} %zu %zu\\n", {place});')
        for name, (_, packed) in C_FORMATS.items():
            struct = f"struct {name.partition('#')[0]}"
            if struct.split()[1] not in self.words:
                continue
            lines.append(f'printf("packed.{name} %zu\\n", sizeof({struct}));')
            for member in filter(None, packed):
                place = f"offsetof({struct}, {member}), sizeof((({struct} *) 0)->{member})"
                lines.append(f'printf("packed.{name}.{member} %zu %zu\\n", {place});')
        body = "\n    ".join(lines)
        (directory / "values.c").write_text(
            f"#include <stddef.h>\n#include <stdio.h>\n{includes}\nint main(void)\n{{\n    {body}\n    return 0;\n}}\n"
        )
        _run_gcc(directory, architecture, "-o", "values", "values.c")
        answer = subprocess.run([directory / "values"], capture_output=True, text=True, check=True).stdout
        self.values = {key: list(map(int, values)) for key, *values in map(str.split, answer.splitlines())}

    def has(self, constant: str) -> bool:
        """Whether the headers know every word of the constant's C name."""
        return set(re.findall(r"[A-Za-z_]\w*", _c_name(constant))) - {"sizeof", "struct"} <= self.words

    def value(self, name: str) -> list[int]:
        """What the compiler says, or a skip."""
        if name not in self.values:
            needs.missing(f"the kernel headers in use are too old for {_c_name(name)}: `make test` fetches recent ones")
        return self.values[name]


def fields(kind: type[ctypes.Structure]) -> list[tuple[str, Any]]:
    """The fields of a structure, each with its type."""
    return [(field[0], field[1]) for field in kind._fields_]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Headers:
    return Headers(tmp_path_factory.mktemp("headers"))


@pytest.mark.parametrize("name", PROVEN)
def test_constant(headers: Headers, name: str) -> None:
    assert headers.value(name) == [CONSTANTS[name] % (1 << 64)]  # printed as unsigned


@pytest.mark.parametrize("name", sorted(STRUCTS))
def test_struct(headers: Headers, name: str) -> None:
    kind = STRUCTS[name]
    assert headers.value(name) == [ctypes.sizeof(kind)]
    places = {field: Layout(*headers.value(f"{name}.{field}")) for field, _ in fields(kind)}
    assert places == {field: Layout(getattr(kind, field).offset, getattr(kind, field).size) for field, _ in fields(kind)}
    # All of the structure is covered, so no field of the header is missing in ours.
    assert sum(place.size for place in places.values()) == ctypes.sizeof(kind)


@pytest.mark.parametrize("name", sorted(C_FORMATS))
def test_format(headers: Headers, name: str) -> None:
    """Each field is unpacked from where the header has it, and with its size: a byte set there is seen by it alone."""
    packer, packed = C_FORMATS[name]
    assert headers.value(f"packed.{name}") == [packer.size]
    assert len(packer.unpack(bytes(packer.size))) == len(packed)
    for index, member in enumerate(packed):
        if not member:
            continue
        offset, size = headers.value(f"packed.{name}.{member}")
        for byte in range(size):
            raw = bytearray(packer.size)
            raw[offset + byte] = 1
            expected = 1 << 8 * (byte if sys.byteorder == "little" else size - 1 - byte)
            assert packer.unpack(raw) == tuple(expected if at == index else 0 for at in range(len(packed)))


def test_every_constant_is_proven_or_explained() -> None:
    assert set(NOT_IN_HEADERS) <= set(CONSTANTS), "an explanation for what is no longer there"
    assert set(C_NAMES) <= set(CONSTANTS)
    assert set(STRUCTS) == set(C_STRUCTS)
    # A constant without a C name of its own fails test_constant with recent headers; without them it would be skipped.
    unknown = [name for name in PROVEN if not re.fullmatch(r"(__NR_)?\w+", _c_name(name)) and name not in C_NAMES]
    assert not unknown


def test_the_completeness_check_sees_a_new_constant(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = tmp_path / "addition.py"
    source.write_text("NEW_CONSTANT = 7\n_HIDDEN = 8\nlower = 9\nTEXT = ''\n")
    spec = importlib.util.spec_from_file_location("addition", source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys.modules[__name__], "_modules", lambda: [module])
    assert _constants() == {"addition.NEW_CONSTANT": 7, "addition._HIDDEN": 8}


_BY_ARCHITECTURE = (
    (futex, ("NR_FUTEX",)),
    (ioprio, ("NR_IOPRIO_SET", "NR_IOPRIO_GET")),
    (mempolicy, ("NR_MBIND", "NR_GET_MEMPOLICY", "NR_MOVE_PAGES")),
    (userfaultfd, ("NR_USERFAULTFD",)),
)
"""System calls whose numbers differ by architecture."""


def test_numbers_of_system_calls_of_other_architectures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """arm64, riscv64 and loongarch64 share asm-generic's numbers. Other 64-bit architectures are not supported."""
    if not UAPI.is_dir():
        needs.missing("the headers of other architectures are not there: `make test` fetches them")
    names = [constant[3:].lower() for _, constants in _BY_ARCHITECTURE for constant in constants]
    (tmp_path / "numbers.c").write_text("#include <asm/unistd.h>\n" + "".join(f"{name}_is __NR_{name}\n" for name in names))
    text = _run_gcc(tmp_path, "aarch64", "-E", "-P", "numbers.c")
    numbers = dict(re.findall(r"(\w+)_is\s+(\d+)", text))
    monkeypatch.setattr(_call, "MACHINE", "aarch64")
    for module, constants in _BY_ARCHITECTURE:
        assert module.__file__ is not None
        spec = importlib.util.spec_from_file_location("elsewhere", module.__file__)
        assert spec is not None
        assert spec.loader is not None
        elsewhere = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(elsewhere)
        for constant in constants:
            assert getattr(elsewhere, constant) == int(numbers[constant[3:].lower()])


# --- the bits of a pagemap entry: Documentation/admin-guide/mm/pagemap.rst tells them, no header does ---------------------


def entry(address: int) -> int:
    """The pagemap entry of one page, read by the tests' own code."""
    return oracle.entries(address, PAGE)[0]


def test_pagemap_entry_has_eight_bytes() -> None:
    with Region(4) as region, open("/proc/self/pagemap", "rb", buffering=0) as file:
        region.fill(2, b"x")
        raw = os.pread(file.fileno(), 4 * pagemap.ENTRY_BYTES, region.address // PAGE * pagemap.ENTRY_BYTES)
        numbers = [int.from_bytes(raw[at : at + 8], sys.byteorder) for at in range(0, len(raw), pagemap.ENTRY_BYTES)]
        assert [bool(number) for number in numbers] == [False, False, True, False]


def test_pagemap_present() -> None:
    with Region(1) as region:
        assert entry(region.address) == 0
        region.fill(0, b"x")
        assert entry(region.address) & pagemap.PM_PRESENT
        mman.madvise(region.address, PAGE, mman.MADV_DONTNEED)
        assert entry(region.address) == 0


def test_pagemap_file(tmp_path: Path) -> None:
    with file_of(tmp_path, PAGE) as (fd, _), Region(1, fd=fd) as region:
        region.read(0, 1)
        assert entry(region.address) & pagemap.PM_FILE
        region.fill(0, b"a private copy")
        assert not entry(region.address) & pagemap.PM_FILE


def test_pagemap_exclusive() -> None:
    with Region(1) as region:
        region.fill(0, b"x")
        assert entry(region.address) & pagemap.PM_MMAP_EXCLUSIVE
        gate, opener = os.pipe()
        with Child(lambda: os.read(gate, 1)) as child:
            # The page has two owners now.
            assert not entry(region.address) & pagemap.PM_MMAP_EXCLUSIVE
            os.write(opener, b"x")
            child.result()
        os.close(gate)
        os.close(opener)


def test_pagemap_frame() -> None:
    needs.page_frames()
    fd = os.memfd_create("frame")
    os.ftruncate(fd, PAGE)
    with Region(1, fd=fd, shared=True) as one, Region(1, fd=fd, shared=True) as other, Region(1) as third:
        one.fill(0, b"x")
        other.read(0, 1)
        third.fill(0, b"x")
        frames = [entry(region.address) & pagemap.PM_PFRAME_MASK for region in (one, other, third)]
        assert frames[0] == frames[1] != frames[2]
        # The kernel counts the mappings of each frame: both readings must mean the same frame.
        with open("/proc/kpagecount", "rb", buffering=0) as counts:
            shares = [int.from_bytes(os.pread(counts.fileno(), 8, frame * 8), sys.byteorder) for frame in frames]
        assert shares == [2, 2, 1]
    os.close(fd)


def test_pagemap_guard() -> None:
    needs.capability(capabilities.GUARD_REGIONS)
    needs.capability(capabilities.PAGE_IS_GUARD)
    with Region(2) as region:
        mman.madvise(region.address, PAGE, mman.MADV_GUARD_INSTALL)
        assert entry(region.address) & pagemap.PM_GUARD_REGION
        assert not entry(region.page(1)) & pagemap.PM_GUARD_REGION
        mman.madvise(region.address, PAGE, mman.MADV_GUARD_REMOVE)
        assert entry(region.address) == 0


def test_pagemap_swap() -> None:
    """A marker in the page table where the page is not present is a swap entry to pagemap; no swap space is needed."""
    with Region(2) as region, opened(userfaultfd.UffdFeature.POISON) as watcher:
        watcher.register(region.address, region.length)
        watcher.poison(region.address)
        assert entry(region.address) & (pagemap.PM_SWAP | pagemap.PM_PRESENT) == pagemap.PM_SWAP
        assert entry(region.page(1)) == 0


def test_pagemap_write_protected() -> None:
    with Region(2) as region, opened() as watcher:
        region.fill(0, b"x")
        region.fill(1, b"x")
        watcher.register(region.address, region.length, userfaultfd.UFFDIO_REGISTER_MODE_WP)
        watcher.write_protect(region.address, PAGE, protect=True)
        assert entry(region.address) & pagemap.PM_UFFD_WP
        assert not entry(region.page(1)) & pagemap.PM_UFFD_WP


def test_pagemap_soft_dirty() -> None:
    """With CONFIG_MEM_SOFT_DIRTY a new page has the bit and clear_refs takes it; without, nothing may look like it."""
    with Region(1) as region:
        region.fill(0, b"x")
        if capabilities.SOFT_DIRTY.available:
            assert entry(region.address) & pagemap.PM_SOFT_DIRTY
            Path("/proc/self/clear_refs").write_text("4")
        assert not entry(region.address) & pagemap.PM_SOFT_DIRTY
    # Bit 55 is where PAGEMAP_SCAN's neighbours leave it: between the frame number and the exclusive bit.
    assert pagemap.PM_PFRAME_MASK + 1 == pagemap.PM_SOFT_DIRTY
    assert pagemap.PM_SOFT_DIRTY << 1 == pagemap.PM_MMAP_EXCLUSIVE


def test_page_categories_mean_what_pagemap_means() -> None:
    """The ioctl and the entries of the same pages agree."""
    needs.capability(capabilities.PAGEMAP_SCAN)
    with Region(3) as region, open("/proc/self/pagemap", "rb", buffering=0) as file:
        region.read(0, 1)
        region.fill(1, b"x")
        found = (pagemap.PageRegion * 3)()
        argument = pagemap.PmScanArg(ctypes.sizeof(pagemap.PmScanArg), 0, region.address, region.address + region.length)
        argument.vec, argument.vec_len = ctypes.addressof(found), 3
        argument.category_anyof_mask = PageCategory.PRESENT
        argument.return_mask = PageCategory.PRESENT | PageCategory.PFNZERO
        assert pagemap.pagemap_scan(file.fileno(), argument) == 2
        assert [(item.start, item.end, PageCategory(item.categories)) for item in found[:2]] == [
            (region.address, region.page(1), PageCategory.PRESENT | PageCategory.PFNZERO),
            (region.page(1), region.page(2), PageCategory.PRESENT),
        ]
        assert oracle.present(region.address, region.length) == [True, True, False]


def test_a_read_write_lock_of_the_c_library_fits_and_begins_as_zeros(tmp_path: Path) -> None:
    (tmp_path / "lock.c").write_text(
        "#include <pthread.h>\n#include <stdio.h>\n"
        "static const pthread_rwlock_t fresh = PTHREAD_RWLOCK_INITIALIZER;\n"
        "int main(void) { const unsigned char *bytes = (const unsigned char *) &fresh; int set = 0;\n"
        '  for (unsigned i = 0; i < sizeof fresh; i++) set |= bytes[i]; printf("%zu %d", sizeof fresh, set); return 0; }\n'
    )
    _run_gcc(tmp_path, "x86", "-o", "lock", "lock.c")
    size, is_set = map(int, subprocess.run([tmp_path / "lock"], capture_output=True, check=True).stdout.split())
    assert size <= rwlock._RWLOCK_BYTES
    assert not is_set
