"""Ends every process of a run: as a module for the launcher, as a script for the watchdog that outlives it.

A program's processes need not stay in its group (torchrun starts each worker in a session of its own), but all of them
carry the run's account in their environment. The watchdog needs nothing but this file and the standard library, and of
that as little as can be: every run starts one, and nearly all have nothing to do.
"""

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ACCOUNT_VARIABLE = "VGPU_ACCOUNT"
_PROCESSES = "/proc"
_KILL = 9  # signal.SIGKILL
_ATTEMPTS = 20  # a process may start another between the look and the kill
_START_SECONDS = 1.0  # how long a process may show no environment because a program is being started in it


def members(account: str) -> list[int]:
    """Processes of this user that were started on the virtual machine with this account."""
    wanted = f"{ACCOUNT_VARIABLE}={account}".encode()
    return [
        int(name)
        for name in os.listdir(_PROCESSES)  # noqa: PTH208
        if name.isdecimal() and wanted in _environment(f"{_PROCESSES}/{name}").split(b"\0")
    ]


def _environment(process: str) -> bytes:
    """The environment of a process; empty if it ended, has no program (the kernel's own), or is another user's.

    While a program is being started in it (execve) the kernel shows neither environment nor arguments, a little later
    than the parent hears of the start: such a process is looked at again until it has its arguments.
    """
    deadline = time.monotonic() + _START_SECONDS
    try:
        while not (found := _read(f"{process}/environ")) and time.monotonic() < deadline:
            if _read(f"{process}/cmdline"):
                return _read(f"{process}/environ")
            os.readlink(f"{process}/exe")  # noqa: PTH115
            time.sleep(0.001)
    except OSError:
        return b""
    return found


def _read(path: str) -> bytes:
    with open(path, "rb") as file:  # noqa: PTH123
        return file.read()


def end_members(account: str) -> None:
    """Kills all of them, and waits until they are gone."""
    for _ in range(_ATTEMPTS):
        found = [pid for pid in members(account) if pid != os.getpid()]
        if not found:
            return
        for pid in found:
            send(os.kill, pid)
        time.sleep(0.01)


def send(how: "Callable[[int, int], None]", pid: int, number: int = _KILL) -> None:
    """Sends a signal to a process (`os.kill`) or a group (`os.killpg`), if it is there and this user's."""
    try:
        how(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _watch(folder: str) -> None:
    """Waits for the launcher's end; if it ends without a word, ends its program and removes its files."""
    said = b""
    while part := os.read(0, 64):
        said += part
    program, _, farewell = said.partition(b"\n")
    if farewell:
        return
    if program:
        send(os.killpg, int(program))
    end_members(f"{folder}/account.bin")
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _watch(sys.argv[1])
