"""Runs whose optimizer state has a dtype of its own, or whose gradients are released within backward."""

import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback

from chaos.process import logged
from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.errors import StoppedBySignal
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.plan.recipe_runs import RecipeRun, submit_recipe
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, replace_field
from qlora_lowmem.run.execute import Outcome, execute
from qlora_lowmem.run.job import Job
from qlora_lowmem.run.preflight import inputs_of
from qlora_lowmem.run_folder.checkpoints import newest_complete
from qlora_lowmem.training.adamw import AdamW
from qlora_lowmem.training.ending import DivergedError, Interruption
from qlora_lowmem.training.progress import LogFile
from qlora_lowmem.training.warm_up import WarmUp, optimizer_state_bytes

Make = Callable[..., Recipe]
ALONE = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
RELEASE = ALONE | {"gradient_release": True}
CARD = virtual_gpu.get_card("rtx-4050-laptop-6gb")


class At(TrainerCallback):
    """Does something at an event of a step."""

    def __init__(self, step: int, action: Callable[[], object], event: str = "on_step_begin") -> None:
        self._step, self._action = step, action
        setattr(self, event, self._happen)

    def _happen(self, *event: Any, **_: Any) -> None:
        if event[1].global_step == self._step:
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


def adapter(recipe: Recipe) -> bytes:
    return (Path(recipe.run.output_dir) / "adapter_model.safetensors").read_bytes()


