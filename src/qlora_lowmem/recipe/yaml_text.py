"""A recipe's YAML: read as entries with line numbers (PyYAML's safe loader, duplicate keys refused, numbers read
strictly), and written as a person would write it, each knob with what it does to memory."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import read_text
from qlora_lowmem.recipe import SECTIONS, Recipe
from qlora_lowmem.recipe.checks import field_specs
from qlora_lowmem.units import MIB

_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?(0|[1-9][0-9_]*)")
_INT_TAG = "tag:yaml.org,2002:int"
_COMMENT_AT = 41
_LIMIT = MIB


@dataclass(frozen=True)
class Entry:
    """One `key: value` of the file, or what is wrong with it.

    `section` is "" above the sections and None where the key is no section but holds a mapping.
    """

    section: str | None
    key: str
    line: int
    value: Any = None
    shown: str = ""
    fault: str = ""


def read_recipe(path: Path) -> list[Entry]:
    """The entries of a recipe file in their order, faults among them.

    Raises:
        UsageError: missing (near recipes are named), a folder, not readable or not UTF-8; a YAML syntax error (with its
            line), an empty file, or something else than a mapping.
    """
    text = _text_of(path)
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
    except yaml.reader.ReaderError as fault:  # a character that YAML does not allow
        line, reason = text[: fault.position].count("\n") + 1, str(fault).splitlines()[0]
        raise UsageError(f"{path}, line {line}: not valid YAML: {reason}; remove the character") from None
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        place = f"{path}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(path)
        tabs = " (indent with spaces, not tabs)" if "'\\t'" in str(fault.problem) else ""
        reason = f"{fault.problem or fault.context}{tabs}"
        raise UsageError(f"{place}: not valid YAML: {reason}; correct that line") from None
    except (yaml.YAMLError, RecursionError) as fault:
        raise UsageError(f"{path}: not valid YAML: {str(fault).splitlines()[0]}") from None
    if root is None or (isinstance(root, yaml.ScalarNode) and root.value == ""):
        example = "base:\n    model: granite-4.0-h-1b"
        raise UsageError(f"{path} is empty; write at least one section, such as\n  {example}")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        example = "lora:\n    lora_r: 8"
        raise UsageError(f"{path} holds {kind}; a recipe is sections of `key: value`, such as\n  {example}")
    return list(_entries(loader, root))


def _text_of(path: Path) -> str:
    try:
        return read_text(path, _LIMIT)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe. {_recipes_near(path)}") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a recipe. {_recipes_near(path / '*.yaml')}") from None
    except OSError as fault:
        raise UsageError(f"{path} cannot be read as a recipe: {fault.strerror or fault}") from None


def _recipes_near(path: Path) -> str:
    here, shipped = (sorted(map(str, folder.glob("*.yaml"))) for folder in (path.parent, Path("bench/recipes")))
    found = here or shipped
    by_stem = {Path(each).stem: each for each in found}
    near = [by_stem[stem] for stem in difflib.get_close_matches(path.stem, by_stem, n=3, cutoff=0.5)]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Recipes near: {', '.join(found[:12])}" if found else f"There is no .yaml file in {path.parent} either"


def _entries(loader: yaml.SafeLoader, root: yaml.MappingNode) -> Iterator[Entry]:
    for section, line, node, fault in _items(root, ""):
        if fault:
            yield Entry("", section, line, fault=fault)
        elif section in SECTIONS and isinstance(node, yaml.MappingNode):
            for key, key_line, value, key_fault in _items(node, f"{section}."):
                yield _entry(loader, section, key, key_line, value, key_fault)
        elif section in SECTIONS and not _is_field_of_that_name(section, node):
            empty = isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")
            what = "is empty" if empty else f"holds {_shown_node(node)} instead of fields"
            advice = f"write its fields indented below it, such as {_fields(section)[0]}, or remove the section"
            yield Entry("", section, line, fault=f"the section {section} {what}; {advice}")
        elif isinstance(node, yaml.MappingNode):
            yield Entry(None, section, line)
        else:
            yield _entry(loader, "", section, line, node)


def _is_field_of_that_name(section: str, node: yaml.Node) -> bool:
    """`optimizer: sgd` and `data: x.jsonl` above the sections: a field's value where its section is meant."""
    is_field = section in _fields(section)
    return is_field and isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null")


