"""Colours by what they stand for (`theme.toml`): for paper, for a dark screen, and as names to be themed."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import msgspec


@dataclass(frozen=True)
class Group:
    """Keys of `memory.kinds.KINDS` that are drawn as one; `role` is its colour in a `Theme`, `brief` a shorter text."""

    role: str
    text: str
    brief: str
    kinds: tuple[str, ...]


_DATA = tomllib.loads(Path(__file__).with_name("theme.toml").read_text(encoding="utf-8"))
GROUPS = msgspec.convert(_DATA["groups"], tuple[Group, ...])
SERIES = tuple(role for role in _DATA["colours"] if role.startswith("series-"))
_BLACK, _WHITE = "#16181d", "#ffffff"


@dataclass(frozen=True)
class Theme:
    """Colours as `#rrggbb` by role. `on-ROLE` is the ink for text on a group's colour."""

    colours: Mapping[str, str]

    def __getitem__(self, role: str) -> str:
        return self.colours[role]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21 (WCAG 2.2, "contrast ratio" and "relative luminance")."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: str) -> float:
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _theme(which: int) -> Theme:
    colours = {role: pair[which] for role, pair in _DATA["colours"].items()}
    roles = [group.role for group in GROUPS]
    inks = {f"on-{role}": max(_BLACK, _WHITE, key=partial(contrast, colours[role])) for role in roles}
    return Theme(MappingProxyType(colours | inks))


LIGHT, DARK = _theme(0), _theme(1)
# A colour of its own for every role, to be found again in a drawing and replaced by the role's name.
TOKENS = Theme(MappingProxyType({role: f"#{code:06x}" for code, role in enumerate(LIGHT.colours, start=0x0A0001)}))
ROLE_OF: Mapping[str, str] = MappingProxyType({colour: role for role, colour in TOKENS.colours.items()})


def css_variables(theme: Theme) -> str:
    """The theme as CSS declarations, `--ROLE: #rrggbb;` each."""
    return " ".join(f"--{role}: {colour};" for role, colour in theme.colours.items())