def trained(job: Job) -> list[nn.Parameter]:
    return [p for p in job.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("model", [{}, {"lean": True}], ids=["plain", "lean"])
def test_released_gradients_train_the_same(tiny_recipe: Make, model: dict[str, Any]) -> None:
    """With a learning rate that changes at each step; clipping and accumulation are off in both."""
    options = model | {"target_modules": "all-linear", "weight_decay": 0.1, "warmup_steps": 2, "max_steps": 3}
    plain, released = tiny_recipe("plain", **ALONE | options), tiny_recipe("released", **RELEASE | options)
    kept: list[Job] = []
    assert run(released, on_ready=lambda job, _: kept.append(job)).losses == run(plain).losses
    assert adapter(released) == adapter(plain)
    assert isinstance(kept[0].trainer.own_adamw, AdamW)
    assert all(p.grad is None for p in trained(kept[0]))
    rates = [[line["learning_rate"] for line in logged(Path(each.run.output_dir))] for each in (plain, released)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 1


def test_a_norm_that_is_not_known_is_not_logged(tiny_recipe: Make) -> None:
    for recipe, there in ((tiny_recipe("a", **ALONE), True), (tiny_recipe("b", **RELEASE), False)):
        run(replace_field(recipe, "max_steps", 1))
        assert all(("grad_norm" in line) == there for line in logged(Path(recipe.run.output_dir)))


@pytest.mark.parametrize(
    "changes",
    [{"optimizer_state_dtype": "bf16"}, RELEASE | {"optimizer_state_dtype": "fp32", "adapter_dtype": "bf16"}],
    ids=["bf16", "released fp32"],
)
def test_a_run_that_goes_on_is_the_undisturbed_one(tiny_recipe: Make, changes: dict[str, Any]) -> None:
    """Cut in the midst of a step, and by a signal: losses and weights are the same bit by bit."""
    options = changes | {"save_steps": 1, "logging_steps": 2, "weight_decay": 0.1, "max_steps": 4}
    whole, broken = tiny_recipe("whole", **options), tiny_recipe("broken", **options)
    jobs: list[Job] = []
    expected = run(whole)
    with pytest.raises(PowerCut):
        run(broken, [At(1, cut, "on_pre_optimizer_step")])
    with pytest.raises(StoppedBySignal), Interruption() as interruption:
        run(broken, [At(2, lambda: os.kill(os.getpid(), signal.SIGTERM))], interruption=interruption)
    found = run(broken, on_ready=lambda job, _: jobs.append(job))
    assert found.losses == expected.losses
    assert adapter(broken) == adapter(whole)
    assert jobs[0].trainer.own_adamw is not None
    wanted = {"bf16": torch.bfloat16, "auto": torch.float32, "fp32": torch.float32}
    kinds = {state[name].dtype for state in jobs[0].trainer.optimizer.state.values() for name in ("exp_avg",)}
    assert kinds == {wanted[broken.optimizer.optimizer_state_dtype]}


def test_release_may_be_switched_on_and_off_between_two_starts(tiny_recipe: Make) -> None:
    expected = run(tiny_recipe("whole", **ALONE, max_steps=3))
    for stop, changes in ((1, RELEASE), (2, ALONE)):
        with pytest.raises(PowerCut):
            run(tiny_recipe("broken", **changes, max_steps=3), [At(stop, cut)])
    assert run(tiny_recipe("broken", **RELEASE, max_steps=3)).losses == expected.losses


@pytest.mark.parametrize("changes", [RELEASE, {"optimizer_state_dtype": "bf16"}], ids=["released", "bf16"])
def test_the_warm_up_leaves_no_trace_and_holds_the_states_room(tiny_recipe: Make, changes: dict[str, Any]) -> None:
    options = changes | {"max_steps": 3, "lora_r": 64}
    held: list[int] = []

    def ready(job: Job, _: Any) -> None:
        warm_up = WarmUp(job.trainer)
        job.trainer.add_callback(warm_up)
        job.trainer.add_callback(At(0, lambda: held.append(warm_up._coming_state_bytes())))
        job.trainer.add_callback(At(0, lambda: held.append(sum(p.grad is not None for p in trained(job)))))

    plain, warm = tiny_recipe("plain", **options), tiny_recipe("warm", **options)
    jobs: list[Job] = []
    expected = run(plain, on_ready=lambda job, _: jobs.append(job))
    assert run(warm, on_ready=ready).losses == expected.losses
    assert adapter(warm) == adapter(plain)
    states = jobs[0].trainer.optimizer.state.values()
    taken = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    assert held == [taken, 0]
    own = jobs[0].trainer.own_adamw
    assert own is not None
    assert optimizer_state_bytes(jobs[0].model, "adamw_torch", own.state_dtype) == taken


def test_nothing_is_rescued_out_of_a_backward_that_had_stepped(tiny_recipe: Make) -> None:
    """Out of memory as the gradient of one weight in the midst is made; those behind it are stepped."""
    recipe = tiny_recipe("run", **RELEASE, save_steps=2)
    jobs: list[Job] = []

    def ready(job: Job, _: Any) -> None:
        jobs.append(job)
        weights = trained(job)

        def fail(_: nn.Parameter) -> None:
            if job.trainer.state.global_step == 3:
                raise PowerCut

        weights[len(weights) // 2].register_post_accumulate_grad_hook(fail)

    with pytest.raises(PowerCut):
        run(recipe, on_ready=ready)
    own = jobs[0].trainer.own_adamw
    assert own is not None
    assert own.half_stepped
    assert len({float(state["step"]) for state in own.state.values()}) == 2
    assert jobs[0].trainer.rescue() is None
    assert newest_complete(Path(recipe.run.output_dir)).checkpoint == Path(recipe.run.output_dir) / "checkpoint-2"


def test_what_fails_before_any_weight_is_stepped_is_rescued(tiny_recipe: Make) -> None:
    options = RELEASE | {"save_steps": 50, "logging_steps": 2, "max_steps": 5}
    expected = run(tiny_recipe("whole", **options))
    recipe = tiny_recipe("run", **options)
    jobs: list[Job] = []
    with pytest.raises(PowerCut):
        run(recipe, [At(3, cut)], on_ready=lambda job, _: jobs.append(job))
    assert jobs[0].trainer.rescue() == Path(recipe.run.output_dir) / "checkpoint-3"
    assert run(recipe).losses == expected.losses


def test_no_weight_that_is_not_finite_is_saved(tiny_recipe: Make) -> None:
    """Backward steps weights with a loss of NaN before the loss is looked at, or with gradients that no one sees."""
    recipe = tiny_recipe("run", **RELEASE)
    jobs: list[Job] = []

    def spoil() -> None:
        trained(jobs[0])[0].data.fill_(math.nan)

    with pytest.raises(DivergedError, match=r"the loss is nan after step 3.*which needs .*gradient_release false"):
        run(recipe, [At(2, spoil)], on_ready=lambda job, _: jobs.append(job))
    assert any(not bool(torch.isfinite(p).all()) for p in trained(jobs[0])[1:]), "stepped with NaN"
    out = Path(recipe.run.output_dir)
    assert newest_complete(out).checkpoint == out / "checkpoint-2"
    assert not (out / "adapter_model.safetensors").exists()
    assert all(
        bool(torch.isfinite(each).all()) for each in load_file(out / "checkpoint-2/adapter_model.safetensors").values()
    )

    other = tiny_recipe("other", **RELEASE)
    jobs.clear()

    def ready(job: Job, _: Any) -> None:
        jobs.append(job)

        def overflow(parameter: nn.Parameter) -> None:
            if job.trainer.state.global_step == 2:
                assert parameter.grad is not None
                parameter.grad.fill_(math.inf)

        trained(job)[0].register_post_accumulate_grad_hook(overflow)

    with pytest.raises(DivergedError, match="the adapter's weights are not finite"):
        run(other, on_ready=ready)
    assert newest_complete(Path(other.run.output_dir)).checkpoint == Path(other.run.output_dir) / "checkpoint-2"


def _found(done: RecipeRun) -> Attribution:
    assert done.failure is None, done.failure
    assert done.attribution is not None
    return done.attribution


@pytest.mark.slow
def test_on_a_card_gradients_go_and_state_doubles(recipe_runs: virtual_gpu.Server, tiny_hybrid: Path) -> None:
    """Adapters of rank 512 on a tiny model, so that they are most of the peak; attribution changes none of it."""
    small = {"model": str(tiny_hybrid), "max_seq_length": 32, "lora_r": 512, "target_modules": "all-linear"} | ALONE
    changes: dict[str, dict[str, Any]] = {
        "default": {},
        "fp32": {"optimizer_state_dtype": "fp32"},
        "released": {"gradient_release": True},
        "released fp32": {"gradient_release": True, "optimizer_state_dtype": "fp32"},
        "lean": {"lean": True},
        "lean released": {"lean": True, "gradient_release": True},
        "one step": {"gradient_release": True, "max_steps": 1},
    }
    recipes = {name: load_recipe(RECIPES / "optimised.yaml", small | each) for name, each in changes.items()}
    plain = {name: submit_recipe(recipe_runs, recipes[name], CARD) for name in ("fp32", "released")}
    asked = {name: submit_recipe(recipe_runs, each, CARD, attribute=True) for name, each in recipes.items()}
    found = {name: _found(each.result()) for name, each in asked.items()}
    for name, without in plain.items():
        assert without.result().profile == asked[name].result().profile, name
    kinds = {name: each.kinds for name, each in found.items()}
    assert max(each.unexplained_share for each in found.values()) < 0.02
    assert kinds["fp32"]["optimizer"] == 2 * kinds["default"]["optimizer"]
    assert kinds["released fp32"]["optimizer"] == 2 * kinds["released"]["optimizer"]
    assert kinds["default"]["optimizer"] == kinds["released"]["optimizer"] == kinds["lean"]["optimizer"]
    assert kinds["default"]["gradients"] == kinds["default"]["adapters"] == kinds["default"]["optimizer"] // 2
    largest = 2 * 512 * (2 * 128 + 2 * 16 + 4)  # bytes of B of mamba.in_proj: gate and x, B and C, a step for each head
    for name in ("released", "released fp32", "one step"):
        assert kinds[name].get("gradients", 0) <= largest, name
    assert 0 < kinds["one step"]["optimizer_step"] <= largest
    assert kinds["lean released"].get("gradients", 0) < kinds["lean"]["gradients"]
    for name, other in (("released", "default"), ("released fp32", "fp32"), ("lean released", "lean")):
        assert found[name].allocated_bytes < found[other].allocated_bytes, name


@pytest.mark.slow
@pytest.mark.parametrize("changes", [RELEASE, RELEASE | {"optimizer_state_dtype": "fp32"}], ids=["auto", "fp32"])
def test_the_warm_up_sees_what_a_steady_step_takes(
    recipe_runs: virtual_gpu.Server, tiny_hybrid: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    small = {"model": str(tiny_hybrid), "device": "virtual", "max_seq_length": 32, "max_steps": 2, "lora_r": 256}
    recipe = load_recipe(RECIPES / "optimised.yaml", small | changes | {"output_dir": str(tmp_path / "run")})
    arguments = {"content": recipe.to_dict(), "warm_up": True}
    done = recipe_runs.submit("training.virtual_jobs:train", arguments, CARD).result()
    assert done.value is not None, done.output_tail
    phases = done.value["phases"]
    assert phases["warm-up"] == pytest.approx(phases["steady"], rel=0.01)
