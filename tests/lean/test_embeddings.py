"""Quantised tables: error, rows, and bad input."""

from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch

from qlora_lowmem.lean import RefusedOptionError, quantise_embeddings
from qlora_lowmem.lean.embeddings import QuantisedEmbedding, QuantisedHead, QuantisedTable

from .conftest import relative


def table_of(bits: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, QuantisedTable]:
    weight = torch.randn(300, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    return weight, QuantisedTable(weight, bits)


@pytest.mark.parametrize(("bits", "error"), [(8, 0.01), (4, 0.1)])
def test_error_is_that_of_the_format(bits: int, error: float) -> None:
    weight, table = table_of(bits)
    found = relative(table.rows(torch.arange(300)), weight)
    assert error / 3 < found < error


def test_four_bits_are_nf4() -> None:
    weight, table = table_of(4)
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))
    ours = table.rows(torch.arange(300))
    assert relative(ours, weight) <= 1.01 * relative(theirs, weight)  # 1 %: scales are bf16 here, fp32 there
    assert relative(ours, theirs) < 0.03


@pytest.mark.parametrize("bits", [8, 4])
def test_bytes(bits: int) -> None:
    _, table = table_of(bits, torch.bfloat16)
    assert sum(b.nbytes for b in table.buffers()) == 300 * 128 * bits // 8 + 300 * 2 * 2


@pytest.mark.parametrize("bits", [8, 4])
def test_embedding_and_head_read_the_same_table(bits: int) -> None:
    _, table = table_of(bits)
    ids = torch.tensor([[3, 299], [0, 3]])
    rows = QuantisedEmbedding(table)(ids)
    assert rows.shape == (2, 2, 128)
    assert torch.equal(rows[0, 0], rows[1, 1])
    logits = QuantisedHead(table)(rows)
    assert relative(logits, rows @ table.rows(torch.arange(300)).t()) < 1e-6


def test_a_row_of_zeros_stays_zero() -> None:
    for bits in (8, 4):
        assert not QuantisedTable(torch.zeros(4, 64), bits).rows(torch.arange(4)).any()


@pytest.mark.parametrize(("bits", "width", "message"), [(5, 64, "quantised_embeddings=5"), (4, 63, "even")])
def test_bad_input(bits: int, width: int, message: str) -> None:
    embedding, head = torch.nn.Embedding(4, width), torch.nn.Linear(width, 4, bias=False)
    head.weight = embedding.weight
    model = SimpleNamespace(get_input_embeddings=lambda: embedding, get_output_embeddings=lambda: head)
    with pytest.raises(RefusedOptionError, match=message):
        quantise_embeddings(model, bits)
