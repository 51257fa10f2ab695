"""The plan held to reality: published fine-tuning peaks, and the same runs as recipes on virtual cards."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm.auto import tqdm

from published.rows import fine_tuning_runs
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.plan.recipe_runs import roomy, submit_recipe
from reality.comparison import Comparison
from reality.rows import FACTORY, FITCHECK, FMS, PEFT, PublishedPeak, published_peaks
from reality.table import SOURCES, write_reality

pytestmark = pytest.mark.reality

ROWS = published_peaks()


def _of(*sources: str) -> dict[str, Any]:
    """The rows of these sources, for `pytest.mark.parametrize`."""
    rows = [row for row in ROWS if row.source in sources]
    return {"argnames": "row", "argvalues": rows, "ids": [f"{row.run} {row.measures}" for row in rows]}


FITTED_LENGTH = 692
# The plan's allocated peak, and what the card held (sampled, with a cache that no job needs), of a job that a recipe
# states fully; of a loop that it does not, with what is explained.
LIMIT, DEVICE_LIMIT, LEFT_LIMIT = 0.01, 0.04, 0.025
# A measured program itself: its peak without 4 bits, and what it takes beyond the loaded model in general.
PROGRAM_LIMIT, GROWTH_LIMIT = 0.001, 0.005
PROGRAM_RESERVED_LIMIT = 0.015


@pytest.fixture(scope="module")
def server(on_gpu: bool, request: pytest.FixtureRequest) -> virtual_gpu.Server:
    if on_gpu:
        pytest.skip("published runs are planned on virtual cards")
    server: virtual_gpu.Server = request.getfixturevalue("virtual_server")
    return server


@pytest.fixture(scope="module")
def plans(server: virtual_gpu.Server) -> dict[str, MemoryProfile]:
    """The peaks of every recipe, by the row's key; each card with as much memory as is asked of it."""
    runs = {
        row.key: submit_recipe(server, row.recipe, roomy(virtual_gpu.get_card(row.card)), timeout=300)
        for row in {row.key: row for row in ROWS}.values()
    }
    profiles = {}
    for key, future in tqdm(runs.items(), desc="plans", unit="run"):
        run = future.result()
        assert run.profile is not None, f"{key}: {run.failure}"
        assert run.out_of_memory is None, f"{key}: {run.out_of_memory}"
        profiles[key] = run.profile
    return profiles


def _program_of(row: PublishedPeak) -> tuple[str, dict[str, Any]] | None:
    """The measured program and its arguments, where it is stated here."""
    recipe = row.recipe
    if row.source == FITCHECK:
        return "reality.program:peak", {
            "architecture": row.architecture,
            "rank": recipe.lora.lora_r,
            "targets": list(recipe.lora.target_modules),
            "batch": recipe.batch.batch_size,
            "length": recipe.batch.max_seq_length,
            "attention": recipe.base.attention,
            "nf4": recipe.quantization.load_in_4bit,
        }
    if row.source == PEFT:
        run = next(each for each in fine_tuning_runs() if each.experiment in row.run)
        return "published.finetuning:peak_reserved", {
            "peft_config": dict(run.peft_config),
            "longest_length": FITTED_LENGTH,
        }
    return None


@pytest.fixture(scope="module")
def comparisons(
    server: virtual_gpu.Server, plans: dict[str, MemoryProfile], results_folder: Path
) -> Iterator[dict[str, Comparison]]:
    """Every row; the table is written once all of them are there."""
    jobs = {}
    for row in ROWS:
        program = _program_of(row)
        if program is not None:
            function, arguments = program
            jobs[row.name] = server.submit(function, arguments, virtual_gpu.get_card(row.card), timeout=300)
    programs = {}
    for name, job in tqdm(jobs.items(), desc="programs", unit="run"):
        result = job.result()
        assert result.value is not None, f"{name}: {result.error}\n{result.output_tail}"
        programs[name] = result.value
    found = {row.name: Comparison(row, plans[row.key], programs.get(row.name)) for row in ROWS}
    yield found
    write_reality(results_folder, list(found.values()), provenance_record("the card of each row", "virtual"))


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) == 64
    assert {row.source for row in ROWS} == set(SOURCES)


@pytest.mark.parametrize(**_of(FMS))
def test_a_job_that_a_recipe_states_fully(comparisons: dict[str, Comparison], row: PublishedPeak) -> None:
    found = comparisons[row.name]
    assert found.difference is not None
    limit = LIMIT if row.measures == "allocated" else DEVICE_LIMIT
    assert abs(found.difference) <= limit, f"{row.measured_bytes:,} measured, {found.plan_bytes:,} planned"


@pytest.mark.parametrize(**_of(FITCHECK))
def test_a_loop_that_holds_its_logits(comparisons: dict[str, Comparison], row: PublishedPeak) -> None:
    found = comparisons[row.name]
    assert found.left is not None
    assert found.program_difference is not None
    assert found.program_growth_difference is not None
    assert abs(found.left) <= LEFT_LIMIT, f"{row.measured_bytes:,} measured, {found.plan_bytes:,} + {found.explained:,}"
    assert abs(found.program_growth_difference) <= GROWTH_LIMIT
    if not row.recipe.quantization.load_in_4bit:
        assert abs(found.program_difference) <= PROGRAM_LIMIT


@pytest.mark.parametrize(**_of(FACTORY))
def test_a_rounded_figure(comparisons: dict[str, Comparison], row: PublishedPeak) -> None:
    assert comparisons[row.name].agrees, (
        f"{row.measured_bytes:,} measured, {comparisons[row.name].plan_bytes:,} planned"
    )


@pytest.mark.parametrize(**_of(PEFT))
def test_a_program_of_its_own(comparisons: dict[str, Comparison], row: PublishedPeak) -> None:
    found = comparisons[row.name]
    assert found.program_difference is not None
    assert abs(found.program_difference) <= PROGRAM_RESERVED_LIMIT
