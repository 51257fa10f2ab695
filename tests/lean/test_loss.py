"""The LM head and its loss by tiles against whole logits."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qlora_lowmem.lean.embeddings import QuantisedTable
from qlora_lowmem.lean.loss import DenseHead, HeadOptions, token_log_probs

from .conftest import relative

SCALE = 1 / 6


def problem(dtype: torch.dtype = torch.float32, ignored: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 30, 16, generator=g).to(dtype)
    weight = torch.randn(211, 16, generator=g).to(dtype)
    labels = torch.randint(0, 211, (2, 30), generator=g)
    labels.view(-1)[torch.randperm(60, generator=g)[:ignored]] = -100
    return hidden, weight, labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = (hidden @ weight.t()) * SCALE
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return -losses.view(labels.shape)


def lean(hidden: Tensor, weight: Tensor, labels: Tensor, tile_bytes: int, head=None, entropy: bool = False):
    options = HeadOptions(SCALE, tile_bytes, entropy)
    return token_log_probs(hidden, labels, head or DenseHead(weight), lambda rows: rows * 1, options)


@pytest.mark.parametrize("tile_bytes", [1, 211 * 4 * 7, 10**9])
@pytest.mark.parametrize("ignored", [0, 25, 60])
def test_equals_whole_logits(tile_bytes: int, ignored: int) -> None:
    hidden, weight, labels = problem(ignored=ignored)
    ours, theirs = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    found, expected = lean(*ours, labels, tile_bytes)[0], plain(*theirs, labels)
    assert (found - expected).abs().max() <= 1e-5
    # An arbitrary loss on the log-probabilities, not the mean: dft, weights, a sum of several.
    for log_probs in (found, expected):
        (log_probs.exp() * torch.arange(30.0)).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        assert (one.grad - other.grad).norm() <= 1e-5 * other.grad.norm()


def test_bf16_is_no_further_from_the_truth() -> None:
    hidden, weight, labels = problem(torch.bfloat16)
    results = []
    for function, dtype in ((lambda *a: lean(*a, 211 * 6 * 7)[0], None), (plain, None), (plain, torch.float32)):
        rows = hidden.to(dtype or hidden.dtype).clone().requires_grad_()
        log_probs = function(rows, weight.to(rows.dtype), labels)
        log_probs.mean().backward()
        results.append((log_probs, rows.grad))
    for ours, theirs, true in zip(*results, strict=True):
        assert relative(ours, true) <= 1.05 * relative(theirs, true)


def test_entropy_and_top1() -> None:
    hidden, weight, labels = problem(ignored=10)
    logits = ((hidden @ weight.t()) * SCALE).log_softmax(-1)
    labels[0, :5] = logits[0, :5].argmax(-1)
    _, entropies, is_top1 = lean(hidden, weight, labels, 211 * 4 * 7, entropy=True)
    scored = labels != -100
    assert (entropies - torch.where(scored, -(logits.exp() * logits).sum(-1), 0)).abs().max() < 1e-5
    assert torch.equal(is_top1, scored & (logits.argmax(-1) == labels))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_head(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_lowmem.lean.embeddings._TILE_BYTES", 2 * 16 * 50)  # several parts of the vocabulary
    hidden, weight, labels = problem()
    table = QuantisedTable(weight, bits)
    dequantised = table.rows(torch.arange(211))
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = lean(ours, weight, labels, 211 * 4 * 7, head=table)[0]
    expected = plain(theirs, dequantised, labels)
    assert (found - expected).abs().max() <= 1e-5
    found.sum().backward()
    expected.sum().backward()
    assert relative(ours.grad, theirs.grad) <= 1e-5


def test_without_gradients_no_row_gradient_is_computed() -> None:
    hidden, weight, labels = problem()
    with torch.no_grad():
        log_probs, _, _ = lean(hidden.requires_grad_(), weight, labels, 10**6)
    assert log_probs.grad_fn is None
