"""A recipe as the file that a person would write: every knob of it, each with what it does to memory."""

from collections.abc import Sequence

import yaml

from qlora_lowmem.recipe.checks import field_specs
from qlora_lowmem.recipe.recipe import SECTIONS, Recipe

_COMMENT_AT = 41


def commented_yaml(recipe: Recipe, title: Sequence[str]) -> str:
    """The text of a recipe file that `load_recipe` reads as `recipe`, but for its name, which is the file's.

    Args:
        title: lines of the comment at its top.
    """
    lines = [f"# {line}" for line in title]
    plain = recipe.to_dict()
    for section in SECTIONS:
        lines += ["", f"{section}:"]
        for spec in (spec for spec in field_specs().values() if spec.section == section):
            setting = f"  {spec.name}: {_scalar(plain[section][spec.name])}"
            lines.append(f"{setting:<{_COMMENT_AT}} # {_comment(spec.memory)}")
    return "\n".join(lines) + "\n"


def _comment(memory: str) -> str:
    """A field's effect on memory, as it reads beside its value."""
    return f"no effect on memory{memory.removeprefix('none')}" if memory.split(":")[0] == "none" else memory


def _scalar(value: object) -> str:
    """A value on one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip().removesuffix("...").strip()
