"""Decoder layers of the families that are known, as layers that run in tiles: Llama's with its relatives', Granite's.

Projections are called as the modules that they are, so that PEFT's LoRA and bitsandbytes' 4-bit layers keep their own
semantics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lowmem.lean import scan, scan_triton
from qlora_lowmem.lean.attention import KeyValues, rotate
from qlora_lowmem.lean.convolution import causal_conv_silu, next_tail
from qlora_lowmem.lean.norms import gated_rms_norm, rms_norm
from qlora_lowmem.lean.options import LeanOptions
from qlora_lowmem.lean.scan_chunks import ScanInputs, ScanOptions
from qlora_lowmem.lean.swiglu import swiglu, swiglu_of
from qlora_lowmem.lean.tiles import Carry, TiledLayer


@dataclass(frozen=True)
class SequenceInputs:
    """What all layers of one forward see."""

    valid: Tensor | None  # (batch, seq) bool; None without padding
    cos: Tensor | None  # (1 or batch, seq, head_dim)
    sin: Tensor | None


def trainable(*modules: nn.Module | None) -> list[Tensor]:
    """Parameters of the modules that are trained."""
    return [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]


class DecoderLayer:
    """A pre-norm decoder layer: the norms, the residuals and the feed-forward half, which all layers share.

    `layer` is transformers' own, `mixer` its module between the first norm and the first residual.
    """

    def __init__(self, layer: Any, inputs: SequenceInputs, mixer: Any) -> None:
        self.layer, self.inputs, self.mixer = layer, inputs, mixer
        self._residual_multiplier = getattr(layer, "residual_multiplier", 1.0)
        feed_forward = (getattr(layer, name, None) for name in ("mlp", "shared_mlp", "block_sparse_moe"))
        self.mixer_parameters: Sequence[Tensor] = trainable(layer.input_layernorm, mixer)
        self.feed_forward_parameters: Sequence[Tensor] = trainable(layer.post_attention_layernorm, *feed_forward)

    def residual(self, x: Tensor, update: Tensor) -> Tensor:
        """x plus the update. One rounding, and no tensor for the product."""
        return torch.add(x, update.to(x.dtype), alpha=self._residual_multiplier)

    def normed(self, x: Tensor) -> Tensor:
        """What the mixer receives."""
        norm = self.layer.input_layernorm
        return rms_norm(x, norm.weight, norm.variance_epsilon)

    def feed_forward(self, h: Tensor) -> Tensor:
        norm = self.layer.post_attention_layernorm
        return self.residual(h, _update(self.layer, rms_norm(h, norm.weight, norm.variance_epsilon)))


def _update(layer: Any, x: Tensor) -> Tensor:
    """What stands between the second norm and the second residual."""
    mlp = getattr(layer, "mlp", None)
    if mlp is not None:
        return mlp.down_proj(swiglu_of(mlp.gate_proj(x), mlp.up_proj(x)))  # type: ignore[no-any-return]
    mlp = layer.shared_mlp
    update: Tensor = mlp.output_linear(swiglu(mlp.input_linear(x)))
    return layer.block_sparse_moe(x) + update if layer.has_experts else update


class AttentionLayer(DecoderLayer):
    """Causal attention to everything before. No carry: tiles share the keys and values of the whole sequence."""

    def begin(self, x: Tensor) -> tuple[KeyValues, Carry]:
        return KeyValues(x.shape[1], self.mixer.scaling, self.inputs.valid), ()

    def _heads(self, name: str, normed: Tensor) -> Tensor:
        """(batch, tile, heads, head_dim) of the projection `name`, normed where the family norms heads (Qwen 3)."""
        heads: Tensor = getattr(self.mixer, f"{name}_proj")(normed).unflatten(-1, (-1, self.mixer.head_dim))
        norm = getattr(self.mixer, f"{name}_norm", None)
        return heads if norm is None else rms_norm(heads, norm.weight, norm.variance_epsilon)

    def _keys_values(self, normed: Tensor, start: int) -> tuple[Tensor, Tensor]:
        return self._rotated(self._heads("k", normed), start), self._heads("v", normed)

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        cos, sin = self.inputs.cos, self.inputs.sin
        # SmolLM 3 rotates in some of its layers only.
        if cos is None or sin is None or not getattr(self.mixer, "use_rope", True):
            return x
        span = slice(start, start + x.shape[1])
        return rotate(x, cos[:, span], sin[:, span])

    def mix(self, x: Tensor, start: int, shared: KeyValues, carry: Carry) -> tuple[Tensor, Carry]:
        normed = self.normed(x)
        k, v = self._keys_values(normed, start)
        q = self._rotated(self._heads("q", normed), start)
        shared.write(start, k.detach(), v.detach())
        out = shared.attend(start, q, k, v).flatten(2)
        return self.residual(x, self.mixer.o_proj(out)), carry

    def advance(self, x: Tensor, start: int, shared: KeyValues, carry: Carry) -> Carry:
        shared.write(start, *self._keys_values(self.normed(x), start))
        return carry


class MambaLayer(DecoderLayer):
    """Carry: the convolution's last d_conv - 1 inputs (batch, d_conv - 1, conv_dim) and the scan's state (batch, heads,
    head_dim, d_state)."""

    def __init__(self, layer: Any, inputs: SequenceInputs, options: LeanOptions) -> None:
        super().__init__(layer, inputs, layer.mamba)
        low, high = layer.mamba.time_step_limit
        self.scan_options = ScanOptions(options.scan_chunk_length, (float(low), float(high)))
        self.scan: Any = scan_triton if options.scan == "triton" else scan
        a_log = layer.mamba.A_log
        # Of a frozen A once for all tiles.
        self._a = None if a_log.requires_grad else -torch.exp(a_log.detach().float())

    def begin(self, x: Tensor) -> tuple[None, Carry]:
        mixer, batch = self.mixer, x.shape[0]
        tail = x.new_zeros(batch, mixer.conv_kernel_size - 1, mixer.conv_dim)
        states = (batch, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size)
        return None, (tail, x.new_zeros(states, dtype=torch.float32))

    def _scan_inputs(self, x: Tensor, start: int, carry: Carry) -> tuple[Tensor, ScanInputs, Tensor]:
        """gate, the scan's inputs, and the next tail."""
        mixer, (tail, state) = self.mixer, carry
        valid = self.inputs.valid
        mask = None if valid is None else valid[:, start : start + x.shape[1], None]
        x = self.normed(x)
        projected = mixer.in_proj(x if mask is None else x * mask)
        gate, mixed, dt = projected.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads], -1)
        convolved = causal_conv_silu(mixed, tail, mixer.conv1d.weight.squeeze(1), mixer.conv1d.bias)
        if mask is not None:
            convolved = convolved * mask
        width = mixer.n_groups * mixer.ssm_state_size
        xs, b, c = convolved.split([mixer.intermediate_size, width, width], -1)
        inputs = ScanInputs(
            x=xs.unflatten(-1, (mixer.num_heads, mixer.head_dim)),
            dt=dt,
            a=-torch.exp(mixer.A_log.float()) if self._a is None else self._a,
            b=b.unflatten(-1, (mixer.n_groups, -1)),
            c=c.unflatten(-1, (mixer.n_groups, -1)),
            d=mixer.D,
            dt_bias=mixer.dt_bias,
            state=state,
        )
        return gate, inputs, next_tail(mixed, tail)

    def mix(self, x: Tensor, start: int, shared: Any, carry: Carry) -> tuple[Tensor, Carry]:
        del shared
        gate, inputs, tail = self._scan_inputs(x, start, carry)
        y, state = self.scan.mamba2_scan(inputs, self.scan_options)
        norm = self.mixer.norm
        # The projection receives what it receives in the plain model: the residual stream's dtype.
        y = gated_rms_norm(y.flatten(2), gate, norm.weight, norm.variance_epsilon, norm.group_size, x.dtype)
        return self.residual(x, self.mixer.out_proj(y)), (tail, state)

    def advance(self, x: Tensor, start: int, shared: Any, carry: Carry) -> Carry:
        del shared
        _, inputs, tail = self._scan_inputs(x, start, carry)
        return tail, self.scan.advance_state(inputs, self.scan_options)


def tiled_layer(layer: Any, inputs: SequenceInputs, options: LeanOptions) -> TiledLayer:
    """A decoder layer of transformers' as one that runs in tiles, for one forward.

    Mirrors `LlamaDecoderLayer.forward` and `GraniteMoeHybridDecoderLayer.forward`. What Llama's relatives add is read
    from their modules: biases (Qwen 2), norms of heads (Qwen 3), layers without rotation (SmolLM 3), multipliers
    (Granite).
    """
    if getattr(layer, "mamba", None) is not None:
        return MambaLayer(layer, inputs, options)
    return AttentionLayer(layer, inputs, layer.self_attn)


def window_of(config: Any) -> int | None:
    """Tokens that the narrowest of a model's layers sees; None where all see everything."""
    # Mistral has one window for all layers where its config names no types; the others list a type a layer.
    types = getattr(config, "layer_types", None)
    slides = types is None or "sliding_attention" in types
    return getattr(config, "sliding_window", None) if slides else None
