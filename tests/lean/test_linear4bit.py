"""4-bit layers whose weight is dequantised by tiles, beside bitsandbytes' own."""

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_lowmem.lean.linear4bit import PackedWeight, linear_4bit, patch_linear_4bit

from .conftest import relative


class Dequantised(TorchDispatchMode):
    """Bytes of every weight that is written out while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operator passes."""
        found = operator(*args, **(kwargs or {}))
        if "dequantize_4bit" in str(operator) or "gemm_4bit" in str(operator):
            weight = found if "dequantize" in str(operator) else None
            self.sizes.append(weight.numel() * weight.element_size() if weight is not None else -1)
        return found


def packed(rows: int, columns: int, *, nested: bool = True, quant_type: str = "nf4", blocksize: int = 64) -> Any:
    torch.manual_seed(rows + columns)
    weight = torch.randn(rows, columns)
    return bnb.functional.quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type)


SHAPES = st.tuples(
    st.integers(2, 300), st.one_of(st.integers(1, 5).map(lambda n: 64 * n), st.integers(1, 100).map(lambda n: 2 * n))
)


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    nested=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    blocksize=st.sampled_from([64, 128]),
    tile_bytes=st.integers(1, 40_000),
)
def test_tiles_are_the_weight(
    shape: tuple[int, int], nested: bool, quant_type: str, blocksize: int, tile_bytes: int
) -> None:
    """To the bit, whatever the tile: each begins where a block of constants does."""
    data, state = packed(*shape, nested=nested, quant_type=quant_type, blocksize=blocksize)
    whole = bnb.functional.dequantize_4bit(data, state)
    weight = PackedWeight(data, state)
    by_rows = [tile for _, tile in weight.row_tiles(tile_bytes, torch.float32)]
    assert torch.equal(torch.cat(by_rows), whole)
    found = torch.empty_like(whole)
    for span, tile in weight.column_tiles(tile_bytes, torch.float32):
        found[:, span] = tile
    assert torch.equal(found, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(192, 256), (100, 192), (96, 72)])
def test_product_and_gradient(shape: tuple[int, int], dtype: torch.dtype) -> None:
    data, state = packed(*shape)
    x = torch.randn(2, 70, shape[1], dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 70, shape[0], dtype=dtype)
    results = []
    for out in (bnb.matmul_4bit(x, data, quant_state=state), linear_4bit(x, PackedWeight(data, state), 8192)):
        results.append((out, *torch.autograd.grad(out, x, grad)))
    for theirs, ours in zip(*results, strict=True):
        assert ours.dtype is dtype
        assert relative(ours, theirs) <= (1e-6 if dtype is torch.float32 else 3e-3)


def adapted_layers(bias: bool = False) -> nn.Module:
    """A LoRA layer over 4 bits (512 x 256), as PEFT makes it."""
    data, state = packed(512, 256)
    layer = bnb.nn.Linear4bit(256, 512, bias=bias, compute_dtype=torch.float32, device="meta")
    layer.weight = bnb.nn.Params4bit(data, requires_grad=False, quant_state=state, bnb_quantized=True)
    layer.quant_state = state
    if bias:
        layer.bias = nn.Parameter(torch.randn(512), requires_grad=False)
    model = nn.Sequential(layer)
    model.is_loaded_in_4bit = True
    return get_peft_model(model, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)).train()


def gradients_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    out = model(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *trained])]


@pytest.mark.parametrize("bias", [False, True])
def test_layers_inside_peft(bias: bool) -> None:
    plain = adapted_layers(bias)
    lean = copy.deepcopy(plain)
    idea = patch_linear_4bit(lean, 131072)
    assert idea is not None
    assert "1 4-bit layers" in idea.detail
    x = torch.randn(1, 200, 256, requires_grad=True)
    for model in (plain, lean):  # the first call settles bitsandbytes' compute dtype
        model(x)
    theirs = gradients_of(plain, x)
    with Dequantised() as written:
        ours = gradients_of(lean, x)
    for found, expected in zip(ours, theirs, strict=True):
        assert relative(found, expected) <= 1e-6
    assert written.sizes
    assert max(written.sizes) == (131072 if not bias else 512 * 256 * 4)
    assert (-1 in written.sizes) is bias  # bitsandbytes' own, where there is a bias


def test_patched_twice_is_patched_once() -> None:
    model = adapted_layers()
    plain = next(m for m in model.modules() if type(m).__module__.startswith("bitsandbytes.")).forward
    for _ in range(2):
        patch_linear_4bit(model, 65536)
    layer = next(m for m in model.modules() if type(m).__module__.startswith("bitsandbytes."))
    assert layer._plain_forward == plain


def test_few_rows_and_small_weights_stay_with_bitsandbytes() -> None:
    few, small = adapted_layers(), adapted_layers()
    patch_linear_4bit(few, 65536)
    patch_linear_4bit(small, 2**20)
    for model, rows in ((few, 64), (small, 200)):
        x = torch.randn(1, rows, 256, requires_grad=True)
        with Dequantised() as written:
            model(x)
        assert written.sizes == [-1]


def test_a_model_without_4_bit_layers_is_not_spoken_of() -> None:
    assert patch_linear_4bit(nn.Sequential(nn.Linear(4, 4)), 65536) is None
