"""Bad inputs by command: what a person can give it that it must refuse, and how one of them is tried."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from forked_commands import run_forked
from qlora_lowmem.errors import EXIT_USAGE

SECONDS = 90
# Bytes of address space beyond what a fork begins with: an input that never ends must not fill the machine.
_ROOM = 6 * 2**30


@dataclass(frozen=True)
class Place:
    """Where a case is tried.

    Attributes:
        folder: for what it makes; whatever lies there after the command that did not before was left behind.
        good: a recipe, samples, a model, a run: each as it should be, and shared.
    """

    folder: Path
    good: Path

    @property
    def recipe(self) -> str:
        """The path of a recipe that would train."""
        return str(self.good / "good.yaml")

    def path(self, word: str) -> str:
        """A word of a command line, in which `GOOD/` is what is good and `NEW/` the case's own folder."""
        return word.replace("GOOD/", f"{self.good}/").replace("NEW/", f"{self.folder}/")


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        command: as `qlora-lowmem` names it; `pytest` for the plugin's options.
        what: is wrong; unique in a command.
        words: of the command line, made in a place.
        says: what the message names, regardless of case.
    """

    command: str
    what: str
    words: Callable[[Place], list[str]]
    says: tuple[str, ...] = ()


def fault_of(case: Case, good: Path) -> str | None:
    """What a command made of a bad input that it should not; None where it ended as promised."""
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name), good)
        words = case.words(place)
        before = set(_inside(place.folder))
        module, words = ("pytest", words) if case.command == "pytest" else ("qlora_lowmem", [case.command, *words])
        try:
            done = run_forked(module, tuple(words), os.environ, SECONDS, room=_ROOM)
        except subprocess.TimeoutExpired:
            return f"still runs after {SECONDS} s"
        left = sorted(str(path.relative_to(place.folder)) for path in set(_inside(place.folder)) - before)
        left = [] if "out/tokenised" in left else left  # samples are tokenised once, whatever is wrong after that
        said = (done.stdout if case.command == "pytest" else "") + done.stderr
    expected = pytest.ExitCode.USAGE_ERROR if case.command == "pytest" else EXIT_USAGE
    said = said.replace(name, "PLACE").replace(str(good), "GOOD")
    faults = [
        f"exit code {done.returncode}" if done.returncode != expected else "",
        "a traceback" if "Traceback" in said else "",
        "no message" if not said.strip() else "",
        f"left behind: {', '.join(left)}" if left else "",
        *(f"does not say {each!r}" for each in case.says if each.lower() not in said.lower()),
        "longer than a message" if len(said) > 6000 else "",
    ]
    if case.command != "pytest" and said.count("error: ") != 1:
        faults.append(f"{said.count('error: ')} messages")
    found = "; ".join(filter(None, faults))
    return f"{found}\n{said.strip()[-1500:]}" if found else None


def _inside(folder: Path) -> Iterator[Path]:
    return folder.rglob("*")


def all_cases() -> list[Case]:
    """Every case, the commands' in turn."""
    from bad_inputs import commands, files, models, recipes, rows

    return [case for module in (recipes, commands, files, rows, models) for case in module.cases()]
