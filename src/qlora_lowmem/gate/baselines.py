"""Recorded peaks under version control: one JSON file a device, one block a case.

A file is written whole or not at all (a temporary file, then a rename), by one process at a time (a lock on the
folder), and each case carries a checksum: a figure that was changed by hand is told from one that was recorded.
Checksums are by case, so that two branches that record different cases merge.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import read_text, write_whole
from qlora_lowmem.results.kinds.verdicts import Record

SCHEMA = 1
_LOCK_SECONDS = 30.0
_RESTORE = "Restore it (git checkout -- {path}), or delete it and record every case again (pytest --vram-record ...)"


class BaselineError(UsageError):
    """A baseline file that cannot be read or written. The message says which, why, and what to do."""


def baseline_path(folder: Path, device: str) -> Path:
    """The file of a device."""
    return folder / f"{device}.json"


def read_baselines(path: Path) -> dict[str, Record]:
    """The records of a file by case; none where there is no file.

    Raises:
        BaselineError: not JSON, another schema, or a case that does not have its checksum.
    """
    try:
        text = read_text(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BaselineError(f"{path}: the baselines cannot be read: {error.strerror or error}") from None
    restore = _RESTORE.format(path=path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        marks = " It holds git's conflict marks." if "<<<<<<<" in text else ""
        raise BaselineError(f"{path}: the baselines are not valid JSON: {error}.{marks} {restore}") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA or not isinstance(content.get("cases"), dict):
        found = content.get("schema") if isinstance(content, dict) else None
        raise BaselineError(
            f"{path}: schema is {found!r} and this version reads {SCHEMA}. Update qlora_lowmem, or: {restore}"
        )
    return {name: _read_case(path, name, case) for name, case in content["cases"].items()}


def _read_case(path: Path, name: str, case: Any) -> Record:
    again = (
        f"Restore it (git checkout -- {path}), or take its block out and record it again: "
        f"pytest --vram-record={name} ..."
    )
    if not isinstance(case, dict):
        raise BaselineError(f"{path}: case {name!r} is not an object. {again}")
    rest = {key: value for key, value in case.items() if key != "checksum"}
    if case.get("checksum") != _checksum(rest):
        raise BaselineError(
            f"{path}: case {name!r} does not have its checksum: it was edited by hand or badly merged, and figures are "
            f"recorded, never typed. {again}"
        )
    try:
        record = msgspec.convert(rest, Record)
    except msgspec.ValidationError as error:
        raise BaselineError(f"{path}: case {name!r} is not a record: {error}. {again}") from None
    unknown = sorted(rest.keys() - {field.name for field in fields(Record)})
    if unknown:  # written again, it would lose them
        raise BaselineError(f"{path}: case {name!r} is not a record: unknown: {', '.join(unknown)}. {again}")
    return record


def record_baselines(path: Path, records: Mapping[str, Record], *, forget: Collection[str] = ()) -> None:
    """Write the records of these cases and leave the others of the file as they are.

    Args:
        forget: cases to take out.

    Raises:
        BaselineError: the file there cannot be read (it is left as it is), or the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            # Read under the lock, so that what another process has just recorded stays. What cannot be read is an
            # error here too: it is never overwritten.
            kept = {name: record for name, record in read_baselines(path).items() if name not in forget}
            write_whole(path, render({**kept, **records}), fsync=True)
    except OSError as error:
        raise BaselineError(
            f"{path}: the baselines cannot be written: {error}. Nothing was changed. Make the folder writable, or "
            "record into another one with --vram-baselines DIR"
        ) from None


def render(records: Mapping[str, Record]) -> str:
    """The file's text: cases sorted, a figure a line, so that a diff shows what changed and nothing else."""
    cases = {}
    for name, record in sorted(records.items()):
        content = msgspec.to_builtins(record, order="sorted")
        if record.launches is None:  # a case without them stays as it was recorded
            content.pop("launches", None)  # msgspec leaves out a default that it did not read
        cases[name] = {"checksum": _checksum(content), **content}
    return json.dumps({"schema": SCHEMA, "cases": cases}, indent=1, ensure_ascii=False) + "\n"


def _checksum(case: Mapping[str, Any]) -> str:
    canonical = json.dumps(case, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()[:16]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process alone. The lock is the folder itself: it leaves no file, and ends with us.

    Raises:
        OSError: another process holds it for longer than half a minute.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process has been recording into {folder} for a while") from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
