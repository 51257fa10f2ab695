"""Checkpoints that are there complete or not at all, and the newest of them that is still as it was written.

A checkpoint is written into `.saving` beside its place, flushed to the disk, sealed with a manifest (size and SHA-256
of each file) and renamed: a process that is killed, a full disk or a power cut leaves the one before it untouched. A
folder that has a manifest was complete; one that differs from it was torn or corrupted after it was written.
"""

import hashlib
import itertools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import read_small, write_whole
from qlora_lowmem.owned import flush
from qlora_lowmem.run_folder.ownership import MANIFEST, RECIPE_FILE, is_our_checkpoint
from qlora_lowmem.units import format_bytes

STAGING = ".saving"
_NAME = re.compile(r"checkpoint-[0-9]+")
# transformers pickles its arguments beside a checkpoint. Nothing here reads them, and a pickle can run code.
_PICKLED_ARGUMENTS = "training_args.bin"


class _File(msgspec.Struct):
    bytes: int
    sha256: str


class _Manifest(msgspec.Struct):
    """Every file of a folder, by its path in it."""

    files: dict[str, _File]


class NotSavedError(UsageError):
    """A checkpoint or an adapter could not be written. What was there before it is still there, whole."""


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from, or None; and what to tell of newer ones that are corrupt."""

    checkpoint: Path | None
    notes: tuple[str, ...] = ()


def seal(folder: Path) -> None:
    """Flush every file in `folder` to the disk, then write and flush its manifest. Raises `OSError`."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        flush(path)
        files[path.relative_to(folder).as_posix()] = _File(path.stat().st_size, _digest(path))
    content = msgspec.json.format(msgspec.json.encode(_Manifest(files)), indent=2)
    write_whole(folder / MANIFEST, content + b"\n", fsync=True)


def corruption(folder: Path) -> str | None:
    """What is wrong with a sealed folder, or None if it is as it was written."""
    try:
        manifest = msgspec.json.decode(read_small(folder / MANIFEST), type=_Manifest)
        for name, written in manifest.files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            size = path.stat().st_size
            if size != written.bytes:
                return f"{name} has {size:,} bytes, and {written.bytes:,} were written"
            if _digest(path) != written.sha256:
                return f"{name} is not what was written: its SHA-256 differs"
    except FileNotFoundError:
        return f"{MANIFEST} is missing, so it was never finished"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (msgspec.DecodeError, RecursionError):
        return f"{MANIFEST} cannot be read as one"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def step_of(checkpoint: Path) -> int:
    """The optimizer steps that a checkpoint has behind it, from its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def newest_complete(output_dir: Path) -> Found:
    """The checkpoint with the most steps in `output_dir` that is as it was written."""
    notes: list[str] = []
    for folder in _newest_first(output_dir):
        wrong = corruption(folder)
        if wrong is None:
            return Found(folder, tuple(notes))
        notes.append(f"{folder.name} is damaged ({wrong}), so the one before it is used")
    if notes:
        notes.append("no whole checkpoint is left, so training starts from the beginning")
    return Found(None, tuple(notes))


class CheckpointStore:
    """The checkpoints of one output folder, of which the newest `keep` whole ones stay.

    Each holds a copy of the run's `recipe.json`. What is no checkpoint of ours is neither replaced nor removed.
    """

    def __init__(self, output_dir: Path, keep: int) -> None:
        self._output_dir = output_dir
        self._keep = keep
        marker = output_dir / RECIPE_FILE
        self._marker = marker.read_bytes() if marker.is_file() else None  # as the run began

    @property
    def staging(self) -> Path:
        """Where a checkpoint is being written."""
        return self._output_dir / STAGING

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Put `checkpoint-STEP`, which `write` makes in the folder it is given, in its place; or `NotSavedError`."""
        target = self._output_dir / f"checkpoint-{step}"

        def place(staging: Path) -> None:
            made = staging / target.name
            (made / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
            if self._marker is not None:
                (made / RECIPE_FILE).write_bytes(self._marker)
            seal(made)
            if target.exists():  # a damaged one of an earlier run, or another tool's
                beside = (target.with_name(f"{target.name}.not-ours-{number}") for number in itertools.count(1))
                free = next(path for path in beside if not path.exists())
                target.rename(staging / "replaced" if is_our_checkpoint(target) else free)
            made.rename(target)
            flush(self._output_dir)

        self._staged(f"the checkpoint of step {step}", write, place)
        self._drop_old(step)
        return target

    def save_final(self, write: Callable[[Path], None]) -> None:
        """Put the files of the trained adapter into the output folder, each whole; or `NotSavedError`."""

        def place(staging: Path) -> None:
            (staging / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
            made = sorted(path for path in staging.iterdir() if path.is_file())
            for path in made:
                flush(path)
            for path in made:
                path.replace(self._output_dir / path.name)
            flush(self._output_dir)

        self._staged("the adapter", write, place)

    def _staged(self, what: str, write: Callable[[Path], None], place: Callable[[Path], None]) -> None:
        staging = self.staging
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            write(staging)
            place(staging)
        except Exception as error:  # tokenizers raises a bare one
            cause = why_not_written(error)
            shutil.rmtree(staging, ignore_errors=True)
            if cause is None:
                raise
            raise NotSavedError(self._message(what, cause)) from error
        shutil.rmtree(staging, ignore_errors=True)

    def _message(self, what: str, cause: str) -> str:
        try:
            free = f"{format_bytes(shutil.disk_usage(self._output_dir).free)} are free there"
        except OSError:
            free = "the folder is not there any more"
        whole = newest_complete(self._output_dir).checkpoint
        kept = f"{whole.name} is whole" if whole else "there is no earlier checkpoint"
        return (
            f"{what} could not be written to {str(self._output_dir)!r} ({cause}; {free}); {kept}. Make room on that "
            "disk, then start the same command again: it goes on from there. Fewer checkpoints take less room "
            "(--save-total-limit)"
        )

    def _drop_old(self, step: int) -> None:
        """Remove all but the newest whole ones. Any of a later step is damaged, else the run had gone on from it."""
        kept = 0
        for folder in _newest_first(self._output_dir):
            its = step_of(folder)
            if kept < self._keep and (its == step or (its < step and corruption(folder) is None)):
                kept += 1
            elif is_our_checkpoint(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _newest_first(output_dir: Path) -> list[Path]:
    found = [path for path in output_dir.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of, reverse=True)


def why_not_written(error: BaseException) -> str | None:
    """What the system said when a file could not be written; None for any other error.

    safetensors and tokenizers give the system's words in a message of their own (Rust's `std::io::Error`), torch's zip
    writer none (caffe2/serialize/inline_container.cc).
    """
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    said = re.search(r"([^:]+) \(os error \d+\)", text)
    if said:
        return said.group(1).strip()
    if isinstance(error, RuntimeError) and ("inline_container" in text or "iostream" in text):
        return "a file could not be written to its end"
    return None
