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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from fla.ops.common import chunk_h, chunk_o
from fla.ops.simple_gla import chunk_simple_gla
from fla.ops.utils import cumsum
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.autotuner import Autotuner

from qlora_lowmem.lean import scan
from qlora_lowmem.lean.scan_chunks import ScanOptions, product_dtype

SPAN = 128  # tokens computed together: B and C for 48 heads take 1.5 MiB each, the states in backward 3 MiB
_CHUNK = 64  # tokens of a chunk of the kernels, which offer powers of two
_WARPS = 4


def _autotuner(kernel: Any) -> Any:
    while not isinstance(kernel, Autotuner):
        kernel = kernel.fn
    return kernel


_KERNELS = [
    _autotuner(kernel)
    for kernel in (
        cumsum.chunk_local_cumsum_scalar_kernel,
        chunk_h.chunk_fwd_kernel_h,
        chunk_h.chunk_bwd_kernel_dh,
        chunk_o.chunk_fwd_kernel_o,
        chunk_o.chunk_bwd_kernel_dqkwg,
        chunk_o.chunk_bwd_kernel_dv,
    )
]


@contextmanager
def _one_configuration() -> Iterator[None]:
    """An autotuner with one configuration measures nothing. Put back at the end: other code may use the kernels."""
    offered = [kernel.configs for kernel in _KERNELS]
    for kernel, configs in zip(_KERNELS, offered, strict=True):
        usable = [config for config in configs if config.num_warps == _WARPS]
        kernel.configs = [min(usable, key=lambda config: config.num_stages)]
    try:
        yield
    finally:
        for kernel, configs in zip(_KERNELS, offered, strict=True):
            kernel.configs = configs


def mamba2_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    """As `scan.mamba2_scan`, except that the chunk's length is the kernels'."""
    if _stays_plain(x) or any(t.requires_grad for t in (a, d, dt_bias)):
        return scan.mamba2_scan(x, dt, a, b, c, d, dt_bias, state, options)
    return _Scan.apply(x, dt, a, b, c, d, dt_bias, state, options)  # type: ignore[no-any-return]


def advance_state(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor, state: Tensor, options: ScanOptions
) -> Tensor:
    """The last state alone, bit for bit that of `mamba2_scan`: backward starts tiles from it."""
    if _stays_plain(x):
        return scan.advance_state(x, dt, a, b, dt_bias, state, options)
    dtype = product_dtype(x)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False), _one_configuration():
        for span in _spans(x.shape[1]):
            state = _attend(dtype, x[:, span], dt[:, span], a, b[:, span], b[:, span], dt_bias, state, options)[1]
    return state


def _stays_plain(x: Tensor) -> bool:
    return x.is_cuda and product_dtype(x) == torch.float32


def _spans(seq: int) -> list[slice]:
    return [slice(start, min(start + SPAN, seq)) for start in range(0, seq, SPAN)]


def _attend(
    dtype: torch.dtype,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    """`C_t h_t` (batch, span, heads, head_dim) in `dtype` and the last state, for one span."""
    step = F.softplus(dt.float() + dt_bias).clamp(*options.time_step_limit)
    copies = x.shape[2] // b.shape[2]
    found: tuple[Tensor, Tensor] = chunk_simple_gla(
        q=c.to(dtype).repeat_interleave(copies, 2),
        k=b.to(dtype).repeat_interleave(copies, 2),
        v=(x * step[..., None]).to(dtype),
        g=step * a,
        scale=1.0,
        initial_state=state,
        output_final_state=True,
        state_v_first=True,
        chunk_size=_CHUNK,
    )
    return found


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        dt_bias: Tensor,
        state: Tensor,
        options: ScanOptions,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, dt, a, b, c, d, dt_bias, state)
        ctx.options = options
        ctx.dtype = product_dtype(x)
        y = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        with torch.autocast(x.device.type, enabled=False), _one_configuration():
            for span in _spans(x.shape[1]):
                inputs = (x[:, span], dt[:, span], a, b[:, span], c[:, span], dt_bias, state)
                attended, state = _attend(ctx.dtype, *inputs, options)
                y[:, span] = attended
                y[:, span].addcmul_(x[:, span], d.float()[:, None])
        return y, state

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, a, b, c, d, dt_bias, state = ctx.saved_tensors
        walk = _spans(x.shape[1])
        states = [state]
        grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c)]
        with torch.autocast(x.device.type, enabled=False), _one_configuration():
            for span in walk[:-1]:
                inputs = (x[:, span], dt[:, span], a, b[:, span], b[:, span], dt_bias, states[-1])
                states.append(_attend(ctx.dtype, *inputs, ctx.options)[1])
            for span in reversed(walk):
                grad = grad_y[:, span]
                parts = (*(t[:, span] for t in (x, dt, b, c)), states.pop())
                leaves = [t.detach().requires_grad_() for t in parts]
                with torch.enable_grad():
                    part_x, part_dt, part_b, part_c, start = leaves
                    ends = _attend(ctx.dtype, part_x, part_dt, a, part_b, part_c, dt_bias, start, ctx.options)
                *found, grad_state = torch.autograd.grad(ends, leaves, (grad.to(ctx.dtype), grad_state))
                del ends, parts, leaves, part_x, part_dt, part_b, part_c, start
                found[0] = torch.addcmul(found[0], grad, d.float()[:, None])
                for whole, part in zip(grads, found, strict=True):
                    whole[:, span] = part
        grad_x, grad_dt, grad_b, grad_c = grads
        return grad_x, grad_dt, None, grad_b, grad_c, None, None, grad_state, None
