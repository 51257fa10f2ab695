"""Where a recipe's `data` leads: a JSON Lines file, a Parquet file or a hub data set. Nothing is opened here."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe.sections import DATA_SUFFIXES, is_hub_data

DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class DataSource:
    """A place that holds samples.

    Attributes:
        kind: how it is read.
        name: the file's path or the hub id, as messages name it.
        split: of a hub data set; "" for a file.
    """

    kind: Literal["jsonl", "parquet", "hub"]
    name: str
    split: str = ""

    @property
    def unit(self) -> str:
        """What is numbered, from 1."""
        return "line" if self.kind == "jsonl" else "row"

    @property
    def shown(self) -> str:
        """The name as a person gave it."""
        return f"{self.name}:{self.split}" if self.split else self.name


def resolve_data(name: str) -> DataSource:
    """Say where a recipe's `data` leads.

    A symbolic link is followed, and a path may lead anywhere: data are only read. What is no regular file (a pipe, a
    device) is refused, for it cannot be read twice.

    Raises:
        UsageError: there is no such file, or it is none that can be read as data.
    """
    if is_hub_data(name):
        owner_and_name, _, split = name.partition(":")
        return DataSource("hub", owner_and_name, split or DEFAULT_SPLIT)
    path = Path(name)
    suffix = path.suffix.lower()
    if path.is_dir():
        raise UsageError(f"{path} is a folder; data.data or --data names one .jsonl or .parquet file in it")
    if suffix not in DATA_SUFFIXES:
        raise UsageError(f"{path} is no .jsonl or .parquet file; data.data or --data names one, or a hub id owner/name")
    try:
        exists, regular = path.exists(), path.is_file()
    except (OSError, ValueError) as fault:
        raise UsageError(f"{path}: the data file cannot be read: {fault}") from None
    if not exists:
        raise UsageError(f"{path}: no such data file ({_neighbours(path)}); correct data.data or --data")
    if not regular:
        raise UsageError(f"{path} is no regular file; data are read twice, so copy it into a .jsonl file")
    return DataSource("jsonl" if suffix == ".jsonl" else "parquet", str(path))


def _neighbours(path: Path) -> str:
    names = sorted(each.name for suffix in DATA_SUFFIXES for each in path.parent.glob(f"*{suffix}"))
    near = difflib.get_close_matches(path.name, names, n=1) or names[:5]
    return f"in that folder: {', '.join(near)}" if near else "there is no .jsonl or .parquet file in that folder"
