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
_ATTEMPTS = 20  # a process may start another between the look and the kill


def members(account: Path) -> Iterator[int]:
    """Processes of this user that were started on the virtual machine with this account."""
    wanted = f"{ACCOUNT_VARIABLE}={account}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended, or another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)


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
