"""A run goes on from its own checkpoints only, alone, and what may change between two starts is said."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_field
from qlora_lowmem.run_folder.checkpoints import CheckpointStore
from qlora_lowmem.run_folder.resumption import checkpoint_to_resume, held_folder

Make = Callable[..., Recipe]


def begun(recipe: Recipe) -> Recipe:
    """As if it had run to a first checkpoint."""
    output_dir = Path(recipe.run.output_dir)
    with held_folder(output_dir):
        assert checkpoint_to_resume(recipe).checkpoint is None
    CheckpointStore(output_dir, 2).save(1, lambda staging: (staging / "checkpoint-1").mkdir())
    return recipe


def test_the_same_recipe_goes_on(tiny_recipe: Make) -> None:
    recipe = begun(tiny_recipe("run"))
    found = checkpoint_to_resume(recipe)
    assert found.checkpoint == Path(recipe.run.output_dir) / "checkpoint-1"
    assert found.notes == ()


def test_what_a_killed_run_was_writing_is_removed(tiny_recipe: Make) -> None:
    recipe = begun(tiny_recipe("run"))
    leftover = Path(recipe.run.output_dir) / ".saving" / "checkpoint-2"
    leftover.mkdir(parents=True)
    checkpoint_to_resume(recipe)
    assert not leftover.parent.exists()


@pytest.mark.parametrize(
    ("leaf", "value", "said"),
    [
        ("lora_r", 4, "lora.lora_r was 8"),
        ("learning_rate", 1e-3, "optimizer.learning_rate was 0.0002"),
        ("batch_size", 2, "batch.batch_size was 1"),
        ("eval_fraction", 0.5, "data.eval_fraction was 0.0"),
        ("use_rslora", True, "lora.use_rslora was False"),
        ("exclude_modules", ("q_proj",), "lora.exclude_modules was None"),
        ("warmup_ratio", 0.5, "optimizer.warmup_ratio was 0.0"),
        ("neftune_noise_alpha", 5.0, "data.neftune_noise_alpha was 0.0"),
        ("quantised_embeddings", "8bit", "lean.quantised_embeddings was 'none'"),
        ("optimizer_state_dtype", "bf16", "optimizer.optimizer_state_dtype was 'auto'"),
    ],
)
def test_another_training_is_refused(tiny_recipe: Make, leaf: str, value: object, said: str) -> None:
    recipe = begun(tiny_recipe("run", **({"lean": True} if leaf == "quantised_embeddings" else {})))
    with pytest.raises(UsageError, match="another recipe") as caught:
        checkpoint_to_resume(replace_field(recipe, leaf, value))
    assert said in str(caught.value)


def test_back_to_what_a_field_that_came_later_is_by_default_is_another_training_too(tiny_recipe: Make) -> None:
    recipe = begun(tiny_recipe("run", use_rslora=True))
    with pytest.raises(UsageError, match=r"lora\.use_rslora was True"):
        checkpoint_to_resume(replace_field(recipe, "use_rslora", False))


@pytest.mark.parametrize(
    "changes",
    [
        {"eval_data": "held.jsonl"},
        {"gradient_checkpointing": False},
        {"loss": "full", "attention": "eager"},
        {"lean": True, "checkpoints": "host"},
        {"batch_size": 2, "gradient_accumulation_steps": 1},
    ],
)
def test_what_only_changes_memory_goes_on_aloud(tiny_recipe: Make, changes: dict[str, object]) -> None:
    recipe = begun(tiny_recipe("run"))
    for leaf, value in changes.items():
        recipe = replace_field(recipe, leaf, value)
    found = checkpoint_to_resume(recipe)
    assert found.checkpoint is not None
    assert len(found.notes) == len(changes)
    assert all("the same training, up to rounding" in note for note in found.notes)


def test_gradients_may_be_released_from_now_on(tiny_recipe: Make) -> None:
    recipe = begun(tiny_recipe("run", gradient_accumulation_steps=1, max_grad_norm=0.0))
    found = checkpoint_to_resume(replace_field(recipe, "gradient_release", True))
    assert found.checkpoint is not None
    assert found.notes == ("optimizer.gradient_release was False and is now True: the same training, up to rounding",)


@pytest.mark.parametrize("change", ["longer", "as long"])
def test_other_data_under_the_same_name_are_refused(tiny_recipe: Make, conversations: Path, change: str) -> None:
    recipe = begun(tiny_recipe("run", data=str(conversations)))
    content = conversations.read_text()
    if change == "longer":
        conversations.write_text(content + json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    else:
        conversations.write_text(content.replace("It is 2.", "It is 5."))
    with pytest.raises(UsageError, match="would train on other samples"):
        checkpoint_to_resume(recipe)
    conversations.write_text(content)
    assert checkpoint_to_resume(recipe).checkpoint is not None


def test_another_revision_of_a_hub_data_set_is_refused(
    tiny_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_dataset` itself, on a folder that stands for a repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "owner" / "name" / "train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"text": "one"}\n')
    recipe = begun(tiny_recipe("run", data="owner/name"))
    assert checkpoint_to_resume(recipe).checkpoint is not None
    file.write_text('{"text": "two"}\n')
    os.utime(file, (1, 1))
    with pytest.raises(UsageError, match="would train on other samples"):
        checkpoint_to_resume(recipe)


def test_another_number_of_processes_goes_on_with_the_same_samples_a_step(
    tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = begun(tiny_recipe("run"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="the number of processes was 1"):
        checkpoint_to_resume(recipe)
    with pytest.raises(UsageError, match=r"batch\.gradient_accumulation_steps was 2"):
        checkpoint_to_resume(replace_field(recipe, "gradient_accumulation_steps", 4))
    found = checkpoint_to_resume(replace_field(recipe, "gradient_accumulation_steps", 1))
    assert found.checkpoint is not None
    assert "the number of processes was 1 and is now 2" in found.notes[1]


def test_a_checkpoint_of_another_run_put_here_is_refused(tiny_recipe: Make) -> None:
    recipe, other = begun(tiny_recipe("run")), begun(tiny_recipe("other", learning_rate=1e-2))
    theirs = Path(other.run.output_dir) / "checkpoint-1"
    theirs.rename(Path(recipe.run.output_dir) / "checkpoint-2")
    with pytest.raises(UsageError, match=r"optimizer\.learning_rate was 0\.01"):
        checkpoint_to_resume(recipe)


def test_resume_false_mixes_nothing(tiny_recipe: Make) -> None:
    recipe = begun(tiny_recipe("run"))
    with pytest.raises(UsageError, match=r"run\.resume: false"):
        checkpoint_to_resume(replace_field(recipe, "resume", False))


@pytest.mark.parametrize("old", [True, False])
def test_an_unreadable_marker_is_no_licence(tiny_recipe: Make, old: bool) -> None:
    """Nor is one of an earlier version, which did not remember its data."""
    recipe = begun(tiny_recipe("run"))
    marker = Path(recipe.run.output_dir) / "recipe.json"
    content = {name: value for name, value in json.loads(marker.read_text()).items() if old and name != "data"}
    marker.write_text(json.dumps(content))
    said = "whose checkpoints these are is unknown" if old else r"its recipe\.json is none of this command's"
    with pytest.raises(UsageError, match=said):
        checkpoint_to_resume(recipe)


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    refused = pytest.raises(UsageError, match="another run is training")
    with held_folder(tmp_path / "run"), refused, held_folder(tmp_path / "run"):
        pass
    with held_folder(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"), held_folder(tmp_path / "file" / "run"):
        pass
