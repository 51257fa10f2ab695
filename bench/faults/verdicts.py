"""What is not as it should be: of what a command said and returned, of what it left, of what was there before."""

import json
import os
import re
import signal
import sysconfig
import time
from pathlib import Path

from faults.inputs import BEFORE, COMMANDS
from faults.kinds import FILE, FULL_DISK, NO_TARGET, Fault

_SETTLING = 30.0  # seconds that a watchdog has to end what a killed command has left
_BAD_WORDS = ("Traceback", "Exception ignored", "an unexpected failure")
_FRAME = re.compile(r'^  File "([^"]+)", line \d+, in (\S+)$', re.MULTILINE)
_TRACEBACK = r"Traceback \(most recent call last\):\n(?:  [^\n]*\n)+"
_ONE_TRACEBACK = re.compile(
    # What Python says above it where the module `site`, or the one that `-m` needs, is what was interrupted.
    r"(Fatal Python error: init_import_site: [^\n]*\nPython runtime state: [^\n]*\n\s*|Could not import runpy[^\n]*\n)?"
    # And what it was about to handle.
    rf"(?:{_TRACEBACK}\w+[^\n]*\n\nDuring handling of the above exception, another exception occurred:\n\n)*"
    rf"{_TRACEBACK}KeyboardInterrupt:? *\n*"
)
_FROZEN = ("<frozen ", "<string>")  # modules that are part of the interpreter, and lines of `.pth` files
_IN_EVERY_START = ("/_distutils_hack/__init__.py", "/_virtualenv.py")  # what such lines import
_RUNS_THE_MODULE = "_run_code"  # of runpy: beneath it, it is ours


def pythons_own(said: str, code: int) -> bool:
    """Whether an interrupt ended Python in its own start, before a line of ours.

    Then there is one traceback and not another word; each frame of it is of Python itself, and none runs the module
    that was asked for; and Python ends by the signal, or says that it could not start.
    """
    frames = _FRAME.findall(said)
    library = sysconfig.get_path("stdlib") + "/"
    theirs = all(
        place.startswith(_FROZEN)
        or place.endswith(_IN_EVERY_START)
        or (place.startswith(library) and "/site-packages/" not in place)
        for place, _ in frames
    )
    runs = any(function == _RUNS_THE_MODULE for _, function in frames)
    found = _ONE_TRACEBACK.fullmatch(said)
    return found is not None and theirs and not runs and code == (1 if found[1] else -signal.SIGINT)


def what_is_short(name: str, fault: Fault, code: int, said: str, *, helped: bool) -> list[str]:
    """Of what it said and its exit code; `helped`, of `--help`."""
    short = [f"it says {words!r}" for words in _BAD_WORDS if words in said]
    allowed = {0} if helped else set(COMMANDS[name].codes)
    if fault.number == signal.SIGKILL:
        allowed |= {-signal.SIGKILL}
    elif fault.number:
        # Before a command has its signals, and once it is done, the system's own way ends it.
        allowed |= {128 + fault.number, -fault.number}
    elif fault == NO_TARGET:
        allowed = {2}
    elif fault == FULL_DISK or (fault.kind == "full stream" and fault.stream == 1):
        allowed |= {2}
    if not COMMANDS[name].ends and not fault.number:
        allowed |= {130}
    return [*short, *([f"exit code {code}"] if code not in allowed else [])]


def left_behind(folder: Path, fault: Fault) -> list[str]:
    """Processes, temporary folders and half files that are there when all had time to go.

    A command that is killed has no time to remove its own temporary folder: the next one does. Where there can be no
    cache, the virtual GPU's is in the temporary folder.
    """
    killed = fault.number == signal.SIGKILL
    may_stay = ["qlora_lowmem.scratch-"] * killed + [f"qlora_lowmem-{os.getuid()}"] * (fault == FILE)
    deadline = time.monotonic() + _SETTLING
    while True:
        left = _processes_of(folder)
        temporary = [path.name for path in (folder / "tmp").iterdir()]
        left += [f"{name} stays" for name in temporary if not name.startswith(tuple(may_stay))]
        left += [f"{path.name} stays" for path in folder.glob(".*") if not killed]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.1)


def _processes_of(folder: Path) -> list[str]:
    """What runs with the folder in its environment or its command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(folder).encode() + b"/" in told:
            found.append(f"process {process.name} ({told[-80:]!r}) stays")
    return found


def not_whole(name: str, folder: Path, *, written: bool) -> list[str]:
    """The file that the command writes, if that is not as it was before or whole; if `written`, it must be new."""
    target = COMMANDS[name].target
    if target is None:
        return []
    try:
        text = (folder / target).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return [f"{target}: {error}"]
    if text == BEFORE:
        return [f"{target} is as before"] * written
    return [] if _is_whole(target, text) else [f"{target} is not whole"]


def _is_whole(target: str, text: str) -> bool:
    if not target.endswith(".json"):
        return text.rstrip().endswith({"page.html": "</html>", "README.md": "Apache-2.0."}[target])
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
