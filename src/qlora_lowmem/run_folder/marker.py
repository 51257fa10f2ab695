"""`recipe.json`: whose run an output folder is, and each of its checkpoints: recipe, data, number of processes."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_lowmem.data.sources import resolve_data
from qlora_lowmem.environment import processes
from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import replace_text
from qlora_lowmem.recipe import SYNTHETIC, Recipe, hashed_fields, recipe_hash
from qlora_lowmem.recipe.io import recipe_from_dict

RECIPE_FILE = "recipe.json"


@dataclass(frozen=True)
class Marker:
    """What a run remembers of itself.

    Attributes:
        hash: of the recipe, for people.
        recipe: its plain values.
        data: what `data_digest` says of the data.
        processes: how many train together.
    """

    hash: str
    recipe: dict[str, Any]
    data: str
    processes: int

    @classmethod
    def of(cls, recipe: Recipe) -> "Marker":
        """That of a run that starts now. Reads all of a data file.

        Raises:
            UsageError: the data cannot be read.
        """
        return cls(recipe_hash(recipe), recipe.to_dict(), data_digest(recipe.data.data), processes())

    @classmethod
    def read(cls, path: Path) -> "Marker":
        """The inverse of `write`.

        Raises:
            UsageError: it is none of this version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            hashed_fields(content["recipe"])
            return cls(str(content["hash"]), content["recipe"], str(content["data"]), int(content["processes"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(
                f"run.output_dir: {str(path)!r} cannot be read, so whose checkpoints these are is unknown. Restore the "
                "file, or give another folder with --output-dir"
            ) from None

    def write(self, folder: Path) -> None:
        """Into a run's folder, whole or not at all.

        Raises:
            UsageError: it cannot be written.
        """
        replace_text(folder / RECIPE_FILE, json.dumps(asdict(self), indent=2) + "\n", "the run's recipe")


def is_marker(path: Path) -> bool:
    """Whether this command wrote it, in whatever version: it holds a recipe and its hash."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        hashed_fields(content["recipe"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return "hash" in content


def data_digest(data: str) -> str:
    """Equal for equal data: a file's SHA-256, a hub data set's fingerprint (which changes with its revision).

    A file is read once more for it, in blocks: seconds for gigabytes, and a small part of what checking its samples
    takes at each start.

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
