"""From a YAML file and a command line to a checked recipe. All faults are found first and told in one message."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import SECTIONS, Recipe, field_values
from qlora_lowmem.recipe.checks import (
    FieldSpec,
    InvalidValueError,
    allowed,
    check_value,
    closest,
    field_specs,
    parse_text,
)
from qlora_lowmem.recipe.contradictions import contradictions
from qlora_lowmem.recipe.sections import SYNTHETIC, is_hub_data
from qlora_lowmem.recipe.yaml_text import Entry, FileFault, parse_recipe_text, read_recipe_text

# The names of the same knobs in TRL, transformers, PEFT and bitsandbytes.
_OTHER_NAMES = {
    "model_id": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "attn_implementation": "attention",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_quant_storage": "quant_storage",
    "r": "lora_r",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "max_length": "max_seq_length",
    "seq_length": "max_seq_length",
    "per_device_train_batch_size": "batch_size",
    "optim": "optimizer",
    "lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "num_train_epochs": "num_epochs",
    "epochs": "num_epochs",
    "steps": "max_steps",
    "dataloader_num_workers": "dataloader_workers",
    "dataloader_pin_memory": "pin_memory",
    "dataset": "data",
    "train_file": "data",
    "output": "output_dir",
    "test_size": "eval_fraction",
    "validation_split": "eval_fraction",
}
_METAVARS = {"int": "N", "float": "X", "memory": "SIZE", "modules": "NAMES", "data": "FILE", "path": "DIR"}


@dataclass
class _Draft:
    """Values found so far, where each was written, and what is wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    written_at: dict[str, str] = field(default_factory=dict)
    faulty: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def take(self, leaf: str, where: str, read: Callable[[FieldSpec, Any], Any], value: Any, shown: str = "") -> None:
        """The value of a field as `read` makes it, or the fault that it finds."""
        spec = field_specs()[leaf]
        self.written_at[leaf] = where
        try:
            self.values[leaf] = read(spec, value)
        except InvalidValueError as fault:
            self.faulty.add(leaf)
            self.faults.append(f"{where}: {spec.path} = {shown or _shown(value)} {fault}")


