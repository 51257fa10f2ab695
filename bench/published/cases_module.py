"""Norms, gated MLPs, rotary embeddings and activations."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from published.cases import Setting, Step, case, leaf, three_modes

BF16 = torch.bfloat16


def _with_fixed_gradient(
    forward: Callable[[], torch.Tensor], gradient: torch.Tensor, alive: Iterable[Any] = ()
) -> Step:
    """Forward and backward with an output gradient that exists already, the graph retained; keeps `alive` alive."""

    def step(_alive: Iterable[Any] = alive) -> None:
        output = forward()
        output.backward(gradient, retain_graph=True)

    return step


@case("layer_norm/huggingface")
def layer_norm(row: Setting) -> Step:
    norm = nn.LayerNorm(row.x, eps=row.config["eps"], device="cuda")
    other = nn.LayerNorm(row.x, device="cuda")
    hidden = torch.randn(row.config["M"], row.x, device="cuda", dtype=row.dtype)
    gradient = torch.randn_like(hidden)
    hidden.requires_grad_(True)
    return _with_fixed_gradient(lambda: norm(hidden), gradient, [other])


@case("group_norm/huggingface")
def group_norm(row: Setting) -> Step:
    """The measured script ignores the mode: its rows for forward and backward repeat the full iteration."""
    groups = row.x // row.config["channels_per_group"]
    norm = nn.GroupNorm(groups, row.x, eps=row.config["eps"], device="cuda")
    other = nn.GroupNorm(groups, row.x, device="cuda")
    hidden = torch.randn(row.config["M"], row.x, row.config["H"], device="cuda", dtype=row.dtype)
    gradient = torch.randn_like(hidden)
    hidden.requires_grad_(True)
    return _with_fixed_gradient(lambda: norm(hidden), gradient, [other])


def _llama_rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As transformers' Llama writes it: fp32 inside, the weight applied after the cast back."""
    dtype = hidden.dtype
    hidden = hidden.to(torch.float32)
    variance = hidden.pow(2).mean(-1, keepdim=True)
    hidden = hidden * torch.rsqrt(variance + eps)
    return weight * hidden.to(dtype)


@case("rms_norm/huggingface")
def rms_norm(row: Setting) -> Step:
    """The weight is fp32 and the input bf16, so the output and the gradient that comes in promote to fp32."""
    weight = nn.Parameter(torch.ones(row.x, device="cuda"))
    other = nn.Parameter(torch.ones(row.x, device="cuda"))
    hidden = torch.randn(row.config["M"], row.x, device="cuda", dtype=row.dtype)
    gradient = torch.randn_like(hidden)
    hidden.requires_grad_(True)
    return _with_fixed_gradient(lambda: _llama_rms_norm(hidden, weight, row.config["eps"]), gradient, [other])


@case("megatron_rms_norm/torch")
def megatron_rms_norm(row: Setting) -> Step:
    norm = nn.RMSNorm(row.x, eps=1e-6, device="cuda", dtype=BF16)
    hidden = leaf(row.config["S"], row.config["B"], row.x, dtype=BF16)

    def step() -> None:
        output = norm(hidden)
        output.sum().backward()

    return step


@case("relu_squared/torch")
def relu_squared(row: Setting) -> Step:
    """The memory benchmark's input is a single row of `x` numbers."""
    hidden = leaf(row.x, dtype=row.dtype)

    def step() -> None:
        output = torch.square(F.relu(hidden))
        output.backward(torch.ones_like(output), retain_graph=True)

    return step


@case("softmax/torch")
def softmax(row: Setting) -> Step:
    hidden = leaf(row.x, dtype=row.dtype)

    def step() -> None:
        output = torch.softmax(hidden, dim=-1)
        output.backward(torch.ones_like(output), retain_graph=True)

    return step


class _GatedMLP(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        linear = partial(nn.Linear, bias=False, device="cuda", dtype=BF16)
        self.gate = linear(config["hidden_size"], config["intermediate_size"])
        self.up = linear(config["hidden_size"], config["intermediate_size"])
        self.down = linear(config["intermediate_size"], config["hidden_size"])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))


