"""What is done to a run besides its steps changes none of its losses."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from chaos.process import logged
from helpers import RECIPES
from qlora_lowmem.errors import StoppedBySignal
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.execute import Outcome, execute
from qlora_lowmem.run.job import Job
from qlora_lowmem.run.preflight import inputs_of
from qlora_lowmem.run_folder.checkpoints import newest_complete
from qlora_lowmem.training.ending import Interruption
from qlora_lowmem.training.progress import LogFile
from qlora_lowmem.training.warm_up import WarmUp, longest_batch, optimizer_state_bytes
from tiny_chat import write_tiny_chat

Make = Callable[..., Recipe]


class At(TrainerCallback):
    """Does something as a step begins, or after its evaluation's first batch."""

    def __init__(self, step: int, action: Callable[[], object], event: str = "on_step_begin") -> None:
        self._step, self._action = step, action
        setattr(self, event, self._happen)

    def _happen(self, *event: Any, **_: Any) -> None:
        state = event[1]
        if state.global_step == self._step:
            self._action()


class PowerCut(BaseException):
    """Nothing catches it."""


def cut() -> None:
    raise PowerCut


def run(recipe: Recipe, callbacks: Sequence[TrainerCallback] = (), **options: Any) -> Outcome:
    """Train from the newest whole checkpoint, as the command does."""
    output_dir = Path(recipe.run.output_dir)
    found = newest_complete(output_dir).checkpoint
    callbacks = [*callbacks, LogFile(output_dir, print)]
    return execute(inputs_of(recipe), output_dir=output_dir, resume_from=found, callbacks=callbacks, **options)


def history(recipe: Recipe, *keys: str) -> list[tuple[Any, ...]]:
    return [tuple(line.get(key) for key in keys) for line in logged(Path(recipe.run.output_dir))]


def test_a_run_cut_between_two_log_lines_logs_the_same(tiny_recipe: Make) -> None:
    """Losses are logged as means over three steps, across epochs' ends, and checkpoints come in between."""
    options = {"logging_steps": 3, "save_steps": 2, "eval_fraction": 0.4, "eval_steps": 2}
    whole, broken = tiny_recipe("whole", **options), tiny_recipe("broken", **options)
    expected = run(whole)
    with pytest.raises(PowerCut):
        run(broken, [At(5, cut)])
    found = run(broken)
    assert found.losses == expected.losses
    assert len(found.losses) == 2
    assert found.evaluations == expected.evaluations
    assert [step for step, _ in found.evaluations] == [2, 4, 6]
    assert (found.tokens, found.steps) == (expected.tokens, expected.steps) == (6 * 2 * 24, 6)
    assert found.new_tokens == 2 * 2 * 24
    keys = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    assert history(broken, *keys) == history(whole, *keys)


def test_the_full_loss_counts_and_logs_as_the_fused_one(tiny_recipe: Make) -> None:
    fused, full = tiny_recipe("fused", max_steps=2), tiny_recipe("full", max_steps=2, loss="full")
    expected, found = run(fused), run(full)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.tokens == expected.tokens == 2 * 2 * 24
    assert history(full, "step", "tokens") == history(fused, "step", "tokens")


def test_a_run_that_had_ended_takes_no_further_step(tiny_recipe: Make) -> None:
    """Killed after its last checkpoint and before its adapter was written."""
    recipe = tiny_recipe("run", max_steps=2)
    first = run(recipe)
    adapter = Path(recipe.run.output_dir) / "adapter_model.safetensors"
    content = adapter.read_bytes()
    adapter.unlink()
    again = run(recipe)
    assert (again.steps, again.losses) == (2, first.losses)
    assert adapter.read_bytes() == content


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_after_the_step_with_a_checkpoint(tiny_recipe: Make, number: int, code: int) -> None:
    recipe = tiny_recipe("run", max_steps=4, save_steps=50)
    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignal, match="after step 3 of 4: saved in") as caught, Interruption() as interruption:
        run(recipe, [At(2, lambda: os.kill(os.getpid(), number))], interruption=interruption)
    assert caught.value.exit_code == code
    assert signal.getsignal(number) is before
    assert newest_complete(Path(recipe.run.output_dir)).checkpoint == Path(recipe.run.output_dir) / "checkpoint-3"
    assert run(recipe).losses == run(tiny_recipe("whole", max_steps=4)).losses


