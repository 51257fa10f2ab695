"""What of the base model itself is trained beside adapters: modules whole, and rows of the embeddings.

PEFT copies a module that it trains whole, and keeps and saves the copy once for every name that the weight is tied
under; loaded from one copy alone, PEFT 0.21 fails. So such weights are trained in place here, and saved under the base
model's own names, as PEFT saves an embedding that has grown: `PeftModel.from_pretrained` puts them into the base, where
what is tied to them follows. Rows are PEFT's own `trainable_token_indices`.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.refusals import quantised_by
from qlora_lowmem.models.targets import Targets, matches, own_name
from qlora_lowmem.models.vocabulary import index_of, indices_of
from qlora_lowmem.recipe import Recipe

_SAVE, _ROWS = "lora.modules_to_save", "lora.trainable_token_indices"


@dataclass(frozen=True)
class TrainedBase:
    """Names as the model has them.

    Attributes:
        weights: parameters that are trained whole; one that is tied under several names comes once.
        rows: the modules of which some rows are trained, and the tokens of those; what is tied follows.
        notes: what a person should know of them.
    """

    weights: tuple[str, ...] = ()
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def trained_base(
    model: PreTrainedModel, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, targets: Targets
) -> TrainedBase:
    """What a recipe trains of a model, on any device, that has rows for all tokens.

    Raises:
        UsageError: a name that is no module with weights, weights in 4 bits, a module that has an adapter; a token that
            the model does not know; both of them for one weight; what lean or FSDP cannot train.
    """
    lora, added = recipe.lora, recipe.data.added_tokens or ()
    asked, tokens = lora.modules_to_save or (), lora.trainable_token_indices or ()
    if not (asked or tokens or added):
        return TrainedBase()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        given = _SAVE if asked else _ROWS if tokens else "data.added_tokens"
        raise UsageError(f"{given}: FSDP shares out layers, and trains no part of the base model here. Use DDP instead")
    names = {id(parameter): name for name, parameter in reversed(list(model.named_parameters()))}
    whole = {
        id(parameter): names[id(parameter)]
        for name in asked
        for module in _modules(name, model, recipe, targets)
        for parameter in module.parameters()
    }
    indices = [*(index_of(each, tokenizer, model) for each in tokens), *indices_of(tokenizer, added)]
    ends = _embeddings(model)
    tied = len({id(module.weight) for module in ends.values()}) < len(ends)
    of_rows = dict(list(ends.items())[:1]) if tied else ends
    of_rows = {name: module for name, module in of_rows.items() if indices and id(module.weight) not in whole}
    if tokens and not of_rows:
        raise UsageError(f"{_ROWS}: {_SAVE} trains all rows of {' and '.join(ends)} already. Remove one of them")
    if tied and of_rows and not getattr(model.config, "tie_word_embeddings", False):
        raise UsageError(
            f"{_ROWS}: {' and '.join(ends)} are tied, and PEFT {peft.__version__} does not see that in this model's "
            f"configuration. Train all of them, with {_SAVE}: [{next(iter(ends))}]"
        )
    for name, module in of_rows.items():
        biased = getattr(module, "bias", None) is not None
        if biased or not isinstance(module, torch.nn.Embedding | torch.nn.Linear):
            raise UsageError(
                f"{_ROWS}: {name} is a {type(module).__name__}{' with a bias' * biased}, and PEFT {peft.__version__} "
                f"trains no rows of one. Train all of it, with {_SAVE}: [{name}]"
            )
    notes = []
    if tied and any(id(module.weight) in whole for module in ends.values()):
        notes.append(f"{_SAVE}: {' and '.join(ends)} are tied: one weight, which learns from both and is saved once")
    return TrainedBase(tuple(whole.values()), dict.fromkeys(of_rows, tuple(dict.fromkeys(indices))), tuple(notes))


def _embeddings(model: PreTrainedModel) -> dict[str, Any]:
    """The input embedding and the LM head by their names."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: end for end in ends for name, module in model.named_modules() if module is end}


def _modules(asked: str, model: PreTrainedModel, recipe: Recipe, targets: Targets) -> Iterator[torch.nn.Module]:
    """The modules of a name."""
    found = {name: module for name, module in model.named_modules() if matches(name, (asked,))}
    having = {name: module for name, module in found.items() if list(module.parameters())}
    ends = _embeddings(model)
    if not having:
        plain = (name for name, module in model.named_modules() if module._parameters and not _is_linear(module))
        wrong = "has no weights" if found else "is no module of this model"
        raise UsageError(
            f"{_SAVE}: {asked!r} {wrong}. These have some, beside layers that are adapted: "
            f"{', '.join(dict.fromkeys(map(own_name, [*ends, *plain])))}"
        )
    for name, module in having.items():
        inside = next((each for each in targets.modules if f"{each}.".startswith(f"{name}.")), None)
        if inside is not None:
            raise UsageError(
                f"{_SAVE}: {asked!r} would train {name} whole, and {inside} gets an adapter. Remove it, or leave what "
                "is inside to it with lora.exclude_modules"
            )
        linears = [f"{name}.{own}".rstrip(".") for own, each in module.named_modules() if _is_linear(each)]
        packed = next((each for each in linears if _in_4_bits(each, model, recipe)), None)
        if packed is not None:
            raise UsageError(
                f"{_SAVE}: {asked!r}, and {packed} is stored in 4 bits, which do not learn. Give it an adapter "
                "(lora.target_modules), or set quantization.load_in_4bit to false"
            )
        if recipe.lean.lean and name not in ends:
            raise UsageError(
                f"{_SAVE}: {asked!r}, and lean trains only {' and '.join(ends)} of the base model, not what its layers "
                "are made of. Remove it, or set lean.lean to false"
            )
        yield module


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D)


def _in_4_bits(linear: str, model: PreTrainedModel, recipe: Recipe) -> bool:
    packs = recipe.quantization.load_in_4bit or quantised_by(model.config) is not None
    return packs and not matches(linear, get_keys_to_not_convert(model))
