"""What a fork of the server does: a brief run's peaks are the whole run's, and FLOPs are counted by formulas."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from helpers import RECIPES
from qlora_lowmem.plan.recipe_runs import submit_recipe, two_steps
from qlora_lowmem.plan.worker import FlopCount, product_with_4bit
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.run import brevity
from qlora_lowmem.run.brevity import Brevity
from qlora_lowmem.virtual_gpu import Server, get_card

CARD = get_card("rtx-4050-laptop-6gb")


@given(circle=st.integers(1, 4), before=st.integers(0, 5), micro_batches=st.integers(1, 12), forgotten=st.booleans())
def test_what_is_left_out_is_what_came_before(circle: int, before: int, micro_batches: int, forgotten: bool) -> None:
    """An allocator of so many states before it goes round in a circle: the same are seen, and the last is the same."""
    after: dict[int, int] = {n: n + 1 if n + 1 < before + circle else before for n in range(before + circle)}

    def run(brief: bool) -> tuple[list[int], list[int], int]:
        """The states that each of two steps began its micro-batches in, those of its last ones; how many were counted
        again.
        """
        began: list[int] = []
        again: list[None] = []
        state = 0

        def training_step() -> torch.Tensor:
            nonlocal state
            began.append(state)
            state = after[state]
            return torch.tensor(state)

        trainer: Any = SimpleNamespace(
            training_step=training_step, args=SimpleNamespace(gradient_accumulation_steps=micro_batches)
        )
        last = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(brevity, "_allocator_state", lambda: state)
            if brief:
                recorder: Any = SimpleNamespace(micro_batch_again=lambda: again.append(None))
                Brevity(SimpleNamespace(trainer=trainer), recorder)  # type: ignore[arg-type]
            for _ in range(2):
                state = 0 if forgotten else state
                for _ in range(micro_batches):
                    assert isinstance(trainer.training_step(), torch.Tensor)
                last.append(began[-1])
        return began, last, len(again)

    whole, last, _ = run(brief=False)
    seen, last_seen, again = run(brief=True)
    assert len(seen) + again == len(whole)
    assert set(seen) == set(whole)
    assert last_seen == last
    assert len(seen) <= min(len(whole), 2 * (before + 2 * circle + 2))


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "offloading": {"activation_offloading": True},
    "growing segments": {"expandable_segments": True},
    "all kept": {"gradient_checkpointing": False, "loss": "full", "lora_dropout": 0.1},
    "lean": {"lean": True},
    "lean, host": {"lean": True, "checkpoints": "host"},
    "three samples, all linear layers": {"batch_size": 3, "target_modules": "all-linear", "optimizer": "adamw_8bit"},
}


def test_brief_runs_have_the_peaks_of_whole_ones(tiny_hybrid: Path, recipe_runs: Server) -> None:
    small = {"model": str(tiny_hybrid), "max_seq_length": 512, "gradient_accumulation_steps": 9}
    recipes = {
        way: two_steps(load_recipe(RECIPES / "optimised.yaml", small | changes)) for way, changes in WAYS.items()
    }
    waiting = {
        (way, brief): submit_recipe(recipe_runs, recipe, CARD, attribute=way == "plain", brief=brief)
        for way, recipe in recipes.items()
        for brief in (False, True)
    }
    counted = {way: submit_recipe(recipe_runs, recipe, CARD, brief=True, count=True) for way, recipe in recipes.items()}
    for way in WAYS:
        whole, brief = (waiting[way, each].result() for each in (False, True))
        assert whole.failure is None
        assert brief.profile == whole.profile, way
        assert replace(counted[way].result(), flops=0) == replace(brief, attribution=None), "counting changes nothing"
        assert counted[way].result().flops > 10**6
        assert (brief.floor_bytes, brief.pinned_host_bytes) == (whole.floor_bytes, whole.pinned_host_bytes)
        assert (brief.attribution is None) == (whole.attribution is None)
        if brief.attribution is not None and whole.attribution is not None:
            assert brief.attribution.kinds == whole.attribution.kinds
            owners = [
                [(each.kind, each.line, each.bytes, each.blocks) for each in found.owners]
                for found in (brief.attribution, whole.attribution)
            ]
            assert owners[0] == owners[1]


def test_a_run_is_stopped_once_the_card_holds_more_than_it_may(tiny_hybrid: Path, recipe_runs: Server) -> None:
    recipe = two_steps(load_recipe(RECIPES / "optimised.yaml", {"model": str(tiny_hybrid), "max_seq_length": 512}))
    run = submit_recipe(recipe_runs, recipe, CARD, brief=True).result()
    assert run.profile is not None
    assert not run.stopped
    need = run.profile.peak.device
    just, less = (submit_recipe(recipe_runs, recipe, CARD, brief=True, most=most) for most in (need, need - 1))
    assert just.result() == run
    assert less.result().stopped
    profile = less.result().profile
    assert profile is not None
    assert profile.peak.device == need


def test_forward_and_backward_of_a_product() -> None:
    inputs, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5)
    with FlopCount() as counted:
        torch.nn.functional.linear(inputs, weight).sum().backward()
    assert counted.total == 2 * (2 * 3 * 5 * 7)  # the product, and the inputs' gradient


def test_a_checkpoint_is_run_forward_twice() -> None:
    inputs, weight = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)

    def squared(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, weight) ** 2

    with FlopCount() as counted:
        checkpoint(squared, inputs, use_reentrant=False).sum().backward()
    product = 2 * 3 * 5 * 7
    assert counted.total == 4 * product  # twice forward, and the gradients of both operands


def test_what_does_not_come_through_python_counts_nothing() -> None:
    """As PyTorch's own counter, which looks at each operator; and other modes see each again."""
    block = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    inputs = torch.randn(2, 3, 8)

    def step() -> None:
        mixed = torch.nn.functional.conv1d(block(inputs), torch.ones(3, 3, 1))
        torch.einsum("bsd,btd->bst", mixed, mixed.exp()).sum().backward()

    with FlopCounterMode(display=False) as theirs:
        step()
    with FlopCount() as ours:
        step()
    assert ours.total == theirs.get_total_flops() > 0
    with _Seen() as seen:
        torch.ones(2, 3).view(3, 2) * 2
    assert {"aten::view", "aten::mul"} <= seen.names


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_a_product_with_a_4bit_weight_is_one_with_its_shape() -> None:
    assert product_with_4bit(torch.empty(2, 3, 5), torch.empty(0), [7, 5]) == 2 * 2 * 3 * 5 * 7
