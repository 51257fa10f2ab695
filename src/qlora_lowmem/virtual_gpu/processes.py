"""Runs a program, and ends with it every process that it started: a script between the launcher and the program.

A program's processes need neither stay in its group (torchrun starts each worker in a session of its own) nor keep its
environment. But whoever has lost its parent becomes a child of this process, which asks for it: what is left when the
program has ended, it ends. It outlives the launcher, and does the same then. It needs nothing but the standard library,
and of that as little as can be, since every run starts one.

`processes.py FD FOLDER`: on FD comes the program (`write_order`); back go its pid, or the error that kept it from
starting, and its exit code when nothing of it is left. FOLDER is the run's, removed if the launcher is gone.
"""

import marshal
import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import NoReturn

ACCOUNT_VARIABLE = "VGPU_ACCOUNT"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_END_SECONDS = 20.0  # a process that cannot be killed (in the kernel, or another user's) is not waited for longer


def write_order(command: "Sequence[str | Path]", env: "Mapping[str, str]", cwd: "Path | str | None") -> bytes:
    """What a program is, as the script reads it."""
    encoded = [os.fsencode(part) for part in command], {os.fsencode(k): os.fsencode(v) for k, v in env.items()}
    order = marshal.dumps((*encoded, None if cwd is None else os.fsencode(cwd)))
    return len(order).to_bytes(8, "little") + order


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant that loses its own."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def children() -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for name in os.listdir("/proc"):  # noqa: PTH208
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid():
            found.append(int(name))
    return found


def end_children(spared: "frozenset[int]" = frozenset()) -> None:
    """Kills all children but these, and theirs, which are children then; waits until they are gone."""
    deadline = time.monotonic() + _END_SECONDS
    while (found := set(children()) - spared) and time.monotonic() < deadline:
        for pid in found:
            send(os.kill, pid)
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                continue
        time.sleep(0.002)


def send(how: "Callable[[int, int], None]", pid: int, number: int = signal.SIGKILL) -> None:
    """Sends a signal to a process (`os.kill`) or a group (`os.killpg`), if it is there and this user's."""
    try:
        how(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def _read(fd: int, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = os.read(fd, count - len(found))
        if not part:
            sys.exit(1)  # the launcher is gone before it has said what to run
        found += part
    return found


def _start(fd: int, command: list[bytes], env: dict[bytes, bytes], cwd: bytes | None) -> int:
    """The program's pid; the error that kept it from starting is told, and ends this process."""
    failed, fails = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become(fails, command, env, cwd)
    os.close(fails)
    if error := os.read(failed, 32):
        os.write(fd, b"failed " + error + b"\n")
        sys.exit(1)
    os.close(failed)
    return pid


def _become(fails: int, command: list[bytes], env: dict[bytes, bytes], cwd: bytes | None) -> "NoReturn":
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        if cwd is not None:
            os.chdir(cwd)
        os.execvpe(command[0], command, env)
    except OSError as error:
        os.write(fails, str(error.errno).encode())
    os._exit(127)


def _wait(fd: int, woken: int, program: int) -> int | None:
    """The program's exit code, or None if the launcher is gone first."""
    import select

    while True:
        ready, _, _ = select.select([fd, woken], [], [])
        if fd in ready:
            return None
        os.read(woken, 4096)
        while True:  # the program, and orphans
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == program:
                return os.waitstatus_to_exitcode(status)
            if pid == 0:
                break


def _main(fd: int, folder: str) -> None:
    os.set_inheritable(fd, False)
    adopt_orphans()
    woken, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    command, env, cwd = marshal.loads(_read(fd, int.from_bytes(_read(fd, 8), "little")))
    program = _start(fd, command, env, cwd)
    os.write(fd, f"started {program}\n".encode())
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # they are the program's
        os.dup2(nothing, stream)
    os.chdir("/")
    code = _wait(fd, woken, program)
    send(os.killpg, program)
    end_children()
    if code is None:
        import shutil

        shutil.rmtree(folder, ignore_errors=True)
        return
    os.write(fd, f"ended {code}\n".encode())


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2])
