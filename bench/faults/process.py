"""A command as a process of its own, with a fault prepared for it, and the signal that strikes it."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from faults.inputs import COMMANDS, environment
from faults.kinds import FULL_DISK, UNHEARD, Fault

_PATIENCE = 600.0  # seconds: the machine may have much else to do
_AT_THE_START = 0.5
_POLL_SECONDS = 0.01


class Running:
    """The command `name`, started in `folder` with `words`.

    Attributes:
        kept_at: seconds from the start until it had left something to go on with; 0 if it has not, as far as was seen.
        timed_out: it had to be ended.
    """

    def __init__(self, name: str, words: Sequence[str], fault: Fault, folder: Path) -> None:
        self._command, self._fault, self._folder = COMMANDS[name], fault, folder
        for each in ("printed", "said"):
            (folder / each).write_text("")
        self._began = time.monotonic()
        self._process = _start(words, fault, folder)
        self.kept_at = 0.0
        self.timed_out = False

    def strike(self, seconds: float, kept_at: float, rng: random.Random) -> float:
        """Send the fault's signal; returns when, in seconds from the start.

        Args:
            seconds, kept_at: of the command, left alone.
        """
        until = {"start": _AT_THE_START, "work": seconds, "kept": seconds - kept_at}[self._fault.moment]
        delay = rng.uniform(0.0, until)
        if self._fault.moment == "kept":
            self._wait_until_it_has_kept()
        time.sleep(delay)
        moment = time.monotonic() - self._began
        self._process.send_signal(self._fault.number)
        return moment

    def ended(self) -> tuple[int, str, float]:
        """Its exit code, minus the signal's number where one ended it, all that it said, and how long it ran."""
        if not self._command.ends and not self._fault.number and self._fault.kind != "unread pipe":
            time.sleep(3.0)
            self._process.send_signal(signal.SIGINT)
        if self._fault == UNHEARD:
            self._wait_until_it_has_kept()
        try:
            told = self._process.communicate(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            self.timed_out = True
            os.killpg(self._process.pid, signal.SIGKILL)
            told = self._process.communicate()
        took = time.monotonic() - self._began
        said = b"".join(filter(None, told)).decode(errors="replace")
        said += "".join((self._folder / name).read_text(errors="replace") for name in ("printed", "said"))
        return self._process.returncode, said, took

    def _wait_until_it_has_kept(self) -> None:
        while self._command.keeps and self._process.poll() is None:
            now = time.monotonic() - self._began
            if now > _PATIENCE:
                return
            if any(self._folder.glob(self._command.keeps)):
                self.kept_at = now
                return
            time.sleep(_POLL_SECONDS)


def _start(words: Sequence[str], fault: Fault, folder: Path) -> "subprocess.Popen[bytes]":
    streams = [os.open("/dev/null", os.O_RDONLY)]
    streams += [os.open(folder / name, os.O_WRONLY | os.O_APPEND) for name in ("printed", "said")]
    if fault.kind == "full stream":
        os.close(streams[fault.stream])
        streams[fault.stream] = os.open("/dev/full", os.O_WRONLY)
    if fault.kind == "unread pipe":
        os.close(streams[fault.stream])
        reader, streams[fault.stream] = os.pipe()
        os.close(reader)
    prepared: Callable[[], None] | None = None
    if fault.kind == "closed stream":
        prepared = lambda: os.close(fault.stream)  # noqa: E731
    if fault == FULL_DISK:
        prepared = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))  # noqa: E731
    stdin, stdout, stderr = streams
    if fault == FULL_DISK:  # which what it says must not be on
        stdout = stderr = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-m", "qlora_lowmem", *words],
        cwd=folder,
        env=environment(folder),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        preexec_fn=prepared,
        start_new_session=True,
    )
    for each in streams:
        os.close(each)
    return process
