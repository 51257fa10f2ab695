"""Whole hybrids: loss and every gradient of a lean step against a plain one, and what the report says."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Phi3Config

from qlora_lowmem.lean import LeanOptions, apply_lean

from .conftest import VOCABULARY, batch_of, hybrid, lean_copy, relative, step

SMALL = LeanOptions(
    tile_length=16, feed_forward_tile_length=7, scan_chunk_length=3, loss_tile_bytes=VOCABULARY * 4 * 10
)


@settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking trains models for minutes
)
@given(
    layers=st.text("ma", min_size=1, max_size=6),
    batch=st.integers(1, 2),
    seq=st.integers(4, 50),
    tile=st.integers(1, 60),
    feed_forward=st.integers(1, 60),
    chunk=st.integers(1, 20),
    groups=st.sampled_from([1, 2]),
    rope=st.booleans(),
    experts=st.sampled_from([0, 3]),
    padding=st.sampled_from([None, "left", "right"]),
    checkpointing=st.sampled_from(["layer", "segments", "host"]),
)
def test_same_loss_and_gradients(
    assert_same_step: Callable[..., None],
    layers: str,
    batch: int,
    seq: int,
    tile: int,
    feed_forward: int,
    chunk: int,
    groups: int,
    rope: bool,
    experts: int,
    padding: str | None,
    checkpointing: str,
) -> None:
    tile = max(tile, seq // 12)  # a dozen tiles at most, for the time it takes
    plain = hybrid(
        layers,
        mamba_n_groups=groups,
        position_embedding_type="rope" if rope else "nope",
        num_local_experts=experts,
        num_experts_per_tok=min(experts, 2),
    )
    options = LeanOptions(
        tile_length=tile,
        feed_forward_tile_length=feed_forward,
        scan_chunk_length=chunk,
        checkpointing=checkpointing,
        loss_tile_bytes=VOCABULARY * 4 * 10,
    )
    assert_same_step(plain, options, batch_of(batch, seq, padding))


@pytest.mark.parametrize("biased", [True, False])
def test_biases_and_time_step_limits(assert_same_step: Callable[..., None], biased: bool) -> None:
    plain = hybrid(
        "ma", attention_bias=biased, mamba_proj_bias=biased, mamba_conv_bias=biased, time_step_limit=(0.3, 1.5)
    )
    assert_same_step(plain, SMALL, batch_of(2, 30))


def test_normalised_by_num_items_in_batch(assert_same_step: Callable[..., None]) -> None:
    assert_same_step(hybrid("ma"), SMALL, batch_of(2, 20, "right"), num_items_in_batch=torch.tensor(123))


def test_adapters_on_attention_only(assert_same_step: Callable[..., None]) -> None:
    """Layers below the first adapter are not gone through in backward, and need no checkpoint."""
    plain = hybrid("mamamm")
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad and "self_attn" not in name:
            parameter.requires_grad_(False)
    assert_same_step(plain, SMALL, batch_of(2, 30))


def test_everything_trained(assert_same_step: Callable[..., None]) -> None:
    """Norms, embeddings, convolutions, A, D: what QLoRA freezes gets its gradients where it is trained."""
    plain = hybrid("mam")
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    # The A of a strongly decaying head hardly matters: its gradient is a difference of near equals.
    for name, parameter in plain.named_parameters():
        if name.endswith("A_log"):
            parameter.requires_grad_(False)
    assert_same_step(plain, SMALL, batch_of(2, 30))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_no_further_from_the_truth(autocast: bool) -> None:
    """The mean relative error of the gradients, against that of the plain model. Rounding is chance, so that one model
    comes out anywhere between half and one and a quarter of it; six are taken together."""
    ratios = []
    for seed in range(6):
        truth_model = hybrid("mmam", seed=seed)
        plain = copy.deepcopy(truth_model).bfloat16()
        truth_model.load_state_dict({k: v.float() for k, v in plain.state_dict().items()})
        inputs = batch_of(2, 64)
        truth_loss, truth = step(truth_model, inputs)
        errors = []
        for model in (lean_copy(plain, SMALL), plain):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                loss, gradients = step(model, inputs)
            assert abs(loss - truth_loss) <= 3e-4 * truth_loss
            errors.append(sum(relative(gradients[name], truth[name]) for name in truth))
        ratios.append(errors[0] / errors[1])
    assert torch.tensor(ratios).log().mean().exp() <= 1.02, ratios


def test_dropout_drops_the_same_elements_in_backward() -> None:
    """A directional derivative, by differences, of a step whose dropout is fixed by a seed."""
    model = lean_copy(hybrid("mam", lora_dropout=0.3), SMALL).double()
    inputs = batch_of(1, 40)

    def loss_at(shift: float, direction: dict[str, torch.Tensor]) -> float:
        shifted = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in shifted.named_parameters():
                if name in direction:
                    parameter.add_(direction[name], alpha=shift)
            torch.manual_seed(7)
            return shifted(**inputs).loss.item()

    torch.manual_seed(7)
    _, gradients = step(model, inputs)
    direction = {name: g / g.norm() for name, g in gradients.items()}
    expected = sum(g.norm().item() for g in gradients.values())
    found = (loss_at(3e-4, direction) - loss_at(-3e-4, direction)) / 6e-4
    assert abs(found - expected) <= 1e-2 * expected  # other masks in backward: tens of percents


def test_evaluation_and_generation_still_work() -> None:
    plain = hybrid("mam").eval()
    lean = lean_copy(plain, SMALL)
    inputs = batch_of(2, 30)
    with torch.no_grad():
        assert relative(lean(**inputs).loss, plain(**inputs).loss) < 1e-5
        prompt = {"input_ids": inputs["input_ids"][:, :9], "attention_mask": inputs["attention_mask"][:, :9]}
        assert relative(lean(**prompt).logits, plain(**prompt).logits) < 1e-5
        arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(lean.generate(**prompt, **arguments), plain.generate(**prompt, **arguments))


@pytest.mark.parametrize(("bits", "near"), [(8, 2e-3), (4, 5e-2)])
def test_quantised_embeddings_change_the_loss_a_little(bits: int, near: float) -> None:
    plain = hybrid("mam", hidden_size=64, mamba_n_heads=8)
    lean = copy.deepcopy(plain)
    report = apply_lean(lean, LeanOptions(quantised_embeddings=bits))
    assert "quantised_embeddings" in report.applied
    inputs = batch_of(2, 40)
    loss, gradients = step(plain, inputs)
    lean_loss, lean_gradients = step(lean, inputs)
    assert lean_gradients.keys() == gradients.keys()
    assert 0 < abs(lean_loss - loss) <= near * loss
    assert lean.generate(inputs["input_ids"][:, :5], max_new_tokens=2).shape == (2, 7)


def test_applied_twice_is_applied_once(assert_same_step: Callable[..., None]) -> None:
    plain = hybrid("ma")
    apply_lean(plain, LeanOptions())
    assert_same_step(plain, SMALL, batch_of(1, 20))


def test_router_logits_are_refused_with_experts() -> None:
    model = lean_copy(hybrid("ma", num_local_experts=3, num_experts_per_tok=2))
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        model(**batch_of(1, 10), output_router_logits=True)


def test_report_of_a_hybrid() -> None:
    report = apply_lean(hybrid("mma"), LeanOptions(checkpointing="host"))
    assert not report.not_applied
    assert "on  checkpointing: host" in str(report)


def test_what_tiles_do_not_know_is_reported() -> None:
    report = apply_lean(hybrid("ma", attention_dropout=0.1))
    assert {idea.name for idea in report.not_applied} >= {"tiles", "scan", "attention"}
    assert "attention_dropout=0.1" in report.not_applied[0].detail
    assert "hidden_act='gelu'" in apply_lean(hybrid("ma", hidden_act="gelu")).not_applied[0].detail


def test_general_ideas_on_another_model(assert_same_step: Callable[..., None]) -> None:
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_config(config).train()
    report = apply_lean(copy.deepcopy(plain), SMALL)
    assert set(report.applied) == {"rms_norm", "checkpointing", "loss"}
    assert {idea.name for idea in report.not_applied} == {"tiles", "scan", "attention", "swiglu"}
    assert "not for Phi3ForCausalLM" in str(report)
    assert_same_step(plain, SMALL, batch_of(2, 30))


@pytest.mark.parametrize(
    ("field", "value"), [("tile_length", 0), ("checkpointing", "disk"), ("quantised_embeddings", 3)]
)
def test_bad_options(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        LeanOptions(**{field: value})


@pytest.mark.parametrize(
    ("seq", "tiles"), [(100, (512, 512)), (2048, (512, 512)), (4096, (1024, 1024)), (131072, (2048, 1024))]
)
def test_tiles_grow_with_the_sequence(seq: int, tiles: tuple[int, int]) -> None:
    assert LeanOptions().tiles_for(seq) == tiles
    assert LeanOptions(tile_length=64).tiles_for(seq) == (64, 64)


def test_a_model_without_a_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="ForCausalLM"):
        apply_lean(torch.nn.Linear(2, 2))
