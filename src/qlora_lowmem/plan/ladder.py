"""From the fastest recipe to the leanest: what is tried, in which order, and why.

The order of preference, from the first to the last:

1. the wanted sequence length is reached;
2. every linear layer is trained, in the same arithmetic (nothing below but the last rungs changes what is learnt);
3. the step is fast: first nothing is computed twice, then PyTorch's checkpointing, then this project's tiles, then
   what travels to host memory;
4. only then are frozen embeddings, and with them the optimizer's state, rounded to fewer bits.

The first rung that fits at the wanted length is the best recipe, and it is then taken as far as it reaches. Rungs own
only the fields that are their idea.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from qlora_lowmem.errors import UsageError
from qlora_lowmem.plan.asked import runs_in_tiles
from qlora_lowmem.recipe import Recipe, field_values
from qlora_lowmem.recipe.io import replace_fields
from qlora_lowmem.recipe.moves import Change, changes_of, moves, one_by_one

# What computes nothing twice and rounds nothing, whatever else a recipe says.
_PLAIN: dict[str, Any] = {
    "gradient_checkpointing": False,
    "activation_offloading": False,
    "lean": False,
    "quantised_embeddings": "none",
}
# What every rung starts from, so far as the person has not said otherwise: what costs nothing is made use of.
_START: dict[str, Any] = _PLAIN | {"loss": "fused", "attention": "auto", "expandable_segments": True}
_MOVES = {move.name: move for move in moves(Recipe(), tiles=True)}
# What the parts of a rung are: moves, and how they are made here.
_PARTS: dict[str, Mapping[str, Any]] = {name: move.sets for name, move in _MOVES.items()} | {
    "fastest": {"gradient_checkpointing": False, "lean": False},
    "checkpointing": {"gradient_checkpointing": True, "lean": False},
    "segments": {"checkpoints": "segments"},
}
# What a part sets too, and is no idea of it. What `auto` takes for the scan depends on whether Triton kernels are
# installed; `plain` holds the same bytes on every machine, and a proposal may have only tens of MiB of room.
_BESIDE = {"tiles": {"checkpoints": "layer", "loss_tile_bytes": 2**24, "scan": "plain"}}
_WORDS = {name: move.cost for name, move in _MOVES.items()} | {
    "fastest": "exact; nothing is computed twice",
    "tiles": "exact; layers run in tiles, each forward twice",
    "segments": "exact; the inputs of most layers are computed again too",
    "as it is": "nothing leaner is known",
}


@dataclass(frozen=True)
class Rung:
    """One way of training: the first of its `parts` is what it is, the others are made on top of it."""

    parts: tuple[str, ...]

    @property
    def name(self) -> str:
        """The parts that tell it from others."""
        return ", ".join(part for part in self.parts if part != "checkpointing" or len(self.parts) == 1)

    @property
    def words(self) -> str:
        """What it costs; where it changes what is trained, that alone."""
        changing = [part for part in self.parts if part in _MOVES and _MOVES[part].kind == "changes training"]
        return "; ".join(_WORDS[part] for part in changing or self.parts[-1:])


_FIRST = (("fastest",), ("checkpointing",))
_TILED = (
    *_FIRST,
    ("tiles",),
    ("tiles", "segments"),
    ("tiles", "host"),
    ("tiles", "host", "8-bit embeddings"),
    ("tiles", "host", "4-bit embeddings", "8-bit AdamW"),
)
_OTHER = (*_FIRST, ("checkpointing", "offloading"), ("checkpointing", "offloading", "8-bit AdamW"))
AS_IT_IS = Rung(("as it is",))


def ladder(
    recipe: Recipe, *, tiles: bool, fixed: Collection[str] = (), climbing: bool = False
) -> list[tuple[Rung, Recipe]]:
    """Each rung with `recipe` made so, the fastest first.

    A batch of several samples becomes as many micro-batches of one, the same samples a step: for that, gradients are
    kept over a step and not released.

    Args:
        tiles: as for `recipe.moves.moves`.
        fixed: fields that the person has set on the command line, and no rung changes. A part of a rung that would is
            left out, and the rung where it is what the rung is; all else takes the person's value.
        climbing: the recipe is known not to fit, so rungs that keep more than it does are left out.

    Raises:
        UsageError: no rung goes with what is fixed.
    """
    own = {leaf: value for leaf, value in field_values(recipe).items() if leaf in fixed}
    split = recipe.batch.batch_size > 1 and not own.get("gradient_release")
    split = split and not {"batch_size", "gradient_accumulation_steps"} & set(fixed)
    together = one_by_one(recipe) if split else {}
    tiles = tiles or own.get("lean", False)
    found = _made(_TILED, recipe, own, together) if tiles else {}
    if not any(made.lean.lean for made in found):
        found = _made(_OTHER, recipe, own, together)
    if not found:
        flags = ", ".join(f"--{leaf.replace('_', '-')} {value}" for leaf, value in own.items() if leaf in _START)
        raise UsageError(f"no recipe of the ladder goes with {flags or 'these fields'}; leave one of them out")
    now = field_values(recipe)
    kept = [leaf for leaf in ("gradient_checkpointing", "lean") if now[leaf] and (tiles or leaf != "lean")]
    made = [(rung, made) for made, rung in found.items()]
    if not climbing:
        return made
    further = list(found).index(recipe) + 1 if recipe in found else 0
    return [(rung, made) for rung, made in made[further:] if all(field_values(made)[leaf] for leaf in kept)]


def _made(
    rungs: Collection[tuple[str, ...]], recipe: Recipe, own: Mapping[str, Any], together: dict[str, Any]
) -> dict[Recipe, Rung]:
    """The recipe of each rung that goes with `own`, once, under the name that says most."""
    found: dict[Recipe, Rung] = {}
    for first, *others in rungs:
        if _contradicts(first, own):
            continue
        parts = (first, *(part for part in others if not _contradicts(part, own)))
        fields = dict(_START)
        for part in parts:
            fields |= {**_PARTS[part], **_BESIDE.get(part, {})}
        fields |= {leaf: value for leaf, value in own.items() if leaf in fields}
        try:
            made = replace_fields(recipe, fields | together)
        except UsageError:
            continue  # a field that no rung sets contradicts this one
        if made not in found or len(parts) >= len(found[made].parts):
            found[made] = Rung(parts)
    return found


def _contradicts(part: str, own: Mapping[str, Any]) -> bool:
    return any(own.get(leaf, value) != value for leaf, value in _PARTS[part].items())


def computing_nothing_twice(recipe: Recipe) -> Recipe:
    """`recipe` without any of the rungs' ideas: what their FLOPs are compared with."""
    return replace_fields(recipe, _PLAIN)


def next_fallback(recipe: Recipe) -> Change | None:
    """The fallback of a run that is out of memory: the next knob that trains the same; None if none is left.

    `recipe/moves.py` states the order. The checkpoint of the last good step is not lost. What would switch another of
    the recipe's knobs off is passed over: that is a choice of the person's own.
    """
    changes = changes_of(recipe, tiles=runs_in_tiles(recipe))
    return next((each for each in changes if each.keeps_training and False not in each.changes.values()), None)
