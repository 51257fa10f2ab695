"""The LM head and its loss a tile of tokens at a time: the logits of a whole sequence never exist.

Granite's vocabulary of 100,352 makes a token's logits 196 KiB in bf16 and 392 KiB in the fp32 that the loss needs; for
1,024 tokens, 588 MiB, and as much again for gradients. A tile holds one bf16 and one fp32 buffer, 6 bytes a token and
word: 64 MiB is 111 tokens.

A token's log-probability depends on its own hidden row only, so its gradient is a row, scaled by what arrives at that
log-probability. Forward therefore computes the row while the tile's logits exist (two products a tile in all, where
recomputing in backward needs three), and backward only scales: whatever loss is built on the log-probabilities, its
gradient is exact. Kept for backward: those rows, one residual tensor, which becomes the gradient in place. The final
norm is part of the tile, so its output does not exist for the whole sequence either.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_lowmem.lean.token_rows import TrainedRows

IGNORE_INDEX = -100
_ENTROPY_BYTES = 24 * 2**20  # of the temporary that entropies take: 62 rows of 100,352 words in fp32


class Head(Protocol):
    """An output embedding that can be multiplied with a few rows at a time."""

    @property
    def vocabulary(self) -> int:
        """Number of words."""

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Parts of the vocabulary with their weight (words, hidden) in dtype."""


@dataclass(frozen=True)
class DenseHead:
    """A plain weight (vocabulary, hidden): one tile, the weight itself.

    Attributes:
        trained: rows that are trained in the place of the weight's own, which then stays frozen.
    """

    weight: Tensor
    trained: TrainedRows | None = None

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]

    def tiles(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.vocabulary), self.weight.detach().to(dtype)


