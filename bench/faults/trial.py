"""One command and one fault: how it ended, what it said, what it left behind, what became of what was there before."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.inputs import COMMANDS

_PATIENCE = 300.0
_SETTLING = 15.0  # seconds that a watchdog has to end what a killed command has left
_BAD_WORDS = ("Traceback", "Exception ignored", "an unexpected failure")
_OURS = "/qlora_lowmem/"


@dataclass(frozen=True)
class Fault:
    """What befalls a command.

    Attributes:
        kind: its column of the table.
        number: the signal, for those.
        early: the signal comes in the first half second, else anywhere in the work.
        stream: the descriptor that is closed, full or unread.
    """

    kind: str
    number: int = 0
    early: bool = False
    stream: int = 0


SIGNALS = {
    "SIGINT at the start": Fault("SIGINT at the start", signal.SIGINT, early=True),
    "SIGTERM at the start": Fault("SIGTERM at the start", signal.SIGTERM, early=True),
    "SIGINT": Fault("SIGINT", signal.SIGINT),
    "SIGTERM": Fault("SIGTERM", signal.SIGTERM),
    "SIGKILL": Fault("SIGKILL", signal.SIGKILL),
}
UNHEARD = Fault("full stream", stream=2)  # which disturbs nothing
STREAMS = (
    *(Fault("closed stream", stream=number) for number in range(3)),
    Fault("full stream", stream=1),
    Fault("unread pipe", stream=1),
)
DISKS = (Fault("full disk"), Fault("target that takes nothing"))
CACHES = (Fault("torn cache"), Fault("flipped cache"), Fault("file for a cache"))


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        moment: seconds from the start to the signal.
        seconds: how long it ran.
        code: the exit code, minus the signal's number where that ended it.
        short: what is not as it should be.
        before_ours: the signal came while Python itself was starting, which no command can answer for.
        said: the end of what it said.
    """

    command: str
    kind: str
    moment: float
    seconds: float
    code: int
    short: tuple[str, ...]
    before_ours: bool
    said: str


def try_one(name: str, fault: Fault, prepared: Path, folder: Path, seconds: float, rng: random.Random) -> Outcome:
    """Run the command `name`, which takes `seconds` if it is left alone, in a copy of `prepared` at `folder`."""
    shutil.copytree(prepared, folder, symlinks=True)
    temporary = folder / "tmp"
    temporary.mkdir()
    _spoil(folder / "cache", fault, rng)
    words = _words(name, fault)
    moment = rng.uniform(0.0, 0.5 if fault.early else seconds) if fault.number else 0.0
    began = time.monotonic()
    process = _start(words, fault, folder)
    if fault.number:
        time.sleep(moment)
        process.send_signal(fault.number)
    elif not COMMANDS[name].ends and fault.kind != "unread pipe":
        time.sleep(3.0)
        process.send_signal(signal.SIGINT)
    try:
        told = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        told = process.communicate()
    code, took = process.returncode, time.monotonic() - began
    said = b"".join(filter(None, told)).decode(errors="replace")
    said += "".join((folder / name).read_text(errors="replace") for name in ("printed", "said"))
    before_ours = fault.early and "Traceback" in said and _OURS not in said
    short = list(_what_is_short(name, fault, code, said)) if not before_ours else []
    short += _left_behind(folder, fault)
    short += [f"{record} is no JSON" for record in COMMANDS[name].records if not _is_whole(folder / record)]
    shutil.rmtree(folder, ignore_errors=True)
    return Outcome(name, fault.kind, round(moment, 3), round(took, 3), code, tuple(short), before_ours, said[-600:])


def _words(name: str, fault: Fault) -> list[str]:
    """The command's words; where the fault strikes its first words as well as its last, only those of a heavy one."""
    command = COMMANDS[name]
    words = list(command.words)
    if fault.kind == "target that takes nothing":
        return [*words[:1], "--json", "/dev/full", *words[1:]] if command.records else [*words, "--nonsense"]
    if fault.stream and not command.light and fault != UNHEARD:
        return [*words[:1], "--help"]
    return words


def _start(words: list[str], fault: Fault, folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "qlora_lowmem", *words]
    env = os.environ | {"TMPDIR": str(folder / "tmp"), "QLORA_LOWMEM_CACHE": str(folder / "cache")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    streams = [os.open("/dev/null", os.O_RDONLY)]
    streams += [os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("printed", "said")]
    if fault.kind == "full stream":
        os.dup2(os.open("/dev/full", os.O_WRONLY), streams[fault.stream])
    if fault.kind == "unread pipe":
        reader, writer = os.pipe()
        os.dup2(writer, streams[1])
        os.close(writer)
        os.close(reader)
    prepared: Callable[[], None] | None = None
    if fault.kind == "closed stream":
        prepared = lambda: os.close(fault.stream)  # noqa: E731
    if fault.kind == "full disk":
        prepared = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))  # noqa: E731
    stdin, stdout, stderr = streams
    if fault.kind == "full disk":  # which what it says must not be on
        stdout = stderr = subprocess.PIPE
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        preexec_fn=prepared,
        start_new_session=True,
    )
    for each in streams:
        os.close(each)
    return process


def _spoil(cache: Path, fault: Fault, rng: random.Random) -> None:
    """Leave rubbish in the cache: every file cut short, or a bit of each changed; a file where the folder was."""
    if fault.kind == "file for a cache":
        shutil.rmtree(cache)
        cache.write_text("")
    if fault.kind not in ("torn cache", "flipped cache"):
        return
    for path in sorted(each for each in cache.rglob("*") if each.is_file() and each.stat().st_size):
        content = bytearray(path.read_bytes())
        place = rng.randrange(len(content))
        content[place] ^= 1 << rng.randrange(8)
        path.write_bytes(content[:place] if fault.kind == "torn cache" else content)


def _what_is_short(name: str, fault: Fault, code: int, said: str) -> list[str]:
    short = [f"it says {words!r}" for words in _BAD_WORDS if words in said]
    allowed = set(COMMANDS[name].codes)
    if fault.number == signal.SIGKILL:
        allowed |= {-signal.SIGKILL}
    elif fault.number:
        # Before a command has its signals, and once it is done, the system's own way ends it.
        allowed |= {128 + fault.number, -fault.number}
    elif (
        fault == UNHEARD
        or fault.kind in ("closed stream", "unread pipe")
        or fault.kind in {each.kind for each in CACHES}
    ):
        allowed |= set()
    else:
        allowed |= {2}
    if not COMMANDS[name].ends:
        allowed |= {130}
    return [*short, *([f"exit code {code}"] if code not in allowed else [])]


def _left_behind(folder: Path, fault: Fault) -> list[str]:
    """Processes, temporary folders and half files that are there when all had time to go.

    A command that is killed has no time to remove its own temporary folder: the next one does. Where there can be no
    cache, the virtual GPU's is in the temporary folder.
    """
    killed = fault.number == signal.SIGKILL
    may_stay = {"SIGKILL": "qlora_lowmem.scratch-", "file for a cache": f"qlora_lowmem-{os.getuid()}"}
    allowed = may_stay.get(fault.kind)
    deadline = time.monotonic() + _SETTLING
    while True:
        left = [f"process {each} stays" for each in _processes_of(folder)]
        temporary = [path.name for path in (folder / "tmp").iterdir()]
        left += [f"{name} stays" for name in temporary if allowed is None or not name.startswith(allowed)]
        half = [path for path in folder.glob(".*") if not killed]
        left += [f"{path.name} stays" for path in half]
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
            found.append(f"{process.name} ({told[-80:]!r})")
    return found


def _is_whole(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False
