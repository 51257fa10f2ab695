"""Checkpoints of an interrupted run: the newest complete one, and whether it belongs to this recipe."""

import json
from pathlib import Path

from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe, recipe_hash

RECIPE_FILE = "recipe.json"
# The trainer writes this file last, so a checkpoint that has it is whole.
_LAST_WRITTEN = "trainer_state.json"


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps in `output_dir`, or None."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_whole(folder):
            found.append((int(step), folder))
    return max(found)[1] if found else None


def _is_whole(folder: Path) -> bool:
    try:
        json.loads((folder / _LAST_WRITTEN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def checkpoint_to_resume(recipe: Recipe) -> Path | None:
    """Where `recipe` goes on from, if it was interrupted; remembers the recipe in its output folder.

    Raises:
        UsageError: the folder holds checkpoints of another recipe, or is not a folder that can be written.
    """
    output_dir = Path(recipe.run.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / ".writable").touch()
        (output_dir / ".writable").unlink()
    except OSError as error:
        raise UsageError(
            f"run.output_dir: {str(output_dir)!r} cannot be written ({error.strerror}); give another folder with "
            "--output-dir"
        ) from None
    checkpoint = newest_checkpoint(output_dir)
    marker = output_dir / RECIPE_FILE
    if checkpoint is not None and not recipe.run.resume:
        raise UsageError(
            f"run.resume: false, and {str(output_dir)!r} holds checkpoints of an earlier run that new ones would mix "
            "with. Give another --output-dir, remove the folder, or resume"
        )
    if checkpoint is not None and marker.is_file():
        before = json.loads(marker.read_text(encoding="utf-8"))
        if before["hash"] != recipe_hash(recipe):
            changed = _differences(before["recipe"], recipe.to_dict())
            raise UsageError(
                f"run.output_dir: {str(output_dir)!r} holds checkpoints of another recipe (different: "
                f"{', '.join(changed)}). Give another --output-dir, remove the folder, or restore those fields"
            )
    content = {"hash": recipe_hash(recipe), "recipe": recipe.to_dict()}
    marker.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return checkpoint


def _differences(before: dict[str, object], now: dict[str, object]) -> list[str]:
    different = []
    for section, values in now.items():
        earlier = before.get(section)
        if isinstance(values, dict) and isinstance(earlier, dict):
            different += [
                f"{section}.{leaf} was {earlier.get(leaf)!r}"
                for leaf, value in values.items()
                if earlier.get(leaf) != value and section != "run"
            ]
    return different or ["an unknown field"]
