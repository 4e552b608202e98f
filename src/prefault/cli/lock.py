"""``prefault lock``: keep files in memory until the command ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NoReturn, TypeAlias

import click

from prefault.cli.json_output import print_json
from prefault.cli.messages import complain, complain_of
from prefault.cli.options.file_options import FileArguments, failures_to_json, file_options, flush, need_paths
from prefault.cli.options.option_types import rate_option
from prefault.files.failures import FileError
from prefault.files.file_locks import FileLock, lock_files
from prefault.sizes import PAGE_SIZE, format_count, format_size

Ready: TypeAlias = Callable[[int], None]
"""Called with the exit status once all is locked."""

_MOST_PID_BYTES = 20

_ENDING = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}


@click.command()
@file_options("prefault-lock")
@click.option("-d", "--daemon", is_flag=True, help="Go on in the background, and return when the files are locked.")
@click.option("-w/-W", "--wait/--no-wait", default=True, help="With --daemon: wait until the files are locked (default).")
@click.option("-P", "--pidfile", type=click.Path(), metavar="FILE", help="Write the pid to FILE; removed at the end.")
@click.option("--progress", is_flag=True, help="Show progress on stderr.")
@rate_option
@click.option(
    "--headroom", type=click.Choice(["check", "ignore"]), default="check",
    help="Check RLIMIT_MEMLOCK, memory cgroups and free memory before the start (default), or let the kernel find out.",
)  # fmt: skip
def lock(
    files: FileArguments, daemon: bool, wait: bool, pidfile: str | None, progress: bool, rate: int | None,
    headroom: Literal["check", "ignore"],
) -> int:  # fmt: skip
    """Bring files into memory and keep them there, until SIGTERM, or Ctrl-C.

    \b
    Examples:
      prefault lock index.db                                   until Ctrl-C
      prefault lock -d -P /run/index.pid index.db              in the background
      kill $(cat /run/index.pid)

    Exit status: 0; 1 if a file could not be locked (the others stay locked), or a limit leaves too little memory (nothing is
    locked); 2 for a wrong command line.
    """
    need_paths(files)
    pidfile = None if pidfile is None else os.path.abspath(pidfile)  # a daemon leaves the directory

    def hold(ready: Ready) -> int:
        with contextlib.ExitStack() as kept:
            write_pid = None if pidfile is None else kept.enter_context(_pid_file(pidfile))
            try:
                locked = kept.enter_context(
                    lock_files(files.selection, ranges=files.ranges, progress=progress, rate=rate, headroom=headroom)
                )
            except ValueError as error:
                raise click.UsageError(str(error)) from error
            kept.enter_context(_signals_waiting())
            if write_pid is not None:
                write_pid()
            status = _show(locked, files)
            if locked.closed:
                return status
            ready(status)
            signal.sigwait(_ENDING)
            return status

    return _in_background(hold, wait=wait) if daemon else hold(lambda _: flush())


def _show(locked: FileLock, files: FileArguments) -> int:
    for failure in locked.failures:
        files.fail(failure)
    if files.output == "json":
        members = {
            "page_size": PAGE_SIZE, "pid": os.getpid(), "files": locked.files, "bytes": locked.bytes,
            "directories": files.selection.directories, "skipped": files.selection.skipped,
            "failures": failures_to_json(locked.failures), "seconds": locked.seconds,
        }  # fmt: skip
        print_json("prefault-lock", 1, members)
    if locked.closed and not locked.failures:
        complain("nothing was locked: no file was selected that has any bytes in the range")
        return 1
    count = format_count(locked.files, "file")
    files.print_summary([("locked", f"{format_size(locked.bytes)} in {count}, by process {os.getpid()}")])
    files.print_key_values("Locked", locked.files, locked.bytes // PAGE_SIZE, locked.bytes // PAGE_SIZE)
    return 1 if locked.failures else 0


@contextmanager
def _signals_waiting() -> Iterator[None]:
    """Keep the signals that end the command waiting, for sigwait(3)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _pid_file(path: str) -> Iterator[Callable[[], None]]:
    """Hold a pid file; yield a function that writes the pid of this process to it. The file is removed at the end.

    A file that was left behind by a process that was killed is taken over: its flock(2) is free.

    Raises:
        FileError: a process that runs holds it, or it is another file than a pid file, which would be overwritten.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        status = os.fstat(fd)
        if (
            not stat.S_ISREG(status.st_mode)
            or status.st_size > _MOST_PID_BYTES
            or not _is_pid(os.pread(fd, _MOST_PID_BYTES, 0))
        ):
            raise FileError(errno.EEXIST, "is there already, and is no pid file", path, "name another pid file")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, _MOST_PID_BYTES, 0).decode(errors="replace").strip() or "another"
            remedy = f"end it (kill {holder}), or name another pid file"
            raise FileError(errno.EEXIST, f"is held by process {holder}", path, remedy) from error
        if not os.fstat(fd).st_nlink:
            raise FileError(errno.EAGAIN, "was removed meanwhile by the process that held it", path, "try again")
        os.ftruncate(fd, 0)
        try:
            yield lambda: _write(fd, f"{os.getpid()}\n")
        finally:
            with contextlib.suppress(FileNotFoundError):  # somebody removed it
                os.unlink(path)
    finally:
        os.close(fd)


def _is_pid(content: bytes) -> bool:
    return not content.strip() or content.strip().isdigit()


def _write(fd: int, text: str) -> None:
    os.pwrite(fd, text.encode(), 0)


def _in_background(hold: Callable[[Ready], int], *, wait: bool) -> int:
    """Run ``hold`` in a process of its own, without a terminal; return its status once it is ready."""
    flush()
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reader)
        _run_in_child(hold, writer, wait=wait)
    os.close(writer)
    try:
        if not wait:
            return 0
        told = os.read(reader, 1)
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        raise
    finally:
        os.close(reader)
    if told:
        return told[0]
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if ended < 0:
        complain(f"the process in the background was ended by signal {-ended} before the files were locked")
    return ended if ended > 0 else 1


def _run_in_child(hold: Callable[[Ready], int], writer: int, *, wait: bool) -> NoReturn:
    """Run ``hold`` and end the process: the code that the parent goes on with must not run twice."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the files are locked; the pid file is removed
        if not wait:
            _let_go_of(1, 2)  # but not of stdin and the directory yet: a list of paths, and relative ones
        status = hold(lambda status: _tell_parent(writer, status, wait))
    except click.ClickException as error:
        complain(error.format_message())
        status = error.exit_code
    except OSError as error:
        complain_of(error)
    except KeyboardInterrupt:
        status = 128 + signal.SIGTERM
    except BaseException:  # noqa: BLE001  a defect: its traceback is all that is left of it
        sys.excepthook(*sys.exc_info())
    finally:
        flush()
        os._exit(status)


def _tell_parent(writer: int, status: int, wait: bool) -> None:
    flush()
    os.chdir("/")  # the file system that this was started on can be unmounted
    _let_go_of(0, 1, 2)
    if wait:
        os.write(writer, bytes([status]))  # a BrokenPipeError ends this process: the parent was ended meanwhile
    os.close(writer)


def _let_go_of(*streams: int) -> None:
    """Leave standard streams, by their descriptors: who reads them waits for their end."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in streams:
        os.dup2(null, fd)
    os.close(null)
