"""A causal language model whose decoder layers run in tiles, from its inputs to what its forward returns.

This file and `layers.py` are the only ones that know transformers' decoders. What TRL's trainer reads of its fused LM
head is made here too.
"""

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_outputs
from transformers.masking_utils import create_recurrent_attention_mask

from qlora_lowmem.lean.checkpointing import run_layers
from qlora_lowmem.lean.embeddings import QuantisedHead
from qlora_lowmem.lean.families import Family
from qlora_lowmem.lean.layers import SequenceInputs, tiled_layer, window_of
from qlora_lowmem.lean.loss import IGNORE_INDEX, DenseHead, Head, HeadOptions, token_log_probs
from qlora_lowmem.lean.norms import rms_norm
from qlora_lowmem.lean.options import LeanOptions
from qlora_lowmem.lean.tiles import TilePlan
from qlora_lowmem.lean.token_rows import trained_rows


@dataclass
class _Lean:
    """Kept on a patched module. `plain_forward` is what its forward was; without a family only the loss is ours."""

    family: Family | None
    options: LeanOptions
    plain_forward: Any


def patch(causal: Any, family: Family | None, options: LeanOptions) -> None:
    """Give a causal language model, and of a family its backbone, the forwards of this module. Not reversible."""
    forwards = [(causal, _causal_forward)]
    if family is not None:
        forwards.append((causal.model, _backbone_forward))
    for module, forward in forwards:
        again = module.__dict__.get("_lean")
        plain = module.forward if again is None else again.plain_forward
        module._lean = _Lean(family, options, plain)
        # The signature stays that of the class: trainers read it to choose the columns that they pass.
        wrapped = functools.wraps(type(module).forward)(forward)
        module.forward = types.MethodType(wrapped, module)


def _wants_more(module: Any, kwargs: dict[str, Any]) -> bool:
    """Calls for what is not made here: caches, captured hidden states; without a family, router logits."""
    if kwargs.get("past_key_values") is not None:
        return True
    if module._lean.family is None:
        return bool(kwargs.get("output_router_logits"))
    captured = ("output_hidden_states", "output_attentions")
    return bool(kwargs.get("use_cache")) or any(kwargs.get(n) or getattr(module.config, n, False) for n in captured)


