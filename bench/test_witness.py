"""Two methods, one figure: every recipe's peak by the virtual GPU and by a ledger that knows nothing of it.

The ledger (`tests/witness/`) knows operators, not the allocator, so it is held against what torch's counters say was
*requested*; how much more lies in whole blocks is a column of its own.
"""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from matrix_recipes import ORDER
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.plan.recipe_runs import roomy
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.results.tables import markdown_table, provenance_lines, write_result
from qlora_lowmem.units import MIB, format_bytes

if TYPE_CHECKING:
    from witness.step import WitnessAccount

pytestmark = pytest.mark.witness

# The lean implementations are ours to prove otherwise: tests/lean holds them against the plain ones.
WITNESSED = [name for name in ORDER if name != "lean"]
LIMIT = 0.005
# cuBLAS takes one for each of two handles, the main thread's and autograd's: up to sm_89, and on sm_90.
WORKSPACE_BYTES = {True: 8_519_680, False: 33_554_432}
# Operators are compared one by one where the methods differ most.
COMPARED_BY_OPERATOR = 2
# Why an operator is in one account and not in the other, for those that have been seen there.
_MASKED = "one of the methods had an attention mask for a batch without padding, and took the masked kernel"
EXPLANATIONS = {
    "aten._scaled_dot_product_efficient_attention.default": _MASKED,
    "aten._scaled_dot_product_flash_attention.default": _MASKED,
    "aten.bitwise_and.Tensor": _MASKED,
    "aten.where.self": _MASKED,
}


@dataclass
class Comparison:
    """A recipe's last step by both methods, in bytes.

    Attributes:
        virtual: `allocated`, `requested`, `peak` on the virtual GPU.
        operators: (operator, virtual less ledger), the largest first; empty where they were not compared.
    """

    recipe: Recipe
    virtual: dict[str, int]
    ledger: "WitnessAccount"
    workspaces: int
    operators: list[tuple[str, int]]

    @property
    def total(self) -> int:
        """The ledger's peak with what it leaves out."""
        return self.ledger.peak.size + self.ledger.further_batches + self.workspaces

    @property
    def difference(self) -> float:
        """The ledger over the virtual GPU's requested bytes, less 1."""
        return self.total / self.virtual["requested"] - 1


@pytest.fixture(scope="module")
def comparisons(
    request: pytest.FixtureRequest, recipes: list[Recipe], results_folder: Path
) -> Iterator[dict[str, Comparison]]:
    """Every recipe by both methods; the table is written at the end."""
    from witness.step import bear_witness  # brings torch and all of its company: not for those who leave this out

    server: virtual_gpu.Server = request.getfixturevalue("virtual_server")
    card = roomy(virtual_gpu.get_card(request.config.getoption("vram_card") or DEFAULT_CARD))
    workspaces = 2 * WORKSPACE_BYTES[card.compute_capability < (9, 0)]
    recipes = [each for each in recipes if each.name in WITNESSED]
    runs = {each.name: _submit(server, "steady_counters", each, card) for each in recipes}
    found = {
        each.name: Comparison(
            each, _value(runs[each.name]), bear_witness(each, card.compute_capability, card.sm_count), workspaces, []
        )
        for each in recipes
    }
    _compare_by_operator(server, card, list(found.values()))
    yield found
    _write(results_folder, list(found.values()), card.name)


def _submit(
    server: virtual_gpu.Server, function: str, recipe: Recipe, card: virtual_gpu.Card
) -> "Future[virtual_gpu.JobResult]":
    return server.submit(f"witness.virtual:{function}", {"content": recipe.to_dict()}, card, timeout=900)


def _value(run: "Future[virtual_gpu.JobResult]") -> Any:
    result = run.result()
    assert result.value is not None, f"{result.error}\n{result.output_tail}"
    return result.value


def _compare_by_operator(server: virtual_gpu.Server, card: virtual_gpu.Card, found: list[Comparison]) -> None:
    """Name the operators where the methods differ most, and wherever they disagree."""
    ranked = sorted(found, key=lambda each: -abs(each.difference))
    chosen = [each for rank, each in enumerate(ranked) if rank < COMPARED_BY_OPERATOR or abs(each.difference) > LIMIT]
    runs = [_submit(server, "operators_at_peak", each.recipe, card) for each in chosen]
    for each, run in zip(chosen, runs, strict=True):
        theirs, ours = _value(run), each.ledger.peak.by_operator()
        differences = [(name, theirs.get(name, 0) - ours[name]) for name in {*theirs, *ours}]
        each.operators = sorted(differences, key=lambda pair: (-abs(pair[1]), pair[0]))


