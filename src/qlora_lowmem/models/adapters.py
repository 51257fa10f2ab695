"""The adapters that a recipe asks for, as PEFT makes them, and what of the base model is trained beside them: on the
meta device first, to count what will be trained.

PEFT 0.21 reads some names of modules as those of transformers 4, where experts were Linear modules: `gate_proj` of a
Qwen 3 mixture becomes adapters on the stacked parameters of all experts, and none on a dense MLP of that name
(peft/utils/transformers_weight_conversion.py). Full names and regular expressions are read so too, also by whoever
loads the adapter later; so such names are no targets here.
"""

import copy
import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from qlora_lowmem.models.adapter_files import PREFIX, ROWS
from qlora_lowmem.models.trusted import ADAPTER_WEIGHTS
from qlora_lowmem.recipe import Recipe


@dataclass(frozen=True)
class Adapted:
    """What of an adapted model is trained.

    Attributes:
        modules: full names of the modules that hold an adapter.
        parameters: how many numbers learn.
        base: what of the base model itself learns: `model.embed_tokens.weight`, `2 rows of model.embed_tokens`.
    """

    modules: tuple[str, ...]
    parameters: int
    base: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: PeftModel) -> "Adapted":
        """Counted on the model itself, on any device."""
        inner = model.get_base_model()
        names = tuple(name for name, module in inner.named_modules() if isinstance(module, LoraLayer))
        base = (
            f"{len(parameter)} row{'s' * (len(parameter) > 1)} of {name.partition(ROWS)[0]}" if ROWS in name else name
            for name, parameter in of_the_base(model).items()
        )
        return cls(names, sum(each.numel() for each in model.parameters() if each.requires_grad), tuple(base))

    @property
    def where(self) -> str:
        """In words: `adapters of 8 modules, and model.embed_tokens.weight`."""
        adapters = f"adapters of {len(self.modules)} modules"
        return f"{adapters}, and {', '.join(self.base)}" if self.base else adapters


def of_the_base(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """What is trained beside adapters, by its name in the base model."""
    named = model.get_base_model().named_parameters()
    return {name: each for name, each in named if each.requires_grad and ".lora_" not in name}


def lora_config(
    recipe: Recipe, names: Iterable[str], within: str = "", rows: Mapping[str, tuple[int, ...]] | None = None
) -> LoraConfig:
    """The section `lora` in PEFT's words.

    Args:
        names: the resolved target modules.
        within: the language model's name in a wrapper. PEFT is then given an expression, so that whoever loads the
            adapter into the whole wrapper adapts nothing else.
        rows: the modules of which rows are trained, and of which tokens.
    """
    inside = rf"{re.escape(within)}\.(.*\.)?({'|'.join(re.escape(name.removeprefix(f'{within}.')) for name in names)})"
    return LoraConfig(
        r=recipe.lora.lora_r,
        lora_alpha=recipe.lora.lora_alpha,
        use_rslora=recipe.lora.use_rslora,
        lora_dropout=recipe.lora.lora_dropout,
        target_modules=inside if within else list(names),
        trainable_token_indices={name: list(tokens) for name, tokens in rows.items()} if rows else None,
        task_type="CAUSAL_LM",
    )


def adapt(model: PreTrainedModel, config: LoraConfig, weights: Iterable[str] = (), **options: Any) -> PeftModel:
    """The model with its adapters, in which `weights`, parameters of the base model, are trained in place.

    Its `save_pretrained` writes those too, under the base model's own names.
    """
    adapted: Any = get_peft_model(model, config, **options)
    inner = adapted.get_base_model()
    head = inner.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.register_parameter("bias", None)  # TRL's fused loss asks for it, and the wrapper knows none
    weights = tuple(weights)
    for name in weights:
        inner.get_parameter(name).requires_grad_(True)
    adapted.save_pretrained = functools.partial(_save, adapted, weights)
    return adapted  # type: ignore[no-any-return]


def _save(
    adapted: PeftModel, weights: Iterable[str], folder: str, is_main_process: bool = True, **options: Any
) -> None:
    """As PEFT saves, with those weights of the base model that were trained, and no others: of an embedding that grew
    PEFT would save all of it, and once more for the LM head.
    """
    options["save_embedding_layers"] = False
    PeftModel.save_pretrained(adapted, folder, is_main_process=is_main_process, **options)
    if weights and is_main_process:
        file, inner = Path(folder) / ADAPTER_WEIGHTS, adapted.get_base_model()
        trained = {f"{PREFIX}{name}": inner.get_parameter(name).detach() for name in weights}
        save_file(load_file(file) | trained, file, metadata={"format": "pt"})


def foresee_adapters(skeleton: PreTrainedModel, config: LoraConfig, weights: Iterable[str] = ()) -> Adapted:
    """What `adapt` will train, from a model on the meta device, which stays as it is."""
    return Adapted.of(adapt(copy.deepcopy(skeleton), config, weights, low_cpu_mem_usage=True))


def becomes_experts(model: torch.nn.Module, leaf: str) -> bool:
    """Whether PEFT would take the name of a module for a mixture's experts or router, and adapt those instead."""
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # half of a pair that is one parameter now: gate_proj without up_proj
        return True
    return bool(config.target_parameters)
