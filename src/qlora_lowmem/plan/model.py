"""What a recipe's model is, as far as memory depends on it: the shapes, never the values, of its weights."""

from dataclasses import dataclass
from pathlib import Path

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.probes.advice import TILED_MODEL_TYPE
from qlora_lowmem.recipe import SYNTHETIC, Recipe
from qlora_lowmem.recipe.io import replace_fields


@dataclass(frozen=True)
class PlannedModel:
    """A recipe whose model needs no download, and what the ladder asks of the model.

    Attributes:
        recipe: with random weights where the architecture is at hand, and synthetic samples.
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

    Weights become random, since memory does not depend on their values: a known architecture and a local folder need
    nothing else, of a model on the hub only `config.json` is fetched. A GGUF file, and a model that brings its own
    code, stay as they are.

    Raises:
        UsageError: no such model; a model on the hub whose configuration cannot be fetched.
    """
    planned = replace_fields(recipe, {"data": SYNTHETIC, "device": "virtual"})
    keeps_its_weights = recipe.base.model.lower().endswith(".gguf") or recipe.base.trust_remote_code
    if recipe.base.weights == "pretrained" and not keeps_its_weights:
        planned = _with_random_weights(planned)
    source = resolve_model(planned.base.model, planned.base.weights)
    return PlannedModel(planned, recipe, source.context_length, source.model_type == TILED_MODEL_TYPE)


def _with_random_weights(recipe: Recipe) -> Recipe:
    try:
        found = resolve_model(recipe.base.model, "random")
    except UsageError:
        found = resolve_model(recipe.base.model, "pretrained")
    if found.architecture is not None:
        return replace_fields(recipe, {"weights": "random"})
    assert found.hub_id is not None  # a folder or a known name has its architecture
    folder = _configuration_folder(found.hub_id, recipe.base.revision)
    return replace_fields(recipe, {"model": folder, "revision": None, "weights": "random"})


def _configuration_folder(hub_id: str, revision: str | None) -> str:
    """A folder that holds the `config.json` of a model on the hub.

    Raises:
        UsageError: it cannot be fetched.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return str(Path(hf_hub_download(hub_id, "config.json", revision=revision)).parent)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"base.model: the configuration of {hub_id!r} could not be fetched ({reason}). Planning needs its "
            "config.json, not its weights: check the name and the connection to the hub, log in if the model is gated, "
            "or give a local folder that holds config.json"
        ) from None