@pytest.mark.parametrize("name", WITNESSED)
def test_the_two_methods_agree(comparisons: dict[str, Comparison], name: str) -> None:
    each = comparisons[name]
    assert abs(each.difference) <= LIMIT, (
        f"{name}: the ledger says {format_bytes(each.total)}, the virtual GPU "
        f"{format_bytes(each.virtual['requested'])} ({each.difference:+.3%}); the operators that differ most: "
        f"{_in_words(each.operators)}"
    )


def test_a_changed_recipe_is_noticed(comparisons: dict[str, Comparison]) -> None:
    """The limit is no formality: half the micro-batch's tokens, or the other loss, are far outside of it."""
    for one, other in (("optimised", "seq512"), ("baseline", "fused-loss"), ("baseline", "checkpointing")):
        assert abs(comparisons[one].total / comparisons[other].virtual["requested"] - 1) > 10 * LIMIT


def _in_words(operators: list[tuple[str, int]], top: int = 4) -> str:
    return ", ".join(f"{name} {'+' if size > 0 else ''}{format_bytes(size)}" for name, size in operators[:top] if size)


def _write(folder: Path, found: list[Comparison], card: str) -> None:
    record = provenance_record(card, "virtual")
    rows = [
        {
            "recipe": each.recipe.name,
            "virtual_allocated_bytes": each.virtual["allocated"],
            "virtual_requested_bytes": each.virtual["requested"],
            "ledger_bytes": each.ledger.peak.size,
            "further_batches_bytes": each.ledger.further_batches,
            "workspace_bytes": each.workspaces,
            "ledger_total_bytes": each.total,
            "difference": each.difference,
            "difference_to_allocated": each.total / each.virtual["allocated"] - 1,
            "largest_differences": _in_words(each.operators),
        }
        for each in found
    ]
    headers = ("recipe", "largest differences, virtual less ledger", "virtual allocated", "of it whole blocks")
    headers += ("virtual requested", "ledger", "workspaces", "batches", "ledger in all", "difference")
    cells = [
        [
            each.recipe.name,
            _in_words(each.operators) or "not compared",
            _mib(each.virtual["allocated"]),
            _mib(each.virtual["allocated"] - each.virtual["requested"]),
            _mib(each.virtual["requested"]),
            _mib(each.ledger.peak.size),
            _mib(each.workspaces),
            _mib(each.ledger.further_batches),
            _mib(each.total),
            f"{each.difference:+.3%}",
        ]
        for each in found
    ]
    seen = {name for each in found for name, size in each.operators if abs(size) >= MIB}
    reasons = {why: sorted(name for name in seen if EXPLANATIONS.get(name) == why) for why in EXPLANATIONS.values()}
    explained = "".join(f"- {', '.join(names)}: {why}.\n" for why, names in reasons.items() if names)
    worst = max(found, key=lambda each: abs(each.difference))
    markdown = (
        "# The virtual GPU and an independent ledger\n\n"
        "Peaks of each recipe's last optimizer step in MiB. The ledger runs the same model classes, adapters, loss, "
        "autocast and checkpointing on tensors without memory, and knows neither CUDA libraries nor an allocator; "
        "cuBLAS workspaces and the batches of further micro-batches are added to it. It is held against the bytes that "
        "were requested; the caching allocator gives whole blocks, which are a column of their own.\n\n"
        f"Worst difference {worst.difference:+.3%} (`{worst.recipe.name}`); the limit is {LIMIT:.1%}.\n\n"
        f"{markdown_table(headers, cells, text_columns=2)}\n\n"
        + (f"The largest differences:\n\n{explained}\n" if explained else "")
        + f"{provenance_lines(record)}\n"
    )
    content = {"environment": record, "limit": LIMIT, "rows": rows}
    content["operators"] = {each.recipe.name: dict(each.operators[:20]) for each in found if each.operators}
    write_result(folder, "witness", content, markdown, rows)


def _mib(size: int) -> str:
    return f"{size / MIB:.1f}"
