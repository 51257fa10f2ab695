"""From a YAML file and a command line to a checked recipe. All faults are found first and told in one message."""

import argparse
import dataclasses
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import is_file, user_path
from qlora_lowmem.recipe import CAME_LATER, SECTIONS, Recipe, field_values
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
from qlora_lowmem.recipe.other_names import INSTEAD, OURS
from qlora_lowmem.recipe.sections import OF_SAMPLES, SYNTHETIC, is_hub_data
from qlora_lowmem.recipe.yaml_text import Entry, read_recipe

_SHOWN = 40  # faults; more than a person's own file has
_METAVARS = {
    "int": "N",
    "float": "X",
    "memory": "SIZE",
    "modules": "NAMES",
    "exclusions": "NAMES",
    "names": "NAMES",
    "tokens": "TOKENS",
    "words": "TOKENS",
    "data": "FILE",
    "path": "DIR",
}


@dataclass
class _Draft:
    """Values found so far, where each was written, and what is wrong."""

    values: dict[str, Any] = field(default_factory=dict)
    written_at: dict[str, str] = field(default_factory=dict)
    faulty: set[str] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)
    listed: set[str] = field(default_factory=set)  # sections whose fields have been told

    def take(self, leaf: str, where: str, read: Callable[[FieldSpec, Any], Any], value: Any, shown: str = "") -> None:
        """The value of a field as `read` makes it, or the fault that it finds."""
        spec = field_specs()[leaf]
        self.written_at[leaf] = where
        try:
            self.values[leaf] = read(spec, value)
        except InvalidValueError as fault:
            self.refuse(leaf, f"{shown or _shown(value)} {fault}")

    def refuse(self, leaf: str, fault: str) -> None:
        """The value of a field is not to be taken; `fault` goes on after `section.field = `."""
        self.faulty.add(leaf)
        self.faults.append(f"{self.written_at[leaf]}: {field_specs()[leaf].path} = {fault}")


