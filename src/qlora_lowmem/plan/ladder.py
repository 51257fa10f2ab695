"""From the fastest recipe to the leanest: what is tried, in which order, and why.

The order of preference, from the first to the last:

1. the wanted sequence length is reached;
2. every linear layer is trained, in the same arithmetic (nothing below but the last rungs changes what is learnt);
3. the step is fast: first nothing is computed twice, then PyTorch's checkpointing, then this project's tiles, then
   what travels to host memory;
4. only then are frozen embeddings, and with them the optimizer's state, rounded to fewer bits.

The first rung that fits at the wanted length is the best recipe, and it is then taken as far as it reaches.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_fields


@dataclass(frozen=True)
class Rung:
    """One way of training, `fields` being what it sets of a recipe, and `words` what it costs."""

    name: str
    words: str
    fields: Mapping[str, Any]


def _rung(name: str, words: str, *sets: Mapping[str, Any]) -> Rung:
    return Rung(name, words, MappingProxyType({leaf: value for each in sets for leaf, value in each.items()}))


_PLAIN: dict[str, Any] = {
    "gradient_checkpointing": False,
    "loss": "fused",
    "attention": "sdpa",
    "activation_offloading": False,
    "expandable_segments": True,
    "lean": False,
    "quantised_embeddings": "none",
}
_CHECKPOINTING = _PLAIN | {"gradient_checkpointing": True}
# What `auto` takes for the scan depends on whether Triton kernels are installed; `plain` holds the same bytes on every
# machine, and a proposal has only tens of MiB of room.
_TILES = _CHECKPOINTING | {"lean": True, "checkpoints": "layer", "loss_tile_bytes": 2**24, "scan": "plain"}
# Set by rungs but no part of what they are: a person's own value on the command line is taken instead.
_YIELDS = frozenset({"scan"})
_SEGMENTS = _TILES | {"checkpoints": "segments"}
_HOST = _TILES | {"checkpoints": "host"}
# With what contradicts any optimizer but adamw_torch as it is by default.
_EIGHT_BITS = {"optimizer": "adamw_8bit", "optimizer_state_dtype": "auto", "gradient_release": False}
_OFFLOADING = _CHECKPOINTING | {"activation_offloading": True}

_FIRST = (
    _rung("fastest", "exact; nothing is computed twice", _PLAIN),
    _rung("checkpointing", "exact; each layer runs forward twice", _CHECKPOINTING),
)
# The lean implementations know this model's layers.
_TILED = (
    *_FIRST,
    _rung("tiles", "exact; layers run in tiles, each forward twice", _TILES),
    _rung("tiles, segments", "exact; the inputs of most layers are computed again too", _SEGMENTS),
    _rung("tiles, host", "exact; layers' inputs travel to host memory and back", _HOST),
    _rung("tiles, host, 8-bit embeddings", "changes the model a little", _HOST, {"quantised_embeddings": "8bit"}),
    _rung(
        "tiles, host, 4-bit embeddings, 8-bit AdamW",
        "changes the model and its training a little",
        _HOST,
        {"quantised_embeddings": "4bit"} | _EIGHT_BITS,
    ),
)
_OTHER = (
    *_FIRST,
    _rung(
        "offloading", "exact; kept activations travel to host memory", _CHECKPOINTING, {"activation_offloading": True}
    ),
    _rung(
        "offloading, 8-bit AdamW",
        "the optimizer's state is rounded to 8 bits",
        _CHECKPOINTING,
        {"activation_offloading": True} | _EIGHT_BITS,
    ),
)


def rungs(*, tiles: bool) -> tuple[Rung, ...]:
    """Every rung, the fastest first.

    Args:
        tiles: whether the lean implementations run the model's layers in tiles; otherwise they save nothing.
    """
    return _TILED if tiles else _OTHER


def ladder(recipe: Recipe, *, tiles: bool, fixed: Collection[str], climbing: bool) -> Iterator[tuple[Rung, Recipe]]:
    """Each rung with `recipe` made so.

    A batch of several samples becomes as many micro-batches of one, the same samples a step: for that, gradients are
    kept over a step and not released.

    Args:
        fixed: fields that the person has set on the command line, which no rung may change: a rung that would is left
            out, but for `scan`, which it then leaves alone.
        climbing: the recipe is known not to fit, so rungs that keep more than it does are left out.
    """
    batch = recipe.batch
    for rung in rungs(tiles=tiles):
        fields = {leaf: value for leaf, value in rung.fields.items() if leaf not in _YIELDS & set(fixed)}
        if climbing and _keeps_more(fields, recipe):
            continue
        releases = recipe.optimizer.gradient_release and "gradient_release" in fixed
        if batch.batch_size > 1 and not releases and not {"batch_size", "gradient_accumulation_steps"} & set(fixed):
            together = batch.batch_size * batch.gradient_accumulation_steps
            fields |= {"batch_size": 1, "gradient_accumulation_steps": together, "gradient_release": False}
        try:
            changed = replace_fields(recipe, fields)
        except UsageError:
            continue  # a field that no rung sets contradicts this one
        if any(_value(changed, leaf) != _value(recipe, leaf) for leaf in fixed if leaf in fields):
            continue
        if changed != recipe or not climbing:
            yield rung, changed


def _keeps_more(fields: Mapping[str, Any], recipe: Recipe) -> bool:
    return (recipe.memory.gradient_checkpointing and not fields["gradient_checkpointing"]) or (
        recipe.lean.lean and not fields["lean"]
    )


def _value(recipe: Recipe, leaf: str) -> Any:
    for section in (recipe.base, recipe.batch, recipe.memory, recipe.lean, recipe.optimizer):
        if leaf in vars(section):
            return getattr(section, leaf)
    raise KeyError(leaf)
