"""The recipe on the command line: one flag a field, its help taken from the field."""

import argparse
from collections.abc import Collection

from qlora_lowmem.recipe.checks import FieldSpec, allowed, field_specs
from qlora_lowmem.recipe.recipe import SECTIONS


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


_METAVARS = {"int": "N", "float": "X", "memory": "SIZE", "modules": "NAMES", "data": "FILE", "path": "DIR"}


def _help(spec: FieldSpec) -> str:
    limits = f" ({allowed(spec)})" if spec.limits else ""
    negative = f"; or {spec.flag.replace('--', '--no-', 1)}" if spec.kind == "bool" else ""
    return f"{spec.help}{limits}{negative}. Memory: {spec.memory}."
