"""Granite 4.0 hybrids (and their dense siblings) in tiles: the adapter between transformers' modules and this package.

The only file that knows transformers, and it knows it by what the model brings: the classes and functions that a
model's own `forward` would use are looked up in the module that its class comes from. Projections are called as the
modules that they are, so that PEFT's LoRA and bitsandbytes' 4-bit layers keep their own semantics. Mirrors
`GraniteMoeHybridDecoderLayer.forward`, `GraniteMoeHybridModel.forward` and `GraniteMoeHybridForCausalLM.forward`.
"""

import functools
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import scan
from .attention import KeyValues, rotate
from .checkpointing import run_layers
from .convolution import causal_conv_silu, next_tail
from .loss import HeadOptions
from .norms import gated_rms_norm, rms_norm
from .options import LeanOptions
from .scan_chunks import ScanOptions
from .scoring import head_of, score
from .swiglu import swiglu
from .tiles import Carry, TilePlan

MODEL_CLASS = "GraniteMoeHybridForCausalLM"


@dataclass(frozen=True)
class SequenceInputs:
    """What all layers of one forward see.

    valid is (batch, seq) bool or None without padding; cos and sin are (1 or batch, seq, head_dim) or None.
    """

    valid: Tensor | None
    cos: Tensor | None
    sin: Tensor | None


def _trainable(*modules: nn.Module | None) -> list[Tensor]:
    return [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]


class _Layer:
    """The feed-forward half, which all layers share."""

    def __init__(self, layer: Any, inputs: SequenceInputs) -> None:
        self.layer, self.inputs = layer, inputs
        mixer = layer.self_attn if layer.mamba is None else layer.mamba
        self.mixer_parameters: Sequence[Tensor] = _trainable(layer.input_layernorm, mixer)
        self.feed_forward_parameters: Sequence[Tensor] = _trainable(
            layer.post_attention_layernorm, layer.shared_mlp, layer.block_sparse_moe
        )

    def _residual(self, x: Tensor, update: Tensor) -> Tensor:
        # One rounding, and no tensor for the product.
        return torch.add(x, update.to(x.dtype), alpha=self.layer.residual_multiplier)

    def feed_forward(self, h: Tensor) -> Tensor:
        norm, mlp = self.layer.post_attention_layernorm, self.layer.shared_mlp
        x = rms_norm(h, norm.weight, norm.variance_epsilon)
        update = mlp.output_linear(swiglu(mlp.input_linear(x)))
        if self.layer.has_experts:
            update = self.layer.block_sparse_moe(x) + update
        return self._residual(h, update)

    def _normed(self, x: Tensor) -> Tensor:
        norm = self.layer.input_layernorm
        return rms_norm(x, norm.weight, norm.variance_epsilon)


def _scan_module(options: LeanOptions) -> Any:
    """`scan.py`, or `scan_triton.py` where `apply_lean` has chosen it."""
    if options.scan != "triton":
        return scan
    from . import scan_triton  # needs an optional package

    return scan_triton


