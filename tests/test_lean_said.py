"""What of `lean` a model takes, and what it refuses: said by the run, by --dry-run, in --json and in the model card."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers import RECIPES, TINY_HYBRID
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import EXIT_USAGE
from qlora_lowmem.models.sources import architecture
from tiny_chat import write_tiny_chat

main = partial(run_command, "train")

LEFT_OUT = "lean leaves out tiles, scan, attention, swiglu: attention_dropout=0.1"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose attention has dropout, which tiles do not know."""
    folder = write_tiny_chat(tmp_path_factory.mktemp("dropping"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.1}))
    return folder


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_chat(tmp_path_factory.mktemp("untied"))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return folder


def run(model: Path, data: Path, *more: str) -> int:
    flags = ["--config", str(RECIPES / "demo.yaml"), "--model", str(model), "--data", str(data), "--quiet"]
    size = ["--max-steps", "1", "--max-seq-length", "64", "--output-dir", str(data.parent / "out"), "--lean"]
    return main([*flags, *size, *more])


def test_a_model_that_an_idea_does_not_know_is_told(
    dropping: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dropping, conversations, "--scan", "triton", "--json", "-") == 0
    printed = capsys.readouterr()
    assert f"note: {LEFT_OUT}" in printed.err
    lean = json.loads(printed.out)["lean"]
    assert lean["model_class"] == "LlamaForCausalLM"
    applied = {idea["name"]: idea["applied"] for idea in lean["ideas"]}
    assert applied == dict.fromkeys(("tiles", "scan", "attention", "swiglu"), False) | dict.fromkeys(
        ("rms_norm", "checkpointing", "loss", "dequantisation", "adapters"), True
    )
    card = (conversations.parent / "out" / "README.md").read_text()
    assert "  - scan: left out, attention_dropout=0.1" in card
    assert "  - rms_norm: 5 norms\n" in card


def test_a_model_in_tiles_is_told_of_kernels_it_has_no_layer_for(
    model: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(model, conversations, "--scan", "triton", "--dry-run") == 0
    assert "# note: lean leaves out scan: the model has no Mamba-2 layer" in capsys.readouterr().out
    assert run(model, conversations, "--dry-run", "--json", "-") == 0
    ideas = json.loads(capsys.readouterr().out)["lean"]["ideas"]
    assert {idea["name"] for idea in ideas if idea["applied"]} >= {"tiles", "attention", "swiglu", "loss"}
    assert all(idea["applied"] for idea in ideas)


def test_a_dry_run_tells_what_can_be_known(
    dropping: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(dropping, conversations, "--dry-run") == 0
    assert f"# note: {LEFT_OUT}" in capsys.readouterr().out
    assert run(dropping, conversations, "--dry-run", "--json", "-") == 0
    assert {idea["name"] for idea in json.loads(capsys.readouterr().out)["lean"]["ideas"]} >= {"scan", "rms_norm"}


def refused(capsys: pytest.CaptureFixture[str], exit_code: int, *said: str) -> None:
    printed = capsys.readouterr().err
    assert exit_code == EXIT_USAGE, printed
    assert printed.count("error: ") == 1
    for words in said:
        assert words in printed


@pytest.mark.parametrize("how", ["--dry-run", "--no-resume"])
def test_untied_embeddings_are_not_quantised(
    untied: Path, conversations: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    refused(
        capsys,
        run(untied, conversations, "--quantised-embeddings", "8bit", how),
        "lean.quantised_embeddings: '8bit'",
        "are not tied",
        "one of none, 8bit, 4bit",
        "set lean.quantised_embeddings to none",
    )


@pytest.mark.parametrize("how", ["--dry-run", "--no-resume"])
def test_triton_on_a_cpu_is_refused(
    tiny_hybrid: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    flags = ["--config", str(RECIPES / "optimised.yaml"), "--model", str(tiny_hybrid), "--weights", "random"]
    flags += ["--device", "cpu", "--max-seq-length", "32", "--lean", "--scan", "triton", how]
    said = ("lean.scan: 'triton'", "the model is on cpu", "one of auto, plain, triton", "set lean.scan to auto")
    refused(capsys, main([*flags, "--output-dir", str(tmp_path / "out")]), *said)


def test_what_only_loading_tells_is_a_message_too(untied: Path) -> None:
    """Past the first look: the error of the lean code itself, in the recipe's words."""
    import torch

    from qlora_lowmem.errors import UsageError
    from qlora_lowmem.models.loading import load_base
    from qlora_lowmem.models.sources import resolve_model
    from qlora_lowmem.recipe.io import load_recipe

    flags: dict[str, Any] = {"model": str(untied), "lean": True, "quantised_embeddings": "4bit"}
    recipe = load_recipe(RECIPES / "demo.yaml", flags)
    with pytest.raises(UsageError, match=r"lean\.quantised_embeddings: '4bit'.*not tied"):
        load_base(recipe, resolve_model(str(untied), "pretrained"), torch.float32, torch.device("cpu"))


def test_an_odd_width_in_4_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = {
        "hidden_size": 63,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "mamba_n_heads": 2,
        "mamba_d_head": 63,
    }
    (tmp_path / "config.json").write_text(json.dumps(architecture("granite-4.0-h-350m") | TINY_HYBRID | odd))
    flags = ["--config", str(RECIPES / "optimised.yaml"), "--model", str(tmp_path), "--weights", "random", "--dry-run"]
    flags += ["--device", "cpu", "--lean", "--quantised-embeddings", "4bit", "--output-dir", str(tmp_path / "out")]
    refused(capsys, main(flags), "lean.quantised_embeddings: '4bit'", "even hidden size, and this is 63")
