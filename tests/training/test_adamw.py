"""AdamW with state in another dtype and gradients released within backward: torch's own arithmetic, one by one."""

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.loading import check_gradient_release
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import replace_fields
from qlora_lowmem.training.adamw import AdamW, adamw_of

BF16, FP32 = torch.bfloat16, torch.float32
SHAPES = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=3)
OPTIONS = {"lr": 3e-2, "weight_decay": 0.1}
RELEASE = {"gradient_release": True, "max_grad_norm": 0.0, "gradient_accumulation_steps": 1}


def parameters(shapes: Sequence[Sequence[int]], dtype: torch.dtype, seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(trained: Sequence[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for each in trained:
        each.grad = torch.randn(each.shape, generator=generator).to(each.dtype)


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[Tensor, Tensor]:
    state = optimizer.state[parameter]
    return state["exp_avg"], state["exp_avg_sq"]


@settings(max_examples=40)
@given(
    shapes=SHAPES,
    dtype=st.sampled_from([BF16, FP32]),
    rate=st.floats(1e-6, 1),
    decay=st.sampled_from([0.0, 0.01, 1.0]),
    steps=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_in_one_dtype_it_is_torchs_own_bit_by_bit(
    shapes: list[list[int]], dtype: torch.dtype, rate: float, decay: float, steps: int, seed: int
) -> None:
    ours, torchs = parameters(shapes, dtype, seed), parameters(shapes, dtype, seed)
    own = AdamW(ours, lr=rate, weight_decay=decay)
    reference = torch.optim.AdamW(torchs, lr=rate, weight_decay=decay, foreach=False)
    for step in range(steps):
        for trained, optimizer in ((ours, own), (torchs, reference)):
            give_gradients(trained, seed + step)
            optimizer.step()
    for mine, theirs in zip(ours, torchs, strict=True):
        assert torch.equal(mine, theirs)
        for found, expected in zip(moments(own, mine), moments(reference, theirs), strict=True):
            assert found.dtype == dtype
            assert torch.equal(found, expected)


@settings(max_examples=40)
@given(
    shapes=SHAPES,
    dtypes=st.sampled_from([(BF16, FP32), (FP32, BF16)]),
    steps=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_in_two_dtypes_it_computes_in_fp32_and_rounds_once_a_step(
    shapes: list[list[int]], dtypes: tuple[torch.dtype, torch.dtype], steps: int, seed: int
) -> None:
    """The reference is torch's own in fp32, whose weights or moments are rounded after each step."""
    dtype, state_dtype = dtypes
    ours = parameters(shapes, dtype, seed)
    exact = [nn.Parameter(each.detach().float()) for each in ours]
    own = AdamW(ours, **OPTIONS, state_dtype=state_dtype)
    reference = torch.optim.AdamW(exact, **OPTIONS, foreach=False)
    for step in range(steps):
        give_gradients(ours, seed + step)
        for mine, theirs in zip(ours, exact, strict=True):
            assert mine.grad is not None
            theirs.grad = mine.grad.float()
        own.step()
        reference.step()
        for mine, theirs in zip(ours, exact, strict=True):
            theirs.data = theirs.detach().to(dtype).float()
            assert torch.equal(mine.float(), theirs)
            for found, kept in zip(moments(own, mine), moments(reference, theirs), strict=True):
                kept.copy_(kept.to(state_dtype).float())
                assert found.dtype == state_dtype
                assert torch.equal(found.float(), kept)


def test_state_in_fp32_follows_where_bf16_stands_still() -> None:
    """The second moment falls once gradients get small; in bf16 a thousandth less rounds back to the same."""
    large, small = torch.ones(8), torch.full((8,), 1e-3)
    fell = {}
    for state_dtype in (None, FP32):
        weight = nn.Parameter(torch.zeros(8, dtype=BF16))
        optimizer = AdamW([weight], lr=1e-3, weight_decay=0.0, state_dtype=state_dtype)
        for gradient in (large, *[small] * 500):
            weight.grad = gradient.to(BF16)
            optimizer.step()
        fell[state_dtype] = float(moments(optimizer, weight)[1][0]) / 1e-3
    assert fell[None] == pytest.approx(1, rel=0.01)
    assert fell[FP32] == pytest.approx(0.999**500, rel=0.01)


@pytest.mark.parametrize(("dtype", "state_dtype"), [(BF16, FP32), (FP32, BF16), (BF16, None)])
@pytest.mark.parametrize("through_torch", [False, True])
def test_saved_state_keeps_its_dtype_and_goes_on_exactly(
    tmp_path: Any, dtype: torch.dtype, state_dtype: torch.dtype | None, through_torch: bool
) -> None:
    trained, again = parameters([[5, 3], [7]], dtype, 0), parameters([[5, 3], [7]], dtype, 0)
    optimizer = AdamW(trained, **OPTIONS, state_dtype=state_dtype)
    give_gradients(trained, 1)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state")
    saved = torch.load(tmp_path / "state", weights_only=True)
    if through_torch and state_dtype is None:  # as when gradient release is switched off, and on again
        other = torch.optim.AdamW(parameters([[5, 3], [7]], dtype, 0))
        other.load_state_dict(saved)
        saved = other.state_dict()
    fresh = AdamW(again, lr=1.0, state_dtype=state_dtype)
    fresh.load_state_dict(saved)
    for mine, theirs in zip(again, trained, strict=True):
        mine.data.copy_(theirs.data)
        assert {each.dtype for each in moments(fresh, mine)} == {state_dtype or dtype}
    for each, of in ((trained, optimizer), (again, fresh)):
        give_gradients(each, 2)
        of.step()
    for mine, theirs in zip(again, trained, strict=True):
        assert torch.equal(mine, theirs)
        assert fresh.state[mine]["step"] == 2


def test_a_state_of_other_groups_is_refused() -> None:
    saved = AdamW(parameters([[2]], FP32, 0)).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        AdamW(parameters([[2], [3]], FP32, 0)).load_state_dict(saved)


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))


def test_released_within_backward_it_takes_the_same_steps() -> None:
    """With a learning rate that changes from step to step, and two groups."""
    found = []
    for gradient_release in (False, True):
        model = stack()
        groups = [
            {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=0.1, gradient_release=gradient_release)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(3):
            torch.manual_seed(step)
            model(torch.randn(2, 6)).square().sum().backward()
            assert all((p.grad is None) == gradient_release for p in model.parameters())
            assert optimizer.half_stepped == gradient_release
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            assert not optimizer.half_stepped
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_released_gradients_never_exist_together() -> None:
    model, most = stack(), 0

    def count(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for each in model.parameters():
        each.register_post_accumulate_grad_hook(count)
    AdamW(model.parameters()).step()
    model(torch.ones(2, 6)).sum().backward()
    assert most == 8
    model.zero_grad()
    most, optimizer = 0, AdamW(model.parameters(), gradient_release=True)
    model(torch.ones(2, 6)).sum().backward()
    assert most == 1
    assert len(optimizer.state) == 8


def test_without_steps_gradients_go_and_all_else_stays() -> None:
    model = stack()
    optimizer = AdamW(model.parameters(), gradient_release=True)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.without_steps():
        model(torch.ones(2, 6)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    assert not optimizer.half_stepped


def test_a_model_is_let_go_with_its_hooks() -> None:
    model = stack()
    optimizer = AdamW(model.parameters(), gradient_release=True)
    model(torch.ones(2, 6)).sum().backward()
    alive = [weakref.ref(optimizer), *(weakref.ref(p) for p in model.parameters())]
    del model, optimizer
    gc.collect()
    assert not any(each() is not None for each in alive)


def test_torchs_own_is_taken_unless_a_field_asks() -> None:
    recipe = Recipe(name="x")
    assert adamw_of(recipe) is None
    found = adamw_of(replace_fields(recipe, {"optimizer_state_dtype": "fp32", "learning_rate": 1e-3}))
    assert found == (AdamW, {"lr": 1e-3, "state_dtype": FP32, "gradient_release": False})
    found = adamw_of(replace_fields(recipe, RELEASE))
    assert found == (AdamW, {"lr": 2e-4, "state_dtype": None, "gradient_release": True})


def test_release_is_refused_where_gradients_are_needed_later(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace_fields(Recipe(name="x"), RELEASE)
    check_gradient_release(recipe, loss_scaling=False)
    with pytest.raises(UsageError, match=r"gradient_release: true, and this card computes in fp16.* to fp32"):
        check_gradient_release(recipe, loss_scaling=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"optimizer\.gradient_release: true, and 2 processes .* start one process"):
        check_gradient_release(recipe, loss_scaling=False)
    check_gradient_release(Recipe(name="x"), loss_scaling=True)
