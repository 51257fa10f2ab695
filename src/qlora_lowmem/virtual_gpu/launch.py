"""Starts programs on a virtual GPU."""

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from qlora_lowmem.scratch import scratch_folder

from . import account, processes
from .account import ACCOUNT_FILE, PEAK_FILES, Report, read_report
from .build import CACHE_VARIABLE, ensure_built
from .cards import CARD_VARIABLE, MEMORY_VARIABLE, Card, VirtualGPUError, VirtualGPUUnavailable, get_card
from .streams import open_standard_streams

_WORKER = Path(__file__).with_name("worker")
_NVIDIA_SMI = Path(__file__).with_name("nvidia_smi.py")
PROGRAM = "nvidia-smi"  # of the machine's own
_COMPILED = "compiled"  # what torch.compile keeps
# Seconds that a process group gets to end after SIGTERM before it is killed.
_GRACE_SECONDS = 5.0
_TRIAL = ("/bin/sh", "-c", ":")

File = int | IO[bytes] | IO[str] | None


def environment(card: Card, *, count: int = 1, report: Path) -> dict[str, str]:
    """The full environment in which any process becomes a process on a machine with `count` such cards.

    `report` is a folder, made if need be, where the processes leave what `read_report` reads. A new environment is a
    new machine: what was in the folder before is replaced.

    Raises:
        VirtualGPUUnavailable: this machine cannot host a virtual GPU.
        ValueError: `count` is not between 1 and 16.
    """
    return dict(os.environ) | variables(card, count, report, os.environ)


def variables(card: Card, count: int, report: Path, base: Mapping[str, str]) -> dict[str, str]:
    """What `environment` adds to the environment `base`; makes the report folder and its account."""
    build = ensure_built()
    report.mkdir(parents=True, exist_ok=True)
    for stale in report.glob(PEAK_FILES):
        stale.unlink()
    shutil.rmtree(report / _COMPILED, ignore_errors=True)
    account.create(report / ACCOUNT_FILE, card, count)
    preload = [*map(str, build.preload), *base.get("LD_PRELOAD", "").split()]
    added = {
        "LD_PRELOAD": " ".join(dict.fromkeys(preload)),
        "LD_LIBRARY_PATH": _prepend(str(build.folder), base.get("LD_LIBRARY_PATH")),
        "PYTHONPATH": _prepend(str(_WORKER), base.get("PYTHONPATH")),
        "TRITON_LIBCUDA_PATH": str(build.folder),
        "PATH": _prepend(str(_programs(report)), search_path(base)),
        # Every card of the machine is visible, whatever the real machine hides.
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count))),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    } | card_variables(card, report)
    _prove(build.folder, dict(base) | added)
    account.create(report / ACCOUNT_FILE, card, count)  # without the trial
    return added


def _prove(libraries: Path, variables: dict[str, str]) -> None:
    """Starts a program that does nothing: what the loader ignores with a warning, the real one would run without."""
    trial = subprocess.run(_TRIAL, env=variables, capture_output=True, text=True, errors="replace", check=False)
    reading = account.read(Path(variables[processes.ACCOUNT_VARIABLE]))
    if trial.returncode == 0 and "in_force" in reading.notices and str(libraries) not in trial.stderr:
        return
    raise VirtualGPUUnavailable(
        f"programs that are started here do not load the virtual GPU's libraries from {libraries} (exit code "
        f"{trial.returncode}): {trial.stderr.strip()[-500:] or 'the loader says nothing'}\nSet {CACHE_VARIABLE} to a "
        "folder on a disk from which programs may be run."
    )


def search_path(base: Mapping[str, str]) -> str:
    """PATH of a program: what lies beside this interpreter is found, also where its environment is not activated."""
    path, here = base.get("PATH", os.defpath), str(Path(sys.executable).parent)
    return path if here in path.split(":") else _prepend(here, path)


