"""May this recipe go on in its output folder, and from where: one run at a time, and never another's checkpoints."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qlora_lowmem.environment import processes
from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import CAME_LATER, Recipe, hashed_fields
from qlora_lowmem.recipe.moves import keeps_training
from qlora_lowmem.run_folder.checkpoints import STAGING, Found, newest_complete
from qlora_lowmem.run_folder.ownership import RECIPE_FILE, Marker, data_digest, is_marker, refuse_foreign

_LOCK = ".lock"


@dataclass(frozen=True)
class Change:
    """What differs between two starts of a run: a field inside the recipe's hash, or (without section) another fact."""

    section: str
    leaf: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.section}.{self.leaf} was {self.before!r}" if self.section else f"{self.leaf} was {self.before}"


@contextmanager
def held_folder(output_dir: Path) -> Iterator[None]:
    """Make the output folder and hold it for this run alone; the system lets go of it however the process ends.

    Raises:
        UsageError: it cannot be written, another run holds it, or it holds another tool's files.
    """
    refuse_foreign(output_dir)
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
        UsageError: the folder holds checkpoints of another recipe, of other data or of a run that is not known, ones
            that `resume: false` would mix with, or files of another tool; or it cannot be written.
    """
    output_dir = Path(recipe.run.output_dir)
    refuse_foreign(output_dir)
    shutil.rmtree(output_dir / STAGING, ignore_errors=True)  # what a killed run was writing
    found = newest_complete(output_dir)
    notes = list(found.notes)
    if found.checkpoint is not None and not recipe.run.resume:
        raise UsageError(
            f"run.resume: false, and {str(output_dir)!r} holds checkpoints of an earlier run that new ones would mix "
            "with. Give another --output-dir, remove the folder, or resume"
        )
    now = Marker.of(recipe)
    if found.checkpoint is not None:
        own = found.checkpoint / RECIPE_FILE  # not there if the run's was taken away while it ran
        if own.is_file():
            _refuse_another(Marker.read(own), now, recipe)
        kept = _refuse_another(Marker.read(output_dir / RECIPE_FILE), now, recipe)
        notes += [f"{change} and is now {change.now!r}: the same training, up to rounding" for change in kept]
    now.write(output_dir)
    return Found(found.checkpoint, tuple(notes))


def mark_finished(recipe: Recipe, summary: dict[str, Any]) -> None:
    """Remember in the output folder, which is held, that its run has ended well; `UsageError` if that fails."""
    output_dir = Path(recipe.run.output_dir)
    if is_marker(output_dir / RECIPE_FILE):  # else it was taken away while the run went on
        replace(Marker.read(output_dir / RECIPE_FILE), finished=summary).write(output_dir)


def finished_run(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the run in the output folder, where it is this one, has ended well and its adapter is there.

    Raises:
        UsageError: data that cannot be read.
    """
    output_dir = Path(recipe.run.output_dir)
    marker, adapter = output_dir / RECIPE_FILE, output_dir / "adapter_model.safetensors"
    if not (recipe.run.resume and adapter.is_file() and is_marker(marker)):
        return None
    try:
        before = Marker.read(marker)
    except UsageError:  # of another version: told where it is taken up
        return None
    if before.finished is None or changes_between(before.recipe, recipe, (before.processes, processes()))[1]:
        return None
    return before.finished if before.data == data_digest(recipe.data.data) else None


def _refuse_another(before: Marker, now: Marker, recipe: Recipe) -> list[Change]:
    """The changes that keep what is trained; raises `UsageError` if there are others, or the data are not the same."""
    output_dir = recipe.run.output_dir
    kept, foreign = changes_between(before.recipe, recipe, (before.processes, now.processes))
    if foreign:
        raise UsageError(
            f"run.output_dir: {output_dir!r} holds checkpoints of another recipe (different: "
            f"{', '.join(map(str, foreign))}). Give another --output-dir, remove the folder, or restore those "
            "fields"
        )
    if before.data != now.data:
        raise UsageError(
            f"data.data: {recipe.data.data!r} is not what it was when the checkpoints in {output_dir!r} were made "
            f"({before.data}, now {now.data}), so going on would train on other samples. Restore it, or give another "
            "--output-dir"
        )
    return kept


def changes_between(
    before: dict[str, Any], recipe: Recipe, processes: tuple[int, int] = (1, 1)
) -> tuple[list[Change], list[Change]]:
    """(changes that keep what is trained, those that do not) from a recipe's plain values to `recipe`.

    Args:
        processes: how many trained together before, and do now.
    """

    def samples_a_step(plain: dict[str, Any], processes: int) -> int:
        return int(plain["batch"]["batch_size"]) * int(plain["batch"]["gradient_accumulation_steps"]) * processes

    def value(fields: dict[str, dict[str, Any]], section: str, leaf: str) -> Any:
        return fields[section].get(leaf, CAME_LATER.get((section, leaf)))

    now, earlier = hashed_fields(recipe.to_dict()), hashed_fields(before)
    changes = [
        Change(section, leaf, value(earlier, section, leaf), value(now, section, leaf))
        for section in now
        for leaf in {**now[section], **earlier[section]}
        if value(earlier, section, leaf) != value(now, section, leaf)
    ]
    if processes[0] != processes[1]:
        changes.append(Change("", "the number of processes", *processes))
    same = samples_a_step(earlier, processes[0]) == samples_a_step(now, processes[1])
    kept = [each for each in changes if (not each.section and same) or keeps_training(each.leaf, same_samples=same)]
    return kept, [change for change in changes if change not in kept]
