"""A block's kind from its owner, its scope and the Python frames of its allocation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lowmem import lean
from qlora_lowmem.lean.families import HOLDS
from qlora_lowmem.memory.history import BEFORE, Block
from qlora_lowmem.memory.kinds import KINDS, RecipeNamer, line_of, module_type, owner_line, plain_name
from qlora_lowmem.memory.scopes import Scope

SITE = "/somewhere/lib/python3.11/site-packages"


def frames(*places: str) -> list[dict[str, Any]]:
    """`path:function` as frames, innermost first."""
    return [
        {"filename": f"{SITE}/{path}", "line": 10, "name": name}
        for path, _, name in (place.partition(":") for place in places)
    ]


def kind_of(scope: Scope | None, where: list[dict[str, Any]], before: bool = False) -> str:
    return RecipeNamer().kind(scope, Block(0, 512, 512, where, -1, BEFORE if before else 0, 1))


MODEL = "transformers/models/granitemoehybrid/modeling_granitemoehybrid.py:forward"
TILES = "qlora_lowmem/lean/tiles.py:backward_in_tiles"
MAMBA = ("model.layers.3.mamba", "mamba")


@pytest.mark.parametrize(
    ("scope", "where", "kind"),
    [
        (Scope("forward", *MAMBA), frames(MODEL), "activations_mamba"),
        (Scope("recompute", *MAMBA), frames(MODEL), "recomputed_mamba"),
        (Scope("backward", *MAMBA, "MulBackward0"), [], "backward_mamba"),
        (Scope("forward", "model.norm", "norm"), frames(MODEL), "activations_norm"),
        (Scope("forward", "", "loss"), frames(MODEL), "loss"),
        (Scope("recompute", *MAMBA), frames("bitsandbytes/functional.py:dequantize_4bit", MODEL), "dequantised"),
        (Scope("forward", *MAMBA), frames("trl/kernels/chunked_logprob.py:forward", MODEL), "loss"),
        (Scope("forward", *MAMBA), frames("qlora_lowmem/lean/checkpointing.py:run_layers", MODEL), "checkpoints"),
        (
            Scope("backward", "model", "other", "_RunSegment"),
            frames("qlora_lowmem/lean/scan.py:_chunk"),
            "backward_mamba",
        ),
        (Scope("backward", *MAMBA), frames("trl/models/activation_offloading.py:unpack", MODEL), "checkpoints"),
        (Scope("recompute", *MAMBA), frames("qlora_lowmem/lean/scan.py:_chunk", TILES), "recomputed_mamba"),
        (Scope("recompute", *MAMBA), frames("qlora_lowmem/lean/scan.py:_backward", TILES), "backward_mamba"),
        (Scope("recompute", *MAMBA), frames("torch/autograd/graph.py:_engine_run_backward", TILES), "backward_mamba"),
        (Scope("optimizer"), frames("torch/optim/adamw.py:step"), "optimizer_step"),
        (Scope("between"), frames("torch/nn/utils/clip_grad.py:clip_grad_norm_"), "optimizer_step"),
        (Scope("between"), frames("torch/_utils.py:to", "accelerate/utils/operations.py:send_to_device"), "input"),
        (Scope("between"), frames("somebody/code.py:work"), "unexplained"),
        (None, frames("torch/optim/adamw.py:_init_group"), "optimizer"),
        (None, [], "loss"),
    ],
)
def test_kind(scope: Scope | None, where: list[dict[str, Any]], kind: str) -> None:
    assert kind_of(scope, where) == kind
    assert kind in KINDS


def test_lean_declares_of_each_of_its_files_what_memory_it_holds() -> None:
    files = {path.name for path in Path(lean.__file__).parent.glob("*.py")}
    assert files == set(HOLDS), "a file of lean/ is not named in lean/families.py: HOLDS, or is no more"


@pytest.mark.parametrize("file", [file for file, held in HOLDS.items() if held])
def test_what_lean_declares_is_what_a_block_is(file: str) -> None:
    held, where = HOLDS[file], frames(f"qlora_lowmem/lean/{file}:work", MODEL)
    kind = kind_of(Scope("forward", "model.layers.3", "other"), where)
    assert kind == (held if held in ("loss", "checkpoints") else f"activations_{held}")


def test_without_any_knowledge_a_block_is_unexplained() -> None:
    assert kind_of(None, [], before=True) == "unexplained"


def test_the_product_within_a_dequantising_function_is_an_activation(tmp_path: Path) -> None:
    file = tmp_path / "bitsandbytes" / "ops.py"
    file.parent.mkdir()
    file.write_text("empty = torch.empty(shape)\nreturn torch.nn.functional.linear(A, B_dq, bias)\n")
    calls = [[{"filename": str(file), "line": line, "name": "_dequant_linear_fallback"}] for line in (1, 2)]

    kinds = [kind_of(Scope("forward", *MAMBA), call) for call in calls]

    assert kinds == ["dequantised", "activations_mamba"]


def test_owner_line_is_the_first_outside_of_libraries_that_serve_others() -> None:
    where = frames("torch/nn/functional.py:linear", "bitsandbytes/nn/modules.py:forward", MODEL)
    assert owner_line(where, None) == f"{MODEL.replace(':', ':10 ')}"
    hooked = frames(
        "torch/autograd/graph.py:_engine_run_backward", "qlora_lowmem/memory/scopes.py:backward_with_scopes"
    )
    assert owner_line([*hooked, *where], None) == owner_line(where, None), "our hooks own nothing of anyone's"
    assert owner_line([], Scope("backward", *MAMBA, "BmmBackward0")) == "autograd: BmmBackward0"
    assert SITE not in line_of(where[0])


class GraniteMoeHybridMambaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = GraniteMoeHybridRMSNormGated()
        self.in_proj = nn.Linear(2, 2)


class GraniteMoeHybridRMSNormGated(nn.Module):
    pass


class GraniteMoeHybridRotaryEmbedding(nn.Module):
    pass


class GraniteMoeHybridDecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mamba = GraniteMoeHybridMambaLayer()
        self.rotary = GraniteMoeHybridRotaryEmbedding()


class GraniteMoeHybridForCausalLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([GraniteMoeHybridDecoderLayer()])
        self.lm_head = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("", "loss"),
        ("lm_head", "loss"),
        ("layers.0", "other"),
        ("layers.0.rotary", "other"),
        ("layers.0.mamba", "mamba"),
        ("layers.0.mamba.in_proj", "mamba"),
        ("layers.0.mamba.norm", "norm"),
    ],
)
def test_module_type_is_the_nearest_that_says_something(name: str, kind: str) -> None:
    with torch.device("meta"):
        assert module_type(GraniteMoeHybridForCausalLM(), name) == kind


def test_plain_names() -> None:
    assert plain_name("base_model.model.model.layers.0.mlp") == "model.layers.0.mlp"
    assert plain_name("base_model.model") == plain_name("base_model") == ""
