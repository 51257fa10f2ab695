"""Is this value allowed in this field? Every message says what is allowed and what to do."""

import dataclasses
import difflib
import functools
import math
import operator
import re
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from qlora_lowmem.recipe import SECTIONS, Recipe, recipe_fields
from qlora_lowmem.recipe.sections import DATA_SUFFIXES, SYNTHETIC, TARGET_PRESETS, is_hub_data
from qlora_lowmem.units import MIB, parse_memory_limit

_INTEGER = re.compile(r"[+-]?[0-9]+")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.\w+)*", re.ASCII)
_PATTERN = re.compile(r"[\\^$*+?()\[\]{}|]")  # what a regular expression has, and no module's name
_NAME = re.compile(r"(?!\.)[^/\\{}\x00-\x1f]+")
_CONTROL = re.compile(r"[\x00-\x1f]")
_LISTS = ("modules", "exclusions", "names", "tokens", "words")
_OF_NAMES = ("modules", "exclusions")  # or an expression
_BOOLEANS = {"true": True, "false": False}
_LIMITS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "min": ("at least", operator.ge),
    "max": ("at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


class InvalidValueError(ValueError):
    """A value that its field does not take. The message goes on after "section.field = value"."""


@dataclass(frozen=True)
class FieldSpec:
    """What a field takes, read from its annotation and its metadata."""

    section: str
    name: str
    kind: str  # one of _CHECKS
    optional: bool
    choices: tuple[str, ...]
    limits: dict[str, float]
    help: str
    memory: str
    default: Any

    @property
    def path(self) -> str:
        """`section.field`, as messages name it."""
        return f"{self.section}.{self.name}" if self.section else self.name

    @property
    def flag(self) -> str:
        """The field on the command line."""
        return "--" + self.name.replace("_", "-")


@functools.cache
def field_specs() -> dict[str, FieldSpec]:
    """Every field of the recipe by its leaf name, in the order of the file."""
    return {each.name: _spec(section, each) for section, each in recipe_fields()}


def _spec(section: str, each: "dataclasses.Field[Any]") -> FieldSpec:
    annotation = typing.get_type_hints(SECTIONS[section] if section else Recipe)[each.name]
    arguments = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    plain = next(argument for argument in arguments if argument is not types.NoneType)
    metadata = each.metadata
    choices: tuple[str, ...] = typing.get_args(plain) if typing.get_origin(plain) is Literal else ()
    by_annotation = "choice" if choices else plain.__name__
    return FieldSpec(
        section=section,
        name=each.name,
        kind=by_annotation if metadata["kind"] == "auto" else metadata["kind"],
        optional=types.NoneType in arguments,
        choices=choices,
        limits={key: limit for key, limit in metadata.items() if key in _LIMITS},
        help=metadata["help"],
        memory=metadata["memory"],
        default=each.default,
    )


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` most likely meant, if any is near."""
    return next(iter(difflib.get_close_matches(word.lower().replace("-", "_"), list(known), n=1, cutoff=0.6)), None)


def check_value(spec: FieldSpec, value: Any) -> Any:
    """`value` as the field holds it (an integer for a float becomes a float, a list of modules a tuple), or an
    `InvalidValueError`.
    """
    if value is None:
        if spec.optional:
            return None
        raise InvalidValueError(f"is not allowed; {_advice(spec)}")
    return _CHECKS[spec.kind](spec, value)


def parse_text(spec: FieldSpec, text: str) -> Any:
    """As `check_value`, of what is written on the command line: `8`, `true`, `none`, `q_proj,v_proj`."""
    text = text.strip()
    if spec.optional and text.lower() in ("none", "null"):
        return None
    value: Any = text
    if spec.kind == "bool":
        value = _BOOLEANS.get(text.lower(), text)
    elif spec.kind in ("int", "memory") and _INTEGER.fullmatch(text):
        value = int(text[:40])  # beyond any limit already; int() itself refuses thousands of digits
    elif spec.kind in ("int", "float", "memory"):
        value = _number(text)
    elif spec.kind in _LISTS and not (
        spec.kind in _OF_NAMES and (_PATTERN.search(text) or (spec.kind == "modules" and _is_preset(text)))
    ):
        value = [int(each) if spec.kind == "tokens" and _INTEGER.fullmatch(each) else each for each in _listed(text)]
    return check_value(spec, value)


def _listed(text: str) -> list[str]:
    return [each.strip() for each in text.split(",")]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _advice(spec: FieldSpec) -> str:
    """What to write instead, with the default as the example."""
    if spec.default == "":
        return "write one or leave it out"
    default = {True: "true", False: "false"}.get(spec.default, spec.default) if spec.kind == "bool" else spec.default
    return f"write {allowed(spec)}, or leave it out for the default ({'null' if default is None else default})"


def allowed(spec: FieldSpec) -> str:
    """What the field takes, in words."""
    if spec.kind in ("int", "float"):
        numbers = {key: f"{limit:{'d' if isinstance(limit, int) else 'g'}}" for key, limit in spec.limits.items()}
        limits = " and ".join(f"{_LIMITS[key][0]} {number}" for key, number in numbers.items())
        return f"{'an integer' if spec.kind == 'int' else 'a number'} {limits}".strip()
    return {
        "bool": "true or false (without quotes)",
        "str": "text",
        "choice": "one of " + ", ".join(spec.choices),
        "name": "a name without slashes or braces",
        "modules": f"one of {', '.join(TARGET_PRESETS)}, a list such as [q_proj, v_proj], or a regular expression such "
        r"as '.*\.layers\.[0-7]\..*_proj'",
        "exclusions": r"a list such as [down_proj, layers.0], or a regular expression such as '.*\.layers\.[0-7]\..*'",
        "names": "a list such as [embed_tokens, lm_head]",
        "tokens": 'a list of indices and texts, such as [128002, "<|im_start|>"]',
        "words": 'a list such as ["<|step|>", "<|answer|>"]',
        "memory": '"N%" with N above 0 and up to 100, a size such as "5.5 GiB", or a number of bytes',
        "data": f"the path of a .jsonl or .parquet file, a hub id (owner/name or owner/name:split), or {SYNTHETIC}",
        "path": "a folder, in which {name} stands for the recipe's name",
    }[spec.kind]


def _within(spec: FieldSpec, value: float) -> None:
    finite = isinstance(value, int) or math.isfinite(value)
    if not finite or not all(_LIMITS[key][1](value, limit) for key, limit in spec.limits.items()):
        raise InvalidValueError(f"is out of range; {_advice(spec)}")


def _check_int(spec: FieldSpec, value: Any) -> int:
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        raise InvalidValueError(f"is text, because of the quotes; write {value.strip()} without them")
    if isinstance(value, float) and value.is_integer() and math.isfinite(value):
        raise InvalidValueError(f"is not written as an integer; write {int(value)}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidValueError(f"is not an integer; {_advice(spec)}")
    _within(spec, value)
    return value


def _check_float(spec: FieldSpec, value: Any) -> float:
    if isinstance(value, str) and isinstance(_number(value), float):
        raise InvalidValueError(f"is text, because of the quotes; write {value} without them")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidValueError(f"is not a number; {_advice(spec)}")
    _within(spec, value)
    return float(value)


def _check_bool(spec: FieldSpec, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidValueError(f"is not true or false; {_advice(spec)}")
    return value


def _check_str(spec: FieldSpec, value: Any) -> str:
    if isinstance(value, bool | int | float):
        raise InvalidValueError("is not text; put quotes around it")
    if not isinstance(value, str):
        raise InvalidValueError(f"is not text; {_advice(spec)}")
    if not value.strip():
        raise InvalidValueError(f"is empty; {_advice(spec)}")
    if _CONTROL.search(value):
        raise InvalidValueError(f"holds a line break or a control character; {_advice(spec)}")
    return value


def _check_choice(spec: FieldSpec, value: Any) -> str:
    if value in spec.choices:
        return str(value)
    near = closest(str(value), spec.choices)
    hint = f"did you mean {near}? Allowed: {', '.join(spec.choices)}" if near else _advice(spec)
    raise InvalidValueError(f"is not allowed; {hint}")


def _check_name(spec: FieldSpec, value: Any) -> str:
    if not _NAME.fullmatch(_check_str(spec, value)):
        raise InvalidValueError("cannot name a folder; use letters, digits, '-', '_' and '.', not at the start")
    return str(value)


def _check_modules(spec: FieldSpec, value: Any) -> str | tuple[str, ...]:
    if value in TARGET_PRESETS:
        return str(value)
    if isinstance(value, str) and not _PATTERN.search(value):
        near = _near_preset(value)
        listed = f"; for modules of that name write a list: [{value}]" if _MODULE.fullmatch(value) else ""
        advice = f"did you mean {near}?" if near else f"write {allowed(spec)}{listed}"
        raise InvalidValueError(f"is not a preset; {advice}")
    for name in value if isinstance(value, list | tuple) else ():
        if name in TARGET_PRESETS:
            advice = f"write target_modules: {name}, or modules only"
            raise InvalidValueError(f"mixes the preset {name} into a list; {advice}")
    return _check_names(spec, value, "would train nothing")


def _check_exclusions(spec: FieldSpec, value: Any) -> str | tuple[str, ...]:
    if isinstance(value, str) and not _PATTERN.search(value):
        listed = f"; for modules of that name write a list: [{value}]" if _MODULE.fullmatch(value) else ""
        raise InvalidValueError(f"is not a regular expression; write {allowed(spec)}{listed}")
    return _check_names(spec, value, "excludes nothing")


def _check_names(spec: FieldSpec, value: Any, empty: str) -> str | tuple[str, ...]:
    """Names of modules as a tuple, or a regular expression; `empty` says what a list without a name does."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, RecursionError, OverflowError) as fault:
            raise InvalidValueError(f"is not a regular expression ({fault}); {_advice(spec)}") from None
        return value
    if not isinstance(value, list | tuple):
        raise InvalidValueError(f"is not a list of module names; {_advice(spec)}")
    if not value:
        raise InvalidValueError(f"is an empty list, which {empty}; {_advice(spec)}")
    for name in value:
        if not isinstance(name, str) or not _MODULE.fullmatch(name):
            advice = "names look like q_proj or mamba.in_proj"
            raise InvalidValueError(f"holds {name!r}, which is not a module name; {advice}")
    twice = sorted({name for name in value if list(value).count(name) > 1})
    if twice:
        raise InvalidValueError(f"names {', '.join(twice)} twice; remove the second")
    return tuple(value)


def _check_list(spec: FieldSpec, value: Any) -> tuple[str, ...]:
    names = _check_names(spec, value, "is as null") if isinstance(value, list | tuple) else value
    if not isinstance(names, tuple):
        raise InvalidValueError(f"is not a list of module names; {_advice(spec)}")
    return names


def _check_tokens(spec: FieldSpec, value: Any) -> tuple[int | str, ...]:
    """Texts that are tokens; with the kind `tokens`, indices too."""
    if not isinstance(value, list | tuple):
        raise InvalidValueError(f"is not a list of tokens; {_advice(spec)}")
    if not value:
        raise InvalidValueError(f"is an empty list, which is as null; {_advice(spec)}")
    kinds = (str, int) if spec.kind == "tokens" else (str,)
    for each in value:
        negative = isinstance(each, int) and each < 0
        if not isinstance(each, kinds) or isinstance(each, bool) or each == "" or negative:
            raise InvalidValueError(f"holds {each!r}, which is no token; {_advice(spec)}")
    twice = [each for place, each in enumerate(value) if each in value[:place]]
    if twice:
        raise InvalidValueError(f"names {', '.join(map(repr, twice))} twice; remove the second")
    return tuple(value)


def _is_preset(text: str) -> bool:
    """As it is, or misspelt."""
    return text in TARGET_PRESETS or _near_preset(text) is not None


def _near_preset(text: str) -> str | None:
    """A misspelt preset, as opposed to the name of one module."""
    written = text.lower().replace("_", "-")
    return next(iter(difflib.get_close_matches(written, TARGET_PRESETS, n=1, cutoff=0.8)), None)


def _check_memory(spec: FieldSpec, value: Any) -> str | int:
    if isinstance(value, float) and 0 < value <= 1:
        raise InvalidValueError(f'is a fraction; write "{value * 100:g}%"')
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise InvalidValueError(f"is not a limit; {_advice(spec)}")
    try:
        limit = parse_memory_limit(value, 2**50)
    except ValueError as fault:
        reason = str(fault).removeprefix(repr(value)).split(";")[0].strip()
        raise InvalidValueError(f"{reason}; {_advice(spec)}") from None
    if limit < MIB:
        raise InvalidValueError(f"allows {limit} bytes, less than anything needs; {_advice(spec)}")
    return value


def _check_data(spec: FieldSpec, value: Any) -> str:
    text = _check_str(spec, value)
    if text == SYNTHETIC or text.lower().endswith(DATA_SUFFIXES) or is_hub_data(text):
        return text
    near = closest(text, [SYNTHETIC])
    advice = f"did you mean {near}?" if near else f"write {allowed(spec)}"
    raise InvalidValueError(f"is neither JSON Lines nor Parquet; {advice}")


def _check_path(spec: FieldSpec, value: Any) -> str:
    text = _check_str(spec, value)
    if re.search(r"[{}]", text.replace("{name}", "")):
        raise InvalidValueError("holds a brace; only {name} is replaced, so write the rest out")
    return text


_CHECKS: dict[str, Callable[[FieldSpec, Any], Any]] = {
    "int": _check_int,
    "float": _check_float,
    "bool": _check_bool,
    "str": _check_str,
    "choice": _check_choice,
    "name": _check_name,
    "modules": _check_modules,
    "exclusions": _check_exclusions,
    "names": _check_list,
    "tokens": _check_tokens,
    "words": _check_tokens,
    "memory": _check_memory,
    "data": _check_data,
    "path": _check_path,
}
