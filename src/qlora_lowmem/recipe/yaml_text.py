"""A recipe's YAML: read as entries with line numbers (PyYAML's safe loader, duplicate keys refused, numbers read
strictly), and written as a person would write it, each knob with what it does to memory."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_lowmem.recipe import SECTIONS, Recipe
from qlora_lowmem.recipe.checks import field_specs

_FLOAT = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)[eE][+-]?[0-9]+")
_DECIMAL = re.compile(r"[+-]?(0|[1-9][0-9_]*)")
_INT_TAG = "tag:yaml.org,2002:int"
_COMMENT_AT = 41


class FileFault(Exception):
    """A file that is no recipe at all; the message goes on after the file's path."""


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
    plain_text: str | None = None
    fault: str = ""

    @property
    def where(self) -> str:
        """The place as messages name it."""
        return f"line {self.line}"

    def value_for(self, kind: str) -> Any:
        """The value; a plain `2e-4`, which YAML 1.1 reads as text for want of a dot, is a number for a float field."""
        if kind == "float" and self.plain_text is not None and _FLOAT.fullmatch(self.plain_text):
            return float(self.plain_text)
        return self.value


def read_recipe_text(path: Path) -> str:
    """The file's text.

    Raises:
        FileFault: missing (near recipes are named), a folder, not readable, or not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise FileFault(f": no such recipe. {_recipes_near(path)}") from None
    except IsADirectoryError:
        raise FileFault(f" is a folder, not a recipe. {_recipes_near(path / '*.yaml')}") from None
    except (OSError, ValueError) as fault:
        raise FileFault(f" cannot be read: {fault}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = raw[: fault.start].count(b"\n") + 1
        raise FileFault(f", line {line}: byte {raw[fault.start]:#04x} is not UTF-8; save the file as UTF-8") from None


def _recipes_near(path: Path) -> str:
    here, shipped = (sorted(map(str, folder.glob("*.yaml"))) for folder in (path.parent, Path("bench/recipes")))
    found = here or shipped
    by_stem = {Path(each).stem: each for each in found}
    near = [by_stem[stem] for stem in difflib.get_close_matches(path.stem, by_stem, n=3, cutoff=0.5)]
    if near:
        return f"Did you mean {' or '.join(near)}?"
    return f"Recipes near: {', '.join(found[:12])}" if found else f"There is no .yaml file in {path.parent} either"


def parse_recipe_text(text: str) -> list[Entry]:
    """The entries of a recipe file in their order, faults among them.

    Raises:
        FileFault: a YAML syntax error (with its line), an empty file, or something else than a mapping.
    """
    loader = _loader(text)
    try:
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        line = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        tabs = " (indent with spaces, not tabs)" if "'\\t'" in str(fault.problem) else ""
        raise FileFault(f"{line}: not valid YAML: {fault.problem or fault.context}{tabs}; correct that line") from None
    except (yaml.YAMLError, RecursionError) as fault:
        raise FileFault(f": not valid YAML: {str(fault).splitlines()[0]}") from None
    if root is None or (isinstance(root, yaml.ScalarNode) and root.value == ""):
        raise FileFault(" is empty; write at least one section, such as\n  base:\n    model: granite-4.0-h-1b")
    if not isinstance(root, yaml.MappingNode):
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise FileFault(f" holds {kind}; a recipe is sections of `key: value`, such as\n  lora:\n    lora_r: 8")
    return _entries(loader, root)


def _loader(text: str) -> yaml.SafeLoader:
    try:
        return yaml.SafeLoader(text)
    except yaml.YAMLError as fault:  # a character that YAML does not allow
        line = text[: getattr(fault, "position", 0)].count("\n") + 1
        raise FileFault(f", line {line}: not valid YAML: {str(fault).splitlines()[0]}; remove the character") from None


def _entries(loader: yaml.SafeLoader, root: yaml.MappingNode) -> list[Entry]:
    entries: list[Entry] = []
    for section, line, node, fault in _items(root, ""):
        if fault:
            entries.append(Entry("", section, line, fault=fault))
        elif section in SECTIONS and isinstance(node, yaml.MappingNode):
            for key, key_line, value, key_fault in _items(node, f"{section}."):
                if key_fault:
                    entries.append(Entry(section, key, key_line, fault=key_fault))
                else:
                    entries.append(_entry(loader, section, key, key_line, value))
        elif section in SECTIONS and not _is_field_of_that_name(section, node):
            empty = isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null")
            what = "is empty" if empty else f"holds {_shown_node(node)} instead of fields"
            advice = f"write its fields indented below it, such as {_fields(section)[0]}, or remove the section"
            entries.append(Entry("", section, line, fault=f"the section {section} {what}; {advice}"))
        elif isinstance(node, yaml.MappingNode):
            entries.append(Entry(None, section, line))
        else:
            entries.append(_entry(loader, "", section, line, node))
    return entries


def _is_field_of_that_name(section: str, node: yaml.Node) -> bool:
    """`optimizer: sgd` and `data: x.jsonl` above the sections: a field's value where its section is meant."""
    is_field = section in _fields(section)
    return is_field and isinstance(node, yaml.ScalarNode) and not node.tag.endswith(":null")


def _fields(section: str) -> list[str]:
    return [name for name, spec in field_specs().items() if spec.section == section]


def _items(node: yaml.MappingNode, prefix: str) -> list[tuple[str, int, yaml.Node, str]]:
    """(key, line, value node, fault) of a mapping; a key written twice is a fault at its second place."""
    first_line: dict[str, int] = {}
    items = []
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else _shown_node(key_node)
        fault = ""
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.tag.endswith(":str"):
            fault = f"{prefix}{key} is not a field's name; write `name: value`"
        elif key in first_line:
            fault = f"{prefix}{key} is written twice (first on line {first_line[key]}); remove one of the two"
        first_line.setdefault(key, line)
        items.append((key, line, value_node, fault))
    return items


def _entry(loader: yaml.SafeLoader, section: str, key: str, line: int, node: yaml.Node) -> Entry:
    def fault(message: str) -> Entry:
        name = f"{section}.{key}" if section else key
        return Entry(section, key, line, fault=f"{name} = {shown} {message}")

    shown = _shown_node(node)
    scalars = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(each, yaml.ScalarNode) for each in scalars):
        return fault(f"is not a single value; write `{key}: value`")
    if any(each.tag == _INT_TAG and not _DECIMAL.fullmatch(each.value) for each in scalars):
        return fault("is octal, hexadecimal, binary or base 60 in YAML; write a plain decimal number")
    try:
        values: list[Any] = [loader.construct_object(each, deep=True) for each in scalars]
    except (yaml.YAMLError, ValueError):
        return fault("cannot be read; write a plain value without a tag")
    if not isinstance(node, yaml.ScalarNode):
        return Entry(section, key, line, value=values, shown=shown)
    plain = node.value if node.style is None and isinstance(values[0], str) else None
    return Entry(section, key, line, value=values[0], shown=shown, plain_text=plain)


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
            setting = f"  {name}: {_one_line(plain[section][name])}"
            lines.append(f"{setting:<{_COMMENT_AT}} # {_comment(field_specs()[name].memory)}")
    return "\n".join(lines) + "\n"


def _comment(memory: str) -> str:
    """A field's effect on memory, as it reads beside its value."""
    return f"no effect on memory{memory.removeprefix('none')}" if memory.split(":")[0] == "none" else memory


def _one_line(value: object) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.strip().removesuffix("...").strip()
