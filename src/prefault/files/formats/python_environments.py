"""Files that a Python interpreter reads when it starts and imports: of a virtual environment or an installation."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator

from prefault.files.failures import FileError
from prefault.files.formats.elf_libraries import needed_libraries


def python_files(directory: str) -> Iterator[str]:
    """Yield the files of a Python environment in the order of their use, without running it.

    First come its configuration and interpreter, then the shared libraries of that, the standard library, and site-packages:
    compiled modules and shared objects. Source files are yielded where no compiled file lies beside them. Of a virtual
    environment, the installation that it is made from is included.

    Args:
        directory: ``sys.prefix`` of the environment, which has ``bin/python``.

    Raises:
        FileError: the directory has no interpreter.
        OSError: it cannot be read.
    """
    interpreter = _interpreter(directory)
    config = os.path.join(directory, "pyvenv.cfg")
    real = os.path.realpath(interpreter)
    base, sites = directory, [directory]
    if os.path.exists(config):
        yield config
        home, uses_system_sites = _read_config(config)
        base = os.path.dirname(home or os.path.dirname(real))
        sites = [base, directory] if uses_system_sites else [directory]
    yield real
    libraries = [os.path.join(base, "lib"), os.path.join(os.path.dirname(os.path.dirname(real)), "lib")]
    yield from needed_libraries(real, libraries)
    version = _version(directory, real)
    standard = os.path.join(base, "lib", version)
    if os.path.isdir(standard):
        # The interpreter imports the codecs before anything else (Python/pylifecycle.c).
        yield from _modules(os.path.join(standard, "encodings"), version)
        yield from _modules(standard, version, leave_out=("encodings", "site-packages", "test", "idlelib", "lib2to3"))
    for prefix in sites:
        yield from _modules(os.path.join(prefix, "lib", version, "site-packages"), version)


def _interpreter(directory: str) -> str:
    for name in ("python3", "python"):
        path = os.path.join(directory, "bin", name)
        if os.path.exists(path):
            return path
    remedy = "give the directory that sys.prefix names in that Python"
    raise FileError(errno.ENOENT, "is no Python environment: it has no bin/python3", directory, remedy)


def _read_config(config: str) -> tuple[str | None, bool]:
    """Return the directory of the interpreter that a virtual environment was made from, and whether it uses its packages."""
    with open(config, encoding="utf-8", errors="surrogateescape") as file:
        pairs = dict(re.findall(r"^\s*([\w-]+)\s*=\s*(.*?)\s*$", file.read(1 << 16), re.MULTILINE))
    return pairs.get("home"), pairs.get("include-system-site-packages", "").lower() == "true"


def _version(directory: str, interpreter: str) -> str:
    """Return the name of the directory of modules, such as ``python3.11``."""
    named = re.search(r"python\d+\.\d+t?$", interpreter)
    if named is not None:
        return named[0]
    found = [name for name in os.listdir(os.path.join(directory, "lib")) if re.fullmatch(r"python\d+\.\d+t?", name)]
    if len(found) != 1:
        raise FileError(errno.ENOENT, f"has {len(found)} directories lib/python3.*, and needs one", directory)
    return found[0]


def _modules(top: str, version: str, leave_out: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield path files, shared objects and compiled modules of a directory and all below it."""
    compiled = f".cpython-{version.removeprefix('python').removesuffix('t').replace('.', '')}.pyc"
    for directory, below, names in os.walk(top):
        if directory == top:
            below[:] = [name for name in below if name not in leave_out]
        below.sort(key=lambda name: (name != "__pycache__", name))  # a package before those inside of it
        is_cache = os.path.basename(directory) == "__pycache__"
        modules = _compiled_beside(directory, compiled) if "__pycache__" in below else frozenset()
        for name in sorted(names):
            if is_cache:
                wanted = name.endswith(compiled)
            else:
                wanted = name.endswith((".pyc", ".pth")) or ".so" in name
                wanted = wanted or (name.endswith(".py") and name[:-3] not in modules)
            if wanted:
                yield os.path.join(directory, name)


def _compiled_beside(directory: str, suffix: str) -> frozenset[str]:
    try:
        names = os.listdir(os.path.join(directory, "__pycache__"))
    except OSError:
        return frozenset()
    return frozenset(name.removesuffix(suffix) for name in names if name.endswith(suffix))
