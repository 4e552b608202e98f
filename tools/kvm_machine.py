"""Run a command of this repository in an emulated machine: kvm_machine.py [--nodes] DIRECTORY COMMAND...

The machine has /dev/kvm, and with ``--nodes`` two NUMA nodes: node 0 with the processor and 1.25 GiB, node 1 with 768 MiB.

QEMU's translator (TCG) emulates AMD's SVM with nested paging, so that the Linux in it can run virtual machines, on any
host. That Linux is Debian's kernel with an initial file system of busybox and six modules, in DIRECTORY; its root is this
machine's, by 9p and read-only. The command runs there as root, with PREFAULT_REQUIRE_ALL=1 and
PREFAULT_REQUIRE_KVM=1, or with ``--nodes`` PREFAULT_REQUIRE_NODES=1.
"""

from __future__ import annotations

import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

_REPOSITORY = Path(__file__).parent.parent.resolve()
_SUITE = "trixie"  # its Linux is 6.12: KVM_PRE_FAULT_MEMORY came with 6.11
_MODULES = ("9pnet_virtio", "9p", "kvm-amd")
_LIMIT_S = 900
_READY, _DONE = "--- the machine is ready", "--- exit status "

_INIT = """#!/bin/busybox sh
b=/bin/busybox
for module in {modules}; do $b insmod /modules/$module.ko; done
$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /root
$b mount -t proc proc /root/proc
$b mount -t sysfs sysfs /root/sys
$b mount -t cgroup2 cgroup2 /root/sys/fs/cgroup
$b mount -t devtmpfs devtmpfs /root/dev
$b mkdir -p /root/dev/shm
for directory in dev/shm run tmp; do $b mount -t tmpfs tmpfs /root/$directory; done
echo {ready}
HOME=/tmp PATH=/usr/sbin:/usr/bin:/sbin:/bin $b chroot /root /bin/sh -c {command}
echo "{done}$?"
$b poweroff -f
"""


_NODE_ARGUMENTS = [
    "-object", "memory-backend-ram,id=memory0,size=1280M", "-numa", "node,nodeid=0,cpus=0,memdev=memory0",
    "-object", "memory-backend-ram,id=memory1,size=768M", "-numa", "node,nodeid=1,memdev=memory1",
]  # fmt: skip


def main(directory: Path, command: list[str], *, nodes: bool) -> int:
    tree = directory / "tree"
    if shutil.which("qemu-system-x86_64") is None:
        _install_qemu()
    if not (tree / "boot").is_dir():
        _extract_packages(directory, tree)
    (kernel,) = (tree / "boot").glob("vmlinuz-*")
    image = directory / "initrd"
    image.write_bytes(_initial_file_system(tree, command, nodes=nodes))
    return _run(kernel, image, _NODE_ARGUMENTS if nodes else [])


def _install_qemu() -> None:
    if os.geteuid() != 0:
        sys.exit("qemu-system-x86_64 is not installed, and only root can install it: apt-get install qemu-system-x86")
    subprocess.run(["apt-get", "install", "--yes", "--no-install-recommends", "qemu-system-x86"], check=True)


def _extract_packages(directory: Path, tree: Path) -> None:
    """Download Debian's kernel and busybox, and unpack them: nothing is installed."""
    lists, cache = directory / "lists", directory / "cache"
    for path in (lists / "partial", cache / "archives" / "partial"):
        path.mkdir(parents=True, exist_ok=True)
    source = directory / "sources.list"
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    source.write_text(f"deb [arch=amd64 signed-by={key}] {_debian_archive()} {_SUITE} main\n")
    options = [
        f"-oDir::Etc::SourceList={source.resolve()}", "-oDir::Etc::SourceParts=/dev/null",
        f"-oDir::State::Lists={lists.resolve()}", f"-oDir::Cache={cache.resolve()}", "-oAPT::Sandbox::User=root",
    ]  # fmt: skip
    subprocess.run(["apt-get", *options, "--quiet", "update"], check=True)
    shown = subprocess.run(
        ["apt-cache", *options, "depends", "linux-image-amd64"], check=True, capture_output=True, text=True
    )
    names = re.findall(r"Depends: (linux-image-\d\S+)", shown.stdout)
    subprocess.run(["apt-get", *options, "--quiet", "download", names[0], "busybox-static"], check=True, cwd=directory)
    unfinished = directory / "unfinished"
    for package in directory.glob("*.deb"):
        subprocess.run(["dpkg-deb", "--extract", package, unfinished], check=True)
        package.unlink()
    unfinished.rename(tree)


