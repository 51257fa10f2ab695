"""One family of each kind whose model is not as Llama's: it trains for two steps on a virtual card, all its layers."""

from pathlib import Path

import pytest
from families import tiny
from transformers import AutoConfig

from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.plan.recipe_runs import shortened, submit_recipe
from qlora_lowmem.recipe.io import load_recipe

KINDS = {
    "diffllama": "parameters that its class makes on the host, whatever the device",
    "doge": "its code looks for flex attention as it is imported",
    "falcon_h1": "PEFT refuses the output projection of its Mamba layers",
    "gemma3n_text": "a Linear of the name of a container; weights that its code clamps itself",
    "gpt2": "Conv1D in the place of Linear; no ...ForCausalLM",
    "gpt_oss": "no sdpa",
    "granitemoe": "its configuration has no num_experts",
    "llama4_text": "a router that is a Linear and returns a pair; a prefix that names no backbone",
    "longcat_flash": "the weight of a classifier read past its module",
    "mamba2": "no attention; an infinite time step in its configuration",
    "modernbert-decoder": "weights drawn from a truncated normal distribution",
    "nemotron_h": "attention in a block called mixer; weights drawn by name",
}


def model_folder(family: str, folder: Path) -> Path:
    """With the `config.json` that transformers writes."""
    AutoConfig.for_model(**tiny(family)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe", ["optimised", "lean"])
@pytest.mark.parametrize("family", KINDS)
def test_trains(recipe_runs: virtual_gpu.Server, tmp_path: Path, family: str, recipe: str) -> None:
    changes = {"model": str(model_folder(family, tmp_path)), "target_modules": "all-linear", "max_seq_length": 48}
    found = load_recipe(RECIPES / f"{recipe}.yaml", changes | {"gradient_accumulation_steps": 1})
    run = submit_recipe(recipe_runs, shortened(found), virtual_gpu.get_card("rtx-4050-laptop-6gb")).result()
    assert run.failure is None, run.failure
    assert run.trainable_parameters > 0


def dry_run(model: Path, *flags: str) -> list[str]:
    return ["--config", str(RECIPES / "optimised.yaml"), "--model", str(model), "--dry-run", "--quiet", *flags]


def test_a_configuration_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    model = model_folder("mamba2", tmp_path)
    assert '"__float__": "Infinity"' in (model / "config.json").read_text()
    assert run_command("train", dry_run(model, "--target-modules", "all-linear")) == 0


def test_the_attention_that_was_chosen_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("train", dry_run(model_folder("gpt_oss", tmp_path))) == 0
    assert (
        capsys.readouterr().out.count("note: attention is eager: transformers has no sdpa for GptOssForCausalLM") == 1
    )
    assert run_command("train", dry_run(model_folder("mamba2", tmp_path), "--target-modules", "all-linear")) == 0
    assert "attention" not in capsys.readouterr().out.split("# would train")[1]


def test_no_checkpointing_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_folder("ctrl", tmp_path)
    flags = ("--target-modules", "all-linear", "--max-seq-length", "256")
    assert run_command("train", dry_run(model, *flags)) == 2
    assert "transformers has none for CTRLLMHeadModel" in capsys.readouterr().err
    assert run_command("train", dry_run(model, *flags, "--no-gradient-checkpointing")) == 0
