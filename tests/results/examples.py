"""One small file of every kind that the page shows, made by the project's own writers.

The writers of `reality.json`, `lean-families.json` and `train --json` are `bench/reality/table.py`,
`bench/test_lean_families.py` and the command; what the first two wrote is read by `test_page_published.py` and
`test_page_families.py`, what the last writes by `test_page_runs.py`.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from gate.examples import record
from helpers import RECIPES
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.report import write_report
from qlora_lowmem.memory.attribution import Attribution, OwnerLine, Timeline
from qlora_lowmem.memory.profile import PHASES, MemoryProfile, Peak
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, replace_field
from qlora_lowmem.results.kinds.attribution import write_attribution
from qlora_lowmem.results.kinds.lengths import Length, write_lengths
from qlora_lowmem.results.kinds.longest import Longest, write_longest
from qlora_lowmem.results.kinds.matrix import CaseResult, write_matrix
from qlora_lowmem.results.kinds.phases import PhaseBytes, write_phases
from qlora_lowmem.results.kinds.prediction import compare, write_prediction
from qlora_lowmem.results.kinds.verdicts import Budget, Row
from qlora_lowmem.results.kinds.waterfall import Step, write_waterfall
from results.profiles import MEASURED, predicted

CARD = "rtx-4050-laptop-6gb"
MODEL = "granite-4.0-h-1b"
MIB, GIB = 2**20, 2**30
ENVIRONMENT = provenance_record(CARD, "virtual")
STEPS = (
    Step("baseline", 20 * GIB, 21 * GIB, GIB, 2048),
    Step("checkpointing", 3 * GIB, 4 * GIB, GIB, 2048),
    Step("all layers trained", 3 * GIB + 7, 4 * GIB, GIB, 1024),
)


def attribution(loss: int = 100 * MIB) -> Attribution:
    """A step of four points whose peak holds weights, a Mamba scan and a loss."""
    weights, scan, slack, context = 600 * MIB, 300 * MIB + 5, 64 * MIB, 450 * MIB
    allocated = weights + scan + loss
    rows = ((weights, 0, 0), (weights, scan, 0), (weights, scan, loss), (weights, 0, 0))
    return Attribution(
        device=CARD,
        provenance="virtual",
        phase="steady",
        moment="backward",
        kinds={
            "weights_4bit": weights,
            "activations_mamba": scan,
            "loss": loss,
            "slack": slack,
            "outside": context,
        },
        allocated_bytes=allocated,
        reserved_bytes=allocated + slack,
        device_bytes=allocated + slack + context,
        owners=(OwnerLine("weights_4bit", "model.py:7 load", "model.layers.0.weight", "uint8 (7, 1)", weights, 40),),
        timeline=Timeline(
            ("weights_4bit", "activations_mamba", "loss"),
            (-1, 10, 500, 900),
            (0, 1, 2, 3),
            ("", "forward", "backward", "backward"),
            rows,
        ),
    )


def named(name: str) -> Recipe:
    """A recipe of that name."""
    return replace_field(load_recipe(RECIPES / "optimised.yaml"), "name", name)


def write_all(folder: Path, names: Sequence[str] = ("tiny",)) -> None:
    """Every kind of file in `folder`; `names` are what recipes, ideas and cases are called."""
    write_waterfall(folder, MODEL, [*STEPS, *(Step(name, GIB, 2 * GIB, GIB) for name in names)], ENVIRONMENT)
    (folder / "lean-families.json").write_text(json.dumps({"environment": ENVIRONMENT, "cases": families(names)}))
    write_attribution(folder, named("plain"), attribution(), GIB // 2, ENVIRONMENT)
    write_phases(folder, MODEL, _phases(names), ENVIRONMENT, "Of an example.")
    (folder / "train.json").write_text(json.dumps(trained(names[-1])))
    (folder / "reality.json").write_text(json.dumps({"environment": ENVIRONMENT, "rows": published(names)}))
    write_lengths(folder, MODEL, _lengths(names), virtual_gpu.get_card(CARD), 1.5, ENVIRONMENT)
    rows = [Longest(name, CARD, 4096, 8192, "memory", Peak(3 * GIB, 4 * GIB, 5 * GIB), GIB, 15) for name in names]
    write_longest(folder, MODEL, rows, ENVIRONMENT, {"target_modules": "all-linear"})
    figures = [f for name in names for f in compare(name, predicted(allocated=0.004, reserved=0.05), MEASURED)]
    measured = provenance_record(MEASURED.device, "measured", "580.1")
    write_prediction(folder, figures, measured, "A twin.", dict.fromkeys(names, "it does not fit"))
    write_report(folder, gate_rows(names), ENVIRONMENT)
    (folder / "trend.json").unlink()
    recipe = load_recipe(RECIPES / "optimised.yaml")
    peaks = MemoryProfile(CARD, "virtual", 6 * GIB, 0, {"steady": Peak(GIB, 2 * GIB, 3 * GIB)})
    fits = CaseResult(recipe, CARD, "virtual", fits=True, profile=peaks, floor_bytes=GIB // 2)
    too_large = CaseResult(recipe, CARD, "virtual", fits=False, profile=None, out_of_memory="CUDA out of memory")
    failed = CaseResult(recipe, CARD, "virtual", fits=False, profile=None, failure="ValueError: x")
    write_matrix(folder, [fits, too_large, failed], ENVIRONMENT)


def gate_rows(names: Sequence[str]) -> Sequence[Row]:
    """Cases that hold, one that is over, one that is gone."""
    over = record(5 * MIB), None, Budget(4 * MIB, "allocated", CARD)
    return [
        *(Row(name, "bench/test_baselines.py", "PASS", record(GIB), record(GIB)) for name in names),
        Row("tests/t.py::over", "tests/t.py", "OVER BUDGET", *over, fails=True, message="a\nb"),
        Row("gone", "tests/t.py", "MISSING", None, record(5), fails=True, message="gone"),
    ]


def _phases(names: Sequence[str]) -> dict[str, list[PhaseBytes]]:
    """A life within its budgets, and lives that memory ends at `steady`, after a warm-up that took too much."""
    whole = [
        PhaseBytes(phase, Peak(GIB + n, 4 * GIB + n, 5 * GIB + n), 6 * GIB, 2 * GIB, GIB // 2)
        for n, phase in enumerate(PHASES)
    ]
    ended = [dataclasses.replace(each, floor=0) for each in whole[:5]]
    ended[2] = dataclasses.replace(ended[2], peak=dataclasses.replace(ended[2].peak, allocated=3 * GIB))
    more = dataclasses.replace(ended[4].peak, device=6 * GIB + 4)
    ended[4] = dataclasses.replace(ended[4], peak=more, out_of_memory="CUDA out of memory.")
    return {"whole": whole} | dict.fromkeys(names, ended)


def trained(name: str, **changes: object) -> dict[str, object]:
    """What `train --json` writes, as far as a page shows it."""
    phases = {phase: Peak(GIB + n, 2 * GIB, 3 * GIB + n) for n, phase in enumerate(("load", "steady"))}
    peaks = MemoryProfile(CARD, "virtual", 6 * GIB, 0, phases).to_dict()
    return (
        peaks
        | {"fits": True, "recipe": {"name": name}, "environment": ENVIRONMENT}
        | {"floor_bytes": GIB // 2}
        | changes
    )


def published(names: Sequence[str]) -> list[dict[str, object]]:
    """A row of every figure and each name: a peak with something explained, without, rounded; none at all."""
    plain = {"virtual_card": "t4-16gb", "measured_versions": "", "explained_bytes": 0, "program_bytes": None}
    plain |= {"agrees_with_its_rounding": None, "measured_bytes": 8 * GIB}
    rows: list[dict[str, object]] = [
        {"measures": "allocated", "plan_bytes": 6 * GIB, "explained_bytes": GIB, "program_bytes": 8 * GIB},
        {"measures": "reserved", "plan_bytes": 9 * GIB, "measured_versions": "torch 2.4"},
        {"measures": "device", "plan_bytes": 8 * GIB + 7, "agrees_with_its_rounding": True},
        {"measures": "limit", "plan_bytes": 8 * GIB},
        {"measures": "out of memory", "plan_bytes": 7 * GIB, "agrees_with_its_rounding": False},
    ]
    return [plain | {"source": f"by {name}", "run": name} | row for name in names for row in rows]


def families(names: Sequence[str]) -> list[dict[str, object]]:
    """Each model at two lengths, by model: lean saves a half and three quarters of what is above the floor."""
    peaks = ((1024, 3 * GIB, 2 * GIB), (4096, 5 * GIB, 2 * GIB))
    fields = ("tokens", "optimised_allocated_bytes", "lean_allocated_bytes")
    return [
        {"model": name, "floor_bytes": GIB} | dict(zip(fields, row, strict=True)) for name in names for row in peaks
    ]


def _lengths(names: Sequence[str]) -> list[Length]:
    needs = {"plain": (GIB, 9 * GIB)} | dict.fromkeys(names, (GIB, 2 * GIB))
    return [
        Length(recipe, tokens, need < 5 * GIB, Peak(need - 3, need - 2, need), GIB // 2 + tokens)
        for recipe, sizes in needs.items()
        for tokens, need in zip((1024, 8192), sizes, strict=True)
    ]