def _debian_archive() -> str:
    """Return the address of the Debian archive that this machine's own packages come from."""
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Label: Debian", "Component: main"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    if not listed.stdout:
        sys.exit("apt knows no Debian archive, from which the kernel would come: run apt-get update")
    return listed.stdout.split()[0]


def _initial_file_system(tree: Path, command: list[str], *, nodes: bool) -> bytes:
    modules = _modules(tree)
    environment = ["env", f"PREFAULT_REQUIRE_{'NODES' if nodes else 'KVM'}=1", "PREFAULT_REQUIRE_ALL=1"]
    line = f"cd {shlex.quote(str(_REPOSITORY))} && {shlex.join([*environment, *command])}"
    init = _INIT.format(modules=" ".join(modules), ready=shlex.quote(_READY), done=_DONE, command=shlex.quote(line))
    busybox = next(path for path in (tree / "usr/bin/busybox", tree / "bin/busybox") if path.exists())
    archive = _Archive()
    for name in ("bin", "dev", "modules", "root"):
        archive.add(name, 0o40755)
    archive.add("dev/console", 0o20600, device=(5, 1))
    archive.add("bin/busybox", 0o100755, busybox.read_bytes())
    archive.add("init", 0o100755, init.encode())
    for name, content in modules.items():
        archive.add(f"modules/{name}.ko", 0o100644, content)
    archive.add("TRAILER!!!", 0)
    return bytes(archive.content)


def _modules(tree: Path) -> dict[str, bytes]:
    """Return the modules, each after those that it depends on."""
    files = {path.name.split(".")[0].replace("-", "_"): path for path in tree.rglob("*.ko.xz")}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        name = name.replace("-", "_")
        if name in found or name not in files:  # else it is built in
            return
        content = lzma.decompress(files[name].read_bytes())
        depends = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in filter(None, depends[1].decode().split(",") if depends else ()):
            add(other)
        found[name] = content

    for name in _MODULES:
        add(name)
    return found


class _Archive:
    """A cpio archive in the format of Documentation/driver-api/early-userspace/buffer-format.rst."""

    def __init__(self) -> None:
        self.content = bytearray()
        self._count = 0

    def add(self, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._count += 1
        name = path.encode() + b"\0"
        fields = (self._count, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
        for part in (b"070701" + b"".join(b"%08x" % field for field in fields) + name, content):
            self.content += part + bytes(-(len(self.content) + len(part)) % 4)


def _run(kernel: Path, image: Path, more: list[str]) -> int:
    """Boot, show what the command prints, and return its exit status."""
    # One processor: with two, QEMU 7.2 lets the kernel run into an int3 that it has just patched away.
    arguments = [
        "-accel", "tcg", "-cpu", "max,la57=off", "-m", "2G", "-nodefaults", "-nographic", "-no-reboot",
        "-serial", "stdio",
        "-kernel", str(kernel), "-initrd", str(image), "-append", "console=ttyS0 loglevel=3 panic=-1 mitigations=off",
        # Inode numbers of several file systems would collide without remap.
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host", *more,
    ]  # fmt: skip
    status, ready = 1, False
    with subprocess.Popen(["qemu-system-x86_64", *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as machine:
        limit = threading.Timer(_LIMIT_S, machine.kill)
        limit.start()
        assert machine.stdout is not None
        for raw in machine.stdout:
            line = raw.decode(errors="replace").rstrip()
            if line.startswith(_DONE):
                status, ready = int(line.removeprefix(_DONE)), False
            elif ready:
                print(line, flush=True)
            ready = ready or line.endswith(_READY)
        limit.cancel()
    return status


if __name__ == "__main__":
    words = sys.argv[1:]
    has_nodes = words[:1] == ["--nodes"]
    if len(words) < 2 + has_nodes:
        sys.exit(__doc__)
    sys.exit(main(Path(words[has_nodes]), words[has_nodes + 1 :], nodes=has_nodes))
