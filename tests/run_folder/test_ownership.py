"""What another tool left in the output folder is neither replaced nor removed."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run_folder.checkpoints import CheckpointStore, newest_complete
from qlora_lowmem.run_folder.ownership import RECIPE_FILE, TOTALS, is_our_checkpoint
from qlora_lowmem.run_folder.resumption import checkpoint_to_resume, held_folder
from qlora_lowmem.tokens.dataset import TOKENS_FOLDER, TrainingData
from tiny_chat import write_tiny_chat

Make = Callable[..., Recipe]
THEIRS = ("checkpoint-1/w.bin", "checkpoint-900/w.bin", "tokenised/mine/x", "README.md", "recipe.json", "log.jsonl")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of another tool")
    return files_in(folder)


def test_the_command_leaves_another_tools_folder_as_it_is(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    before = put(tmp_path / "out", *THEIRS)
    model = write_tiny_chat(tmp_path / "model")
    steps = ["--max-steps", "2", "--save-steps", "1", "--max-seq-length", "64", "--quiet"]
    recipe = ["--config", str(RECIPES / "demo.yaml"), "--model", str(model), *steps]
    run = command("train", *recipe, "--output-dir", str(tmp_path / "out"))
    assert run.returncode == 2, run.stderr
    assert "holds README.md, checkpoint-1, checkpoint-900, log.jsonl and 1 more" in run.stderr
    assert "Give another folder with --output-dir" in run.stderr
    assert "Loading weights" not in run.stderr
    assert files_in(tmp_path / "out") == before


@pytest.mark.parametrize(
    "name", [*(name for name in THEIRS if "tokenised" not in name), "adapter_config.json", ".saving/x", ".lock"]
)
def test_each_of_them_alone_is_reason_enough(tiny_recipe: Make, name: str) -> None:
    recipe = tiny_recipe("run")
    output_dir = Path(recipe.run.output_dir)
    before = put(output_dir, name)
    with pytest.raises(UsageError, match=r"would replace files that are not its own"), held_folder(output_dir):
        pass
    with pytest.raises(UsageError, match=r"would replace files that are not its own"):
        checkpoint_to_resume(recipe)
    assert files_in(output_dir) == before


def test_another_tools_memory_file_is_told_from_ours(tiny_recipe: Make) -> None:
    put(Path(tiny_recipe("run").run.output_dir), "memory.json")
    with pytest.raises(UsageError, match=r"memory\.json"):
        checkpoint_to_resume(tiny_recipe("run"))


def test_what_is_in_nobodys_way_is_no_reason(tiny_recipe: Make) -> None:
    recipe = tiny_recipe("run")
    before = put(Path(recipe.run.output_dir), "notes.txt", "tokenised/mine/x")
    with held_folder(Path(recipe.run.output_dir)):
        checkpoint_to_resume(recipe)
    assert before.items() <= files_in(Path(recipe.run.output_dir)).items()


def ours(step: int) -> Callable[[Path], None]:
    def write(staging: Path) -> None:
        folder = staging / f"checkpoint-{step}"
        folder.mkdir()
        (folder / TOTALS).write_text("{}")
        (folder / "weights").write_bytes(b"weights")

    return write


def test_old_checkpoints_of_ours_go_and_no_others(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    for step in (1, 2):
        store.save(step, ours(step))
    (tmp_path / "checkpoint-2" / "manifest.json").unlink()  # torn
    theirs = put(tmp_path, "checkpoint-3/w.bin", "checkpoint-900/w.bin", "checkpoint-4/w.bin")
    assert newest_complete(tmp_path).checkpoint is None
    store.save(4, ours(4))
    found = files_in(tmp_path)
    assert not (tmp_path / "checkpoint-2").exists()
    assert found["checkpoint-4.not-ours-1/w.bin"] == theirs["checkpoint-4/w.bin"], "moved, not lost"
    for name in ("checkpoint-3/w.bin", "checkpoint-900/w.bin"):
        assert found[name] == theirs[name]
    assert newest_complete(tmp_path).checkpoint == tmp_path / "checkpoint-4"


@pytest.mark.parametrize(
    ("torn", "verdict"),
    [
        ([], True),
        (["manifest.json"], True),
        (["manifest.json", RECIPE_FILE], True),
        (["manifest.json", RECIPE_FILE, TOTALS], False),
        (["manifest.json", RECIPE_FILE, TOTALS, "weights"], True),  # an empty folder
    ],
)
def test_a_torn_checkpoint_of_ours_is_known(tiny_recipe: Make, torn: list[str], verdict: bool) -> None:
    recipe = tiny_recipe("run")
    output_dir = Path(recipe.run.output_dir)
    with held_folder(output_dir):
        checkpoint_to_resume(recipe)
    folder = CheckpointStore(output_dir, 2).save(1, ours(1))
    for name in torn:
        (folder / name).unlink()
    assert is_our_checkpoint(folder) is verdict


def test_tokens_of_ours_are_removed_and_nothing_else(tmp_path: Path) -> None:
    parent = tmp_path / TOKENS_FOLDER
    theirs = put(parent, "mine/x", "0123456789abcdef.bak/x")
    put(parent, "0123456789abcdef/tokens.arrow", ".0123456789abcdef.17/tokens.arrow", ".lock")
    TrainingData(None, folder=parent / "0123456789abcdef").discard()
    assert files_in(parent) == theirs | {".lock": b".lock of another tool"}
    shutil.rmtree(parent)
    put(parent, "0123456789abcdef/tokens.arrow", ".lock")
    TrainingData(None, folder=parent / "0123456789abcdef").discard()
    assert not parent.exists()


def test_a_folder_without_its_marker_says_how_to_go_on(tiny_recipe: Make) -> None:
    """Else the next command, whatever its recipe, would go on from the other's checkpoint."""
    recipe = tiny_recipe("run")
    output_dir = Path(recipe.run.output_dir)
    with held_folder(output_dir):
        checkpoint_to_resume(recipe)
    CheckpointStore(output_dir, 2).save(1, ours(1))
    marker = output_dir / RECIPE_FILE
    marker.unlink()
    with pytest.raises(UsageError, match=r"no recipe\.json says whose.*copy '.*/checkpoint-1/recipe\.json' to"):
        checkpoint_to_resume(recipe)
    copy = output_dir / "checkpoint-1" / RECIPE_FILE
    assert RECIPE_FILE in json.loads((copy.parent / "manifest.json").read_text())["files"], "with its SHA-256"
    marker.write_bytes(copy.read_bytes())
    assert checkpoint_to_resume(recipe).checkpoint == output_dir / "checkpoint-1"