class MambaLayer(_Layer):
    """Carry: the convolution's last d_conv - 1 inputs (batch, d_conv - 1, conv_dim) and the scan's state (batch, heads,
    head_dim, d_state)."""

    def __init__(self, layer: Any, inputs: SequenceInputs, options: LeanOptions) -> None:
        super().__init__(layer, inputs)
        low, high = layer.mamba.time_step_limit
        self.scan_options = ScanOptions(options.scan_chunk_length, (float(low), float(high)))
        self.scan: Any = _scan_module(options)

    def begin(self, x: Tensor) -> tuple[None, Carry]:
        mixer, batch = self.layer.mamba, x.shape[0]
        tail = x.new_zeros(batch, mixer.conv_kernel_size - 1, mixer.conv_dim)
        state = torch.zeros(
            batch, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, dtype=torch.float32, device=x.device
        )
        return None, (tail, state)

    def _scan_inputs(self, x: Tensor, start: int, tail: Tensor) -> tuple[Tensor, ...]:
        """gate, then x, dt, A, B and C of the scan, and the next tail."""
        mixer = self.layer.mamba
        valid = self.inputs.valid
        mask = None if valid is None else valid[:, start : start + x.shape[1], None]
        x = self._normed(x)
        projected = mixer.in_proj(x if mask is None else x * mask)
        gate, mixed, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
        convolved = causal_conv_silu(mixed, tail, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
        if mask is not None:
            convolved = convolved * mask
        width = mixer.n_groups * mixer.ssm_state_size
        xs, b, c = convolved.split([mixer.intermediate_size, width, width], -1)
        return (
            gate,
            xs.unflatten(-1, (mixer.num_heads, mixer.head_dim)),
            dt,
            -torch.exp(mixer.A_log.float()),
            b.unflatten(-1, (mixer.n_groups, -1)),
            c.unflatten(-1, (mixer.n_groups, -1)),
            next_tail(mixed, tail),
        )

    def mix(self, x: Tensor, start: int, shared: Any, carry: Carry) -> tuple[Tensor, Carry]:
        del shared
        mixer = self.layer.mamba
        tail, state = carry
        gate, xs, dt, a, b, c, tail = self._scan_inputs(x, start, tail)
        y, state = self.scan.mamba2_scan(xs, dt, a, b, c, mixer.D, mixer.dt_bias, state, self.scan_options)
        norm = mixer.norm
        # The projection receives what it receives in the plain model: the residual stream's dtype.
        y = gated_rms_norm(y.flatten(2), gate, norm.weight, norm.variance_epsilon, norm.group_size, x.dtype)
        return self._residual(x, mixer.out_proj(y)), (tail, state)

    def advance(self, x: Tensor, start: int, shared: Any, carry: Carry) -> Carry:
        del shared
        _, xs, dt, a, b, _, tail = self._scan_inputs(x, start, carry[0])
        return tail, self.scan.advance_state(xs, dt, a, b, self.layer.mamba.dt_bias, carry[1], self.scan_options)


class AttentionLayer(_Layer):
    """No carry: tiles share the keys and values of the whole sequence."""

    def begin(self, x: Tensor) -> tuple[KeyValues, Carry]:
        return KeyValues(x.shape[1], self.layer.self_attn.scaling, self.inputs.valid), ()

    def _keys_values(self, normed: Tensor, start: int) -> tuple[Tensor, Tensor]:
        attention = self.layer.self_attn
        heads = (-1, attention.head_dim)
        k, v = attention.k_proj(normed).unflatten(-1, heads), attention.v_proj(normed).unflatten(-1, heads)
        return self._rotated(k, start), v

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        cos, sin = self.inputs.cos, self.inputs.sin
        if cos is None or sin is None:
            return x
        span = slice(start, start + x.shape[1])
        return rotate(x, cos[:, span], sin[:, span])

    def mix(self, x: Tensor, start: int, shared: KeyValues, carry: Carry) -> tuple[Tensor, Carry]:
        attention = self.layer.self_attn
        normed = self._normed(x)
        k, v = self._keys_values(normed, start)
        q = self._rotated(attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim)), start)
        shared.write(start, k.detach(), v.detach())
        out = shared.attend(start, q, k, v).flatten(2)
        return self._residual(x, attention.o_proj(out)), carry

    def advance(self, x: Tensor, start: int, shared: KeyValues, carry: Carry) -> Carry:
        shared.write(start, *self._keys_values(self._normed(x), start))
        return carry


def tiled_layers(
    backbone: Any, inputs: SequenceInputs, options: LeanOptions, seq: int
) -> tuple[list[MambaLayer | AttentionLayer], list[TilePlan]]:
    """The decoder layers of a `GraniteMoeHybridModel` for one forward of `seq` tokens, with the plan of each."""
    plan = TilePlan(*options.tiles_for(seq))
    layers: list[MambaLayer | AttentionLayer] = []
    plans = []
    for layer in backbone.layers:
        drops = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in layer.modules())
        # Drawn from PyTorch's generator, so that a seeded run stays reproducible. 2 ** 40 leaves room for positions.
        plans.append(replace(plan, seed=int(torch.randint(2**40, ()).item())) if drops else plan)
        layers.append(AttentionLayer(layer, inputs) if layer.mamba is None else MambaLayer(layer, inputs, options))
    return layers, plans


