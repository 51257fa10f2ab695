"""The Mamba-2 scan by Triton kernels of flash-linear-attention (the package `fla-core`), in place of `scan.py`.

Its gated linear attention `o_t = q_t S_t`, `S_t = exp(g_t) S_{t-1} + k_tᵀ v_t` is the scan with q = C, k = B, v = dt x
and g = A dt (Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", 2024). What it would
cost in memory, and what is done here against that:

- it wants B and C once for every head: 48 copies of 0.25 MiB at 1,024 tokens of Granite-4.0-H-1B, 12 MiB each. They
  exist for one span of 128 tokens at a time, 1.5 MiB each;
- it keeps its own inputs for backward: here only the scan's inputs are kept, and backward makes one span again at a
  time, as `scan.py` does with its blocks;
- Triton's autotuner takes a buffer of 256 MiB to flush the card's cache with. So each kernel runs with one
  configuration, of those that it is offered with: 4 warps and the fewest stages, which take the least shared memory.

Two cases stay with `scan.py`. fp32 products on a GPU, because Triton rounds their factors to TF32. And trained A, D or
dt's bias, which QLoRA freezes: the kernels take the gradient of a decay as a difference of two sums that share their
diagonal. With deep decays little is left of it: for dt enough beside the rounding of 16-bit products
(`tests/lean/test_scan_triton.py`), for A, whose sum cancels again, too little.
"""

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lowmem.lean import scan
from qlora_lowmem.lean.options import RefusedOptionError, Scan
from qlora_lowmem.lean.scan_chunks import ScanInputs, ScanOptions, product_dtype
from qlora_lowmem.lean.tiles import spans

SPAN = 128  # tokens computed together: B and C for 48 heads take 1.5 MiB each, the states in backward 3 MiB
_CHUNK = 64  # tokens of a chunk of the kernels, which offer powers of two
_WARPS = 4

_CAPABILITY = (8, 0)  # bf16 products
_SIZES = (16, 32, 64, 128, 256)  # of head_dim and state: what the kernels' tiles divide
_TOKENS = 96  # a whole chunk of 64 and a part of one
# Of the norm. Sums of 16-bit products are a few thousandths off in any order; a wrong kernel is off by far more.
_TOLERANCE = 2e-2


def _autotuner(kernel: Any) -> Any:
    from triton.runtime.autotuner import Autotuner

    while not isinstance(kernel, Autotuner):
        kernel = kernel.fn
    return kernel


@functools.cache
def _kernels() -> list[Any]:
    from fla.ops.common import chunk_h, chunk_o
    from fla.ops.utils import cumsum

    kernels = (
        cumsum.chunk_local_cumsum_scalar_kernel,
        chunk_h.chunk_fwd_kernel_h,
        chunk_h.chunk_bwd_kernel_dh,
        chunk_o.chunk_fwd_kernel_o,
        chunk_o.chunk_bwd_kernel_dqkwg,
        chunk_o.chunk_bwd_kernel_dv,
    )
    return [_autotuner(kernel) for kernel in kernels]


@contextmanager
def _one_configuration() -> Iterator[None]:
    """An autotuner with one configuration measures nothing. Put back at the end: other code may use the kernels."""
    offered = [kernel.configs for kernel in _kernels()]
    for kernel, configs in zip(_kernels(), offered, strict=True):
        usable = [config for config in configs if config.num_warps == _WARPS]
        kernel.configs = [min(usable, key=lambda config: config.num_stages)]
    try:
        yield
    finally:
        for kernel, configs in zip(_kernels(), offered, strict=True):
            kernel.configs = configs


def mamba2_scan(inputs: ScanInputs, options: ScanOptions) -> tuple[Tensor, Tensor]:
    """As `scan.mamba2_scan`, except that the chunk's length is the kernels'."""
    if _stays_plain(inputs.x) or any(t.requires_grad for t in (inputs.a, inputs.d, inputs.dt_bias)):
        return scan.mamba2_scan(inputs, options)
    return _Scan.apply(*inputs, options)  # type: ignore[no-any-return]


