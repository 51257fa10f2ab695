"""The adapters that a recipe asks for, as PEFT makes them: on the meta device first, to count what will be trained.

PEFT 0.21 reads some names of modules as those of transformers 4, where experts were Linear modules: `gate_proj` of a
Qwen 3 mixture becomes adapters on the stacked parameters of all experts, and none on a dense MLP of that name
(peft/utils/transformers_weight_conversion.py). Full names and regular expressions are read so too, also by whoever
loads the adapter later; so such names are no targets here.
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel

from qlora_lowmem.recipe import Recipe


@dataclass(frozen=True)
class Adapted:
    """What of an adapted model is trained.

    Attributes:
        modules: full names of the modules that hold an adapter.
        parameters: how many numbers learn.
    """

    modules: tuple[str, ...]
    parameters: int

    @classmethod
    def of(cls, model: PeftModel) -> "Adapted":
        """Counted on the model itself, on any device."""
        names = (name for name, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer))
        return cls(tuple(names), sum(each.numel() for each in model.parameters() if each.requires_grad))


def lora_config(recipe: Recipe, names: Iterable[str], within: str = "") -> LoraConfig:
    """The section `lora` in PEFT's words.

    Args:
        names: the resolved target modules.
        within: the language model's name in a wrapper. PEFT is then given an expression, so that whoever loads the
            adapter into the whole wrapper adapts nothing else.
    """
    inside = rf"{re.escape(within)}\.(.*\.)?({'|'.join(re.escape(name.removeprefix(f'{within}.')) for name in names)})"
    return LoraConfig(
        r=recipe.lora.lora_r,
        lora_alpha=recipe.lora.lora_alpha,
        use_rslora=recipe.lora.use_rslora,
        lora_dropout=recipe.lora.lora_dropout,
        target_modules=inside if within else list(names),
        task_type="CAUSAL_LM",
    )


def foresee_adapters(skeleton: PreTrainedModel, config: LoraConfig) -> Adapted:
    """What `get_peft_model` will train, from a model on the meta device, which stays as it is."""
    return Adapted.of(get_peft_model(copy.deepcopy(skeleton), config, low_cpu_mem_usage=True))


def becomes_experts(model: torch.nn.Module, leaf: str) -> bool:
    """Whether PEFT would take the name of a module for a mixture's experts or router, and adapt those instead."""
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # half of a pair that is one parameter now: gate_proj without up_proj
        return True
    return bool(config.target_parameters)
