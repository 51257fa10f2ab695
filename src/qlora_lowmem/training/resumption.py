"""May this recipe go on in its output folder, and from where: one run at a time, and never another's checkpoints."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe, hashed_fields, recipe_hash
from qlora_lowmem.recipe.io import recipe_from_dict

from .checkpoints import Found, discard_unfinished, newest_whole
from .manifest import flush

RECIPE_FILE = "recipe.json"
_LOCK = ".lock"
# What decides how much memory a step takes, and not what is trained: it may change between two starts of a run.
_MEMORY_ONLY = {
    ("base", "attention"),
    *(("memory", leaf) for leaf in ("gradient_checkpointing", "loss", "activation_offloading")),
    *(("memory", leaf) for leaf in ("expandable_segments", "max_memory")),
    *(
        ("lean", leaf)
        for leaf in ("lean", "tile_length", "scan_chunk_length", "scan", "checkpoints", "loss_tile_bytes")
    ),
    *(("dataloader", leaf) for leaf in ("dataloader_workers", "pin_memory")),
}
_BATCH = {("batch", "batch_size"), ("batch", "gradient_accumulation_steps")}


@dataclass(frozen=True)
class Change:
    """A field inside the recipe's hash that differs between two starts of a run."""

    section: str
    leaf: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.section}.{self.leaf} was {self.before!r}"


@contextmanager
def held_folder(output_dir: Path) -> Iterator[None]:
    """Make the output folder and hold it for this run alone; the system lets go of it however the process ends.

    Raises:
        UsageError: it cannot be written, or another run holds it.
    """
    lock = FileLock(output_dir / _LOCK)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(
            f"run.output_dir: another run is training in {str(output_dir)!r}. Wait for it, stop it, or give another "
            "folder with --output-dir"
        ) from None
    except OSError as error:
        raise UsageError(
            f"run.output_dir: {str(output_dir)!r} cannot be written ({error.strerror}); give another folder with "
            "--output-dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def checkpoint_to_resume(recipe: Recipe) -> Found:
    """Where `recipe` goes on from, if it was interrupted; remembers the recipe in its output folder, which is held.

    Fields that change how much memory a step takes, and nothing of what is trained, may differ from the run before;
    the notes tell them.

    Raises:
        UsageError: the folder holds checkpoints of another recipe, or ones that `resume: false` would mix with.
    """
    output_dir = Path(recipe.run.output_dir)
    discard_unfinished(output_dir)
    found = newest_whole(output_dir)
    notes = list(found.notes)
    if found.checkpoint is not None and not recipe.run.resume:
        raise UsageError(
            f"run.resume: false, and {str(output_dir)!r} holds checkpoints of an earlier run that new ones would mix "
            "with. Give another --output-dir, remove the folder, or resume"
        )
    marker = output_dir / RECIPE_FILE
    data_bytes = _data_bytes(recipe)
    if found.checkpoint is not None and marker.is_file():
        before = _read(marker)
        kept, foreign = changes_between(before["recipe"], recipe)
        if foreign:
            raise UsageError(
                f"run.output_dir: {str(output_dir)!r} holds checkpoints of another recipe (different: "
                f"{', '.join(map(str, foreign))}). Give another --output-dir, remove the folder, or restore those "
                "fields"
            )
        if before["data_bytes"] != data_bytes:
            raise UsageError(
                f"data.data: {recipe.data.data!r} has {data_bytes:,} bytes, and had {before['data_bytes']:,} when the "
                f"checkpoints in {str(output_dir)!r} were made, so going on would train on other samples. Restore it, "
                "or give another --output-dir"
            )
        notes += [f"{change} and is now {change.now!r}: the same training, up to rounding" for change in kept]
    content = {"hash": recipe_hash(recipe), "recipe": recipe.to_dict(), "data_bytes": data_bytes}
    _replace(marker, json.dumps(content, indent=2) + "\n")
    return Found(found.checkpoint, tuple(notes))


def _data_bytes(recipe: Recipe) -> int:
    path = Path(recipe.data.data)
    return path.stat().st_size if path.is_file() else 0


def _read(marker: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        hashed_fields(content["recipe"])
        int(content["data_bytes"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"run.output_dir: {str(marker)!r} cannot be read, so whose checkpoints these are is unknown. Restore the "
            "file, remove the folder, or give another --output-dir"
        ) from None
    return content


def recipe_of_run(folder: Path) -> Recipe:
    """The recipe that a run's output folder, or the folder of one of its checkpoints, remembers.

    Raises:
        UsageError: there is no such folder, or it remembers none that can be read.
    """
    if not folder.is_dir():
        raise UsageError(f"--run: there is no folder {str(folder)!r}; give the output folder of a run")
    marker = next(
        (each / RECIPE_FILE for each in (folder, folder.resolve().parent) if (each / RECIPE_FILE).is_file()), None
    )
    if marker is None:
        raise UsageError(
            f"--run: {str(folder)!r} holds no {RECIPE_FILE}, so its base model is unknown; give a folder that "
            "qlora_lowmem.train has written"
        )
    try:
        return recipe_from_dict(json.loads(marker.read_text(encoding="utf-8"))["recipe"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--run: {str(marker)!r} is no recipe of this version ({error}); restore it") from None


def changes_between(before: dict[str, Any], recipe: Recipe) -> tuple[list[Change], list[Change]]:
    """(changes that keep what is trained, those that do not) from a recipe's plain values to `recipe`."""
    now, earlier = hashed_fields(recipe.to_dict()), hashed_fields(before)
    changes = [
        Change(section, leaf, earlier.get(section, {}).get(leaf), value)
        for section, values in now.items()
        for leaf, value in values.items()
        if earlier.get(section, {}).get(leaf) != value
    ]
    allowed = _allowed(changes)
    kept = [change for change in changes if (change.section, change.leaf) in allowed]
    return kept, [change for change in changes if change not in kept]


def _allowed(changes: list[Change]) -> set[tuple[str, str]]:
    batch = {change.leaf: change for change in changes if (change.section, change.leaf) in _BATCH}
    if len(batch) == len(_BATCH):
        size, accumulation = batch["batch_size"], batch["gradient_accumulation_steps"]
        if size.before * accumulation.before == size.now * accumulation.now:
            return _MEMORY_ONLY | _BATCH  # the same samples a step
    return _MEMORY_ONLY


def _replace(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}")
    scratch.write_text(text, encoding="utf-8")
    flush(scratch)
    scratch.replace(path)
