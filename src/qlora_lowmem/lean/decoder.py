"""A causal language model whose decoder layers run in tiles, from its inputs to what its forward returns.

This file and `layers.py` are the only ones that know transformers' decoders, and they know them by what the model
brings: the classes that a model's own `forward` would return are looked up in the module that its class comes from.
What TRL's trainer reads of its fused LM head is made here too.
"""

import functools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_recurrent_attention_mask

from qlora_lowmem.lean.checkpointing import run_layers
from qlora_lowmem.lean.embeddings import QuantisedHead
from qlora_lowmem.lean.layers import Family, SequenceInputs
from qlora_lowmem.lean.loss import IGNORE_INDEX, DenseHead, Head, HeadOptions, token_log_probs
from qlora_lowmem.lean.norms import rms_norm
from qlora_lowmem.lean.options import LeanOptions
from qlora_lowmem.lean.tiles import TiledLayer, TilePlan


def _tiled_layers(
    backbone: Any, family: Family, inputs: SequenceInputs, options: LeanOptions, seq: int
) -> tuple[list[TiledLayer], list[TilePlan]]:
    """The decoder layers for one forward of `seq` tokens, with the plan of each."""
    plan = TilePlan(*options.tiles_for(seq))
    layers, plans = [], []
    for layer in backbone.layers:
        drops = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in layer.modules())
        # Drawn from PyTorch's generator, so that a seeded run stays reproducible. 2 ** 40 leaves room for positions.
        plans.append(replace(plan, seed=int(torch.randint(2**40, ()).item())) if drops else plan)
        layers.append(family.tiled_layer(layer, inputs, options))
    return layers, plans


def _modeling(module: nn.Module) -> Any:
    """The module of transformers that a model's class comes from."""
    return sys.modules[type(module).__module__]


@dataclass
class _Lean:
    """Kept on a patched module. `plain_forward` is what its forward was."""

    family: Family
    options: LeanOptions
    plain_forward: Any


def _wants_more(module: Any, kwargs: dict[str, Any]) -> bool:
    """Calls for what tiles do not make: caches, captured hidden states."""
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        return True
    captured = ("output_hidden_states", "output_attentions")
    return any(kwargs.get(name) or getattr(module.config, name, False) for name in captured)


