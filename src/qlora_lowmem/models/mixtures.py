"""Mixtures of experts whose routers add a loss of their own: what TRL 1.16 must know to add it once a step.

TRL's fused LM head computes the loss that balances experts itself, as Mixtral's model does it
(`add_fused_lm_head`: trl/trainer/utils.py), whatever the model.
"""

import ast
import functools
import inspect
from typing import Any

from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func


def name_experts(model: Any) -> None:
    """Let a mixture's configuration say how many experts there are by the name that TRL asks for, `num_experts`."""
    text = model.config.get_text_config()
    if hasattr(text, "num_local_experts") and not hasattr(text, "num_experts"):
        text.num_experts = text.num_local_experts


def router_loss_coefficient(model: Any) -> float | None:
    """What weighs the routers' loss: None is the configuration's own number; 0 leaves it out of every kind of loss.

    It is left out where the model computes none (Llama 4) or another than Mixtral's (Doge), although its configuration
    has a weight for it: fused and full logits would train for different things. And of Granite hybrids, as in all runs
    that were ever recorded of them.
    """
    if model.config.model_type == "granitemoehybrid":
        return 0.0
    if not hasattr(model.config.get_text_config(), "router_aux_loss_coef"):
        return None
    own = getattr(inspect.getmodule(type(model)), "load_balancing_loss_func", None)
    return None if own is not None and _code(own) == _code(load_balancing_loss_func) else 0.0


@functools.cache
def _code(function: Any) -> str:
    return ast.dump(ast.parse(inspect.getsource(function)))
