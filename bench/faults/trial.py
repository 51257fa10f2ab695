"""One command and one fault: how it ended, what it left behind, what became of what was there before."""

import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

from faults import again
from faults.inputs import COMMANDS, PLAN
from faults.kinds import CACHES, FILE, NO_TARGET, NONE, TORN, UNHEARD, Fault
from faults.process import Running
from faults.verdicts import left_behind, not_whole, pythons_own, what_is_short


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        moment: seconds from the start to the signal.
        kept_at: seconds from the start until there was something to go on with; 0 if there was none or nobody looked.
        seconds: how long it ran.
        code: the exit code, minus the signal's number where that ended it.
        short: what is not as it should be.
        before_ours: the signal came while Python itself was starting, which no command can answer for.
        went_on: what it, or the next start after it, had to go on with.
        said: the end of what it said.
    """

    command: str
    kind: str
    moment: float
    kept_at: float
    seconds: float
    code: int
    short: tuple[str, ...]
    before_ours: bool
    went_on: str
    said: str


def try_one(name: str, fault: Fault, prepared: Path, folder: Path, alone: Outcome | None) -> Outcome:
    """Run the command `name` in a copy of `prepared` at `folder`. What is drawn is drawn from the folder's name.

    Args:
        alone: what it came to undisturbed; None for the trial that finds that out.
    """
    rng = random.Random(folder.name)
    shutil.copytree(prepared, folder, symlinks=True)
    (folder / "tmp").mkdir()
    if fault in CACHES:
        _spoil(folder, fault, rng)
    words = _words(name, fault)
    running = Running(name, words, fault, folder)
    moment = running.strike(alone.seconds, alone.kept_at, rng) if fault.number and alone else 0.0
    code, said, seconds = running.ended()
    before_ours = fault.number == signal.SIGINT and pythons_own(said, code)
    short = [] if before_ours else what_is_short(name, fault, code, said, helped="--help" in words)
    short += ["it had to be ended"] * running.timed_out
    short += left_behind(folder, fault)
    short += not_whole(name, folder, written=code == 0 and "--help" not in words)
    went_on = ""
    if fault.moment == "kept":
        had = again.had(name, folder)
        code_again, said_again, _ = Running(name, words, NONE, folder).ended()
        went_on, faults = again.went_on(name, folder, had, prepared, code_again, said_again)
        short += [f"started again: {each}" for each in (*faults, *left_behind(folder, fault))]
    elif fault in CACHES and name == "plan":
        went_on, faults = again.went_on(name, folder, "0", prepared, code, said)
        short += faults
    shutil.rmtree(folder, ignore_errors=True)
    figures = [round(each, 3) for each in (moment, running.kept_at, seconds)]
    return Outcome(name, fault.kind, *figures, code, tuple(short), before_ours, went_on, said[-1500:])


def _words(name: str, fault: Fault) -> list[str]:
    """The command's words; where the fault strikes its first words as well as its last, only those of a heavy one."""
    command = COMMANDS[name]
    words = list(command.words)
    if fault == NO_TARGET:
        return ["/dev/full" if word == command.target else word for word in words]
    if fault.stream and not command.light and fault != UNHEARD:
        return [*words[:1], "--help"]
    return words


def _spoil(folder: Path, fault: Fault, rng: random.Random) -> None:
    """Leave rubbish in the cache: every file cut short, or a bit of each changed; a file where the folder was."""
    cache = folder / "cache"
    if fault == FILE:
        shutil.rmtree(cache)
        cache.write_text("")
        return
    shutil.copytree(folder / PLAN / "cache", cache / "plan")
    for path in sorted(each for each in cache.rglob("*") if each.is_file() and each.stat().st_size):
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content[:place] if fault == TORN else content)