def _sees_less(module: Any, ids: Tensor | None, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Calls in which a token does not see all before it: custom masks, packed samples, more tokens than a window."""
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        return True
    family = module._lean.family
    if any(kwargs.get(name) is not None for name in family.plain_keywords):
        return True
    window, given = family.window(module.config), ids if ids is not None else kwargs.get("inputs_embeds")
    return window is not None and given is not None and given.shape[1] > window


def _decode(
    backbone: Any, input_ids: Tensor | None, attention_mask: Tensor | None, owns_gradient: bool, **kwargs: Any
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
    layers, plans = _tiled_layers(backbone, backbone._lean.family, inputs, options, x.shape[1])
    return run_layers(layers, x, plans, options.checkpointing, owns_gradient)


def _backbone_forward(
    self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    cached_by_default = kwargs.get("use_cache") is None and not self.training and not torch.is_grad_enabled()
    elsewhere = _wants_more(self, kwargs) or _sees_less(self, input_ids, attention_mask, kwargs)
    if cached_by_default or elsewhere:
        return self._lean.plain_forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    hidden = _decode(self, input_ids, attention_mask, owns_gradient=False, **kwargs)
    normed = rms_norm(hidden, self.norm.weight, self.norm.variance_epsilon)
    return getattr(_modeling(self), self._lean.family.backbone_output)(last_hidden_state=normed)


def _causal_forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    fused_lm_head: bool = False,
    **kwargs: Any,
) -> Any:
    head = head_of(self.lm_head)
    unlabelled = labels is None and shift_labels is None
    if unlabelled or head is None or _wants_more(self, kwargs):
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if fused_lm_head:
            kwargs["fused_lm_head"] = True
        return self._lean.plain_forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    backbone = self.model
    scaling = getattr(self.config, "logits_scaling", 1.0)
    options = HeadOptions(1 / scaling, self._lean.options.loss_tile_bytes, entropy=fused_lm_head)
    norm: Callable[[Tensor], Tensor] = _as_is
    if _sees_less(self, input_ids, attention_mask, kwargs):
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        hidden = backbone._lean.plain_forward(**inputs, **kwargs | {"use_cache": False}).last_hidden_state
    else:
        hidden = _decode(backbone, input_ids, attention_mask, owns_gradient=True, **kwargs)
        if backbone.norm.weight.requires_grad:
            hidden = rms_norm(hidden, backbone.norm.weight, backbone.norm.variance_epsilon)
        else:
            norm = functools.partial(rms_norm, weight=backbone.norm.weight, eps=backbone.norm.variance_epsilon)
    scored = score(hidden, labels, shift_labels, num_items_in_batch, head, norm, options)
    if fused_lm_head:
        return scored.fused_output()
    return getattr(_modeling(self), self._lean.family.causal_output)(loss=scored.loss)


def _as_is(rows: Tensor) -> Tensor:
    return rows * 1  # a new node, so that a gradient with respect to rows exists


def patch(causal: Any, family: Family, options: LeanOptions) -> None:
    """Give a causal language model and its backbone the forwards of this module. Not reversible."""
    backbone = causal.model
    for module, forward in ((backbone, _backbone_forward), (causal, _causal_forward)):
        again = module.__dict__.get("_lean")
        plain = module.forward if again is None else again.plain_forward
        module._lean = _Lean(family, options, plain)
        # The signature stays that of the class: trainers read it to choose the columns that they pass.
        wrapped = functools.wraps(type(module).forward)(forward)
        module.forward = types.MethodType(wrapped, module)


@dataclass(frozen=True)
class Scored:
    """Every label's score, (batch, seq) each, and the loss. `mask` is where there is a label."""

    loss: Tensor
    log_probs: Tensor
    entropies: Tensor
    is_top1: Tensor
    mask: Tensor
    columns: slice

    def fused_output(self) -> Any:
        """The output of TRL's `add_fused_lm_head`, whose labels are one shorter than the sequence unless shifted."""
        # TRL's own class, from its own module, which is loaded since only it knows the keyword.
        return sys.modules["trl.trainer.utils"].FusedCausalLMOutput(
            loss=self.loss,
            log_probs=self.log_probs[:, self.columns],
            entropy=self.entropies[:, self.columns],
            is_top1=self.is_top1[:, self.columns],
            label_mask=self.mask[:, self.columns],
        )


def head_of(module: Any) -> Head | None:
    """An LM head as something to multiply by in tiles, or None where it is something else (adapted, biased)."""
    if isinstance(module, QuantisedHead):
        return module.table
    if type(module) is nn.Linear and module.bias is None:
        return DenseHead(module.weight)
    return None


def score(
    hidden: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    items: Tensor | int | None,
    head: Head,
    norm: Callable[[Tensor], Tensor],
    options: HeadOptions,
) -> Scored:
    """Score labels, (batch, seq) each, of which `shift_labels` are aligned with what predicts them already.

    Args:
        hidden: (batch, seq, hidden), before `norm`.
        items: labels of the whole step, by which the loss is divided; None divides by those here.
        norm: as in `token_log_probs`.
    """
    scored = shift_labels
    if scored is None:
        assert labels is not None
        # The last position predicts nothing. The hidden states stay whole: a slice would be a copy.
        scored = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    weight = head.weight if isinstance(head, DenseHead) and head.weight.requires_grad else None
    log_probs, entropies, is_top1 = token_log_probs(hidden, scored, head, norm, options, weight)
    mask = scored != IGNORE_INDEX
    count = items if items is not None else mask.sum()
    loss = -log_probs.sum() / (count.to(log_probs.device) if isinstance(count, Tensor) else count)
    columns = slice(None) if shift_labels is not None else slice(0, -1)
    return Scored(loss, log_probs, entropies, is_top1, mask, columns)
