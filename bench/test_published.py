"""What the virtual GPU says, held against peaks that others measured on real cards (`published/README.md`)."""

import statistics
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from published.rows import EXCEPTED, FineTuningRun, PublishedRow, Score, fine_tuning_runs, published_rows, score
from published.tables import percent, write_fine_tuning, write_published
from qlora_lowmem import virtual_gpu

pytestmark = pytest.mark.published

ROWS = published_rows()
RUNS = fine_tuning_runs()
LIMIT = 0.001
RUN_LIMIT = 0.015
# Equality up to the published figures' own rounding: seven digits of float32.
EQUAL = 1e-6
FITTED_LENGTH = 692

Peaks = dict[str, "Future[virtual_gpu.JobResult]"]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, virtual_gpu.Server]]:
    with (
        virtual_gpu.Server(["torch"], max_workers=2) as operations,
        virtual_gpu.Server(["torch", "transformers", "peft"], max_workers=1) as runs,
    ):
        yield {"operations": operations, "runs": runs}


def _value(name: str, done: "Future[virtual_gpu.JobResult]") -> Any:
    result = done.result()
    assert result.value is not None, f"{name} gave no peak: {result.error}\n{result.output_tail}"
    return result.value


@pytest.fixture(scope="module")
def peaks(servers: dict[str, virtual_gpu.Server], results_folder: Path) -> Iterator[Peaks]:
    """Every row's peak on its card; the table is written at the end, of all that gave one."""
    jobs = {}
    for row in ROWS:
        kwargs = {"name": row.case, "x": row.x, "mode": row.mode, "config": dict(row.config)}
        card = virtual_gpu.get_card(row.card)
        jobs[row.name] = servers["operations"].submit("published.peak:steady_peak", kwargs, card, timeout=120)
    yield jobs
    write_published(results_folder, _scores(jobs))


def _scores(peaks: Peaks) -> list[Score]:
    values = {name: done.result().value for name, done in peaks.items()}
    return score(ROWS, {name: value for name, value in values.items() if value is not None})


@pytest.fixture(scope="module")
def runs(servers: dict[str, virtual_gpu.Server], results_folder: Path) -> Iterator[Peaks]:
    """Every fine-tuning run's reserved peak on its card; the table is written at the end."""
    jobs = {}
    for run in RUNS:
        kwargs = {"peft_config": dict(run.peft_config), "longest_length": FITTED_LENGTH}
        card = virtual_gpu.get_card(run.card)
        function = "published.finetuning:peak_reserved"
        jobs[run.experiment] = servers["runs"].submit(function, kwargs, card, timeout=300)
    yield jobs
    values = {name: done.result().value for name, done in jobs.items()}
    write_fine_tuning(
        results_folder, RUNS, {name: value for name, value in values.items() if value is not None}, FITTED_LENGTH
    )


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS) == 132
    assert len(RUNS) == 4


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_operation(peaks: Peaks, row: PublishedRow) -> None:
    _value(row.name, peaks[row.name])
    (found,) = [each for each in _scores_of_series(peaks, row) if each.row is row]
    if row.case in EXCEPTED:
        assert abs(found.error or 0) > LIMIT, "it agrees now: the exception is over"
        return
    if found.error is not None:
        assert abs(found.error) <= LIMIT, (
            f"{row.name}: {found.compared} differs by {percent(found.error)}: measured {row.measured_mib} MiB, "
            f"virtual {found.virtual_bytes / 2**20} MiB ({row.note or 'no note'})"
        )


def _scores_of_series(peaks: Peaks, row: PublishedRow) -> list[Score]:
    series = [each for each in ROWS if each.series == row.series]
    return score(series, {each.name: _value(each.name, peaks[each.name]) for each in series})


def test_median_is_equality(peaks: Peaks) -> None:
    errors = [abs(each.error) for each in _scores(peaks) if each.held and each.error is not None]
    assert len(errors) == len(ROWS) - 8 - 1, "all but rope's 8 and the one that growth is taken from"
    assert statistics.median(errors) < EQUAL


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.experiment)
def test_fine_tuning_run(runs: Peaks, run: FineTuningRun) -> None:
    value = _value(run.experiment, runs[run.experiment])
    assert value["trainable_parameters"] == run.trainable_parameters
    error = value["reserved"] / 2**20 / run.reserved_mib - 1
    assert abs(error) <= RUN_LIMIT, f"reserved differs by {percent(error)}: {asdict(run)}, virtual {value}"
