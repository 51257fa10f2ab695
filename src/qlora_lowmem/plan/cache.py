"""Runs that were made before, kept by what they were made from: recipe, card, versions, and this package's own code."""

import functools
import hashlib
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import qlora_lowmem
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import versions
from qlora_lowmem.files import write_whole
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.recipe import Recipe, recipe_hash

# Rooms whose code no run comes to: they ask for runs, or show what came of them.
_NOT_RUN = {"commands", "gate", "results", "watch", "__pycache__"}
_SUFFIXES = {".py", ".cpp", ".h", ".toml", ".json"}


class RunCache:
    """Plain data by key, a file each; a folder that cannot be written is said once and then done without."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        """What was kept under `key`; None if nothing was, or if it is damaged."""
        if self._folder is None:
            return None
        try:
            content = json.loads(self._path(self._folder, key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def put(self, key: str, content: dict[str, Any]) -> None:
        """Keep `content` under `key`, whole or not at all."""
        if self._folder is None:
            return
        path = self._path(self._folder, key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content))
        except OSError as error:
            print(f"plan: {self._folder} cannot be written ({error.strerror}); nothing is cached", file=sys.stderr)
            self._folder = None

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"


def run_key(question: str, recipe: Recipe, card: virtual_gpu.Card) -> str:
    """The key of what a run of `recipe` on `card` answers to `question`: equal keys are equal answers."""
    figures = {each.name: getattr(card, each.name) for each in fields(card) if each.name != "sources"}
    content = [question, recipe_hash(recipe), _model_content(recipe), figures, versions(), _source_hash()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _model_content(recipe: Recipe) -> Any:
    """What the model's name leads to now: a folder or a file may change under its name."""
    source = resolve_model(recipe.base.model, recipe.base.weights, recipe.base.revision)
    if source.gguf is None:
        return source.architecture
    status = source.gguf.stat()
    return [status.st_size, status.st_mtime_ns]


@functools.cache
def _source_hash() -> str:
    digest = hashlib.sha256()
    root = Path(qlora_lowmem.__file__).parent
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.suffix in _SUFFIXES and not _NOT_RUN & set(inside.parts):
            digest.update(str(inside).encode() + path.read_bytes())
    return digest.hexdigest()
