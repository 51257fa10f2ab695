"""The recipe: what to train, said once, and checked before torch is imported.

`sections` says what its fields are, `checks` what each takes, `contradictions` which cannot hold together, `moves` what
can be changed to need less memory. `io` makes a checked recipe of a file and a command line.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import yaml

from qlora_lowmem.recipe import sections
from qlora_lowmem.recipe.sections import SYNTHETIC, Run, is_hub_data, knob

__all__ = ["SECTIONS", "SYNTHETIC", "Recipe", "Run", "field_values", "hashed_fields", "recipe_fields", "recipe_hash"]


@dataclass(frozen=True)
class Recipe:
    """One training job, complete. `load_recipe` makes a checked one from a file."""

    name: str = knob("", "name in tables; the file's name without .yaml", kind="name")
    base: sections.Base = field(default_factory=sections.Base)
    quantization: sections.Quantization = field(default_factory=sections.Quantization)
    lora: sections.Lora = field(default_factory=sections.Lora)
    batch: sections.Batch = field(default_factory=sections.Batch)
    memory: sections.Memory = field(default_factory=sections.Memory)
    lean: sections.Lean = field(default_factory=sections.Lean)
    optimizer: sections.Optimizer = field(default_factory=sections.Optimizer)
    schedule: sections.Schedule = field(default_factory=sections.Schedule)
    dataloader: sections.Dataloader = field(default_factory=sections.Dataloader)
    data: sections.Data = field(default_factory=sections.Data)
    run: Run = field(default_factory=Run)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, as a YAML or JSON file holds them."""
        plain: dict[str, Any] = dataclasses.asdict(self)
        for section in ("lora", "data"):
            plain[section] = {
                leaf: list(value) if isinstance(value, tuple) else value for leaf, value in plain[section].items()
            }
        return plain

    def to_yaml(self) -> str:
        """A recipe file that states every field. A data path in it is relative to the working folder, as in use."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)


# Each section by its name in the file.
SECTIONS: dict[str, Any] = {each.name: each.type for each in dataclasses.fields(Recipe) if each.name != "name"}


def recipe_fields() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Every (section, field) in the order of the file; `name` stands above the sections, so its section is ""."""
    yield "", next(each for each in dataclasses.fields(Recipe) if each.name == "name")
    for section, group in SECTIONS.items():
        for each in dataclasses.fields(group):
            yield section, each


def field_values(recipe: Recipe) -> dict[str, Any]:
    """The value of every field by its leaf name."""
    return {
        each.name: getattr(getattr(recipe, section) if section else recipe, each.name)
        for section, each in recipe_fields()
    }


# Fields that came after figures had been recorded, with what recipes meant before: there they leave the hash as it was.
CAME_LATER: dict[tuple[str, str], Any] = {
    ("data", "template"): "auto",
    ("lora", "use_rslora"): False,
    ("lora", "exclude_modules"): None,
    ("lora", "modules_to_save"): None,
    ("lora", "trainable_token_indices"): None,
    ("optimizer", "warmup_ratio"): 0.0,
    ("data", "eval_data"): None,
    ("data", "neftune_noise_alpha"): 0.0,
    ("data", "added_tokens"): None,
}
# What says where and how often, not what is trained or what it needs.
_OUTSIDE_THE_HASH = ("logging_steps", "save_steps", "save_total_limit", "eval_steps")


def hashed_fields(plain: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The part of `Recipe.to_dict()` that the hash covers: all that affects memory or training.

    Name, `run` section, logging, saving and when to evaluate stay out, and a data file counts by its name, not its
    folder, so that a recipe has one hash in every checkout. A data set of the hub counts by its whole name.
    """
    kept = {section: dict(values) for section, values in plain.items() if section not in ("name", "run")}
    for leaf in _OUTSIDE_THE_HASH:
        kept["schedule"].pop(leaf, None)
    if kept["base"]["attention"] == "auto":  # which is sdpa of every model that takes both
        kept["base"]["attention"] = "sdpa"
    for (section, leaf), before in CAME_LATER.items():
        if kept[section].get(leaf) == before:
            kept[section].pop(leaf, None)
    for leaf in ("data", "eval_data"):
        named = kept["data"].get(leaf)
        if named is not None and not is_hub_data(named):
            kept["data"][leaf] = PurePath(named).name
    return kept


def recipe_hash(recipe: Recipe) -> str:
    """12 hex digits over `hashed_fields`: equal hashes are the same training job."""
    return hashlib.sha256(json.dumps(hashed_fields(recipe.to_dict()), sort_keys=True).encode()).hexdigest()[:12]
