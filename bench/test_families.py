"""Every decoder-only family trains: tiny, plain and with lean; those that people fine-tune at their default size."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from families import families, tiny, why_none
from family_runs import Family, write_families
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from matrix_recipes import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.models.loading import skeleton
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.plan.recipe_runs import mapped, roomy
from qlora_lowmem.recipe.io import load_recipe

pytestmark = pytest.mark.families
# Those that people fine-tune most, whose configuration class has sizes of a model that exists.
AT_DEFAULT_SIZE = (
    "falcon_h1", "gemma", "gemma2", "gemma3_text", "glm4", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "mamba2",
    "mistral", "mixtral", "olmo2", "olmo3", "phi", "phi3", "qwen2", "qwen3", "smollm3",
)  # fmt: skip


class _Sweep:
    def __init__(self, server: virtual_gpu.Server) -> None:
        self._server, self._card = server, roomy(virtual_gpu.get_card(DEFAULT_CARD))

    def submit(self, config: dict[str, Any], name: str, device: str) -> "Future[dict[str, Any]]":
        job = self._server.submit(
            "family_runs:run_here", {"config": config, "name": name, "device": device}, self._card, timeout=600
        )
        return mapped(job, lambda done: done.value or {"reason": f"it ended with exit code {done.exit_code}"})

    def both(self, config: dict[str, Any], device: str = "virtual") -> "list[Future[dict[str, Any]]]":
        return [self.submit(config, name, device) for name in ("optimised", "lean")]


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, on_gpu: bool, results_folder: Path) -> list[Family]:
    """Every family tiny, some at their default size too."""
    if on_gpu:
        pytest.skip("the sweep is virtual")
    sweep = _Sweep(request.getfixturevalue("virtual_server"))
    cases = [(name, "tiny", tiny(name)) for name in families()]
    cases += [(name, "default", AutoConfig.for_model(name).to_dict()) for name in AT_DEFAULT_SIZE]
    runs = [sweep.both(config) for _, _, config in cases]
    left = {name: why for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if (why := why_none(name)) is not None}
    record = provenance_record(DEFAULT_CARD, "virtual")
    found = []
    for (name, size, config), pair in zip(cases, tqdm(runs, desc="families", unit="family"), strict=True):
        plain, lean, device = pair[0].result(), pair[1].result(), "virtual"
        if size == "tiny" and "reason" in plain:
            on_cpu, lean_on_cpu = (run.result() for run in sweep.both(config, "cpu"))
            if "reason" not in on_cpu:
                on_cpu["on_a_card"] = plain["reason"]
                plain, lean, device = on_cpu, lean_on_cpu, "cpu"
        found.append(_row(name, size, device, plain, lean))
        write_families(results_folder, found, left, record)  # what is known, should it be ended
    return found


def _row(name: str, size: str, device: str, plain: dict[str, Any], lean: dict[str, Any]) -> Family:
    reason = (
        plain.get("reason") or plain.get("on_a_card") or ("with lean, " + lean["reason"] if "reason" in lean else "")
    )
    best = plain if "reason" not in plain else lean
    return Family(
        family=name,
        size=size,
        device=device,
        trains="reason" not in plain,
        trains_lean="reason" not in lean,
        attention=best.get("attention", ""),
        checkpointing=plain.get("checkpointing", True),
        ideas=", ".join(lean.get("ideas", ())),
        adapted=best.get("adapted", 0),
        idle=best.get("idle", 0),
        allocated_bytes=plain.get("allocated", 0) if size == "default" else 0,
        reason=reason,
    )


def test_nearly_all_train(rows: list[Family]) -> None:
    tiny = [row for row in rows if row.size == "tiny"]
    assert sum(row.trains and row.device == "virtual" for row in tiny) >= 0.95 * len(tiny)
    assert all(row.reason for row in tiny if not (row.trains and row.trains_lean and row.device == "virtual"))


def test_lean_trains_whatever_trains(rows: list[Family]) -> None:
    assert [row.family for row in rows if row.trains and not row.trains_lean] == []


def test_those_that_people_fine_tune_train_at_their_default_size(rows: list[Family]) -> None:
    assert [row.family for row in rows if row.size == "default" and not (row.trains and row.trains_lean)] == []


@pytest.mark.parametrize("family", families())
def test_weights_that_transformers_saved_are_those_of_their_configuration(family: str, tmp_path: Path) -> None:
    """Held against each other from the files' headers, by names that are the hub's and not the model's."""
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny(family)), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    recipe = load_recipe(RECIPES / "demo.yaml", {"model": str(tmp_path)})
    skeleton(recipe, source_of(recipe))
