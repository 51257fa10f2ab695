"""Ends every process of a run: as a module for the launcher, as a script for the watchdog that outlives it.

A program's processes need not stay in its group (torchrun starts each worker in a session of its own), but all of them
carry the run's account in their environment. The watchdog needs nothing but this file and the standard library.
"""

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ACCOUNT_VARIABLE = "VGPU_ACCOUNT"
_PROCESSES = Path("/proc")
_ATTEMPTS = 20  # a process may start another between the look and the kill
_START_SECONDS = 1.0  # how long a process may show no environment because a program is being started in it


def members(account: Path) -> Iterator[int]:
    """Processes of this user that were started on the virtual machine with this account."""
    wanted = f"{ACCOUNT_VARIABLE}={account}".encode()
    for folder in _PROCESSES.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended, or another user's
            if wanted in _environment(folder).split(b"\0"):
                yield int(folder.name)


def _environment(process: Path) -> bytes:
    """The environment of a process.

    While a program is being started in it (execve) the kernel shows neither environment nor arguments, a little later
    than the parent hears of the start: such a process is looked at again until it has its arguments.

    Raises:
        OSError: it ended, has no program (the kernel's own), or is another user's.
    """
    deadline = time.monotonic() + _START_SECONDS
    while not (found := (process / "environ").read_bytes()) and time.monotonic() < deadline:
        if (process / "cmdline").read_bytes():
            return (process / "environ").read_bytes()
        (process / "exe").readlink()
        time.sleep(0.001)
    return found


def end_members(account: Path) -> None:
    """Kills all of them, and waits until they are gone."""
    for _ in range(_ATTEMPTS):
        found = [pid for pid in members(account) if pid != os.getpid()]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def end_group(pid: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal to a process group, if it is there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _watch(pipe: int, folder: Path) -> None:
    """Waits for the launcher's end; if it ends without a word, ends its program and removes its files."""
    said = b""
    while part := os.read(pipe, 64):
        said += part
    program, _, farewell = said.partition(b"\n")
    if farewell:
        return
    if program:
        end_group(int(program))
    end_members(folder / "account.bin")
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(int(sys.argv[1]), Path(sys.argv[2]))
