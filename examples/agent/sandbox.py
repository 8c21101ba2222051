"""
Run code that a model has edited: in a process of its own, with limits, and without rights where the caller is root.

What holds it: processor seconds, memory and number of processes, file sizes, wall time, and that whatever it started
is ended with it. What does not: it may read what its user may read, use the network, and end with status 0 without
having run a test. Code of unknown origin belongs in a container or a virtual machine, too.
"""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# The interpreter may lie where a user without rights cannot reach it, so rights are dropped inside, before any code of
# the folder runs. Where it does lie there, that code can import of the standard library what is imported here.
_RUNNER = """
import ctypes, math, os, pkgutil, resource, runpy, sys, time
script, seconds, memory, processes, user = sys.argv[1], *map(int, sys.argv[2:])
for name, limit in (
    ("CPU", seconds), ("AS", memory), ("NPROC", processes), ("FSIZE", 1 << 20), ("NOFILE", 64), ("CORE", 0)
):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
if user:
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: no program gives rights back
sys.path.insert(0, os.getcwd())
runpy.run_path(script, run_name="__main__")
"""


@dataclass(frozen=True)
class Limits:
    """
    What a run may use.

    Args:
        seconds (`int`):
            Of processor time, for each process; twice as many of wall time for all.
        memory (`int`):
            Bytes of address space, for each process.
        processes (`int`):
            That may run at once, beside those that the user runs anyway.
    """

    seconds: int = 2
    memory: int = 512 << 20
    processes: int = 8


def run(folder: Path, script: str, limits: Limits | None = None) -> str:
    """
    Run a script of a folder.

    Args:
        folder (`Path`):
            Working directory, and where the script imports from.
        script (`str`):
            Its name.
        limits ([`Limits`], *optional*):
            The default ones if left out.

    Returns:
        `str`: `"passed"` if it ends with status 0, `"failed"` if with another, `"stopped"` if at a limit of time.

    Raises:
        `PermissionError`: If the folder cannot be entered by a user without rights.
    """
    limits = limits or Limits()
    user = unused_user() if os.getuid() == 0 else 0
    folder.chmod(0o755)
    closed = [parent for parent in folder.resolve().parents if user and not parent.stat().st_mode & 1]
    if closed:
        raise PermissionError(
            f"{folder} lies in {closed[0]}, which a user without rights cannot enter. Use a folder that everybody can "
            "enter, such as one of `tempfile.mkdtemp(dir='/tmp')`."
        )
    # the kernel counts threads, and those that have ended until they are reaped
    there = sum(len(_threads(pid)) for pid in _processes_of(user or os.getuid()))
    numbers = (limits.seconds, limits.memory, limits.processes + there, user)
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", "-S", "-c", _RUNNER, script, *map(str, numbers)],
        cwd=folder,
        env={"PATH": os.defpath},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = process.wait(timeout=2 * limits.seconds)
    except subprocess.TimeoutExpired:
        return "stopped"
    finally:
        _end_all(process, user)
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "stopped"
    return "passed" if status == 0 else "failed"


def unused_user() -> int:
    """A user id for this process, of a range that is kept for such uses, that no account has."""
    first, count = 61184, 4096
    for step in range(count):
        user = first + (os.getpid() + step) % count
        try:
            pwd.getpwuid(user)
        except KeyError:
            return user
    raise RuntimeError(f"all {count} user ids from {first} on belong to accounts, so there is none to run tests as.")


def _end_all(process: subprocess.Popen, user: int) -> None:
    """
    End a run and all it has started: what runs as its user, or, where it runs as the caller, its session. A process
    that has left the session of a caller without rights lives until its limit of processor time.
    """
    while True:
        running = [pid for pid in (_processes_of(user) if user else _session(process.pid)) if _runs(pid)]
        if not running:
            break
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, none of them can start another
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        time.sleep(0.002)
    process.kill()
    process.wait()


def _processes_of(user: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and entry.stat().st_uid == user:
                found.append(int(entry.name))
        except FileNotFoundError:
            pass
    return found


def _threads(pid: int) -> list[str]:
    try:
        return os.listdir(f"/proc/{pid}/task")
    except FileNotFoundError:
        return []


def _session(leader: int) -> list[int]:
    return [pid for pid in _processes_of(os.getuid()) if _status(pid)[3:4] == [str(leader)]]


def _runs(pid: int) -> bool:
    return _status(pid)[:1] not in ([], ["Z"], ["X"])


def _status(pid: int) -> list[str]:
    """State, parent, group, session, ... of a process, or nothing if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