def load_recipe(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a YAML file, with `overrides` (leaf name to value) on top.

    A string among the overrides is text of the command line; any other value is taken as it is. A relative data path of
    the file is resolved against the file's folder, one of the overrides against the working directory. `{name}` in
    `output_dir` is filled in. An `output_dir` of the file lies below the working directory, so that a recipe from
    elsewhere writes and removes nothing else; an override may name any folder. Links are followed.

    Raises:
        UsageError: the file cannot be read or is no recipe; or every unknown key, wrong value and contradiction found.
    """
    path = Path(path)
    draft = _Draft()
    _take_entries(draft, read_recipe(path))
    for leaf in ("data", "eval_data"):
        data = draft.values.get(leaf) or SYNTHETIC
        if data != SYNTHETIC and not is_hub_data(data):
            folder = path.parent if is_file(path) else Path()  # a pipe lies in none
            draft.values[leaf] = os.path.normpath(folder / user_path(data))
    _take_overrides(draft, overrides or {})
    _keep_output_inside(draft)
    if "name" not in draft.values and "name" not in draft.faulty:
        draft.take("name", "the file's name", check_value, path.stem)
    return _finish(draft, str(path))


def lasting_path(path: str | os.PathLike[str], recipe: Recipe) -> str:
    """Where other processes read `recipe`, which is that of `path`, while this one lives, and what takes its place.

    That is `path` itself where it is a file. A pipe (a shell's `<(...)`) is read once, and then a copy in memory is it.
    """
    if is_file(path):
        return os.fspath(path)
    named = {leaf: field_values(recipe)[leaf] for leaf in ("data", "eval_data")}
    files = {leaf: name for leaf, name in named.items() if name not in (None, SYNTHETIC) and not is_hub_data(name)}
    copy = replace_fields(recipe, {leaf: os.path.abspath(name) for leaf, name in files.items()})  # noqa: PTH100
    handle = os.memfd_create("recipe", 0)  # kept open, by what this process turns into as well
    with os.fdopen(handle, "w", encoding="utf-8", closefd=False) as file:
        file.write(copy.to_yaml())
    return f"/proc/{os.getpid()}/fd/{handle}"


def words_for_another(path: str | os.PathLike[str], recipe: Recipe) -> list[str]:
    """What follows this command's own words for a process that is given them: the later `--config` counts."""
    return [] if is_file(path) else ["--config", lasting_path(path, recipe)]


def recipe_from_dict(content: Mapping[str, Any]) -> Recipe:
    """The inverse of `Recipe.to_dict`, checked (`UsageError`): a recipe that crossed a process or a JSON file.

    What was written before a field came has none of it, and what it meant then.
    """
    draft = _Draft()
    for name, spec in field_specs().items():
        group = content[spec.section] if spec.section else content
        later = (spec.section, name) in CAME_LATER and name not in group
        value = CAME_LATER[spec.section, name] if later else group[name]
        draft.take(name, "recipe", check_value, tuple(value) if isinstance(value, list) else value)
    return _finish(draft, "recipe")


def replace_field(recipe: Recipe, leaf: str, value: Any) -> Recipe:
    """`recipe` with one field changed and everything checked again; a string is text as on the command line.

    Raises:
        UsageError: no such field, a value that it does not take, or a contradiction with another field.
    """
    return replace_fields(recipe, {leaf: value})


def replace_fields(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """As `replace_field`, several fields together, so that they may need each other."""
    draft = _Draft(field_values(recipe), dict.fromkeys(field_specs(), "as it was"))
    _take_overrides(draft, changes)
    return _finish(draft, "this change")


def _take_entries(draft: _Draft, entries: list[Entry]) -> None:
    specs = field_specs()
    for entry in entries:
        where, key, section = f"line {entry.line}", entry.key, entry.section
        if entry.fault:
            draft.faults.append(f"{where}: {entry.fault}")
        elif key in specs and specs[key].section == section:
            draft.take(key, where, check_value, entry.value, entry.shown)
        else:
            name = f"{section}.{key}" if section else key
            draft.faults.append(f"{where}: {name}: {_unknown_key(key, section or '', draft.listed)}")


def _take_overrides(draft: _Draft, overrides: Mapping[str, Any]) -> None:
    specs = field_specs()
    for given, value in overrides.items():
        leaf = given.removeprefix("--").replace("-", "_")
        if leaf not in specs:
            draft.faults.append(f"override {given}: {_unknown_key(given, '', draft.listed)}")
            continue
        read = parse_text if isinstance(value, str) else check_value
        draft.faulty.discard(leaf)
        draft.take(leaf, specs[leaf].flag, read, value)


def _keep_output_inside(draft: _Draft) -> None:
    given = draft.values.get("output_dir", "")
    path = Path(os.path.normpath(given))
    on_command_line = draft.written_at.get("output_dir") == field_specs()["output_dir"].flag
    if not on_command_line and (path.is_absolute() or path.parts[:1] in (("..",), ("~",))):
        advice = "write a folder below it, or give this one on the command line (--output-dir)"
        draft.refuse("output_dir", f"{given!r} leads out of the working directory; {advice}")


def _finish(draft: _Draft, source: str) -> Recipe:
    specs = field_specs()
    groups: dict[str, dict[str, Any]] = {section: {} for section in ["", *SECTIONS]}
    for leaf, value in draft.values.items():
        groups[specs[leaf].section][leaf] = value
    recipe = Recipe(**groups[""], **{section: group(**groups[section]) for section, group in SECTIONS.items()})
    now = field_values(recipe)
    for leaves, message in contradictions(recipe):
        if not draft.faulty.intersection(leaves):
            places = {leaf: draft.written_at.get(leaf, "the default") for leaf in leaves}
            said = " and ".join(f"{specs[leaf].path} = {_shown(now[leaf])} ({at})" for leaf, at in places.items())
            draft.faults.append(f"{said} contradict each other: {message}")
    if draft.faults:
        count = "1 problem" if len(draft.faults) == 1 else f"{len(draft.faults)} problems"
        shown, rest = draft.faults[:_SHOWN], len(draft.faults) - _SHOWN
        raise UsageError("\n  ".join([f"{source}: {count}", *shown, *([f"... and {rest} more"] if rest > 0 else [])]))
    filled = recipe.run.output_dir.replace("{name}", recipe.name)
    return dataclasses.replace(recipe, run=dataclasses.replace(recipe.run, output_dir=filled))


def _unknown_key(key: str, section: str, listed: set[str]) -> str:
    """What an unknown key most likely meant: the field in its own section, another library's name, a misspelling.

    Args:
        listed: sections whose fields have been told already; one whose fields are told here is added.
    """
    specs = field_specs()
    known = [*specs, *SECTIONS] if not section else list(specs)
    near = key if key in specs else OURS.get(key)
    if near is None and key in INSTEAD:
        return f"unknown key; {INSTEAD[key]}"
    near = near or closest(key, known)
    if near is None and section in listed:
        return "unknown key; remove it"
    if near is None:
        listed.add(section)
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


def add_override_arguments(
    parser: argparse.ArgumentParser, without: Collection[str] = (), *, synthetic: bool = False
) -> None:
    """Add a flag for every field of the recipe, a group a section; a flag that is not given is None.

    Values stay text here: `load_recipe` reads and checks them, so that a flag and a YAML value meet the same rules.

    Args:
        without: fields that get no flag, because the command asks for them in its own way.
        synthetic: whatever the recipe names, the command runs synthetic samples: flags that are about others are
            refused.
    """
    groups = {"": parser.add_argument_group("recipe", "Every field of the recipe, to override what its file says.")}
    for section, group in SECTIONS.items():
        groups[section] = parser.add_argument_group(f"recipe: {section}", (group.__doc__ or "").splitlines()[0])
    for spec in field_specs().values():
        if synthetic and spec.name in OF_SAMPLES:
            parser.add_argument(spec.flag, dest=spec.path, type=_only_synthetic(spec), help=argparse.SUPPRESS)
        elif spec.name not in without:
            _add_flag(groups[spec.section], spec)


def overrides_from(namespace: argparse.Namespace) -> dict[str, str]:
    """The fields given on the command line, leaf name to text, as `load_recipe` takes them."""
    given = {name: getattr(namespace, name, None) for name in field_specs()}
    return {name: value for name, value in given.items() if value is not None}


def _only_synthetic(spec: FieldSpec) -> Callable[[str], str]:
    def read(text: str) -> str:
        if spec.name == "data" and text == SYNTHETIC:
            return text
        raise argparse.ArgumentTypeError(
            f"{spec.path} would change nothing here: samples are synthetic, each of full length, for memory does not "
            "depend on what they say. Leave it out; --max-seq-length says how long they are"
        )

    return read


def _add_flag(group: "argparse._ArgumentGroup", spec: FieldSpec) -> None:
    if spec.kind != "bool":
        metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else _METAVARS.get(spec.kind, "TEXT")
        limits = f" ({allowed(spec)})" if spec.limits else ""
        text = f"{spec.help}{limits}. Memory: {spec.memory}."
        group.add_argument(spec.flag, metavar=metavar, help=text.replace("%", "%%"))
        return
    negative = spec.flag.replace("--", "--no-", 1)
    text = f"{spec.help}; or {negative}. Memory: {spec.memory}."
    group.add_argument(spec.flag, nargs="?", const="true", metavar="true|false", help=text.replace("%", "%%"))
    group.add_argument(negative, dest=spec.name, action="store_const", const="false", help=argparse.SUPPRESS)
