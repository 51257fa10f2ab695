"""Tokens that a recipe adds: in the tokenizer, and a row for each in the embedding and the LM head.

An embedding often has rows to spare, padded to a round number; it grows only where it has too few. A new row begins as
the mean of those of the tokens that were there before (Hewitt 2021, "Initializing new word embeddings for pretrained
language models"): whatever was in a spare row was never trained.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qlora_lowmem.errors import UsageError


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], model: str) -> None:
    """Make `texts` tokens of their own; never split, and no special ones: answers show them.

    Raises:
        UsageError: one is a token already.
    """
    known = tokenizer.get_vocab()
    for text in texts:
        if text in known:
            raise UsageError(
                f"data.added_tokens: {text!r} is a token of {model!r} already, id {known[text]}. Remove it; to train "
                f"its row, write it in lora.trainable_token_indices"
            )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])


def indices_of(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> tuple[int, ...]:
    """The indices of texts that are tokens."""
    known = tokenizer.get_vocab()
    return tuple(known[text] for text in texts)


def index_of(token: int | str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> int:
    """The index of a token of the recipe, which `model`, on any device, has a row for.

    Raises:
        UsageError: a text that is several tokens or unknown, an index beyond the embedding.
    """
    field, rows = "lora.trainable_token_indices", _rows(model)
    if isinstance(token, int):
        if token >= rows:
            raise UsageError(f"{field}: {token}, and the model knows {rows:,} tokens, 0 to {rows - 1}")
        return token
    known = tokenizer.get_vocab()
    if token in known:
        return index_of(known[token], tokenizer, model)
    pieces = list(tokenizer(token, add_special_tokens=False)["input_ids"])
    if len(pieces) == 1 and pieces[0] != tokenizer.unk_token_id:
        return index_of(int(pieces[0]), tokenizer, model)
    made = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(pieces))) or "nothing"
    raise UsageError(
        f"{field}: {token!r} is no token of the model; its tokenizer makes {made} of it. Write it in "
        "data.added_tokens to make it one, or give indices"
    )


def grow(model: PreTrainedModel, added: Sequence[int]) -> None:
    """Give `model`, on any device, a row for every added token.

    Raises:
        UsageError: it cannot grow.
    """
    rows = max(added) + 1
    if rows <= _rows(model):
        return
    head: Any = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UsageError(
            f"data.added_tokens: the model has {_rows(model):,} rows, all of them for tokens of its own, and its LM "
            "head has a bias, which does not grow here. Use tokens that the model has (lora.trainable_token_indices)"
        )
    model.resize_token_embeddings(rows, mean_resizing=False)


def begin_rows(model: PreTrainedModel, added: Sequence[int]) -> None:
    """Set the rows of added tokens, the last in the vocabulary, to the mean of those of all tokens before them."""
    embeddings: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    for weight in {id(each.weight): each.weight for each in embeddings if each is not None}.values():
        with torch.no_grad():
            weight[list(added)] = weight[: min(added)].mean(0)


def _rows(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])
