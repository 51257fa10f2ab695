"""Processes that are run to their end, and that end as they would by themselves where this one is interrupted."""

import contextlib
import subprocess
from collections.abc import Mapping, Sequence

_GRACE_SECONDS = 20.0


def run_child(command: Sequence[str], env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    """The exit code of a program and all that it said.

    `subprocess.run` kills the program where an interrupt comes, and what it has in its folder for temporary files
    stays. This one asks it to end first, with SIGTERM.
    """
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            printed, said = process.communicate()
        except BaseException:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
                process.communicate(timeout=_GRACE_SECONDS)
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, printed, said)