@dataclass(frozen=True)
class HeadOptions:
    """What the head computes with.

    logit_scale multiplies the logits (1 / `logits_scaling` for Granite). tile_bytes bounds the logits of one tile.
    Entropies are computed only where asked for: they cost one more temporary of the tile.
    """

    logit_scale: float = 1.0
    tile_bytes: int = 64 * 2**20
    entropy: bool = False

    def tile_length(self, vocabulary: int, dtype: torch.dtype) -> int:
        """Tokens whose fp32 logits and logits in dtype fit into tile_bytes, at least one."""
        per_token = vocabulary * (4 + (0 if dtype == torch.float32 else dtype.itemsize))
        return max(1, self.tile_bytes // per_token)


def token_log_probs(
    hidden: Tensor, labels: Tensor, head: Head, norm: Callable[[Tensor], Tensor], options: HeadOptions
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label, without the logits. Zero where the label is -100.

    Mirrors `ForCausalLMLoss` of transformers (fp32 softmax) and the per-token outputs of TRL's fused LM head.

    Args:
        hidden: (batch, seq, hidden), before the final norm.
        labels: (batch, seq), already shifted: what each position is to predict.
        head: the output embedding. The weight of a `DenseHead` receives a gradient where it is trained, or its rows.
        norm: the final norm, with frozen parameters (pass normed rows and `lambda x: x` where it is trained).
        options: scale, tile size, entropy.

    Returns:
        log_probs, entropies (zero unless asked for; no gradient) and is_top1 (bool), each (batch, seq).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    learns = None if not isinstance(head, DenseHead) else head.trained.rows if head.trained else head.weight
    weight = learns if learns is not None and learns.requires_grad else None
    scorer = _Scorer(head, norm, options, dtype)
    return _TokenLogProbs.apply(hidden, weight, labels, scorer, torch.is_grad_enabled())  # type: ignore[no-any-return]


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, labels: Tensor, scorer: "_Scorer", gradient: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = hidden.device
        rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        scored = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # the rest of a prompt costs nothing
        log_probs = torch.zeros(targets.shape, dtype=torch.float32, device=device)
        entropies, is_top1 = torch.zeros_like(log_probs), torch.zeros_like(targets, dtype=torch.bool)
        wants_hidden = gradient and hidden.requires_grad
        row_gradients = torch.zeros_like(rows) if wants_hidden else None
        # A trained head's gradient needs the loss's scale, so it is recomputed tile by tile in backward.
        ctx.weight_call = (scorer, rows, targets, scored) if gradient and weight is not None else None
        found: list[tuple[Tensor, Tensor, Tensor | None]] = []
        with torch.autocast(device.type, enabled=False):
            for index, tile in scorer.tiles(rows, targets, scored, wants_hidden):
                found.append((tile.log_probs, tile.is_top1, tile.entropies))
                if row_gradients is not None:
                    row_gradients[index] = tile.row_gradient()
                del tile
        if found:
            for whole, parts in zip((log_probs, is_top1, entropies), zip(*found, strict=True), strict=True):
                if parts[0] is not None:
                    whole[scored] = torch.cat(parts)
        ctx.row_gradients, ctx.shape = row_gradients, hidden.shape
        ctx.mark_non_differentiable(entropies, is_top1)
        return log_probs.view(labels.shape), entropies.view(labels.shape), is_top1.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_hidden = grad_weight = None
        if ctx.weight_call is not None:
            grad_weight = _weight_gradient(grad.reshape(-1), *ctx.weight_call)
        if ctx.row_gradients is not None:
            # In place: a second backward through the same graph would find scaled rows, so they are taken.
            grad_hidden, ctx.row_gradients = ctx.row_gradients, None
            grad_hidden = grad_hidden.mul_(grad.reshape(-1, 1)).view(ctx.shape)
        return grad_hidden, grad_weight, None, None, None


@dataclass(frozen=True)
class _Scorer:
    head: Head
    norm: Callable[[Tensor], Tensor]
    options: HeadOptions
    dtype: torch.dtype  # of the products

    def tiles(self, rows: Tensor, targets: Tensor, scored: Tensor, gradient: bool) -> Iterator[tuple[Tensor, "_Tile"]]:
        """Tiles of the `scored` positions. To have one at a time, delete each before the next is asked for."""
        # Numbers in fp32 that are no scalars: 16-bit logits are cast as they are scaled.
        scale = torch.full((1,), self.options.logit_scale, dtype=torch.float32, device=rows.device)
        scales = scale, -scale
        for index in scored.split(self.options.tile_length(self.head.vocabulary, self.dtype)):
            yield index, _Tile(self, rows[index], targets[index], scales, gradient)


class _Tile:
    """Some scored tokens: their logits, and what is computed from them while they exist."""

    def __init__(
        self, scorer: _Scorer, rows: Tensor, targets: Tensor, scales: tuple[Tensor, Tensor], gradient: bool
    ) -> None:
        head, options, dtype = scorer.head, scorer.options, scorer.dtype
        self.head, self.targets, self.scale, self.dtype = head, targets, options.logit_scale, dtype
        self.trained = head.trained if isinstance(head, DenseHead) else None
        with torch.set_grad_enabled(gradient):
            self.rows = rows.detach().requires_grad_(gradient)
            self.normed = scorer.norm(self.rows)
        self.inputs = self.normed.detach().to(dtype)
        self.logits = logits = self.inputs.new_empty(len(rows), head.vocabulary)
        for part, weight in head.tiles(dtype):
            if part.stop - part.start == head.vocabulary:
                torch.mm(self.inputs, weight.t(), out=logits)
            else:
                logits[:, part] = self.inputs @ weight.t()
        if self.trained is not None:
            logits[:, self.trained.tokens] = self.inputs @ self.trained.rows.detach().to(dtype).t()
        # From here on one fp32 buffer: scaled logits, then exponentials.
        in_place = dtype == torch.float32 and not options.entropy
        wide = logits if in_place else torch.empty_like(logits, dtype=torch.float32)
        scale, self.against = scales
        torch.mul(logits, scale, out=wide)
        largest, best = wide.max(-1, keepdim=True)
        target = wide.gather(1, targets[:, None])
        self.total = wide.sub_(largest).exp_().sum(-1, keepdim=True)
        log_sum = self.total.log().add_(largest)
        self.log_probs = (target - log_sum).squeeze(1)
        self.is_top1 = best.squeeze(1) == targets
        self.exponentials = wide
        self.entropies: Tensor | None = None
        if options.entropy:  # -sum p log p = log Z - sum p z
            length = max(1, _ENTROPY_BYTES // (4 * head.vocabulary))
            pairs = zip(wide.split(length), logits.split(length), strict=True)
            sums = [(e * z).sum(-1, keepdim=True) for e, z in pairs]
            expected = sums[0] if len(sums) == 1 else torch.cat(sums)
            self.entropies = torch.addcdiv(log_sum, expected, self.total, value=-self.scale).squeeze(1)

    def logit_gradient(self) -> Tensor:
        """(tokens, vocabulary) in the head's dtype: d log_prob / d logits = one-hot - p, times the logits' scale."""
        # With exponentials e and their sum Z: p - one-hot is (e - Z one-hot) / Z.
        wide = self.exponentials.scatter_add_(1, self.targets[:, None], -self.total)
        return torch.mul(wide, self.against / self.total, out=wide if wide.dtype == self.dtype else self.logits)

    def row_gradient(self) -> Tensor:
        """(tokens, hidden): the gradient of each row's log-probability, back through the final norm."""
        grad = self.logit_gradient()
        total: Tensor | None = None
        if self.trained is not None:
            total = grad[:, self.trained.tokens] @ self.trained.rows.detach().to(self.dtype)
            grad.index_fill_(1, self.trained.tokens, 0)
        for part, weight in self.head.tiles(self.dtype):
            product = grad[:, part] @ weight
            total = product if total is None else total.float().add_(product)
        assert total is not None
        return torch.autograd.grad(self.normed, self.rows, total.to(self.normed.dtype))[0]


def _weight_gradient(grad: Tensor, scorer: _Scorer, rows: Tensor, targets: Tensor, scored: Tensor) -> Tensor:
    """(vocabulary, hidden), or of the rows that are trained (n, hidden), summed over tiles in fp32."""
    trained = scorer.head.trained if isinstance(scorer.head, DenseHead) else None
    words = scorer.head.vocabulary if trained is None else len(trained.tokens)
    total = torch.zeros(words, rows.shape[-1], dtype=torch.float32, device=rows.device)
    for index, tile in scorer.tiles(rows, targets, scored, gradient=False):
        of_logits = tile.logit_gradient() if trained is None else tile.logit_gradient()[:, trained.tokens]
        total += (of_logits * grad[index, None].to(scorer.dtype)).t() @ tile.inputs
    return total.to(scorer.dtype)
