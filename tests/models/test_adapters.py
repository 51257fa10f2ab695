"""What is told is what is trained: counted on the adapted model, before any weights, whatever PEFT makes of names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import TINY_DECODER
from qlora_lowmem.errors import UsageError
from qlora_lowmem.models.adapters import Adapted
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.preflight import inputs_of, preflight

TINY = TINY_DECODER | {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_DENSE_FIRST = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
# Mixtures with a dense or shared MLP beside their experts, whose projections have the experts' names.
BESIDE_EXPERTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_DENSE_FIRST, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16, "kv_lora_rank": 32},
    "glm4_moe": _DENSE_FIRST,
    "qwen3_moe": {"num_experts": 4, "mlp_only_layers": [0]},
}
_AS_THEY_ARE = {"qwen2_moe": {"num_experts": 4, "mlp_only_layers": [0], "shared_expert_intermediate_size": 32}}
EXPERTS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture
def mixture(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe on a tiny mixture of a family."""

    def make(family: str, **changes: Any) -> Recipe:
        content = {"model_type": family} | TINY | (BESIDE_EXPERTS | _AS_THEY_ARE)[family]
        (tmp_path / "config.json").write_text(json.dumps(content))
        return tiny_recipe("run", model=str(tmp_path), load_in_4bit=False, max_steps=1, **changes)

    return make


@pytest.mark.parametrize("family", BESIDE_EXPERTS)
def test_told_is_trained(mixture: Callable[..., Recipe], family: str, tmp_path: Path) -> None:
    """`all-linear` with dropout: PEFT would adapt all experts, and then refuse the dropout."""
    inputs = inputs_of(mixture(family, target_modules="all-linear", lora_dropout=0.1))
    checked = preflight(inputs)
    assert all(text in checked.targets.notes[0] for text in ("leaves out", *EXPERTS))
    assert checked.adapted.modules == checked.targets.modules
    told, found = checked.adapted, []
    outcome = execute(inputs, output_dir=tmp_path, on_ready=lambda job, _: found.append(Adapted.of(job.model)))
    assert found == [told]
    assert (outcome.trainable_parameters, outcome.adapted_modules) == (told.parameters, len(told.modules))


@pytest.mark.parametrize("family", BESIDE_EXPERTS)
@pytest.mark.parametrize("name", [*EXPERTS, "mlp.down_proj", "model.layers.0.mlp.gate_proj"])
def test_names_of_experts_are_refused(mixture: Callable[..., Recipe], family: str, name: str) -> None:
    with pytest.raises(UsageError, match="for its experts and would adapt all of them") as caught:
        preflight(inputs_of(mixture(family, target_modules=f"o_proj,{name}")))
    assert f"takes {name!r} of a {family}" in str(caught.value)
    assert "o_proj (2)" in str(caught.value)


def test_a_mixture_whose_names_are_read_as_they_are(mixture: Callable[..., Recipe]) -> None:
    """Qwen 2's shared expert is a Linear to PEFT too."""
    checked = preflight(inputs_of(mixture("qwen2_moe", target_modules=",".join(EXPERTS))))
    assert len(checked.adapted.modules) == 6
    assert checked.targets.notes == ()
