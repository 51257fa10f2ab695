"""Norms, SwiGLU and the convolution against transformers' modules, in fp32 and bf16, gradients included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._decomp import decompositions
from torch.nn import functional as F
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridRMSNorm,
    GraniteMoeHybridRMSNormGated,
)

from qlora_lowmem.lean import norms
from qlora_lowmem.lean.convolution import causal_conv_silu, next_tail
from qlora_lowmem.lean.norms import gated_rms_norm, rms_norm
from qlora_lowmem.lean.swiglu import swiglu

from .conftest import relative

DTYPES = [torch.float32, torch.bfloat16]


def outcome(function, *tensors: Tensor) -> list[Tensor]:
    """The result and the gradients of the tensors."""
    tensors = tuple(t.detach().clone().requires_grad_() for t in tensors)
    out = function(*tensors)
    # Numbers that bf16 holds exactly, so that a truth in another dtype is that of the same problem.
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, weights)]


def assert_no_further(lean: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    """In fp32 within 1e-5 of the truth, in bf16 no further from it than the plain implementation (to 5 %)."""
    for ours, theirs, true in zip(lean, plain, truth, strict=True):
        assert relative(ours, true) <= max(1e-5, 1.05 * relative(theirs, true))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_TEMPORARY_BYTES", 4 * 96 * 7)  # blocks of 7 rows of 96


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = GraniteMoeHybridRMSNorm(96, 1e-5)
    x, weight = torch.randn(2, 37, 96).to(dtype), torch.rand(96).add(0.5).to(dtype)

    def plain(x: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": w}, x)

    truth = outcome(plain, x.double(), weight.double())
    lean = outcome(lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    assert lean[0].dtype == dtype
    assert_no_further(lean, outcome(plain, x, weight), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_kernels_of_a_gpu_are_the_plain_operators(
    dtype: torch.dtype, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PyTorch's own decomposition of the backward that it has on CUDA alone."""
    torch.manual_seed(0)
    x, wide = torch.randn(2, 37, 96), torch.randn(2, 37, 96).to(dtype)
    weight = torch.rand(96).add(0.5).to(dtype)
    functions = [
        (lambda x, w: rms_norm(x, w, 1e-5), (wide, weight)),
        (lambda x, g, w: gated_rms_norm(x, g, w, 1e-5, 96 // groups, dtype), (x, wide, weight)),
    ]
    plain = [outcome(function, *tensors) for function, tensors in functions]
    monkeypatch.setattr(norms, "_fuses", lambda _: True)
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("_fused_rms_norm_backward", decompositions._fused_rms_norm_backward, "CPU")
        fused = [outcome(function, *tensors) for function, tensors in functions]
    finally:
        library._destroy()
    for ours, theirs in zip(fused, plain, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert relative(one, other) <= (6e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_gated_rms_norm(dtype: torch.dtype, groups: int) -> None:
    torch.manual_seed(0)
    module = GraniteMoeHybridRMSNormGated(96, 96 // groups, 1e-5)
    x, wide = torch.randn(2, 37, 96), torch.randn(2, 37, 200).to(dtype)
    weight = torch.rand(96).add(0.5).to(dtype)

    def plain(x: Tensor, wide: Tensor, w: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": w}, (x, wide[..., 50:146])).to(wide.dtype)

    def lean(x: Tensor, wide: Tensor, w: Tensor) -> Tensor:
        return gated_rms_norm(x, wide[..., 50:146], w, 1e-5, 96 // groups, wide.dtype)

    truth = outcome(plain, x, wide.float(), weight.float())
    assert_no_further(outcome(lean, x, wide, weight), outcome(plain, x, wide, weight), truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_bit_by_bit_the_plain_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 11, 64).to(dtype)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    for ours, theirs in zip(outcome(swiglu, x), outcome(plain, x), strict=True):
        assert torch.equal(ours, theirs)


def plain_conv(x: Tensor, tail: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """transformers' `causal_conv1d_fn` after a tail."""
    whole = torch.cat([tail, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(whole, weight[:, None], bias, groups=weight.shape[0])).transpose(1, 2)


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2), seq=st.integers(1, 30), taps=st.integers(2, 5), rows=st.integers(1, 9), bf16=st.booleans()
)
def test_convolution(batch: int, seq: int, taps: int, rows: int, bf16: bool) -> None:
    dtype = torch.bfloat16 if bf16 else torch.float32
    g = torch.Generator().manual_seed(seq)
    shapes = [(batch, seq, 24), (batch, taps - 1, 24), (24, taps), (24,)]
    tensors = [torch.randn(*s, generator=g).to(dtype) for s in shapes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "_TEMPORARY_BYTES", 4 * 24 * batch * rows)  # blocks shorter and longer than the tail
        lean = outcome(causal_conv_silu, *tensors)
    truth = outcome(plain_conv, *(t.double() for t in tensors))
    for ours, true in zip(lean, truth, strict=True):
        assert relative(ours, true) <= (6e-3 if bf16 else 1e-5)
    assert torch.equal(next_tail(tensors[0], tensors[1]), torch.cat([tensors[1], tensors[0]], 1)[:, 1 - taps :])
