"""Start the run, let an event strike, note what it hit, start it again; until all have struck, then let it end."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from chaos.disk import SmallDisk
from chaos.events import Event
from chaos.process import Training, logged
from qlora_lowmem.run_folder.checkpoints import newest_complete, step_of

_PATIENCE = 1200.0
_ROOM_AT_START = 2000  # bytes: for the last words of a process whose standard error is a file under the same limit


@dataclass(frozen=True)
class Struck:
    """What an event came to.

    Attributes:
        kind: of the event.
        logged: the last step that was logged when it struck (0: none).
        saved: the newest whole checkpoint's step before the event touched any.
        exit_code: of the process; minus the signal's number if that ended it.
        resumed_from: the step of the checkpoint that the next start went on from (0: the beginning).
        said: what the process said last, where it had a say.
        detail: what was damaged.
    """

    kind: str
    logged: int
    saved: int
    exit_code: int
    resumed_from: int
    said: str
    detail: str = ""

    @property
    def expected(self) -> int:
        """The step to go on from: of the newest whole checkpoint, or of the one before where that was damaged."""
        return self.saved - 1 if self.detail else self.saved

    @property
    def lost(self) -> int:
        """Steps that were logged, which is before they are saved, and have to be made again."""
        return self.logged - self.resumed_from


class Chaos:
    """A run in `disk.folder / "run"` that events strike.

    Args:
        start: starts the command, its standard error into the file that it is given.
        disk: where the run writes.
        notes: a folder for what each process says.
    """

    def __init__(self, start: Callable[[Path], Training], disk: SmallDisk, notes: Path) -> None:
        self._start = start
        self._disk = disk
        self._notes = notes
        self._output_dir = disk.folder / "run"
        self._starts = 0

    def strike(self, events: Sequence[Event]) -> Iterator[Struck]:
        """Let every event strike, one start of the run each; then run it to its end. Yields an event's outcome late:
        what the next start went on from is part of it.
        """
        waiting: list[dict[str, Any]] = []
        for event in [*events, None]:
            self._starts += 1
            if event is not None and _full_at_start(event):
                self._disk.fill(None, _ROOM_AT_START)
            process = self._start(self._notes / f"start-{self._starts}.txt")
            if event is not None and _full_at_start(event):  # it goes on from nowhere; the next start does
                waiting.append(self._let_strike(process, event))
                continue
            if event is None:
                code = process.wait(_PATIENCE)
                assert code == 0, process.said[-3000:]
                found = []
            else:
                found = [self._let_strike(process, event)]
            for each in waiting:
                yield Struck(**each, resumed_from=_resumed_from(process.said))
            waiting = found

    def _let_strike(self, process: Training, event: Event) -> dict[str, Any]:
        # A step is logged before it is saved: to have a new checkpoint to damage, the step after it is waited for.
        target = self._whole() + event.after_steps + ("checkpoint" in event.kind)
        began = time.time()
        if _full_at_start(event):
            pass
        elif event.after_steps:
            self._wait(process, lambda: self._last_logged(since=began) >= target)
        else:
            self._wait(process, lambda: any(words in process.said for words in ("in adapters of", "resuming from")))
        time.sleep(event.delay)
        found: dict[str, Any] = {"kind": event.kind}
        if event.kind in ("SIGTERM", "SIGINT"):
            os.kill(process.pid, getattr(signal, event.kind))
        elif event.kind == "disk full":
            room = _ROOM_AT_START if _full_at_start(event) else int(event.choice * self._checkpoint_bytes())
            while process.running:
                self._disk.fill(process.pid, room)
                time.sleep(0.05)
        else:
            os.kill(process.pid, signal.SIGKILL)
        code = process.wait(_PATIENCE)
        self._disk.clear()
        saved = self._whole()
        # What an earlier start logged and lost is still in the log until this one has loaded.
        found |= {"exit_code": code, "saved": saved, "logged": max(self._last_logged(since=began), saved)}
        said = process.said.replace(str(self._output_dir), "RUN")
        lines = [line for line in said.splitlines() if line.strip()]
        found["said"] = lines[-1] if lines and event.kind in ("SIGTERM", "SIGINT", "disk full") else ""
        if "checkpoint" in event.kind and found["saved"]:
            found["detail"] = self._damage(event)
        return found

    def _wait(self, process: Training, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not reached():
            assert process.running, f"it ended before it was struck: {process.said[-3000:]}"
            assert time.monotonic() < deadline, process.said[-3000:]
            time.sleep(0.01)

    def _damage(self, event: Event) -> str:
        """Cut a file of the newest checkpoint short, or change a byte of it."""
        newest = self._output_dir / f"checkpoint-{self._whole()}"
        files = sorted(path for path in newest.iterdir() if path.stat().st_size > 1)
        path = files[int(event.choice * len(files))]
        content = bytearray(path.read_bytes())
        place = int(event.choice * 7919 % 1 * len(content))
        if event.kind == "torn checkpoint":
            path.write_bytes(content[:place])
            return f"{path.name} cut to {place} of {len(content)} bytes"
        content[place] ^= 0x01
        path.write_bytes(content)
        return f"{path.name}: a bit of byte {place}"

    def _whole(self) -> int:
        found = newest_complete(self._output_dir).checkpoint
        return step_of(found) if found else 0

    def _last_logged(self, since: float = 0.0) -> int:
        lines = [line for line in logged(self._output_dir) if line["time"] > since]
        return int(lines[-1]["step"]) if lines else 0

    def _checkpoint_bytes(self) -> int:
        newest = self._output_dir / f"checkpoint-{self._whole()}"
        return sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())


def starter(made: ForkServerContext, arguments: Sequence[str]) -> Callable[[Path], Training]:
    """Starts the command with these arguments."""
    return lambda log: Training(made, arguments, log)


def _full_at_start(event: Event) -> bool:
    return event.kind == "disk full" and not event.after_steps


def _resumed_from(said: str) -> int:
    line = next((line for line in said.splitlines() if line.startswith("resuming from ")), "")
    return step_of(Path(line.removeprefix("resuming from "))) if line else 0