def test_a_signal_does_not_wait_for_an_evaluation(tiny_recipe: Make) -> None:
    recipe = tiny_recipe("run", max_steps=4, save_steps=50, eval_fraction=0.5, eval_steps=2)
    strike = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM), "on_prediction_step")
    with pytest.raises(StoppedBySignal, match="after step 2 of 4"), Interruption() as interruption:
        run(recipe, [strike], interruption=interruption)
    assert newest_complete(Path(recipe.run.output_dir)).checkpoint == Path(recipe.run.output_dir) / "checkpoint-2"


@pytest.mark.parametrize(
    ("step", "event"), [(2, "on_prediction_step"), (1, "on_step_begin"), (4, "on_prediction_step")]
)
def test_an_evaluation_that_a_signal_cut_short_comes_when_it_goes_on(tiny_recipe: Make, step: int, event: str) -> None:
    """In the midst of one, in the step before it, and in the last one, after which no step is left."""
    options = {"max_steps": 4, "save_steps": 2, "eval_fraction": 0.4, "eval_steps": 2}
    whole, recipe = tiny_recipe("whole", **options), tiny_recipe("run", **options)
    expected = run(whole)
    strike = At(step, lambda: os.kill(os.getpid(), signal.SIGINT), event)
    stopped = pytest.raises(StoppedBySignal, match=rf"after step {max(step, 2)} of 4, before its evaluation: saved in")
    with stopped as caught, Interruption() as interruption:
        run(recipe, [strike], interruption=interruption)
    assert caught.value.exit_code == 130
    assert not (Path(recipe.run.output_dir) / "adapter_model.safetensors").exists()
    found = run(recipe)
    assert found.evaluations == expected.evaluations
    assert [step for step, _ in found.evaluations] == [2, 4]
    assert found.losses == expected.losses
    keys = ("step", "loss", "tokens", "eval_loss")
    assert history(recipe, *keys) == history(whole, *keys)


def test_an_evaluation_made_up_for_is_logged_once(tiny_recipe: Make) -> None:
    """The run is killed after it, so it comes a third time."""
    recipe = tiny_recipe("run", max_steps=4, save_steps=2, eval_fraction=0.4, eval_steps=2)
    strike = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM), "on_prediction_step")
    with pytest.raises(StoppedBySignal), Interruption() as interruption:
        run(recipe, [strike], interruption=interruption)
    with pytest.raises(PowerCut):
        run(recipe, [At(2, cut)])
    assert [step for step, loss in history(recipe, "step", "eval_loss") if loss] == [2]
    found = run(recipe)
    assert [step for step, _ in found.evaluations] == [2, 4]
    assert [step for step, loss in history(recipe, "step", "eval_loss") if loss] == [2, 4]


def test_a_signal_ends_an_evaluation_that_is_made_up_for(tiny_recipe: Make) -> None:
    recipe = tiny_recipe("run", max_steps=4, save_steps=2, eval_fraction=0.4, eval_steps=2)
    for _ in range(2):
        strike = At(2, lambda: os.kill(os.getpid(), signal.SIGTERM), "on_prediction_step")
        with pytest.raises(StoppedBySignal, match="after step 2 of 4"), Interruption() as interruption:
            run(recipe, [strike], interruption=interruption)
    assert [step for step, _ in run(recipe).evaluations] == [2, 4]


