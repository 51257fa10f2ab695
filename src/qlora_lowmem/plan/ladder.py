"""From the fastest recipe to the leanest: what is tried, in which order, and why.

The order of preference, from the first to the last:

1. the wanted sequence length is reached;
2. every linear layer is trained, in the same arithmetic (nothing below but the last rungs changes what is learnt);
3. the step is fast: first nothing is computed twice, then PyTorch's checkpointing, then this project's tiles, then
   what travels to host memory;
4. only then are frozen embeddings, and with them the optimizer's state, rounded to fewer bits.

The first rung that fits at the wanted length is the best recipe, and it is then taken as far as it reaches.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.errors import UsageError
from qlora_lowmem.plan.asked import runs_in_tiles
from qlora_lowmem.recipe import Recipe, field_values
from qlora_lowmem.recipe.io import replace_fields
from qlora_lowmem.recipe.moves import Change, changes_of, moves, one_by_one

# What every rung starts from: nothing is computed twice, and what costs nothing is made use of.
_FASTEST: dict[str, Any] = {
    "gradient_checkpointing": False,
    "loss": "fused",
    "attention": "sdpa",
    "activation_offloading": False,
    "expandable_segments": True,
    "lean": False,
    "quantised_embeddings": "none",
}
_MOVES = {move.name: move for move in moves(Recipe(), tiles=True)}
# What the parts of a rung's name set: moves, and how they are made here. What `auto` takes for the scan depends on
# whether Triton kernels are installed; `plain` holds the same bytes on every machine, and a proposal has only tens of
# MiB of room.
_PARTS = {name: move.sets for name, move in _MOVES.items()} | {
    "fastest": {},
    "tiles": {**_MOVES["tiles"].sets, "checkpoints": "layer", "loss_tile_bytes": 2**24, "scan": "plain"},
    "segments": {"checkpoints": "segments"},
    "offloading": {**_MOVES["checkpointing"].sets, **_MOVES["offloading"].sets},
}
# Set by rungs but no part of what they are: a person's own value on the command line is taken instead.
_YIELDS = frozenset({"scan"})


@dataclass(frozen=True)
class Rung:
    """One way of training: its `name` lists the moves that it makes, and `words` say what they cost."""

    name: str
    words: str

    @property
    def fields(self) -> dict[str, Any]:
        """What it sets of a recipe."""
        parts = (_PARTS[part] for part in self.name.split(", "))
        return _FASTEST | {leaf: value for part in parts for leaf, value in part.items()}


_FIRST = (
    Rung("fastest", "exact; nothing is computed twice"),
    Rung("checkpointing", "exact; each layer runs forward twice"),
)
_TILED = (
    *_FIRST,
    Rung("tiles", "exact; layers run in tiles, each forward twice"),
    Rung("tiles, segments", "exact; the inputs of most layers are computed again too"),
    Rung("tiles, host", "exact; layers' inputs travel to host memory and back"),
    Rung("tiles, host, 8-bit embeddings", "changes the model a little"),
    Rung("tiles, host, 4-bit embeddings, 8-bit AdamW", "changes the model and its training a little"),
)
_OTHER = (
    *_FIRST,
    Rung("offloading", "exact; kept activations travel to host memory"),
    Rung("offloading, 8-bit AdamW", "the optimizer's state is rounded to 8 bits"),
)


def rungs(*, tiles: bool) -> tuple[Rung, ...]:
    """Every rung, the fastest first; `tiles` as for `recipe.moves.moves`."""
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
    now = field_values(recipe)
    releases = now["gradient_release"] and "gradient_release" in fixed
    split = now["batch_size"] > 1 and not releases and not {"batch_size", "gradient_accumulation_steps"} & set(fixed)
    for rung in rungs(tiles=tiles):
        fields = {leaf: value for leaf, value in rung.fields.items() if leaf not in _YIELDS & set(fixed)}
        if climbing and any(now[leaf] and not fields[leaf] for leaf in ("gradient_checkpointing", "lean")):
            continue  # it keeps more
        try:
            changed = replace_fields(recipe, fields | one_by_one(recipe) if split else fields)
        except UsageError:
            continue  # a field that no rung sets contradicts this one
        made = field_values(changed)
        if any(made[leaf] != now[leaf] for leaf in fixed if leaf in fields):
            continue
        if changed != recipe or not climbing:
            yield rung, changed


def next_fallback(recipe: Recipe) -> Change | None:
    """The fallback of a run that is out of memory: the next knob that trains the same; None if none is left.

    `recipe/moves.py` states the order. The checkpoint of the last good step is not lost. What would switch another of
    the recipe's knobs off is passed over: that is a choice of the person's own.
    """
    changes = changes_of(recipe, tiles=runs_in_tiles(recipe))
    return next((each for each in changes if each.keeps_training and False not in each.changes.values()), None)
