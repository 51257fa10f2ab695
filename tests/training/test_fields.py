"""Fields of a recipe that reach the training itself: that they do what they say, and nothing else."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chaos.process import logged
from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.execute import Outcome, execute
from qlora_lowmem.run.preflight import inputs_of
from qlora_lowmem.run_folder.checkpoints import newest_complete
from tiny_chat import write_tiny_chat

Make = Callable[..., Recipe]
main = partial(run_command, "train")


def run(recipe: Recipe) -> Outcome:
    output_dir = Path(recipe.run.output_dir)
    return execute(inputs_of(recipe), output_dir=output_dir, resume_from=newest_complete(output_dir).checkpoint)


def test_noise_on_embeddings_is_the_same_whatever_saves_memory(tiny_recipe: Make) -> None:
    noise = {"neftune_noise_alpha": 20, "max_steps": 3, "lora_dropout": 0.0}
    plain = run(tiny_recipe("plain", **noise))
    assert run(tiny_recipe("none", **noise | {"neftune_noise_alpha": 0})).losses != plain.losses
    for name, changes in {
        "lean": {"lean": True},
        "host": {"lean": True, "checkpoints": "host"},
        "kept": {"gradient_checkpointing": False},
    }.items():
        assert run(tiny_recipe(name, **noise | changes)).losses == pytest.approx(plain.losses, rel=1e-5), name


def test_noise_goes_on_where_it_was_left(tiny_recipe: Make) -> None:
    whole = run(tiny_recipe("whole", neftune_noise_alpha=20, max_steps=4))
    recipe = tiny_recipe("run", neftune_noise_alpha=20, max_steps=4)
    run(recipe)
    for folder in Path(recipe.run.output_dir).glob("checkpoint-[34]"):
        folder.rename(folder.with_name(f"gone-{folder.name}"))
    assert newest_complete(Path(recipe.run.output_dir)).checkpoint == Path(recipe.run.output_dir) / "checkpoint-2"
    assert run(recipe).losses == whole.losses


def test_a_warm_up_as_a_share_is_that_of_its_steps(tiny_recipe: Make) -> None:
    shared = run(tiny_recipe("share", max_steps=5, warmup_ratio=0.5))  # of five steps, rounded up: three
    assert shared.losses == run(tiny_recipe("steps", max_steps=5, warmup_steps=3)).losses
    assert shared.losses != run(tiny_recipe("none", max_steps=5)).losses


def test_rank_stabilised_adapters_are_scaled_by_the_root_of_the_rank(tiny_recipe: Make) -> None:
    """alpha / sqrt(16) is 4 / 1: as if alpha were four times as large."""
    options = {"max_steps": 3, "lora_r": 16}
    stabilised = run(tiny_recipe("rslora", **options, lora_alpha=16, use_rslora=True))
    assert stabilised.losses == run(tiny_recipe("alpha", **options, lora_alpha=64)).losses
    assert stabilised.losses != run(tiny_recipe("plain", **options, lora_alpha=16)).losses


def test_layers_that_are_left_out_have_no_adapter(tiny_recipe: Make) -> None:
    chosen = {"target_modules": "all-linear", "exclude_modules": ("layers.0", "shared_mlp"), "max_steps": 1}
    outcome = run(tiny_recipe("run", **chosen))
    assert outcome.adapted_modules == 4 + 2 * 2, "attention of one layer, the projections of two Mamba layers"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


def evaluated(model: Path, data: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    recipe = ["--config", str(RECIPES / "demo.yaml"), "--model", str(model), "--data", str(data)]
    size = ["--max-seq-length", "64", "--max-steps", "4", "--json", "-", "--output-dir", str(data.parent / more[-1])]
    assert main([*recipe, *size, *more[:-1]]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_is_evaluated_on_is_not_trained_on(
    model: Path, conversations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"prompt": "a", "completion": "b"}\n' * 3)
    without = evaluated(model, conversations, capsys, "without")
    looked = evaluated(model, conversations, capsys, "--eval-data", str(held), "--eval-steps", "2", "looked")
    assert looked["losses"] == without["losses"]
    assert [each["step"] for each in looked["evaluations"]] == [2, 4]
    assert (looked["evaluation_data"]["samples"], looked["evaluation_data"]["tokens"]["samples"]) == (3, 3)
    assert without["evaluations"] == []
    assert sum("eval_loss" in line for line in logged(tmp_path / "looked")) == 2
    assert not list((tmp_path / "looked").glob("tokenised*"))


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "correct data.eval_data or --eval-data"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "held.jsonl:1"),
        ('{"text": "a", "tools": 3}\n{"prompt": "a"}\n', "held.jsonl:2"),
    ],
)
def test_data_for_the_evaluation_are_checked_as_those_for_training(
    model: Path, conversations: Path, capsys: pytest.CaptureFixture[str], dry: bool, content: str | None, said: str
) -> None:
    held = conversations.parent / "held.jsonl"
    if content is not None:
        held.write_text(content)
    flags = ["--config", str(RECIPES / "demo.yaml"), "--model", str(model), "--data", str(conversations), "--quiet"]
    flags += ["--eval-data", str(held), "--output-dir", str(conversations.parent / "out")]
    assert main([*flags, *(["--dry-run"] if dry else [])]) == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("error: ") == 1
