"""Lean on the models that people fine-tune, beside the optimised recipe with as many adapters."""

from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from matrix_recipes import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.cases import ROOMY_BYTES
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.probes.runs import RecipeRun, shortened, submit_recipe
from qlora_lowmem.recipe.io import load_recipe, replace_field
from qlora_lowmem.report.tables import FLOOR_TEXT, gib, markdown_table, provenance_lines, times_floor, write_result

pytestmark = pytest.mark.lean
KNOWN = ("granite-4.0-h-1b", "granite-4.0-1b", "llama-3.2-3b")
# Configurations of bench/reality/models, by the name of their folder.
FOLDERS = ("llama-3.2-1b", "qwen2.5-1.5b", "smollm2-1.7b", "mistral-7b-v0.1", "qwen2.5-7b", "llama-3.1-8b")
MODELS = (*KNOWN, *FOLDERS)
LENGTHS = (1024, 4096)


@dataclass(frozen=True)
class Row:
    """A model's peaks at one length, in bytes."""

    model: str
    tokens: int
    optimised_allocated_bytes: int
    lean_allocated_bytes: int
    floor_bytes: int

    @property
    def saved(self) -> float:
        """Share of the optimised recipe's peak above the floor that lean saves."""
        above = self.optimised_allocated_bytes - self.floor_bytes
        return (self.optimised_allocated_bytes - self.lean_allocated_bytes) / above


def _submit(server: virtual_gpu.Server, card: virtual_gpu.Card, model: str, name: str, tokens: int) -> Any:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    folder = Path(__file__).parent / "reality" / "models" / model
    changes = {"model": model if model in KNOWN else str(folder), "target_modules": "all-linear"}
    for leaf, value in (changes | {"max_seq_length": tokens}).items():
        recipe = replace_field(recipe, leaf, value)
    return submit_recipe(server, shortened(recipe), card)


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, on_gpu: bool, results_folder: Path) -> dict[tuple[str, int], Row]:
    """Every model at every length, on a card of the default kind with room for all."""
    if on_gpu:
        pytest.skip("random weights of 8 B models are virtual; lean.yaml is measured by bench/test_budgets.py --gpu")
    card = virtual_gpu.get_card(DEFAULT_CARD).with_memory(ROOMY_BYTES)
    server = request.getfixturevalue("virtual_server")
    runs: dict[tuple[str, int, str], Future[RecipeRun]] = {
        (model, tokens, name): _submit(server, card, model, name, tokens)
        for model in MODELS
        for tokens in LENGTHS
        for name in ("optimised", "lean")
    }
    found = {key: _peaks(run) for key, run in tqdm(runs.items(), desc="models", unit="run")}
    made = {
        (model, tokens): Row(
            model,
            tokens,
            found[model, tokens, "optimised"][0],
            *found[model, tokens, "lean"],
        )
        for model in MODELS
        for tokens in LENGTHS
    }
    _write(results_folder, list(made.values()))
    return made


def _peaks(run: "Future[RecipeRun]") -> tuple[int, int]:
    """Allocated peak and floor, in bytes."""
    done = run.result()
    assert done.failure is None, done.failure
    assert done.profile is not None
    return done.profile.peak_allocated_bytes, done.floor_bytes


def _write(folder: Path, rows: list[Row]) -> None:
    record = provenance_record(f"{DEFAULT_CARD} with room", "virtual")
    headers = ["model", "tokens", "optimised", "lean", "saves", "floor", "x floor", "of what is above the floor"]
    cells = [
        [
            row.model,
            f"{row.tokens:,}",
            gib(row.optimised_allocated_bytes),
            gib(row.lean_allocated_bytes),
            gib(row.optimised_allocated_bytes - row.lean_allocated_bytes),
            gib(row.floor_bytes),
            times_floor(row.lean_allocated_bytes, row.floor_bytes),
            f"{row.saved:.0%}",
        ]
        for row in rows
    ]
    markdown = (
        "# Lean on the models that people fine-tune\n\nAllocated peaks in GiB, random weights of each architecture, "
        "batch 1, r 8 on all linear layers: the optimised recipe (checkpointing, fused loss) and lean, which is exact. "
        f"{FLOOR_TEXT}\n\n"
        f"{markdown_table(headers, cells)}\n\n{provenance_lines(record)}\n"
    )
    plain = [asdict(row) for row in rows]
    content = {"environment": record, "provenance": "virtual", "cases": plain}
    write_result(folder, "lean-families", content, markdown, plain)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("model", MODELS)
def test_lean_saves_at_least_a_third_of_what_is_above_the_floor(
    rows: dict[tuple[str, int], Row], model: str, tokens: int
) -> None:
    row = rows[model, tokens]
    assert row.saved >= 1 / 3
    assert row.lean_allocated_bytes >= row.floor_bytes
