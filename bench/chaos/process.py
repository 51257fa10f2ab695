"""`python -m qlora_lowmem.train` as a process that can be killed, forked from one that has its imports behind it."""

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

# A module that is not there is left out in silence (multiprocessing/forkserver.py): a test asks for each.
PRELOADED = [
    *("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets"),
    *(f"qlora_lowmem.{name}" for name in ("commands.train", "run.execute", "run.preflight", "training.progress")),
]


def context() -> ForkServerContext:
    """Where processes come from; the first pays for the imports."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    return made


class Training:
    """One start of the command; its standard error goes to `log`."""

    def __init__(self, made: ForkServerContext, arguments: Sequence[str], log: Path) -> None:
        self._log = log
        self._process = made.Process(target=_main, args=(list(arguments), str(log)))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.is_alive()

    def wait(self, seconds: float) -> int:
        """Its exit code, minus the signal's number if one ended it.

        Raises:
            TimeoutError: it goes on.
        """
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError(f"still running after {seconds} s: {self.said[-2000:]}")
        return self._process.exitcode

    @property
    def said(self) -> str:
        """All of its standard error."""
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""


def _main(arguments: list[str], log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 2)
    os.dup2(handle, 1)
    from qlora_lowmem.commands.frame import run_command

    sys.exit(run_command("train", arguments))


def logged(output_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's `log.jsonl`."""
    path = output_dir / "log.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
