"""A forward pass that fails: told as the model's where the model alone fails alike, else left as a fault of ours."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import EXIT_USAGE
from qlora_lowmem.models.loading import skeleton
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.run.own_failure import own_failure

# DBRX's class takes null for clip_qkv, which is its default, and its forward pass does not.
DBRX = {
    "model_type": "dbrx", "d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 64, "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": None},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2, "moe_top_k": 1},
}  # fmt: skip


@pytest.fixture
def dbrx(tmp_path: Path) -> list[str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(DBRX))
    return ["--model", str(tmp_path / "model"), "--weights", "random", "--device", "cpu", "--max-seq-length", "16"]


def test_a_configuration_that_its_own_model_cannot_run(
    dbrx: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(RECIPES / "optimised.yaml"), *dbrx, "--output-dir", str(tmp_path / "out"), "--quiet"]
    assert run_command("train", words) == EXIT_USAGE
    told = capsys.readouterr().err
    assert "in 4 bits already" not in told  # random weights are put there by us
    (said,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert f"the forward pass of {str(tmp_path / 'model')!r} fails in the code of its model, modeling_dbrx.py:" in said
    assert "At least one of 'min' or 'max' must not be None" in said
    assert "DbrxForCausalLM does so alone too" in said
    assert "a field of its config.json is missing" in said


def test_what_we_hand_over_wrong_is_ours(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """It fails at a line of the model's code as well, and alone the model runs."""
    recipe = tiny_recipe(tmp_path)
    model = skeleton(recipe, source_of(recipe))
    with pytest.raises(RuntimeError) as caught:
        model(input_ids=torch.zeros((1, 4), device="meta"))  # no whole numbers
    assert any("/transformers/models/" in str(frame.path) for frame in caught.traceback)
    assert own_failure(recipe, source_of(recipe), caught.value) is None


def test_another_failure_than_the_model_s_own_is_ours(dbrx: list[str]) -> None:
    """Even of a model that does not run."""
    recipe = load_recipe(RECIPES / "optimised.yaml", {"model": dbrx[1], "device": "cpu"})
    with pytest.raises(RuntimeError) as caught:
        skeleton(recipe, source_of(recipe))(input_ids=torch.zeros((1, 4), device="meta"))
    assert own_failure(recipe, source_of(recipe), caught.value) is None
    assert own_failure(recipe, source_of(recipe), RuntimeError("nowhere")) is None
