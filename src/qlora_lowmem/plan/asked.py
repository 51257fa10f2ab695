"""What is asked: a recipe, made ready for planning, on a card.

Of its model counts what memory depends on: the shapes, never the values, of its weights.
"""

from dataclasses import dataclass
from typing import Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import UsageError
from qlora_lowmem.lean.families import takes_tiles
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.recipe import SYNTHETIC, Recipe
from qlora_lowmem.recipe.io import replace_fields


@dataclass(frozen=True)
class PlannedModel:
    """A recipe whose model needs no download, and what the ladder asks of the model.

    Attributes:
        recipe: with random weights where those will do, and synthetic samples.
        asked: as the person gave it.
        context_length: tokens that the model was made for; None where nothing says so.
        tiles: whether the lean implementations run its layers in tiles.
    """

    recipe: Recipe
    asked: Recipe
    context_length: int | None
    tiles: bool

    def as_asked(self, recipe: Recipe, card: str) -> Recipe:
        """A recipe made from `self.recipe`, with the model and the data that the person named, for a GPU."""
        base, data = self.asked.base, self.asked.data
        named = {"model": base.model, "revision": base.revision, "weights": base.weights, "data": data.data}
        return replace_fields(recipe, named | {"device": "cuda", "card": card})


def planned_model(recipe: Recipe) -> PlannedModel:
    """`recipe` made ready for planning.

    Weights become random: memory does not depend on their values. Of a model on the hub only `config.json` is fetched.
    A GGUF file, and a model that brings its own code, stay as they are.

    Raises:
        UsageError: no such model; a model on the hub whose configuration cannot be fetched.
    """
    changes: dict[str, Any] = {"data": SYNTHETIC, "device": "virtual"}
    base = recipe.base
    if base.weights == "random" or not (base.model.lower().endswith(".gguf") or base.trust_remote_code):
        changes["weights"] = "random"
    source = source_of(recipe, weights=changes.get("weights"))
    if "weights" in changes and source.hub_id is not None and source.folder is not None:
        changes |= {"model": str(source.folder), "revision": None}  # fetched now, and not again by each run
    tiles = takes_tiles(source.architecture or {})
    return PlannedModel(replace_fields(recipe, changes), recipe, source.context_length, tiles)


def runs_in_tiles(recipe: Recipe) -> bool:
    """Whether lean runs this recipe's model in tiles; False where its configuration is not to be had."""
    try:
        return planned_model(recipe).tiles
    except UsageError:
        return False


@dataclass(frozen=True)
class Pair:
    """What is asked.

    Attributes:
        model: the recipe, ready for planning; its `max_seq_length` is the wanted length.
        subject: how answers name it.
        recipe_given: whether it is the person's own recipe, or where the ladder starts for a model.
        limit, step: the longest sequence that is tried and what lengths are multiples of, in tokens.
        full: whether the breakdown, the largest batch, single changes and FLOPs are looked into too.
        fixed: fields set on the command line, which no proposal changes.
        keeps_length: the wanted length was asked for, and is what is proposed where it fits; otherwise the longest is.
    """

    model: PlannedModel
    card: virtual_gpu.Card
    subject: str
    recipe_given: bool
    limit: int
    step: int
    full: bool
    fixed: frozenset[str] = frozenset()
    keeps_length: bool = False
