"""The scan against the recurrence that defines it, in doubles, and against transformers' plain implementation."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import mamba2_chunk_scan

from qlora_lowmem.lean import scan_chunks
from qlora_lowmem.lean.scan import advance_state, mamba2_scan
from qlora_lowmem.lean.scan_chunks import ScanInputs, ScanOptions

from .conftest import relative

LIMITS = (0.01, 2.0)


def inputs(batch: int, seq: int, heads: int, dim: int, groups: int, state: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    return [
        normal(batch, seq, heads, dim),
        normal(batch, seq, heads),
        -torch.arange(1, heads + 1).float(),
        normal(batch, seq, groups, state),
        normal(batch, seq, groups, state),
        normal(heads),
        normal(heads),
        normal(batch, heads, dim, state),
    ]


def recurrence(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    dt = F.softplus(dt + bias).clamp(*LIMITS)
    b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], 2) for t in (b, c))
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(a * dt[:, t])[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        outputs.append((state * c[:, t, :, None, :]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(outputs, 1), state


def with_gradients(function, tensors: list[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Both results and the gradients of all inputs under fixed random weights."""
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    y, state = function(*tensors)
    g = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, generator=g).to(t.dtype) for t in (y, state)]
    return [y, state, *torch.autograd.grad([y, state], tensors, weights)]


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2),
    seq=st.integers(1, 40),
    groups=st.integers(1, 2),
    heads=st.integers(1, 3),
    dim=st.integers(1, 9),
    state=st.integers(1, 9),
    chunk=st.integers(1, 48),
)
@example(batch=1, seq=24, groups=2, heads=3, dim=9, state=2, chunk=24)  # the gradient of A is a sum that cancels
def test_equals_the_recurrence(batch: int, seq: int, groups: int, heads: int, dim: int, state: int, chunk: int) -> None:
    tensors = inputs(batch, seq, groups * heads, dim, groups, state)
    truth = with_gradients(recurrence, tensors, torch.float64)
    found = with_gradients(lambda *t: mamba2_scan(ScanInputs(*t), ScanOptions(chunk, LIMITS)), tensors)
    scale = max(t.norm().item() for t in truth[2:])
    for ours, true in zip(found, truth, strict=True):
        # A gradient that almost cancels is compared with the size of its neighbours.
        assert (ours - true).norm() <= 1e-5 * true.norm() + 1e-7 * scale


def test_blocks_of_chunks_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs(2, 50, 4, 8, 2, 8)
    whole = with_gradients(lambda *t: mamba2_scan(ScanInputs(*t), ScanOptions(8, LIMITS)), tensors)
    monkeypatch.setattr(scan_chunks, "_TEMPORARY_BYTES", 4 * 2 * 4 * 8 * 8 * 2)  # two chunks of 8, a rest of 2
    options = ScanOptions(8, LIMITS)
    assert [block.count for block in scan_chunks.blocks(ScanInputs(*tensors), options)] == [2, 2, 2, 1]
    parts = with_gradients(lambda *t: mamba2_scan(ScanInputs(*t), options), tensors)
    for ours, expected in zip(parts, whole, strict=True):
        assert relative(ours, expected) < 2e-6


def test_as_exact_as_the_plain_scan() -> None:
    tensors = inputs(2, 300, 6, 16, 1, 8)
    truth = with_gradients(recurrence, tensors, torch.float64)
    found = with_gradients(lambda *t: mamba2_scan(ScanInputs(*t), ScanOptions(64, LIMITS)), tensors)

    def plain_scan(x, dt, a, b, c, d, bias, state):
        return mamba2_chunk_scan(
            x, dt, a, b, c, chunk_size=256, D=d, dt_bias=bias, dt_softplus=True, dt_limit=LIMITS,
            initial_states=state, return_final_states=True,
        )  # fmt: skip

    plain = with_gradients(plain_scan, tensors)
    for ours, theirs, true in zip(found, plain, truth, strict=True):
        assert relative(ours, true) <= max(2 * relative(theirs, true), 1e-6)


def test_states_carry_across_calls() -> None:
    x, dt, a, b, c, d, bias, state = inputs(2, 50, 4, 8, 2, 8)
    options = ScanOptions(16, LIMITS)
    y, last = mamba2_scan(ScanInputs(x, dt, a, b, c, d, bias, state), options)
    cut = 21
    early = ScanInputs(x[:, :cut], dt[:, :cut], a, b[:, :cut], c[:, :cut], d, bias, state)
    first, middle = mamba2_scan(early, options)
    late = ScanInputs(x[:, cut:], dt[:, cut:], a, b[:, cut:], c[:, cut:], d, bias, middle)
    second, end = mamba2_scan(late, options)
    assert relative(torch.cat([first, second], 1), y) < 1e-6
    assert relative(end, last) < 1e-6
    assert torch.equal(advance_state(early, options), middle)


def test_keeps_only_its_inputs() -> None:
    tensors = inputs(1, 200, 4, 8, 1, 8)
    x = tensors[0].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        mamba2_scan(ScanInputs(*tensors), ScanOptions(64))
    inputs_of_ours = {t.data_ptr() for t in tensors}
    assert {t.data_ptr() for t in kept} <= inputs_of_ours
    assert x.data_ptr() in inputs_of_ours


@pytest.mark.parametrize("frozen", [2, 5, 6])
def test_frozen_parameters_get_no_gradient(frozen: int) -> None:
    tensors = [t.requires_grad_(i != frozen) for i, t in enumerate(inputs(1, 20, 4, 8, 1, 8))]
    y, _ = mamba2_scan(ScanInputs(*tensors), ScanOptions(8))
    y.sum().backward()
    assert [t.grad is None for t in tensors] == [i == frozen for i in range(len(tensors))]


def test_products_follow_autocast() -> None:
    tensors = [t.requires_grad_() for t in inputs(1, 40, 4, 8, 1, 8)]
    exact, _ = mamba2_scan(ScanInputs(*tensors), ScanOptions(16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = mamba2_scan(ScanInputs(*tensors), ScanOptions(16))
    assert y.dtype == torch.float32
    assert 1e-5 < relative(y, exact) < 2e-2
    gradients = torch.autograd.grad(y.sum(), tensors)
    for ours, true in zip(gradients, torch.autograd.grad(exact.sum(), tensors), strict=True):
        assert relative(ours, true) < 5e-2
