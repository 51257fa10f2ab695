"""What a model can look up: its tokens and, where it has a table of them, its positions.

An index beyond a table is an `IndexError` on a CPU and a device assert on a GPU; a virtual GPU computes none and would
say that it fits. So both are looked at on the meta device, before a byte of weights is read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lowmem.errors import UsageError

# How tables of positions are called: GPT-2's wpe, OPT's embed_positions, CTRL's pos_encoding; not relative ones.
_POSITIONS = re.compile(r"wpe|(?!.*(rel_|relative)).*(^|_)(pos|position|positions)(_|$).*")


@dataclass(frozen=True)
class Limits:
    """How many tokens a model knows, and how many positions; None where positions are computed, however long."""

    tokens: int
    positions: int | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Limits":
        """Those of a model on any device, `meta` included; of a wrapper, of its language model."""
        embeddings: Any = model.get_input_embeddings()
        positions = [*_positions(model.get_decoder()), *_biases(model.config)]
        return cls(int(embeddings.weight.shape[0]), min(positions) if positions else None)

    def check_length(self, tokens: int, model: str, field: str = "batch.max_seq_length") -> None:
        """Raises `UsageError` for a sequence of more tokens than there are positions."""
        if self.positions is not None and tokens > self.positions:
            raise UsageError(
                f"{field}: {tokens}, and {model!r} has a table of {self.positions} positions: a token beyond them has "
                f"none. Set {field} to {self.positions} or less"
            )

    def check_token(self, token: int, tokenizer: PreTrainedTokenizerBase, model: str, does: str) -> None:
        """Raises `UsageError` for a token that the model does not know; `does` says what the tokenizer does with it."""
        if token >= self.tokens:
            raise UsageError(
                f"base.model: its tokenizer {does} {tokenizer.convert_ids_to_tokens(token)!r}, id {token}, "
                f"and {model!r} knows {self.tokens:,} tokens, 0 to {self.tokens - 1}. It is another model's tokenizer, "
                "or has tokens that were added to it alone: take both from one place, or remove what was added"
            )


def _positions(decoder: torch.nn.Module) -> Iterator[int]:
    """Rows of each table of positions, less those before the first: OPT's offset, RoBERTa's padding."""
    for module in decoder.modules():
        tables: dict[str, Any] = {**module._buffers, **vars(module)}
        for name, table in tables.items():
            if isinstance(table, torch.Tensor) and table.dim() == 2 and _POSITIONS.fullmatch(name):
                yield table.shape[0]
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Embedding) and _POSITIONS.fullmatch(name):
                before = getattr(child, "offset", 0 if child.padding_idx is None else child.padding_idx + 1)
                yield child.num_embeddings - before


def _biases(config: Any) -> Iterator[int]:
    """Positions that a table of biases is made for in each forward, and no more (transformers 5.23, modeling_mpt)."""
    if config.model_type == "mpt":
        yield config.max_seq_len


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`tokenizer` with a token to pad batches with; any will do, for padding is masked and has no loss.

    The end token where it has no other, as TRL does; with neither, the unknown one or the first.
    """
    if tokenizer.pad_token is None:
        first = tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or first
    return tokenizer
