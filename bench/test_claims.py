"""Each statement that guided the set-up, tested on Granite-4.0-H-1B and beside it on two dense models."""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from claims import adapters, host, placement, sequence, totals, ways_out
from claims.rows import Row, differences_told
from claims.runs import CASES, HYBRID, TITLES, Runs, run_all
from claims.table import summary_table, write_claims
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.models.sources import architecture

pytestmark = pytest.mark.claims

# Every statement has a row of its own; those on bytes have one on every model, those on libraries on the first.
TOPICS = {
    "rank": 3,
    "adapter bytes": 6,
    "half the sequence": 6,
    "attention": 9,
    "checkpointing": 3,
    "all together": 3,
    "base": 3,
    "training adds": 6,
    "total": 6,
    "max_memory": 3,
    "device_map": 3,
    "pinned memory and workers": 3,
    "packing": 4,
    "fewer modules": 6,
    "shorter sequences": 6,
    "lower rank": 3,
    "more accumulation": 6,
}


@pytest.fixture(scope="module")
def server(on_gpu: bool, request: pytest.FixtureRequest) -> virtual_gpu.Server:
    if on_gpu:
        pytest.skip("the statements are tested on virtual cards")
    server: virtual_gpu.Server = request.getfixturevalue("virtual_server")
    return server


def _values(jobs: "Mapping[str, Future[virtual_gpu.JobResult]]") -> dict[str, Any]:
    values = {}
    for name, job in jobs.items():
        result = job.result()
        assert result.value is not None, f"{name}: {result.error}\n{result.output_tail}"
        values[name] = result.value
    return values


@pytest.fixture(scope="module")
def kernels(server: virtual_gpu.Server) -> dict[tuple[str, str], str]:
    """The kernel that SDPA picks for each model's attention, by model and name of the implementation."""
    jobs = {
        (model, name): server.submit(
            "claims.kernels:attention_kernel", _attention_shape(model), virtual_gpu.get_card(card), timeout=120
        )
        for model in TITLES
        for name, card in sequence.SDPA_CARDS.items()
    }
    return {key: str(job.result().value) for key, job in jobs.items()}


def _attention_shape(model: str) -> dict[str, Any]:
    content = architecture(model)
    heads = int(content["num_attention_heads"])
    return {
        "heads": heads,
        "key_value_heads": content["num_key_value_heads"],
        "head_dim": content.get("head_dim") or content["hidden_size"] // heads,
        "length": 2048,
    }


@pytest.fixture(scope="module")
def runs(server: virtual_gpu.Server) -> Runs:
    return run_all(server)


@pytest.fixture(scope="module")
def rows(
    server: virtual_gpu.Server,
    runs: Runs,
    kernels: dict[tuple[str, str], str],
    results_folder: Path,
    printed_at_the_end: list[str],
) -> Iterator[list[Row]]:
    """Every statement's rows; the table is written and printed once all of them are there."""
    placed = _values(placement.submit(server))
    families = (
        adapters.rows(runs),
        sequence.rows(runs, kernels),
        totals.rows(runs),
        placement.rows(placed),
        host.rows(runs, _values(host.submit(server))),
        ways_out.rows(runs),
    )
    rows = differences_told(list(chain.from_iterable(families)))
    yield rows
    write_claims(results_folder, rows, provenance_record(DEFAULT_CARD, "virtual"))
    printed_at_the_end.append(summary_table(rows))


def test_sdpa_ran_two_kernels(kernels: dict[tuple[str, str], str]) -> None:
    """What the rows on attention are named after, on every model."""
    of_names = {"SDPA, on a card without flash": "memory-efficient", "SDPA, which is flash here": "flash"}
    assert kernels == {(model, name): kernel for model in TITLES for name, kernel in of_names.items()}


@pytest.mark.parametrize(("model", "name"), CASES, ids=[f"{model}: {name}" for model, name in CASES])
def test_run_ended_well(runs: Runs, model: str, name: str) -> None:
    assert runs.steady(model, name) > 0


def test_every_statement_has_its_rows(rows: list[Row]) -> None:
    assert Counter(row.topic for row in rows) == TOPICS
    assert {row.topic for row in rows if row.model == TITLES[HYBRID]} == set(TOPICS)


def test_a_row_has_two_figures_and_one_sentence(rows: list[Row]) -> None:
    for row in rows:
        assert row.before.unit == row.after.unit
        assert row.reason.endswith("."), row.reason
        assert row.reason.count(". ") == 0, row.reason
