"""From hidden states and labels to what a causal language model's forward returns: the loss, or what TRL's trainer
reads of its fused LM head."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qlora_lowmem.lean.embeddings import QuantisedHead
from qlora_lowmem.lean.loss import IGNORE_INDEX, DenseHead, Head, HeadOptions, token_log_probs


@dataclass(frozen=True)
class Scored:
    """Every label's score, (batch, seq) each, and the loss. `mask` is where there is a label."""

    loss: Tensor
    log_probs: Tensor
    entropies: Tensor
    is_top1: Tensor
    mask: Tensor
    columns: slice

    def fused_output(self) -> Any:
        """The output of TRL's `add_fused_lm_head`, whose labels are one shorter than the sequence unless shifted."""
        # TRL's own class, from its own module, which is loaded since only it knows the keyword.
        return sys.modules["trl.trainer.utils"].FusedCausalLMOutput(
            loss=self.loss,
            log_probs=self.log_probs[:, self.columns],
            entropy=self.entropies[:, self.columns],
            is_top1=self.is_top1[:, self.columns],
            label_mask=self.mask[:, self.columns],
        )


def head_of(module: Any) -> Head | None:
    """An LM head as something to multiply by in tiles, or None where it is something else (adapted, biased)."""
    if isinstance(module, QuantisedHead):
        return module.table
    if type(module) is nn.Linear and module.bias is None:
        return DenseHead(module.weight)
    return None


def score(
    hidden: Tensor,
    labels: Tensor | None,
    shift_labels: Tensor | None,
    items: Tensor | int | None,
    head: Head,
    norm: Callable[[Tensor], Tensor],
    options: HeadOptions,
) -> Scored:
    """Score labels, (batch, seq) each, of which `shift_labels` are aligned with what predicts them already.

    Args:
        hidden: (batch, seq, hidden), before `norm`.
        items: labels of the whole step, by which the loss is divided; None divides by those here.
        norm: as in `token_log_probs`.
    """
    scored = shift_labels
    if scored is None:
        assert labels is not None
        # The last position predicts nothing. The hidden states stay whole: a slice would be a copy.
        scored = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    weight = head.weight if isinstance(head, DenseHead) and head.weight.requires_grad else None
    log_probs, entropies, is_top1 = token_log_probs(hidden, scored, head, norm, options, weight)
    mask = scored != IGNORE_INDEX
    count = items if items is not None else mask.sum()
    loss = -log_probs.sum() / (count.to(log_probs.device) if isinstance(count, Tensor) else count)
    columns = slice(None) if shift_labels is not None else slice(0, -1)
    return Scored(loss, log_probs, entropies, is_top1, mask, columns)