def _sees_less(
    module: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> bool:
    """Calls in which a token does not see all before it: custom masks, packed samples, more tokens than a window."""
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        return True
    if any(kwargs.get(name) is not None for name in module._lean.family.plain_keywords):
        return True
    window, given = window_of(module.config), input_ids if input_ids is not None else kwargs.get("inputs_embeds")
    return window is not None and given is not None and given.shape[1] > window


def _decode(
    backbone: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    owns_gradient: bool,
    **kwargs: Any,
) -> Tensor:
    """Hidden states (batch, seq, hidden) before the final norm."""
    if kwargs.get("output_router_logits") and any(getattr(layer, "has_experts", False) for layer in backbone.layers):
        raise ValueError(
            "output_router_logits=True: lean runs experts tile by tile and does not collect router logits; "
            "set router_aux_loss_coef=0.0 (and output_router_logits=False in the model's config)"
        )
    embeds = kwargs.get("inputs_embeds")
    if (input_ids is None) == (embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    x = backbone.embed_tokens(input_ids) if embeds is None else embeds
    multiplier = getattr(backbone, "embedding_multiplier", None)
    if multiplier is not None:
        x = x * multiplier
    # None without padding. Asked of transformers' own function, so that both decide alike.
    mask = create_recurrent_attention_mask(backbone.config, x, attention_mask)
    cos = sin = None
    if backbone.rotary_emb is not None:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = backbone.rotary_emb(x, positions)
    inputs = SequenceInputs(None if mask is None else mask.bool(), cos, sin)
    options = backbone._lean.options
    plan = TilePlan(*options.tiles_for(x.shape[1]))
    layers, plans = [], []
    for layer in backbone.layers:
        drops = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in layer.modules())
        # Drawn from PyTorch's generator, so that a seeded run stays reproducible. 2 ** 40 leaves room for positions.
        plans.append(replace(plan, seed=int(torch.randint(2**40, ()).item())) if drops else plan)
        layers.append(tiled_layer(layer, inputs, options))
    return run_layers(layers, x, plans, options.checkpointing, owns_gradient)


def _backbone_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    cached_by_default = kwargs.get("use_cache") is None and not self.training and not torch.is_grad_enabled()
    if cached_by_default or _wants_more(self, kwargs) or _sees_less(self, *args, **kwargs):
        return self._lean.plain_forward(*args, **kwargs)
    hidden = _decode(self, *args, owns_gradient=False, **kwargs)
    normed = rms_norm(hidden, self.norm.weight, self.norm.variance_epsilon)
    return getattr(modeling_outputs, self._lean.family.backbone_output)(last_hidden_state=normed)


def _causal_forward(
    self: Any,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    fused_lm_head: bool = False,
    **kwargs: Any,
) -> Any:
    head = head_of(self.get_output_embeddings())
    unlabelled = labels is None and shift_labels is None
    if unlabelled or head is None or _wants_more(self, kwargs):
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        return self._lean.plain_forward(*args, **kwargs, **({"fused_lm_head": True} if fused_lm_head else {}))
    hidden, norm, output = (_own_hidden if self._lean.family is None else _tiled_hidden)(self, *args, **kwargs)
    scaling = getattr(self.config, "logits_scaling", None) or 1.0
    options = HeadOptions(1 / scaling, self._lean.options.loss_tile_bytes, entropy=fused_lm_head)
    loss, scores = _score(hidden, labels, shift_labels, num_items_in_batch, head, norm, options)
    if fused_lm_head:
        # TRL's own class, from its own module, which is loaded since only it knows the keyword.
        return sys.modules["trl.trainer.utils"].FusedCausalLMOutput(loss=loss, **scores)
    output["loss"] = loss
    return output


def _own_hidden(causal: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Callable[[Tensor], Tensor], Any]:
    """Normed hidden states of the model's own backbone, no norm, and the output that the loss belongs into."""
    output = getattr(causal, causal.base_model_prefix)(*args, **kwargs | {"use_cache": False, "return_dict": True})
    return output.last_hidden_state, _as_is, output


def _tiled_hidden(causal: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Callable[[Tensor], Tensor], Any]:
    """Hidden states, the norm that they still need, and the output that the loss belongs into."""
    backbone = causal.model
    output = getattr(modeling_outputs, causal._lean.family.causal_output)()
    if _sees_less(causal, *args, **kwargs):
        plain = backbone._lean.plain_forward(*args, **kwargs | {"use_cache": False})
        return plain.last_hidden_state, _as_is, output
    hidden = _decode(backbone, *args, owns_gradient=True, **kwargs)
    norm = functools.partial(rms_norm, weight=backbone.norm.weight, eps=backbone.norm.variance_epsilon)
    if backbone.norm.weight.requires_grad:
        return norm(hidden), _as_is, output
    return hidden, norm, output


def _as_is(rows: Tensor) -> Tensor:
    return rows * 1  # a new node, so that a gradient with respect to rows exists


def head_of(module: Any) -> Head | None:
    """An LM head as something to multiply by in tiles, or None where it is something else (adapted, biased)."""
    if isinstance(module, QuantisedHead):
        return module.table
    adapter = getattr(module, "token_adapter", None)
    if adapter is not None:
        head = head_of(adapter.base_layer)
        return replace(head, trained=trained_rows(module)) if isinstance(head, DenseHead) else None
    if type(module) is nn.Linear and module.bias is None:
        return DenseHead(module.weight)
    return None


def _score(
    hidden: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    items: Tensor | int | None,
    head: Head,
    norm: Callable[[Tensor], Tensor],
    options: HeadOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, divided by `items` or else by the labels here, and what TRL's `add_fused_lm_head` gives besides.

    `shift_labels` are aligned with what predicts them already; TRL's scores are one shorter than other labels.
    """
    scored, columns = shift_labels, slice(None)
    if scored is None:
        assert labels is not None
        # The last position predicts nothing. The hidden states stay whole: a slice would be a copy.
        scored, columns = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX), slice(-1)
    log_probs, entropies, is_top1 = token_log_probs(hidden, scored, head, norm, options)
    mask = scored != IGNORE_INDEX
    count = items if items is not None else mask.sum()
    loss = -log_probs.sum() / (count.to(log_probs.device) if isinstance(count, Tensor) else count)
    scores = {"log_probs": log_probs, "entropy": entropies, "is_top1": is_top1, "label_mask": mask}
    return loss, {name: score[:, columns] for name, score in scores.items()}