def _programs(report: Path) -> Path:
    """A folder with the program that only a machine with a card has."""
    script = report / "bin" / PROGRAM
    script.parent.mkdir(exist_ok=True)
    script.write_text(
        f'#!/bin/sh\nexec {shlex.join([sys.executable, "-I", str(_NVIDIA_SMI)])} "$@"\n', encoding="utf-8"
    )
    script.chmod(0o755)
    return script.parent


def card_variables(card: Card, report: Path) -> dict[str, str]:
    """The part that differs between processes of one build: which machine they are on."""
    memory = "" if get_card(card.name).total_bytes == card.total_bytes else str(card.total_bytes)
    return {
        processes.ACCOUNT_VARIABLE: str((report / ACCOUNT_FILE).resolve()),
        CARD_VARIABLE: card.name,
        MEMORY_VARIABLE: memory,
        # What torch.compile finds in its cache it does not time, and timing takes memory: the peak would be another.
        "TORCHINDUCTOR_CACHE_DIR": str((report / _COMPILED).resolve()),
    }


def _prepend(first: str, rest: str | None) -> str:
    entries = [entry for entry in (rest or "").split(":") if entry and entry != first]
    return ":".join([first, *entries])


def run(
    command: Sequence[str],
    card: Card,
    *,
    count: int = 1,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    cwd: Path | str | None = None,
    stdout: File = None,
    stderr: File = None,
) -> Report:
    """Runs a command on a machine with `count` such cards and reports what it used.

    `env` replaces the environment that the virtual machine's variables are added to. `timeout` is in seconds. The
    command's descendants end with it.

    Raises:
        VirtualGPUUnavailable: this machine cannot host a virtual GPU.
        subprocess.TimeoutExpired: it ran longer than `timeout`, and was stopped.
        OSError: the command cannot be started.
    """
    open_standard_streams()
    base = dict(os.environ if env is None else env)
    with scratch_folder() as report:
        complete = base | variables(card, count, report, base)
        with _Program(command, complete, report, cwd, stdout, stderr) as program:
            code = program.wait(timeout)
        return read_report(report, card, code if code >= 0 else 128 - code)


class _Program:
    """A program, and the process between (processes.py), which ends what it leaves, or all if this one is killed.

    An interrupt from the keyboard reaches the program, in a session of its own, only through this.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        folder: Path,
        cwd: Path | str | None,
        stdout: File,
        stderr: File,
    ) -> None:
        self._command = command
        self._heard = b""
        self._connection, theirs = socket.socketpair()
        with theirs:
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", "-S", processes.__file__, str(theirs.fileno()), str(folder.resolve())],
                # Nothing of a virtual machine that this process itself may be on.
                env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
                stdout=stdout,
                stderr=stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # said when it is asked
                self._connection.sendall(processes.write_order(command, env, cwd))
            self._pid = self._hear(None)
        except BaseException:
            self._close()
            raise

    def wait(self, timeout: float | None) -> int:
        """The exit code, or minus a signal's number; `subprocess.TimeoutExpired` after that many seconds."""
        return self._hear(timeout)

    def _hear(self, timeout: float | None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._heard:
            self._connection.settimeout(None if deadline is None else max(deadline - time.monotonic(), 0))
            try:
                part = self._connection.recv(256)
            except (TimeoutError, BlockingIOError):  # the second, when nothing is left
                raise subprocess.TimeoutExpired(self._command, timeout or 0) from None
            except ConnectionResetError:
                part = b""
            if not part:
                raise VirtualGPUError("the process that keeps the program was killed, and the program with it")
            self._heard += part
        line, _, self._heard = self._heard.partition(b"\n")
        word, _, number = line.decode().partition(" ")
        if word == "failed":
            raise OSError(int(number), os.strerror(int(number)), str(self._command[0]))
        return int(number)

    def __enter__(self) -> "_Program":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """Leaves nothing of the program and its descendants behind, however the block ends."""
        try:
            if error is not None:
                first = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
                processes.send(os.killpg, self._pid, first)
                with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt, VirtualGPUError):
                    self.wait(_GRACE_SECONDS)
                processes.send(os.killpg, self._pid)
        finally:
            self._close()

    def _close(self) -> None:
        self._connection.close()
        self._keeper.wait()
