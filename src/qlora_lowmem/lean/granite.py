"""Granite 4.0 hybrids (and their dense siblings) in tiles.

Mirrors `GraniteMoeHybridDecoderLayer.forward`, `GraniteMoeHybridModel.forward` and
`GraniteMoeHybridForCausalLM.forward`.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from qlora_lowmem.lean import scan, scan_triton
from qlora_lowmem.lean.convolution import causal_conv_silu, next_tail
from qlora_lowmem.lean.decoder import AttentionLayer, DecoderLayer, Family, SequenceInputs
from qlora_lowmem.lean.norms import gated_rms_norm
from qlora_lowmem.lean.options import LeanOptions
from qlora_lowmem.lean.scan import ScanInputs, ScanOptions
from qlora_lowmem.lean.swiglu import swiglu
from qlora_lowmem.lean.tiles import Carry, TiledLayer


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    mlp = layer.shared_mlp
    update: Tensor = mlp.output_linear(swiglu(mlp.input_linear(x)))
    return layer.block_sparse_moe(x) + update if layer.has_experts else update


def _modules(layer: Any) -> tuple[Any, Any]:
    return layer.shared_mlp, layer.block_sparse_moe


class MambaLayer(DecoderLayer):
    """Carry: the convolution's last d_conv - 1 inputs (batch, d_conv - 1, conv_dim) and the scan's state (batch, heads,
    head_dim, d_state)."""

    def __init__(self, layer: Any, inputs: SequenceInputs, options: LeanOptions) -> None:
        super().__init__(layer, inputs, layer.mamba, functools.partial(_feed_forward, layer), _modules(layer))
        low, high = layer.mamba.time_step_limit
        self.scan_options = ScanOptions(options.scan_chunk_length, (float(low), float(high)))
        self.scan: Any = scan_triton if options.scan == "triton" else scan

    def begin(self, x: Tensor) -> tuple[None, Carry]:
        mixer, batch = self.layer.mamba, x.shape[0]
        tail = x.new_zeros(batch, mixer.conv_kernel_size - 1, mixer.conv_dim)
        state = torch.zeros(
            batch, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, dtype=torch.float32, device=x.device
        )
        return None, (tail, state)

    def _scan_inputs(self, x: Tensor, start: int, carry: Carry) -> tuple[Tensor, ScanInputs, Tensor]:
        """gate, the scan's inputs, and the next tail."""
        mixer, (tail, state) = self.layer.mamba, carry
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
            a=-torch.exp(mixer.A_log.float()),
            b=b.unflatten(-1, (mixer.n_groups, -1)),
            c=c.unflatten(-1, (mixer.n_groups, -1)),
            d=mixer.D,
            dt_bias=mixer.dt_bias,
            state=state,
        )
        return gate, inputs, next_tail(mixed, tail)

    def mix(self, x: Tensor, start: int, shared: Any, carry: Carry) -> tuple[Tensor, Carry]:
        del shared
        mixer = self.layer.mamba
        gate, inputs, tail = self._scan_inputs(x, start, carry)
        y, state = self.scan.mamba2_scan(inputs, self.scan_options)
        norm = mixer.norm
        # The projection receives what it receives in the plain model: the residual stream's dtype.
        y = gated_rms_norm(y.flatten(2), gate, norm.weight, norm.variance_epsilon, norm.group_size, x.dtype)
        return self.residual(x, mixer.out_proj(y)), (tail, state)

    def advance(self, x: Tensor, start: int, shared: Any, carry: Carry) -> Carry:
        del shared
        _, inputs, tail = self._scan_inputs(x, start, carry)
        return tail, self.scan.advance_state(inputs, self.scan_options)


def _tiled_layer(layer: Any, inputs: SequenceInputs, options: LeanOptions) -> TiledLayer:
    if layer.mamba is not None:
        return MambaLayer(layer, inputs, options)
    return AttentionLayer(layer, inputs, layer.self_attn, functools.partial(_feed_forward, layer), _modules(layer))


FAMILY = Family(
    _tiled_layer,
    backbone_output="MoeModelOutputWithPast",
    causal_output="MoeCausalLMOutputWithPast",
    plain_keywords=("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"),
)