def advance_state(inputs: ScanInputs, options: ScanOptions) -> Tensor:
    """The last state alone, bit for bit that of `mamba2_scan`: backward starts tiles from it."""
    if _stays_plain(inputs.x):
        return scan.advance_state(inputs, options)
    dtype, state, inputs = product_dtype(inputs.x), inputs.state, inputs._replace(c=inputs.b)
    with torch.no_grad(), torch.autocast(inputs.x.device.type, enabled=False), _one_configuration():
        for span in spans(0, inputs.x.shape[1], SPAN):
            state = _attend(dtype, _part(inputs, span, state), options)[1]
    return state


def _stays_plain(x: Tensor) -> bool:
    return x.is_cuda and product_dtype(x) == torch.float32


def _part(inputs: ScanInputs, span: slice, state: Tensor) -> ScanInputs:
    """Views of one span's inputs, which `state` is the state before."""
    x, dt, b, c = (t[:, span] for t in (inputs.x, inputs.dt, inputs.b, inputs.c))
    return inputs._replace(x=x, dt=dt, b=b, c=c, state=state)


def _attend(dtype: torch.dtype, part: ScanInputs, options: ScanOptions) -> tuple[Tensor, Tensor]:
    """`C_t h_t` (batch, span, heads, head_dim) in `dtype` and the last state, for one span."""
    from fla.ops.simple_gla import chunk_simple_gla

    step = F.softplus(part.dt.float() + part.dt_bias).clamp(*options.time_step_limit)
    copies = part.x.shape[2] // part.b.shape[2]
    found: tuple[Tensor, Tensor] = chunk_simple_gla(
        q=part.c.to(dtype).repeat_interleave(copies, 2),
        k=part.b.to(dtype).repeat_interleave(copies, 2),
        v=(part.x * step[..., None]).to(dtype),
        g=step * part.a,
        scale=1.0,
        initial_state=part.state,
        output_final_state=True,
        state_v_first=True,
        chunk_size=_CHUNK,
    )
    return found


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        inputs, options = ScanInputs(*arguments[:-1]), arguments[-1]
        x, state = inputs.x, inputs.state
        ctx.save_for_backward(*inputs)
        ctx.options = options
        ctx.dtype = product_dtype(x)
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False), _one_configuration():
            for span in spans(0, x.shape[1], SPAN):
                part = _part(inputs, span, state)
                attended, state = _attend(ctx.dtype, part, options)
                y[:, span] = attended
                y[:, span].addcmul_(x[:, span], inputs.d.float()[:, None])
        return y, state

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ScanInputs(*ctx.saved_tensors)
        x, dt, _, b, c, d, _, state = inputs
        walk = spans(0, x.shape[1], SPAN)
        states = [state]
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c)]
        with torch.autocast(x.device.type, enabled=False), _one_configuration():
            for span in walk[:-1]:
                before = _part(inputs._replace(c=b), span, states[-1])
                states.append(_attend(ctx.dtype, before, ctx.options)[1])
            for span in reversed(walk):
                grad = grad_y[:, span]
                parts = (*(t[:, span] for t in (x, dt, b, c)), states.pop())
                leaves = [t.detach().requires_grad_() for t in parts]
                with torch.enable_grad():
                    recomputed = inputs._replace(**dict(zip(("x", "dt", "b", "c", "state"), leaves, strict=True)))
                    ends = _attend(ctx.dtype, recomputed, ctx.options)
                *found, grad_state = torch.autograd.grad(ends, leaves, (grad.to(ctx.dtype), grad_state))
                del ends, parts, leaves, recomputed
                found[0] = torch.addcmul(found[0], grad, d.float()[:, None])
                for whole, part in zip(grads, found, strict=True):
                    whole[:, span] = part
        grad_x, grad_dt, grad_b, grad_c = grads
        return grad_x, grad_dt, None, grad_b, grad_c, None, None, grad_state, None


def choose_scan(asked: Scan, mixer: Any) -> tuple[Scan, str]:
    """`plain` or `triton`, and in words which and why, for a Mamba-2 mixer on the device where it will train.

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
        reason, *_ = str(error).splitlines() or [""]
        return f"its kernels do not run here ({type(error).__name__}: {reason})"
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
            ends = function(ScanInputs(x, dt, a, b, c, d, bias, state), ScanOptions())
        return [*(t.detach() for t in ends), *torch.autograd.grad(ends, leaves, weights)]

    pairs = zip(results(mamba2_scan), results(scan.mamba2_scan), strict=True)
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)
