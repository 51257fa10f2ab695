"""Whose an output folder is: the run that `recipe.json` in it tells of, and what else in it is this command's own.

Nothing else is ever replaced or removed.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from qlora_lowmem.data.sources import resolve_data
from qlora_lowmem.environment import processes
from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import is_file, is_folder, read_small, replace_text
from qlora_lowmem.memory.profile import MEMORY_FILE, read_live
from qlora_lowmem.recipe import SYNTHETIC, Recipe, hashed_fields, recipe_hash
from qlora_lowmem.recipe.io import recipe_from_dict

RECIPE_FILE = "recipe.json"
MANIFEST = "manifest.json"  # of `checkpoints.py`
TOTALS = "totals.json"  # of `training/state.py`
# What a run puts into its folder, by names that other tools use too.
_WRITTEN = ("checkpoint-*", "README.md", "log.jsonl", ".saving", "adapter_*")
# What transformers' tokenizers are made of, and how a model speaks by default.
TOKENIZER_FILES = (
    *("tokenizer*", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
)
_SHOWN = 4
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclass(frozen=True)
class Marker:
    """What a run remembers of itself.

    Attributes:
        hash: of the recipe, for people.
        recipe: its plain values.
        data: what `data_digest` says of the data.
        processes: how many train together.
        finished: what the run came to, as `--json` writes it; None until it has ended well.
    """

    hash: str
    recipe: dict[str, Any]
    data: str
    processes: int
    finished: dict[str, Any] | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> "Marker":
        """That of a run that starts now. Reads all of a data file; raises `UsageError` if it cannot be read."""
        return cls(recipe_hash(recipe), recipe.to_dict(), data_digest(recipe.data.data), processes())

    @classmethod
    def read(cls, path: Path) -> "Marker":
        """The inverse of `write`; raises `UsageError` if it is none of this version."""
        try:
            found = msgspec.json.decode(read_small(path), type=cls)
            hashed_fields(found.recipe)
        except _UNREADABLE:
            raise UsageError(
                f"run.output_dir: {str(path)!r} cannot be read, so whose checkpoints these are is unknown. Restore the "
                "file, or give another folder with --output-dir"
            ) from None
        return found

    def write(self, folder: Path) -> None:
        """Into a run's folder, complete or not at all; raises `UsageError` if it cannot be written."""
        content = msgspec.json.format(msgspec.json.encode(self), indent=2).decode()
        replace_text(folder / RECIPE_FILE, f"{content}\n", "the run's recipe")


def is_marker(path: Path) -> bool:
    """Whether this command wrote it, in whatever version: it holds a recipe and its hash."""
    try:
        content = msgspec.json.decode(read_small(path))
        hashed_fields(content["recipe"])
    except _UNREADABLE:
        return False
    return "hash" in content


def data_digest(data: str) -> str:
    """Equal for equal data: a file's SHA-256, a hub data set's fingerprint (which changes with its revision).

    A file is read once more for it: a small part of what checking its samples takes at each start.

    Raises:
        UsageError: a file that cannot be read.
    """
    if data == SYNTHETIC:
        return SYNTHETIC
    source = resolve_data(data)
    if source.kind == "hub":
        import datasets

        found: Any = datasets.load_dataset(source.name, split=source.split)
        return f"fingerprint {found._fingerprint}"
    try:
        with Path(source.name).open("rb") as file:
            return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise UsageError(f"data.data: {source.name!r} cannot be read ({error.strerror}); correct it") from None


def recipe_of_run(folder: Path) -> Recipe:
    """The recipe that a run's folder, or that of one of its checkpoints, remembers; `UsageError` if none is there."""
    if not is_folder(folder):
        raise UsageError(f"--run: there is no folder {str(folder)!r}; give the output folder of a run")
    places = (folder / RECIPE_FILE, folder.resolve().parent / RECIPE_FILE)
    marker = next((path for path in places if is_file(path)), None)
    if marker is None:
        raise UsageError(
            f"--run: {str(folder)!r} holds no {RECIPE_FILE}, so its base model is unknown; give a folder that "
            "qlora_lowmem.train has written"
        )
    try:
        return recipe_from_dict(msgspec.json.decode(read_small(marker))["recipe"])
    except _UNREADABLE as error:
        raise UsageError(f"--run: {str(marker)!r} is no recipe of this version ({error}); restore it") from None


def refuse_foreign(output_dir: Path) -> None:
    """Raise `UsageError` for a folder with files that a run would replace, and that no run of this command has made."""
    marker = output_dir / RECIPE_FILE
    if is_marker(marker) or not output_dir.is_dir():
        return
    found = sorted({path.name for pattern in (*_WRITTEN, *TOKENIZER_FILES) for path in output_dir.glob(pattern)})
    sized = [output_dir / name for name in (RECIPE_FILE, ".lock")]
    found += [path.name for path in sized if path.is_file() and path.stat().st_size > 0]
    try:
        read_live(output_dir)  # as a run on a virtual card leaves it
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        found.append(MEMORY_FILE)
    if not found:
        return
    shown = ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
    why = f"its {RECIPE_FILE} is none of this command's" if marker.exists() else f"no {RECIPE_FILE} says whose"
    raise UsageError(
        f"run.output_dir: {str(output_dir)!r} holds {shown}, and {why}, so a run would replace files that are not its "
        f"own. Give another folder with --output-dir, or move these away{_how_to_go_on(output_dir)}"
    )


def is_our_checkpoint(folder: Path) -> bool:
    """Whether a checkpoint is this command's, whole or torn: it has our manifest, or a file that no other tool saves.

    An empty folder has nothing to lose.
    """
    try:
        if isinstance(msgspec.json.decode(read_small(folder / MANIFEST))["files"], dict):
            return True
    except _UNREADABLE:
        pass
    names = {path.name for path in folder.iterdir()}
    return not names or bool(names & {TOTALS, RECIPE_FILE})


def _how_to_go_on(output_dir: Path) -> str:
    """Where a checkpoint remembers its run, the run can be gone on with."""
    copies = [path for path in output_dir.glob(f"checkpoint-*/{RECIPE_FILE}") if is_marker(path)]
    if not copies:
        return ""
    newest = max(copies, key=lambda path: path.stat().st_mtime)
    return (
        f". To go on from these checkpoints, restore the file that they were made with: copy {str(newest)!r} to "
        f"{str(output_dir / RECIPE_FILE)!r}"
    )
