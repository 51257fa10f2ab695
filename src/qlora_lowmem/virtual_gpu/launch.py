"""Starts programs on a virtual GPU."""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from . import account, processes
from .account import ACCOUNT_FILE, PEAK_FILES, Report, read_report
from .build import CACHE_VARIABLE, ensure_built
from .cards import CARD_VARIABLE, MEMORY_VARIABLE, Card, VirtualGPUUnavailable, get_card
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
    with tempfile.TemporaryDirectory(prefix="vgpu-") as folder:
        report = Path(folder)
        complete = base | variables(card, count, report, base)
        with _watchdog(report) as tell:
            process = subprocess.Popen(
                command, env=complete, cwd=cwd, stdout=stdout, stderr=stderr, start_new_session=True
            )
            tell(process.pid)
            with _stopping(process, complete[processes.ACCOUNT_VARIABLE]):
                code = process.wait(timeout)
        return read_report(report, card, code if code >= 0 else 128 - code)


@contextlib.contextmanager
def _watchdog(folder: Path) -> Iterator[Callable[[int], None]]:
    """A process that ends the program and removes the folder if this one is killed; yields what tells it the pid."""
    watchdog = subprocess.Popen(
        [sys.executable, "-I", "-S", processes.__file__, str(folder.resolve())],
        # Nothing of a virtual machine that this process itself may be on.
        env={name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ},
        cwd="/",
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert watchdog.stdin is not None
    pipe = watchdog.stdin.fileno()

    def say(text: str) -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody killed it
            os.write(pipe, text.encode())

    try:
        yield lambda pid: say(f"{pid}\n")
    finally:
        say("\ndone")
        watchdog.stdin.close()
        watchdog.wait()


@contextlib.contextmanager
def _stopping(process: subprocess.Popen[bytes], account_file: str) -> Iterator[None]:
    """Leaves nothing of the process and its descendants behind, however the block ends.

    An interrupt from the keyboard reaches the program, in a session of its own, only through this.
    """
    try:
        yield
    except BaseException as error:
        first = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        processes.send(os.killpg, process.pid, first)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(_GRACE_SECONDS)
        raise
    finally:
        processes.send(os.killpg, process.pid)
        process.wait()
        processes.end_members(account_file)
