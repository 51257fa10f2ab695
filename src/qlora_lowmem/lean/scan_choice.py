"""Which implementation of the Mamba-2 scan a model gets: Triton's kernels where they are proven on the spot, else
PyTorch's operators."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from qlora_lowmem.lean import scan
from qlora_lowmem.lean.options import RefusedOptionError, Scan
from qlora_lowmem.lean.scan_chunks import ScanOptions

_CAPABILITY = (8, 0)  # bf16 products
_SIZES = (16, 32, 64, 128, 256)  # of head_dim and state: what the kernels' tiles divide
_TOKENS = 96  # a whole chunk of 64 and a part of one
# Of the norm. Sums of 16-bit products are a few thousandths off in any order; a wrong kernel is off by far more.
_TOLERANCE = 2e-2


def choose_scan(asked: Scan, mixer: Any) -> tuple[Scan, str]:
    """`plain` or `triton`, and in words which and why.

    Args:
        asked: what the options say. `auto` takes Triton wherever it works.
        mixer: one Mamba-2 mixer of the model, on the device where it will train.

    Raises:
        RefusedOptionError: `triton` is asked for and cannot be.
    """
    if asked == "plain":
        return "plain", "in PyTorch, as asked"
    refusal = why_not_triton(mixer)
    if refusal is None:
        return "triton", "16-bit products by Triton kernels of flash-linear-attention"
    if asked == "triton":
        raise refused_triton(refusal)
    return "plain", f"in PyTorch: {refusal}"


def why_not_triton(mixer: Any) -> str | None:
    """Why the kernels cannot serve this mixer, from what is cheapest to ask to a trial run; None if they can."""
    device = mixer.D.device
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _CAPABILITY:
            return f"compute capability {capability[0]}.{capability[1]} is below {_CAPABILITY[0]}.{_CAPABILITY[1]}"
    refusal = why_never_triton(mixer, device.type)
    if refusal is not None:
        return refusal
    try:
        difference = _difference(mixer, device)
    except Exception as error:  # no C compiler for Triton's launcher, a card that it does not know, an API that moved
        return (
            f"its kernels do not run here ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
        )
    if not difference <= _TOLERANCE:
        return f"on this card its kernels differ from PyTorch's by {difference:.1e} of the norm"
    return None


def refused_triton(reason: str) -> RefusedOptionError:
    """The error of `triton` asked for where it cannot be."""
    return RefusedOptionError("scan", "triton", reason, "set scan to auto or plain")


def why_never_triton(mixer: Any, device: str) -> str | None:
    """Why the kernels cannot serve this mixer on any device of the type `device`; None if a trial must tell.

    The mixer may be on the meta device.
    """
    if device != "cuda":
        return f"Triton needs a CUDA device, the model is on {device}"
    if mixer.head_dim not in _SIZES or mixer.ssm_state_size not in _SIZES:
        return f"head_dim={mixer.head_dim} and state={mixer.ssm_state_size}: the kernels take {_SIZES}"
    if importlib.util.find_spec("fla") is None:
        return "the package fla-core is not installed (pip install 'qlora-lowmem[triton]')"
    return None


def _difference(mixer: Any, device: torch.device) -> float:
    """The largest relative difference of the two scans and of their gradients, on random inputs of this shape."""
    from qlora_lowmem.lean import scan_triton  # an optional dependency

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    heads, dim, width = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    bias, d = normal(heads), normal(heads)
    a = -torch.arange(1, heads + 1, device=device).float()
    inputs = [normal(1, _TOKENS, heads, dim), normal(1, _TOKENS, heads)]
    inputs += [normal(1, _TOKENS, mixer.n_groups, width) for _ in "bc"] + [normal(1, heads, dim, width)]
    weights = [normal(1, _TOKENS, heads, dim), normal(1, heads, dim, width)]

    def results(function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        x, dt, b, c, state = leaves
        with torch.enable_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            ends = function(x, dt, a, b, c, d, bias, state, ScanOptions())
        return [*(t.detach() for t in ends), *torch.autograd.grad(ends, leaves, weights)]

    pairs = zip(results(scan_triton.mamba2_scan), results(scan.mamba2_scan), strict=True)
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
