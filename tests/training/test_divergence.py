"""A run that has diverged is stopped, and no value that is not finite is saved or logged as another."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from chaos.process import logged
from helpers import RECIPES
from qlora_lowmem.files import json_line
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.preflight import inputs_of
from qlora_lowmem.run_folder.checkpoints import newest_complete
from qlora_lowmem.training.ending import DivergedError, DivergenceCheck
from qlora_lowmem.training.progress import LogFile
from tiny_chat import write_tiny_chat

Make = Callable[..., Recipe]


class SpoilAt(TrainerCallback):
    """Puts an infinity into a trained weight at an event of a step."""

    def __init__(self, step: int, event: str) -> None:
        self._step = step
        setattr(self, event, self._spoil)

    def _spoil(self, *event: Any, **parts: Any) -> None:
        if event[1].global_step == self._step:
            with torch.no_grad():
                next(p for name, p in parts["model"].named_parameters() if "lora_B" in name).fill_(math.inf)


def run(recipe: Recipe, callback: TrainerCallback) -> Path:
    output_dir = Path(recipe.run.output_dir)
    callbacks = [callback, LogFile(output_dir, print)]
    with pytest.raises(DivergedError) as caught:
        execute(inputs_of(recipe), output_dir=output_dir, callbacks=callbacks)
    assert caught.value.exit_code == 2
    (output_dir / "said").write_text(str(caught.value))
    return output_dir


def test_the_command_stops_and_keeps_the_last_finite_checkpoint(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    model, out, summary = write_tiny_chat(tmp_path / "model"), tmp_path / "out", tmp_path / "summary.json"
    steps = ["--max-steps", "6", "--save-steps", "1", "--max-seq-length", "64", "--quiet"]
    wild = ["--learning-rate", "1.0", "--lora-alpha", "1000000", "--max-grad-norm", "0"]
    recipe = ["--config", str(RECIPES / "demo.yaml"), "--model", str(model), *steps, *wild]
    done = command("train", *recipe, "--output-dir", str(out), "--json", str(summary))
    assert done.returncode == 2, done.stderr
    for words in ("training has diverged", "after step 2", "at learning rate", "optimizer.max_grad_norm", "another"):
        assert words in done.stderr
    assert "adapter saved" not in done.stderr
    assert not summary.exists()
    assert not (out / "adapter_model.safetensors").exists()
    kept = newest_complete(out).checkpoint
    assert kept == out / "checkpoint-1"
    assert all(bool(torch.isfinite(each).all()) for each in load_file(kept / "adapter_model.safetensors").values())
    assert all(math.isfinite(line["loss"]) and line["loss"] > 0 for line in logged(out))


def test_a_loss_that_is_not_finite_ends_it(tiny_recipe: Make) -> None:
    out = run(tiny_recipe("run"), SpoilAt(2, "on_step_begin"))
    said = (out / "said").read_text()
    assert "the loss is nan" in said
    assert "after step 3" in said
    assert "checkpoint-2 is the last that was saved" in said


def test_no_checkpoint_holds_weights_that_are_not_finite(tiny_recipe: Make) -> None:
    """The step's loss and gradients were finite; its update was not."""
    out = run(tiny_recipe("run"), SpoilAt(2, "on_step_end"))
    assert "the adapter's weights are not finite" in (out / "said").read_text()
    assert newest_complete(out).checkpoint == out / "checkpoint-1"
    assert not (out / "checkpoint-2").exists()
    assert not (out / ".saving").exists()


def test_on_a_virtual_card_there_are_no_values_to_judge(tiny_recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_lowmem.training.trainer.virtual_gpu.current_card", lambda: object())
    recipe = tiny_recipe("run", max_steps=2)
    execute(inputs_of(recipe), output_dir=Path(recipe.run.output_dir), callbacks=[SpoilAt(1, "on_step_begin")])


def test_overflow_under_fp16_is_no_divergence_until_nothing_is_left_to_scale(tmp_path: Path) -> None:
    check = DivergenceCheck(tmp_path, 1.0)
    for step in range(1, 25):
        check.step(step, 2.0, math.inf, 1e-4, skipped=True)
    with pytest.raises(DivergedError, match="the gradient norm is inf after step 25"):
        check.step(25, 2.0, math.inf, 1e-4, skipped=True)
    check.step(26, 2.0, 1.0, 1e-4, skipped=False)
    check.step(27, 2.0, math.inf, 1e-4, skipped=True)
    with pytest.raises(DivergedError, match="the loss is nan and the gradient norm is inf after step 28"):
        check.step(28, math.nan, math.inf, 1e-4, skipped=True)
    with pytest.raises(DivergedError, match="the gradient norm is nan"):
        check.step(29, 2.0, math.nan, 1e-4, skipped=False)


def test_weights_are_judged_in_any_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        save_file({"a": torch.ones(3, dtype=dtype)}, tmp_path / "adapter_model.safetensors")
        DivergenceCheck(tmp_path, 1.0).weights(tmp_path, 1, None)
        save_file({"a": torch.tensor([1.0, math.nan], dtype=dtype)}, tmp_path / "adapter_model.safetensors")
        with pytest.raises(DivergedError, match=r"not finite \(a\)"):
            DivergenceCheck(tmp_path, 1.0).weights(tmp_path, 1, None)


def test_json_has_null_where_there_is_no_number() -> None:
    line = json_line({"loss": math.nan, "vram": {"a": 1}, "losses": (1.5, -math.inf), "name": "x", "done": True})
    assert json.loads(line) == {"loss": None, "vram": {"a": 1}, "losses": [1.5, None], "name": "x", "done": True}


def test_the_log_has_null_too(tmp_path: Path) -> None:
    LogFile(tmp_path, print).note({"eval_loss": math.nan})
    assert json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)["eval_loss"] is None
