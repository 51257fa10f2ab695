"""A causal language model whose decoder layers run in tiles: what the families of models share, and Llama's.

This file and `granite.py` are the only ones that know transformers' decoders, and they know them by what the model
brings: the classes that a model's own `forward` would return are looked up in the module that its
class comes from. Projections are called as the modules that they are, so that PEFT's LoRA and bitsandbytes' 4-bit
layers keep their own semantics.
"""

import functools
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_recurrent_attention_mask

from qlora_lowmem.lean.attention import KeyValues, rotate
from qlora_lowmem.lean.checkpointing import run_layers
from qlora_lowmem.lean.loss import HeadOptions, head_of, score
from qlora_lowmem.lean.norms import rms_norm
from qlora_lowmem.lean.options import LeanOptions
from qlora_lowmem.lean.swiglu import swiglu_of
from qlora_lowmem.lean.tiles import Carry, TiledLayer, TilePlan


@dataclass(frozen=True)
class SequenceInputs:
    """What all layers of one forward see.

    valid is (batch, seq) bool or None without padding; cos and sin are (1 or batch, seq, head_dim) or None.
    """

    valid: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


def _no_window(config: Any) -> None:
    del config


@dataclass(frozen=True)
class Family:
    """Models whose decoders are built alike.

    Attributes:
        tiled_layer: a decoder layer of theirs as a `TiledLayer`, for one forward.
        backbone_output, causal_output: classes in the model's own module that its forwards return.
        plain_keywords: keywords whose calls take the decoder's own forward.
        window: tokens that the narrowest of a model's layers sees, by its config; None where all see everything.
    """

    tiled_layer: Callable[[Any, SequenceInputs, LeanOptions], TiledLayer]
    backbone_output: str
    causal_output: str
    plain_keywords: tuple[str, ...]
    window: Callable[[Any], int | None] = _no_window


def trainable(*modules: nn.Module | None) -> list[Tensor]:
    """Parameters of the modules that are trained."""
    return [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]


class DecoderLayer:
    """A pre-norm decoder layer: the norms, the residuals and the feed-forward half, which all layers share.

    Args:
        layer: transformers' own.
        inputs: of this forward.
        mixer: the module between the first norm and the first residual.
        feed_forward: what stands between the second norm and the second residual, of (batch, tile, hidden).
        feed_forward_modules: those that it calls.
    """

    def __init__(
        self,
        layer: Any,
        inputs: SequenceInputs,
        mixer: nn.Module,
        feed_forward: Callable[[Tensor], Tensor],
        feed_forward_modules: Sequence[nn.Module | None],
    ) -> None:
        self.layer, self.inputs = layer, inputs
        self._feed_forward = feed_forward
        self._residual_multiplier = getattr(layer, "residual_multiplier", 1.0)
        self.mixer_parameters: Sequence[Tensor] = trainable(layer.input_layernorm, mixer)
        self.feed_forward_parameters: Sequence[Tensor] = trainable(
            layer.post_attention_layernorm, *feed_forward_modules
        )

    def residual(self, x: Tensor, update: Tensor) -> Tensor:
        """x plus the update. One rounding, and no tensor for the product."""
        return torch.add(x, update.to(x.dtype), alpha=self._residual_multiplier)

    def normed(self, x: Tensor) -> Tensor:
        """What the mixer receives."""
        norm = self.layer.input_layernorm
        return rms_norm(x, norm.weight, norm.variance_epsilon)

    def feed_forward(self, h: Tensor) -> Tensor:
        """As `TiledLayer` says."""
        norm = self.layer.post_attention_layernorm
        return self.residual(h, self._feed_forward(rms_norm(h, norm.weight, norm.variance_epsilon)))


class AttentionLayer(DecoderLayer):
    """Causal attention to everything before. No carry: tiles share the keys and values of the whole sequence."""

    def begin(self, x: Tensor) -> tuple[KeyValues, Carry]:
        """As `TiledLayer` says."""
        return KeyValues(x.shape[1], self.layer.self_attn.scaling, self.inputs.valid), ()

    def _heads(self, name: str, normed: Tensor) -> Tensor:
        """(batch, tile, heads, head_dim) of the projection `name`, normed where the family norms heads (Qwen 3)."""
        attention = self.layer.self_attn
        heads: Tensor = getattr(attention, f"{name}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{name}_norm", None)
        return heads if norm is None else rms_norm(heads, norm.weight, norm.variance_epsilon)

    def _keys_values(self, normed: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return self._rotated(self._heads("k", normed), start), self._heads("v", normed)

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        cos, sin = self.inputs.cos, self.inputs.sin
        # SmolLM 3 rotates in some of its layers only.
        if cos is None or sin is None or not getattr(self.layer.self_attn, "use_rope", True):
            return x
        span = slice(start, start + x.shape[1])
        return rotate(x, cos[:, span], sin[:, span])

    def mix(self, x: Tensor, start: int, shared: KeyValues, carry: Carry) -> tuple[Tensor, Carry]:
        """As `TiledLayer` says."""
        normed = self.normed(x)
        k, v = self._keys_values(normed, start)
        q = self._rotated(self._heads("q", normed), start)
        shared.write(start, k.detach(), v.detach())
        out = shared.attend(start, q, k, v).flatten(2)
        return self.residual(x, self.layer.self_attn.o_proj(out)), carry

    def advance(self, x: Tensor, start: int, shared: KeyValues, carry: Carry) -> Carry:
        """As `TiledLayer` says."""
        shared.write(start, *self._keys_values(self.normed(x), start))
        return carry


def _swiglu_feed_forward(mlp: Any, x: Tensor) -> Tensor:
    update: Tensor = mlp.down_proj(swiglu_of(mlp.gate_proj(x), mlp.up_proj(x)))
    return update


def _llama_layer(layer: Any, inputs: SequenceInputs, options: LeanOptions) -> TiledLayer:
    del options
    return AttentionLayer(
        layer, inputs, layer.self_attn, functools.partial(_swiglu_feed_forward, layer.mlp), (layer.mlp,)
    )


def _llama_window(config: Any) -> int | None:
    # Mistral has one window for all layers where its config names no types; the others list a type a layer.
    types = getattr(config, "layer_types", None)
    slides = types is None or "sliding_attention" in types
    return getattr(config, "sliding_window", None) if slides else None


# Llama and the families built as it is: causal attention and a SwiGLU, each after an RMSNorm. Mirrors
# `LlamaDecoderLayer.forward`, `LlamaModel.forward` and `LlamaForCausalLM.forward`. What its relatives add is read from
# their modules: biases (Qwen 2), norms of heads (Qwen 3), layers without rotation (SmolLM 3), multipliers (Granite).
# Packed samples are told apart by their positions, which are given in no other case: the model's own masks keep them.
LLAMA = Family(
    _llama_layer,
    backbone_output="BaseModelOutputWithPast",
    causal_output="CausalLMOutputWithPast",
    window=_llama_window,
    plain_keywords=("position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"),
)


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
