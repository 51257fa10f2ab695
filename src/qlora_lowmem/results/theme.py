"""Colours by what they stand for, the same in every chart: for paper, for a dark screen, and as names to be themed."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Group:
    """Kinds of memory (`memory.kinds.KINDS`) that are drawn as one.

    Attributes:
        role: the name of its colour in a `Theme`.
        text: what people read.
        brief: the same where there is little room.
        kinds: keys of `KINDS`.
    """

    role: str
    text: str
    brief: str
    kinds: tuple[str, ...]


def _of(part: str) -> tuple[str, ...]:
    """What a part of the layers holds: in the forward, computed again, in the backward."""
    return f"activations_{part}", f"recomputed_{part}", f"backward_{part}"


# Bottom to top. A colour stays apart from its neighbours' in the common kinds of colour blindness and in grey (Paul
# Tol's "muted" and "bright" schemes, reordered).
GROUPS: tuple[Group, ...] = (
    Group("weights", "base weights, 4-bit", "4-bit weights", ("weights_4bit", "quantisation")),
    Group("embeddings", "embeddings, norms", "embeddings, norms", ("weights_other",)),
    Group(
        "adapters",
        "adapters, gradients, optimizer",
        "adapters, optimizer",
        ("adapters", "gradients", "optimizer", "optimizer_step"),
    ),
    Group("checkpoints", "checkpointed activations", "checkpoints", ("checkpoints",)),
    Group("mamba", "Mamba scan", "Mamba scan", _of("mamba")),
    Group("attention", "attention", "attention", _of("attention")),
    Group("mlp", "MLP", "MLP", _of("mlp")),
    Group("norm", "norm", "norm", _of("norm")),
    Group("activations", "other activations", "other activations", (*_of("other"), "input")),
    Group("dequantised", "dequantised weights", "dequantised", ("dequantised",)),
    Group("loss", "loss and logits", "loss and logits", ("loss",)),
    Group(
        "libraries", "libraries, rounding, unexplained", "libraries and rest", ("libraries", "rounding", "unexplained")
    ),
    Group("slack", "allocator slack", "allocator slack", ("slack",)),
    Group("context", "CUDA context", "CUDA context", ("outside",)),
)
# Series that have no meaning of their own, to be told apart by marker and dash as well.
SERIES: tuple[str, ...] = ("series-1", "series-2", "series-3", "series-4", "series-5", "series-6")

_BLACK, _WHITE = "#16181d", "#ffffff"
# Role -> on paper, on a dark screen.
_COLOURS = {
    "ground": ("#f6f5f1", "#121419"),
    "paper": ("#ffffff", "#1b1e25"),
    "link": ("#2f2480", "#b9b2fb"),
    "focus": ("#a3195b", "#ff8ab8"),
    "line": ("#d9d7cf", "#373c47"),
    "ink": ("#22252b", "#e9e7e2"),
    "muted": ("#5c6068", "#b3b6bd"),
    "grid": ("#e4e3de", "#343943"),
    "edge": ("#6b6f76", "#8c919b"),
    "limit": ("#a3195b", "#ff8ab8"),
    "bar": ("#332288", "#9d94f0"),
    "saved": ("#c9c3ea", "#453f78"),
    "floor": ("#ddaa00", "#f2cf4a"),
    "bad": ("#b3261e", "#ff9a91"),
    "good": ("#1a6b3a", "#7fd69b"),
    "series-1": ("#332288", "#a9a1f5"),
    "series-2": ("#0b7a75", "#56c8be"),
    "series-3": ("#b5460f", "#f2975d"),
    "series-4": ("#882255", "#e58abb"),
    "series-5": ("#5f6c1f", "#c3cf6b"),
    "series-6": ("#1f6aa5", "#7fbdee"),
    "weights": ("#332288", "#8379e6"),
    "embeddings": ("#88ccee", "#88ccee"),
    "adapters": ("#117733", "#45ad69"),
    "checkpoints": ("#ddcc77", "#ddcc77"),
    "mamba": ("#cc6677", "#e07a8b"),
    "attention": ("#882255", "#b9528c"),
    "mlp": ("#f4a582", "#f4a582"),
    "norm": ("#44aa99", "#4fc0ad"),
    "activations": ("#b2abd2", "#b2abd2"),
    "dequantised": ("#999933", "#b3b34f"),
    "loss": ("#ee7733", "#f2873f"),
    "libraries": ("#727272", "#8d9098"),
    "slack": ("#cfcfcf", "#666b76"),
    "context": ("#eaeaea", "#454a55"),
}


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
    red, green, blue = (_linear(int(colour[start : start + 2], 16) / 255) for start in (1, 3, 5))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _linear(channel: float) -> float:
    return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4


def _ink_on(colour: str) -> str:
    return _WHITE if contrast(_WHITE, colour) > contrast(_BLACK, colour) else _BLACK


def _theme(which: int) -> Theme:
    colours = {role: pair[which] for role, pair in _COLOURS.items()}
    inks = {f"on-{group.role}": _ink_on(colours[group.role]) for group in GROUPS}
    return Theme(MappingProxyType(colours | inks))


LIGHT, DARK = _theme(0), _theme(1)
# A colour of its own for every role, to be found again in a drawing and replaced by the role's name.
TOKENS = Theme(MappingProxyType({role: f"#{code:06x}" for code, role in enumerate(LIGHT.colours, start=0x0A0001)}))
ROLE_OF: Mapping[str, str] = MappingProxyType({colour: role for role, colour in TOKENS.colours.items()})


def css_variables(theme: Theme) -> str:
    """The theme as CSS declarations, `--ROLE: #rrggbb;` each."""
    return " ".join(f"--{role}: {colour};" for role, colour in theme.colours.items())