def _modeling(module: nn.Module) -> Any:
    """The module of transformers that a model's class comes from."""
    return sys.modules[type(module).__module__]


@dataclass
class _Lean:
    """Kept on a patched module. `plain_forward` is what its forward was."""

    options: LeanOptions
    plain_forward: Any


def _is_plain_call(module: Any, attention_mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Calls that tiles do not serve: caches, captured hidden states, custom masks, packed sequences."""
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        return True
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        return True
    captured = ("output_hidden_states", "output_attentions")
    if any(kwargs.get(name) or getattr(module.config, name, False) for name in captured):
        return True
    return any(kwargs.get(name) is not None for name in ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"))


def _decode(
    backbone: Any, input_ids: Tensor | None, attention_mask: Tensor | None, owns_gradient: bool, **kwargs: Any
) -> Tensor:
    """Hidden states (batch, seq, hidden) before the final norm."""
    if kwargs.get("output_router_logits") and any(layer.has_experts for layer in backbone.layers):
        raise ValueError(
            "output_router_logits=True: lean runs experts tile by tile and does not collect router logits; "
            "set router_aux_loss_coef=0.0 (and output_router_logits=False in the model's config)"
        )
    embeds = kwargs.get("inputs_embeds")
    if (input_ids is None) == (embeds is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    x = backbone.embed_tokens(input_ids) if embeds is None else embeds
    x = x * backbone.embedding_multiplier
    # None without padding. Asked of the model's own function, so that both decide alike.
    mask = _modeling(backbone).create_recurrent_attention_mask(backbone.config, x, attention_mask)
    cos = sin = None
    if backbone.rotary_emb is not None:
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        cos, sin = backbone.rotary_emb(x, positions)
    inputs = SequenceInputs(None if mask is None else mask.bool(), cos, sin)
    options = backbone._lean.options
    layers, plans = tiled_layers(backbone, inputs, options, x.shape[1])
    return run_layers(layers, x, plans, options.checkpointing, owns_gradient)


def _backbone_forward(
    self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Any:
    cached_by_default = kwargs.get("use_cache") is None and not self.training and not torch.is_grad_enabled()
    if cached_by_default or _is_plain_call(self, attention_mask, kwargs):
        return self._lean.plain_forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    hidden = _decode(self, input_ids, attention_mask, owns_gradient=False, **kwargs)
    normed = rms_norm(hidden, self.norm.weight, self.norm.variance_epsilon)
    return _modeling(self).MoeModelOutputWithPast(last_hidden_state=normed)


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
    if unlabelled or head is None or _is_plain_call(self, attention_mask, kwargs):
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if fused_lm_head:
            kwargs["fused_lm_head"] = True
        return self._lean.plain_forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    backbone = self.model
    hidden = _decode(backbone, input_ids, attention_mask, owns_gradient=True, **kwargs)
    options = HeadOptions(1 / self.config.logits_scaling, self._lean.options.loss_tile_bytes, entropy=fused_lm_head)
    norm = functools.partial(rms_norm, weight=backbone.norm.weight, eps=backbone.norm.variance_epsilon)
    if backbone.norm.weight.requires_grad:
        hidden = norm(hidden)
        norm = functools.partial(_as_is)
    scored = score(hidden, labels, shift_labels, num_items_in_batch, head, norm, options)
    return scored.fused_output() if fused_lm_head else _modeling(self).MoeCausalLMOutputWithPast(loss=scored.loss)


def _as_is(rows: Tensor) -> Tensor:
    return rows * 1  # a new node, so that a gradient with respect to rows exists


def patch(causal: Any, options: LeanOptions) -> None:
    """Give a `GraniteMoeHybridForCausalLM` and its backbone the forwards of this module. Not reversible."""
    backbone = causal.model
    for module, forward in ((backbone, _backbone_forward), (causal, _causal_forward)):
        again = module.__dict__.get("_lean")
        plain = module.forward if again is None else again.plain_forward
        module._lean = _Lean(options, plain)
        # The signature stays that of the class: trainers read it to choose the columns that they pass.
        wrapped = functools.wraps(type(module).forward)(forward)
        module.forward = types.MethodType(wrapped, module)
