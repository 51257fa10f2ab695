"""What a person reads: the verdict first, the figures with their units, a cost only where it was counted."""

import csv
import re
from dataclasses import replace
from pathlib import Path

from helpers import RECIPES
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.plan.advice import Knob
from qlora_lowmem.plan.answers import Limit, Need, Plan, Proposal, Reach, Shortfall, Tried
from qlora_lowmem.plan.screen import Again, cost, lines, plans_table, row, write_plans
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.units import GIB, MIB

NEED = Need(2 * GIB, 5 * GIB // 2, 3 * GIB, GIB, 0, 1000, fits=True)
KINDS = {"weights_4bit": 2 * GIB, "slack": GIB // 2, "outside": GIB // 2 - MIB, "loss": MIB}
KNOB = Knob("--lean true", 2 * GIB, GIB, True, "slower", "exact; tiles", 1.5, 64 * MIB, 1000)
LONGEST = Limit(4096, 4352, 256, "memory")
FITS = Plan(
    "mine", "granite-4.0-h-1b", "rtx-3060-laptop-6gb", 5 * GIB, True, 1024, True, NEED, KINDS, LONGEST,
    Limit(256, 0, 1, "limit"), (KNOB,), runs=9, cached=2, seconds=4.6,
)  # fmt: skip
PROPOSAL = Proposal(
    "checkpointing", "exact; twice", load_recipe(RECIPES / "optimised.yaml"), NEED, LONGEST, True, 1.42, KINDS
)
LEAN = replace(
    PROPOSAL,
    rung="tiles",
    recipe=load_recipe(RECIPES / "lean-host.yaml"),
    longest=Limit(131_072, 0, 1024, "model"),
    flops_ratio=None,
)


def text(plan: Plan) -> str:
    return "\n".join(lines(plan))


def test_a_recipe_that_fits() -> None:
    shown = text(FITS)
    assert shown.startswith("mine at 1,024 tokens on rtx-3060-laptop-6gb: fits, with 2.000 GiB of room. (virtual)")
    assert "Needs 3.000 GiB of 5.000 usable, the CUDA context in it (2.000 allocated, 2.500 reserved)." in shown
    assert "Longest sequence: 4,096 tokens (4,352 does not fit)" in shown
    assert "Largest batch:    256 samples of 1,024 tokens (no larger one was tried)" in shown
    assert "Proposed" not in shown
    assert "9 runs, 2 of them from the cache, in 5 s. FLOPs:" in shown
    assert len(shown.splitlines()) < 40
    assert max(map(len, shown.splitlines())) <= 120


def test_the_breakdown_keeps_its_sum() -> None:
    shown = text(FITS).splitlines()
    start = next(index for index, line in enumerate(shown) if line.startswith("at the peak"))
    figures = [float(line.split()[-1]) for line in shown[start + 1 : start + 5]]
    assert figures == sorted(figures, reverse=True)
    assert abs(sum(figures) - 3) < 0.002
    assert "loss and logits" in "\n".join(shown), "one small kind is shown by its name"


def test_costs_are_words_and_what_was_counted() -> None:
    assert cost(KNOB, NEED) == "exact; tiles; 1.50 x the FLOPs; 64.0 MiB of host memory"
    fewer = replace(KNOB, flops_ratio=None, host_bytes=0, trainable_parameters=500)
    assert cost(fewer, NEED) == "exact; tiles; 500 of 1,000 parameters learn"


def test_a_recipe_that_does_not_fit_gets_a_proposal() -> None:
    tried = (Tried("fastest", "exact", False), Tried("checkpointing", "exact; twice", True))
    shown = text(replace(FITS, fits=False, need=replace(NEED, fits=False), tried=tried, proposal=PROPOSAL))
    assert "mine at 1,024 tokens on rtx-3060-laptop-6gb: does not fit. (virtual)" in shown
    assert "too much  fastest" in shown
    assert "Proposed: checkpointing, 1,024 tokens; longest sequence 4,096 tokens (4,352 does not fit)." in shown
    assert "attention targets, r 8, 1 x 8 samples a step, adamw_torch, gradient checkpointing" in shown
    assert "A step takes 1.42 x the FLOPs of one that computes nothing twice." in shown


def test_the_best_for_a_model() -> None:
    plan = replace(FITS, recipe_given=False, need=None, kinds={}, longest=None, batch=None, knobs=(), proposal=LEAN)
    shown = text(plan)
    assert shown.startswith("granite-4.0-h-1b on rtx-3060-laptop-6gb: fits at 131,072 tokens, with 2.000 GiB of room")
    assert (
        "Proposed: tiles, 131,072 tokens; longest sequence 131,072 tokens (as long as the model was made for)." in shown
    )
    assert "base weights, 4-bit" in shown
    assert "lean, checkpoints host" in shown
    assert "expandable segments" in shown
    shorter = text(replace(plan, fits=False, proposal=replace(LEAN, reaches_wanted=False)))
    assert "nothing fits at the wanted 1,024 tokens" in shorter
    assert "The leanest, at the longest sequence that fits: tiles" in shorter
    assert "No recipe fits rtx-3060-laptop-6gb" in text(replace(plan, fits=False, proposal=None))


def test_every_rung_is_a_row() -> None:
    rungs = (
        Reach("fastest", "exact; nothing twice", Limit(0, 256, 256, "memory"), 1.0),
        Reach("tiles, host", "exact", Limit(25_344, 25_600, 256, "memory"), 1.31, 3 * GIB // 2),
        Reach("8-bit embeddings", "rounded", Limit(32_768, 0, 256, "limit")),
    )
    plan = replace(FITS, recipe_given=False, proposal=LEAN, reaches=rungs, unanswered=("the breakdown: no room",))
    shown = text(plan).splitlines()
    start = shown.index("longest sequence  from the fastest recipe to the leanest, and what it costs")
    assert shown[start + 1 : start + 4] == [
        "            none  fastest: exact; nothing twice; 1.00 x the FLOPs",
        "   25,344 tokens  tiles, host: exact; 1.31 x the FLOPs; 1.500 GiB of host memory",
        "   32,768 tokens  8-bit embeddings: rounded (--limit)",
    ]
    assert "Not answered: the breakdown: no room" in shown


def test_launches_stand_beside_flops_and_bytes() -> None:
    need = replace(NEED, launches=132_129)
    assert "An optimizer step is 132,129 launches: kernels, copies and memsets." in text(replace(FITS, need=need))
    assert "launches" not in text(FITS), "nobody counted"
    assert cost(replace(KNOB, launches_ratio=5.9), NEED) == (
        "exact; tiles; 1.50 x the FLOPs; 5.90 x the launches; 64.0 MiB of host memory"
    )
    assert "launches" not in cost(replace(KNOB, launches_ratio=1.001), NEED)
    rungs = (Reach("tiles", "exact", Limit(25_344, 25_600, 256, "memory"), 1.31, 0, 415_422),)
    tried = (Tried("tiles", "exact; twice", True, 99_000),)
    found = replace(PROPOSAL, need=need, launches_ratio=1.29)
    shown = text(replace(FITS, recipe_given=False, tried=tried, proposal=found, reaches=rungs))
    assert "   25,344 tokens  tiles: exact; 1.31 x the FLOPs; 415,422 launches a step" in shown
    assert "  fits      tiles: exact; twice; 99,000 launches a step" in shown
    assert "1.42 x the FLOPs of one that computes nothing twice, and 1.29 x its launches." in shown
    assert row(replace(FITS, need=need))["launches"] == 132_129


def test_nothing_fits_says_what_it_would_need_and_of_what() -> None:
    lacking = Shortfall("tiles, host", replace(NEED, device_bytes=7 * GIB, fits=False), KINDS)
    plan = replace(FITS, recipe_given=False, fits=False, need=None, kinds={}, longest=None, batch=None, knobs=(),
                   shortfall=lacking)  # fmt: skip
    shown = text(plan)
    assert "nothing fits at the wanted 1,024 tokens" in shown
    assert "No recipe fits rtx-3060-laptop-6gb, however short its sequence." in shown
    assert "At 1,024 tokens the leanest, tiles, host, would take more than there is.\nNeeds 7.000 GiB of 5.000" in shown
    assert "base weights, 4-bit" in shown
    assert row(plan)["peak_device_bytes"] == 7 * GIB


def test_an_answer_from_the_cache_says_so() -> None:
    assert "Answered from the cache (all 9 runs; --no-cache runs them again)." in text(replace(FITS, cached=9))


def test_limits_that_are_not_memory_say_which() -> None:
    whole = replace(FITS, longest=Limit(8192, 0, 256, "model"), batch=Limit(0, 1, 1, "memory"))
    assert "8,192 tokens (as long as the model was made for)" in text(whole)
    assert "Largest batch:    none (1 does not fit)" in text(whole)


def test_a_table_of_many() -> None:
    failed = replace(FITS, fits=False, need=None, kinds={}, longest=None, failure="mine fails: no such thing")
    table = plans_table([FITS, replace(FITS, proposal=PROPOSAL, fits=False), failed])
    rows = table.splitlines()
    assert len(rows) == 6
    assert rows[-1] == "mine on rtx-3060-laptop-6gb failed: mine fails: no such thing"
    assert "4,352" in rows[2]
    cells = [[cell.strip() for cell in line.split("|")] for line in rows[:5]]
    place = cells[0].index("allocated GiB")
    assert cells[0][place : place + 3] == ["allocated GiB", "floor GiB", "x floor"]
    assert [line[place : place + 3] for line in cells[2:]] == [["2.000", "1.000", "2.00"]] * 2 + [[""] * 3]
    assert row(FITS)["floor_bytes"] == GIB
    assert row(replace(FITS, proposal=PROPOSAL))["proposed"] == "checkpointing"
    assert row(failed)["peak_device_bytes"] == 0
    assert set(row(FITS)) == set(row(failed))


def test_plans_as_a_result_stand_beside_their_floors(tmp_path: Path) -> None:
    again = Again(3 * GIB, True, 6 * GIB, False)
    write_plans(tmp_path, [FITS], [again], "One pair.", provenance_record("a card", "virtual"))
    page = (tmp_path / "plan.md").read_text(encoding="utf-8")
    assert "One pair. The floor is what no method avoids" in page
    assert "| 2.000 | 1.000 | 2.00 |" in re.sub(" +", " ", page)
    with (tmp_path / "plan.csv").open(newline="") as file:
        (found,) = csv.DictReader(file)
    assert (found["peak_allocated_bytes"], found["floor_bytes"]) == (str(2 * GIB), str(GIB))