def test_how_often_to_save_may_change_between_two_starts(tiny_recipe: Make) -> None:
    """It is outside the recipe's hash."""
    recipe = tiny_recipe("run", max_steps=5, save_steps=2)
    with pytest.raises(PowerCut):
        run(recipe, [At(3, cut)])
    run(tiny_recipe("run", max_steps=5, save_steps=1))
    found = {path.name for path in Path(recipe.run.output_dir).glob("checkpoint-*")}
    assert found == {"checkpoint-3", "checkpoint-4", "checkpoint-5"}


def test_the_warm_up_leaves_no_trace(tiny_recipe: Make, tmp_path: Path) -> None:
    """Real samples of many lengths, a model in 16 bits so that the optimizer's state is as large as it gets."""
    model = write_tiny_chat(tmp_path / "model")
    options = {"model": str(model), "weights": "pretrained", "load_in_4bit": False, "data": str(RECIPES / "demo.jsonl")}
    outcomes = []
    for warm in (False, True):
        recipe = tiny_recipe(str(warm), **options, max_seq_length=512, max_steps=3)

        def ready(job: Job, _: Any, warm: bool = warm) -> None:
            lengths = [len(sample["input_ids"]) for sample in job.trainer.train_dataset]
            assert len(set(lengths)) > 1
            assert longest_batch(job.trainer)["input_ids"].shape == (1, max(lengths))
            if warm:
                job.trainer.add_callback(WarmUp(job.trainer))

        outcomes.append(execute(inputs_of(recipe), output_dir=Path(recipe.run.output_dir), on_ready=ready))
    assert outcomes[1].losses == outcomes[0].losses
    assert outcomes[1].tokens == outcomes[0].tokens
    adapters = [tmp_path / name / "adapter_model.safetensors" for name in ("False", "True")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.parametrize(
    ("optimizer", "whole"),
    [("adamw_torch", None), ("adamw_8bit", None), ("adamw_8bit", "lm_head"), ("sgd", None), ("adafactor", None)],
)
def test_the_room_held_for_the_optimizer_is_what_its_state_takes(
    tiny_recipe: Make, optimizer: str, whole: str | None
) -> None:
    """An embedding's is in 32 bits, whatever its optimizer is called."""
    more = {"optimizer": optimizer, "modules_to_save": whole}
    recipe = tiny_recipe("run", max_steps=1, lora_r=64, target_modules="all-linear", **more)
    jobs: list[Job] = []
    run(recipe, on_ready=lambda job, _: jobs.append(job), save=False)
    assert not any("in 4 bits already" in note for note in jobs[0].checked.notes), "what they are put into is not"
    states = jobs[0].trainer.optimizer.state.values()
    tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
    taken = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel() > 1}.values())
    held = optimizer_state_bytes(jobs[0].model, optimizer)
    trained = sum(p.nbytes for p in jobs[0].model.parameters() if p.requires_grad)
    assert abs(taken - held) <= 0.05 * trained


def test_what_is_rescued_goes_on_exactly(tiny_recipe: Make) -> None:
    """As after running out of memory in the midst of a step whose generators and totals have moved on."""
    options = {"logging_steps": 2, "save_steps": 50, "max_steps": 5}
    expected = run(tiny_recipe("whole", **options))
    recipe = tiny_recipe("run", **options)
    jobs: list[Job] = []
    with pytest.raises(PowerCut):
        run(recipe, [At(3, cut, "on_substep_end")], on_ready=lambda job, _: jobs.append(job))
    assert jobs[0].trainer.rescue() == Path(recipe.run.output_dir) / "checkpoint-3"
    assert run(recipe).losses == expected.losses


def test_nothing_is_rescued_out_of_the_optimizers_own_step(tiny_recipe: Make) -> None:
    recipe = tiny_recipe("run", save_steps=50)
    jobs: list[Job] = []
    with pytest.raises(PowerCut):
        run(recipe, [At(3, cut, "on_optimizer_step")], on_ready=lambda job, _: jobs.append(job))
    assert jobs[0].trainer.rescue() is None
