"""Bad inputs by command: what a person can give it that it must refuse, and how one of them is tried."""

import itertools
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from forked_commands import run_forked
from qlora_lowmem.errors import EXIT_USAGE

SECONDS = 90
# Bytes of address space beyond what a fork begins with: an input that never ends must not fill the machine.
_ROOM = 6 * 2**30
_LONGEST = 6000  # characters of a message


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
        what: is wrong, as `SUBJECT: FAULT` where other subjects have that fault too; unique in a command.
        words: of the command line, made in a place.
        says: what the message names, regardless of case.
        waits: it is refused after seconds in which nothing is done.
        kind: the heading that it stands under.
    """

    command: str
    what: str
    words: Callable[[Place], list[str]]
    says: tuple[str, ...] = ()
    waits: bool = False
    kind: str = ""

    @property
    def sides(self) -> tuple[tuple[str, ...], ...]:
        """What it has in common with others of its kind: the subject of its command, and the fault."""
        subject, colon, fault = self.what.partition(": ")
        return ((self.command, subject), (fault,)) if colon else ((self.command, self.what),)


@dataclass(frozen=True)
class Outcome:
    """How a command took a bad input.

    Attributes:
        exit_code: None where it was ended, for it ran too long.
        short: what it made of it that it should not; empty where it ended as promised.
        said: the end of its message.
    """

    command: str
    kind: str
    what: str
    seconds: float
    exit_code: int | None
    short: str
    said: str


def outcome_of(case: Case, good: Path) -> Outcome:
    """Give a command a bad input."""
    with tempfile.TemporaryDirectory() as name:
        place = Place(Path(name), good)
        words = case.words(place)
        before = set(_inside(place.folder))
        module, words = ("pytest", words) if case.command == "pytest" else ("qlora_lowmem", [case.command, *words])
        began = time.monotonic()
        try:
            done = run_forked(module, tuple(words), os.environ, SECONDS, room=_ROOM)
        except subprocess.TimeoutExpired:
            return Outcome(case.command, case.kind, case.what, SECONDS, None, f"still runs after {SECONDS} s", "")
        seconds = time.monotonic() - began
        left = sorted(str(path.relative_to(place.folder)) for path in set(_inside(place.folder)) - before)
        said = (done.stdout if case.command == "pytest" else "") + done.stderr
    said = said.replace(name, "PLACE").replace(str(good), "GOOD").strip()
    short = "; ".join(_short(case, done.returncode, said, left))
    return Outcome(case.command, case.kind, case.what, round(seconds, 2), done.returncode, short, said[-1500:])


def _short(case: Case, exit_code: int, said: str, left: list[str]) -> Iterator[str]:
    """What is not as promised."""
    if exit_code != (pytest.ExitCode.USAGE_ERROR if case.command == "pytest" else EXIT_USAGE):
        yield f"exit code {exit_code}"
    if "Traceback" in said:
        yield "a traceback"
    if not said:
        yield "no message"
    elif case.command != "pytest" and said.count("error: ") != 1:
        yield f"{said.count('error: ')} messages"
    if len(said) > _LONGEST:
        yield "longer than a message"
    if left and "out/tokenised" not in left:  # samples are tokenised once, whatever is wrong after that
        yield f"left behind: {', '.join(left)}"
    yield from (f"does not say {each!r}" for each in case.says if each.lower() not in said.lower())


def _inside(folder: Path) -> Iterator[Path]:
    return folder.rglob("*")


def all_cases() -> list[Case]:
    """Every case, the kinds' in turn."""
    from bad_inputs import commands, files, models, recipes, rows

    kinds = {"recipe": recipes, "flag": commands, "path": files, "samples": rows, "model": models}
    return [replace(case, kind=kind) for kind, module in kinds.items() for case in module.cases()]


def drawn(cases: list[Case], seed: int, enough: int) -> list[Case]:
    """Of every kind so many that near-duplicates are left out: each subject and each fault of a kind once, then twice
    and so on, until there are enough of that kind. In the order of `cases`; a seed draws the same ones.
    """
    rng = random.Random(seed)
    found: set[Case] = set()
    for kind in dict.fromkeys(case.kind for case in cases):
        left = [case for case in cases if case.kind == kind]
        rng.shuffle(left)
        seen: Counter[tuple[str, ...]] = Counter()
        for least in itertools.count(1):
            for case in left:
                if min(seen[side] for side in case.sides) < least:
                    seen.update(case.sides)
                    found.add(case)
            left = [case for case in left if case not in found]
            if not left or sum(case.kind == kind for case in found) >= enough:
                break
    return [case for case in cases if case in found]
