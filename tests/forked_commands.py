"""Commands run in forks of one process that has imported what they import: each would take seconds for that alone."""

import atexit
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

from helpers import ROOT

# Libraries read these as they are imported: a command that wants its own needs a process of its own.
READ_AT_IMPORT = frozenset({"HF_HUB_CACHE", "HF_HUB_OFFLINE"})
_AT_IMPORT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
_context = multiprocessing.get_context("forkserver")


def start_server(*more: str) -> None:
    """Start the process that is forked, with `more` modules imported; once is enough."""
    _context.set_forkserver_preload(["qlora_lowmem.run.execute", *more])
    with mock.patch.dict(os.environ, _AT_IMPORT):
        forkserver.ensure_running()


def run_alone(
    module: str, arguments: tuple[str, ...], env: Mapping[str, str], timeout: float
) -> "subprocess.CompletedProcess[str]":
    """`python -m MODULE ARGUMENTS` in the project's folder."""
    command = [sys.executable, "-m", module, *arguments]
    env = {**_AT_IMPORT, **env}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def run_forked(
    module: str,
    arguments: tuple[str, ...],
    env: Mapping[str, str],
    timeout: float,
    room: int | None = None,
    folder: Path = ROOT,
) -> "subprocess.CompletedProcess[str]":
    """What `python -m MODULE ARGUMENTS` prints and ends with, from a fork.

    Args:
        room: bytes of address space that it may take beyond what it begins with.
        folder: the one that it works in.

    Raises:
        subprocess.TimeoutExpired: it ran longer than `timeout` seconds, and was killed.
    """
    with tempfile.TemporaryDirectory() as place:
        outputs = Path(place, "stdout"), Path(place, "stderr")
        given = (module, arguments, {**env, **_AT_IMPORT}, outputs, room, folder)
        process = _context.Process(target=_command, args=given)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired([module, *arguments], timeout)
        printed = [path.read_text() if path.exists() else "" for path in outputs]
    return subprocess.CompletedProcess([module, *arguments], process.exitcode, *printed)


def _command(
    module: str,
    arguments: tuple[str, ...],
    env: Mapping[str, str],
    outputs: tuple[Path, Path],
    room: int | None,
    folder: Path,
) -> None:
    """In the fork."""
    if room is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + room, resource.RLIM_INFINITY))
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a fork of multiprocessing leaves them out
        sys.stdout.flush()
        sys.stderr.flush()