@case("tiled_swiglu/huggingface")
@case("swiglu/huggingface")
def swiglu(row: Setting) -> Step:
    batch = row.config["B"] if "B" in row.config else row.config["bsz"]
    hidden = leaf(batch, row.x, row.config["hidden_size"], dtype=BF16)
    mlp = _GatedMLP(row.config)
    return three_modes(row.mode, lambda: mlp(hidden), lambda: torch.randn_like(hidden))


class _InShards(torch.autograd.Function):
    """An MLP over shards of the sequence: forward without a graph, each shard run again in backward.

    The input's gradient is written through views of one zero buffer: each shard's `.grad` is such a view, so
    accumulation is in place.
    """

    @staticmethod
    def forward(ctx: Any, mlp: nn.Module, hidden: torch.Tensor, shards: int) -> torch.Tensor:
        ctx.mlp, ctx.shards = mlp, shards
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            outputs = [mlp(shard) for shard in torch.chunk(hidden, shards, dim=-2)]
        return torch.cat(outputs, dim=-2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        (hidden,) = ctx.saved_tensors
        shape, needs_gradient = hidden.shape, hidden.requires_grad
        hidden = hidden.detach().requires_grad_(needs_gradient).view(-1, shape[-1])
        gradient = gradient.view(-1, shape[-1])
        total = torch.zeros_like(hidden)
        start = 0
        for shard in torch.chunk(hidden, ctx.shards, dim=0):
            shard.requires_grad_(needs_gradient)
            length = shard.shape[0]
            shard.grad = total.narrow(0, start, length).view_as(shard)
            part = gradient.narrow(0, start, length).view_as(shard)
            start += length
            with torch.enable_grad():
                output = ctx.mlp(shard)
            torch.autograd.backward(output, part)
        return None, total.view(shape), None


@case("tiled_swiglu/deepspeed_tiled")
def tiled_swiglu(row: Setting) -> Step:
    hidden = leaf(row.config["bsz"], row.x, row.config["hidden_size"], dtype=BF16)
    mlp = _GatedMLP(row.config)
    return three_modes(
        row.mode,
        lambda: _InShards.apply(mlp, hidden, row.config["num_shards"]),
        lambda: torch.randn_like(hidden),
    )


def _half_turn(t: torch.Tensor) -> torch.Tensor:
    half = t.shape[-1] // 2
    return torch.cat((-t[..., half:], t[..., :half]), dim=-1)


@case("rope/huggingface")
def rope(row: Setting) -> Step:
    """Tables of cosines from an fp32 outer product, then the rotation of queries and keys.

    The measured PyTorch (2.4) made the outer product with cuBLAS, whose workspace stays and moves what is allocated
    after it; today's makes it with a Triton kernel.
    """
    hidden_size, length = row.config.get("hidden_size", row.x), row.config.get("seq_len", row.x)
    query_heads, key_heads = row.config["num_q_heads"], row.config["num_kv_heads"]
    width = hidden_size // query_heads
    frequencies = 1.0 / (10000.0 ** (torch.arange(0, width, 2, dtype=torch.int64, device="cuda").float() / width))
    q = leaf(1, length, query_heads, width, dtype=row.dtype).transpose(1, 2)
    k = leaf(1, length, key_heads, width, dtype=row.dtype).transpose(1, 2)
    q_gradient, k_gradient = torch.randn_like(q), torch.randn_like(k)
    positions = torch.arange(length, device="cuda", dtype=torch.long).unsqueeze(0)
    angles = (frequencies[None, :, None].expand(1, -1, 1) @ positions[:, None, :].float()).transpose(1, 2)
    angles = torch.cat((angles, angles), dim=-1)
    cosines, sines = angles.cos().to(row.dtype), angles.sin().to(row.dtype)
    del angles

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
        return q * cosines + _half_turn(q) * sines, k * cosines + _half_turn(k) * sines

    def step(_alive: Any = (frequencies, positions)) -> None:
        rotated = rotate(q, k, cosines, sines)
        torch.autograd.grad(rotated, (q, k), (q_gradient, k_gradient), allow_unused=True, retain_graph=True)

    return step
