"""Whose failure an exception of a forward pass is: ours, or the model's, whose code cannot run what `config.json` says.

That is not guessed from where it was raised, for what we hand over may be wrong. The model is made again as it is in
transformers, without memory, adapters, trainer or tiles, and asked for a few tokens. If that fails at the same line of
its code, nothing of ours had a part in it.
"""

import logging
import traceback

import torch
import transformers
from torch._subclasses import fake_tensor

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.loading import skeleton
from qlora_lowmem.models.sources import ModelSource
from qlora_lowmem.recipe import Recipe

_TOKENS = 8
_MODELS = ("/transformers/models/", "/transformers_modules/")  # and the code of a model's own repository
# What only tensors without values raise.
_NO_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
    NotImplementedError,
)


def own_failure(recipe: Recipe, source: ModelSource, error: Exception) -> UsageError | None:
    """What is told in the place of `error` if the model alone raises it too; else None."""
    place = _line_of_model(error)
    if place is None:
        return None
    logger = logging.getLogger(fake_tensor.__name__)
    before = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs what it raises
    try:
        model = skeleton(recipe, source)
        tokens = torch.zeros((1, _TOKENS), dtype=torch.long, device="meta")
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):  # transformers asks masks for values
            model(input_ids=tokens, use_cache=False)
    except _NO_VALUES:
        return None
    except Exception as alone:
        if _line_of_model(alone) != place:
            return None
    else:
        return None
    finally:
        logger.setLevel(before)
    return UsageError(
        f"base.model: the forward pass of {recipe.base.model!r} fails in the code of its model, {place} "
        f"({type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}; transformers "
        f"{transformers.__version__}). {type(model).__name__} does so alone too, with nothing of a recipe: a field of "
        "its config.json is missing or does not go with another. Compare it with the one that its makers publish"
    )


def _line_of_model(error: BaseException) -> str | None:
    """The innermost line of a model's code that it came through, `modeling_dbrx.py:205 forward`."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if any(part in frame.filename for part in _MODELS):
            return f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}"
    return None
