"""Rows of an embedding and of an LM head that are trained while all others stay frozen, without a copy of those.

PEFT's `trainable_token_indices` (peft/tuners/trainable_tokens/layer.py) writes the trained rows into a copy of the
whole weight at every forward, once for the embedding and once for the head, and backward makes a gradient of all of it:
of Granite's 100,352 x 1,536, four times 294 MiB in bf16 for a few rows. Here a token that is trained is looked up among
the rows (n, hidden), any other in the frozen weight; the head's logits of those n words are computed apart (`loss.py`).
"""

import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lowmem.lean.options import Idea


@dataclass(frozen=True)
class TrainedRows:
    """Tokens (n), ascending, and their rows (n, hidden)."""

    tokens: Tensor
    rows: Tensor


def trained_rows(module: Any) -> TrainedRows | None:
    """What PEFT trains of an embedding or a head; None where that is nothing, or adapters are switched off.

    Known by what it has, since nothing here imports PEFT. It must have been patched (`patch_token_rows`).
    """
    adapter = getattr(module, "token_adapter", None)
    if adapter is None or adapter.disable_adapters or adapter.merged or not adapter.active_adapters:
        return None
    tokens, order = adapter._lean_tokens
    return TrainedRows(tokens, adapter.trainable_tokens_delta[adapter.active_adapters[0]][order])


def patch_token_rows(causal: nn.Module) -> Idea | None:
    """Let embeddings of which rows are trained look those up apart; None where there are none."""
    names = []
    for name, module in causal.named_modules():
        adapter: Any = getattr(module, "token_adapter", None)
        if adapter is None:
            continue
        weight = adapter.base_layer.weight
        indices = torch.tensor(adapter.token_indices[adapter.active_adapters[0]])
        tokens, order = indices.sort()
        adapter._lean_tokens = tokens.to(weight.device), order.to(weight.device)
        if isinstance(adapter.base_layer, nn.Embedding) and "forward" not in adapter.__dict__:
            adapter.forward = types.MethodType(functools.partial(_embedded, module, adapter.forward), adapter)
        names.append(name)
    detail = f"trained rows of {' and '.join(names)}, without a copy of the others"
    return Idea("token_rows", True, detail) if names else None


def _embedded(module: Any, plain: Any, adapter: Any, ids: Tensor) -> Tensor:
    """ids (batch, seq) to (batch, seq, hidden)."""
    trained = trained_rows(module)
    if trained is None:
        return plain(ids)  # type: ignore[no-any-return]
    frozen = adapter.base_layer(ids)
    place = torch.searchsorted(trained.tokens, ids).clamp_(max=len(trained.tokens) - 1)
    rows = F.embedding(place, trained.rows.to(frozen.dtype))
    scale = adapter._get_embed_scale()  # of Gemma's
    rows = rows if scale is None else rows * scale.to(rows.dtype)
    return torch.where((trained.tokens[place] == ids)[..., None], rows, frozen)