def load_recipe(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a YAML file, with `overrides` (leaf name to value) on top.

    A string among the overrides is text of the command line (`"8"`, `"true"`, `"q_proj,v_proj"`); any other value is
    taken as it is. A relative data path of the file is resolved against the file's folder, one of the overrides against
    the working directory. `{name}` in `output_dir` is filled in. An `output_dir` of the file lies below the working
    directory, where a recipe that came from elsewhere can write and remove nothing else; an override may name any
    folder. Links are followed: a recipe cannot make one.

    Raises:
        UsageError: the file cannot be read or is no recipe; or every unknown key, wrong value and contradiction found.
    """
    path = Path(path)
    draft = _Draft()
    try:
        entries = parse_recipe_text(read_recipe_text(path))
    except FileFault as fault:
        raise UsageError(f"{path}{fault}") from None
    _take_entries(draft, entries)
    data = draft.values.get("data", SYNTHETIC)
    if data != SYNTHETIC and not is_hub_data(data):
        draft.values["data"] = os.path.normpath(path.parent / Path(data).expanduser())
    _take_overrides(draft, overrides or {})
    _keep_output_inside(draft)
    if "name" not in draft.values and "name" not in draft.faulty:
        draft.take("name", "the file's name", check_value, path.stem)
    return _finish(draft, str(path))


def recipe_from_dict(content: Mapping[str, Any]) -> Recipe:
    """The inverse of `Recipe.to_dict`, checked: a recipe that crossed a process or a JSON file.

    Raises:
        UsageError: values that no recipe can have.
    """
    draft = _Draft()
    for name, spec in field_specs().items():
        value = content[spec.section][name] if spec.section else content[name]
        draft.take(name, "recipe", check_value, tuple(value) if isinstance(value, list) else value)
    return _finish(draft, "recipe")


def replace_field(recipe: Recipe, leaf: str, value: Any) -> Recipe:
    """`recipe` with one field changed and everything checked again; a string is text as on the command line.

    Raises:
        UsageError: no such field, a value that it does not take, or a contradiction with another field.
    """
    return replace_fields(recipe, {leaf: value})


def replace_fields(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """`recipe` with several fields changed together, so that they may need each other; as `replace_field`.

    Raises:
        UsageError: as `replace_field`.
    """
    draft = _Draft(field_values(recipe), dict.fromkeys(field_specs(), "as it was"))
    _take_overrides(draft, changes)
    return _finish(draft, "this change")


def _take_entries(draft: _Draft, entries: list[Entry]) -> None:
    specs = field_specs()
    for entry in entries:
        if entry.fault:
            draft.faults.append(f"{entry.where}: {entry.fault}")
        elif entry.section is None:
            draft.faults.append(f"{entry.where}: {entry.key}: {_unknown_key(entry.key, '')}")
        elif entry.key in specs and specs[entry.key].section == entry.section:
            value = entry.value_for(specs[entry.key].kind)
            draft.take(entry.key, entry.where, check_value, value, entry.shown)
        else:
            name = f"{entry.section}.{entry.key}" if entry.section else entry.key
            draft.faults.append(f"{entry.where}: {name}: {_unknown_key(entry.key, entry.section)}")


def _take_overrides(draft: _Draft, overrides: Mapping[str, Any]) -> None:
    specs = field_specs()
    for given, value in overrides.items():
        leaf = given.removeprefix("--").replace("-", "_")
        if leaf not in specs:
            draft.faults.append(f"override {given}: {_unknown_key(given, '')}")
            continue
        read = parse_text if isinstance(value, str) else check_value
        draft.faulty.discard(leaf)
        draft.take(leaf, specs[leaf].flag, read, value)


def _keep_output_inside(draft: _Draft) -> None:
    where = draft.written_at.get("output_dir")
    if "output_dir" not in draft.values or where == field_specs()["output_dir"].flag:
        return
    given = draft.values["output_dir"]
    path = Path(os.path.normpath(given))
    if path.is_absolute() or path.parts[:1] in (("..",), ("~",)):
        draft.faulty.add("output_dir")
        draft.faults.append(
            f"{where}: run.output_dir = {given!r} leads out of the working directory; write a folder below it, or give "
            "this one on the command line (--output-dir)"
        )


def _finish(draft: _Draft, source: str) -> Recipe:
    recipe = _build(draft.values)
    for found in contradictions(recipe):
        if not draft.faulty.intersection(found.leaves):
            draft.faults.append(_contradiction(draft, recipe, found.leaves, found.message))
    if draft.faults:
        count = "1 problem" if len(draft.faults) == 1 else f"{len(draft.faults)} problems"
        raise UsageError("\n  ".join([f"{source}: {count}", *draft.faults]))
    filled = recipe.run.output_dir.replace("{name}", recipe.name)
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, output_dir=filled))


def _build(values: Mapping[str, Any]) -> Recipe:
    groups: dict[str, dict[str, Any]] = {section: {} for section in ["", *SECTIONS]}
    for leaf, value in values.items():
        groups[field_specs()[leaf].section][leaf] = value
    return Recipe(**groups[""], **{section: group(**groups[section]) for section, group in SECTIONS.items()})


def _contradiction(draft: _Draft, recipe: Recipe, leaves: tuple[str, ...], message: str) -> str:
    specs = [field_specs()[leaf] for leaf in leaves]
    names = " and ".join(
        f"{spec.path} = {_shown(getattr(getattr(recipe, spec.section), spec.name))}"
        f" ({draft.written_at.get(spec.name, 'the default')})"
        for spec in specs
    )
    return f"{names} contradict each other: {message}"


def _unknown_key(key: str, section: str) -> str:
    """What an unknown key most likely meant: the field in its own section, another library's name, a misspelling."""
    specs = field_specs()
    known = [*specs, *SECTIONS] if not section else list(specs)
    near = key if key in specs else _OTHER_NAMES.get(key) or closest(key, known)
    if near is None:
        choices = [name for name, spec in specs.items() if spec.section == section] or list(specs)
        return f"unknown key; remove it. Known here: {', '.join(choices + ([] if section else list(SECTIONS)))}"
    if near in SECTIONS and near not in specs:
        return f"unknown section; did you mean {near}?"
    spec = specs[near]
    place = f"in the section {spec.section}" if spec.section else "above the sections"
    return f"unknown key here; {near} stands {place}" if key == near else f"unknown key; did you mean {spec.path}?"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."


def add_override_arguments(parser: argparse.ArgumentParser, without: Collection[str] = ()) -> None:
    """Add a flag for every field of the recipe, a group a section; a flag that is not given is None.

    Values stay text here: `load_recipe` reads and checks them, so that a flag and a YAML value meet the same rules.

    Args:
        without: fields that get no flag, because the command asks for them in its own way.
    """
    groups = {"": parser.add_argument_group("recipe", "Every field of the recipe, to override what its file says.")}
    for section, group in SECTIONS.items():
        groups[section] = parser.add_argument_group(f"recipe: {section}", (group.__doc__ or "").splitlines()[0])
    for spec in field_specs().values():
        if spec.name not in without:
            _add_flag(groups[spec.section], spec)


def overrides_from(namespace: argparse.Namespace) -> dict[str, str]:
    """The fields given on the command line, leaf name to text, as `load_recipe` takes them."""
    given = {name: getattr(namespace, name, None) for name in field_specs()}
    return {name: value for name, value in given.items() if value is not None}


def _add_flag(group: "argparse._ArgumentGroup", spec: FieldSpec) -> None:
    text = _help(spec).replace("%", "%%")
    if spec.kind != "bool":
        metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else _METAVARS.get(spec.kind, "TEXT")
        group.add_argument(spec.flag, dest=spec.name, default=None, metavar=metavar, help=text)
        return
    group.add_argument(
        spec.flag, dest=spec.name, default=None, nargs="?", const="true", metavar="true|false", help=text
    )
    negative = spec.flag.replace("--", "--no-", 1)
    group.add_argument(
        negative, dest=spec.name, default=None, action="store_const", const="false", help=argparse.SUPPRESS
    )


def _help(spec: FieldSpec) -> str:
    limits = f" ({allowed(spec)})" if spec.limits else ""
    negative = f"; or {spec.flag.replace('--', '--no-', 1)}" if spec.kind == "bool" else ""
    return f"{spec.help}{limits}{negative}. Memory: {spec.memory}."