def _fields(section: str) -> list[str]:
    return [name for name, spec in field_specs().items() if spec.section == section]


def _items(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int, yaml.Node, str]]:
    """(key, line, value node, fault) of a mapping; a key written twice is a fault at its second place."""
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _shown_node(key_node)
        fault = ""
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
            fault = f"{prefix}{key} is not a field's name; write `name: value`"
        elif key in first_line:
            fault = f"{prefix}{key} is written twice (first on line {first_line[key]}); remove one of the two"
        first_line.setdefault(key, line)
        yield key, line, value_node, fault


def _entry(loader: yaml.SafeLoader, section: str, key: str, line: int, node: yaml.Node, fault: str = "") -> Entry:
    shown = _shown_node(node)
    if key not in field_specs():  # its value is nobody's
        return Entry(section, key, line, fault=fault)
    try:
        return Entry(section, key, line, _value_of(loader, key, node), shown, fault)
    except ValueError as wrong:
        return Entry(section, key, line, fault=fault or f"{section}.{key} = {shown} {wrong}".removeprefix("."))


def _value_of(loader: yaml.SafeLoader, key: str, node: yaml.Node) -> Any:
    """The value of a field; a plain `2e-4`, which YAML 1.1 reads as text for want of a dot, is a number for a float.

    Raises:
        ValueError: it is no plain value.
    """
    scalars = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(each, yaml.ScalarNode) for each in scalars):
        raise ValueError(f"is not a single value; write `{key}: value`")
    if any(each.tag == _INT_TAG and not _DECIMAL.fullmatch(each.value) for each in scalars):
        raise ValueError("is octal, hexadecimal, binary or base 60 in YAML; write a plain decimal number")
    try:
        values: list[Any] = [loader.construct_object(each, deep=True) for each in scalars]
    except (yaml.YAMLError, ValueError):
        raise ValueError("cannot be read; write a plain value without a tag") from None
    if not isinstance(node, yaml.ScalarNode):
        return values
    spec = field_specs().get(key)
    as_float = spec is not None and spec.kind == "float" and node.style is None and _FLOAT.fullmatch(node.value)
    return float(node.value) if as_float else values[0]


def _shown_node(node: yaml.Node) -> str:
    """The node as it was written, shortened."""
    if isinstance(node, yaml.SequenceNode):
        simple = all(isinstance(item, yaml.ScalarNode) for item in node.value)
        text = f"[{', '.join(item.value for item in node.value)}]" if simple else "a nested list"
    elif isinstance(node, yaml.ScalarNode):
        quote = node.style if node.style in ("'", '"') else ""
        text = f"{quote}{node.value}{quote}" or "null"
    else:
        text = "a mapping"
    return text if len(text) <= 80 else text[:77] + "..."


def commented_yaml(recipe: Recipe, title: Sequence[str]) -> str:
    """The text of a recipe file that `load_recipe` reads as `recipe`, but for its name, which is the file's.

    Args:
        title: lines of the comment at its top.
    """
    lines = [f"# {line}" for line in title]
    plain = recipe.to_dict()
    for section in SECTIONS:
        lines += ["", f"{section}:"]
        for name in _fields(section):
            value = yaml.safe_dump(plain[section][name], default_flow_style=True, width=10**6, allow_unicode=True)
            setting = f"  {name}: {value.strip().removesuffix('...').strip()}"
            effect = field_specs()[name].memory
            if effect.split(":")[0] == "none":
                effect = f"no effect on memory{effect.removeprefix('none')}"
            lines.append(f"{setting:<{_COMMENT_AT}} # {effect}")
    return "\n".join(lines) + "\n"
