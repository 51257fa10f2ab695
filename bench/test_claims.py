"""Each statement that guided the set-up, tested on Granite-4.0-H-1B and beside it on two dense models."""

from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from claims import adapters, host, placement, sequence, totals, ways_out
from claims.rows import Row
from claims.runs import CASES, HYBRID, TITLES, WITHOUT_FLASH, Runs, run_all
from claims.table import write_claims
from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.models.sources import architecture

pytestmark = pytest.mark.claims

# Every statement has a row of its own; those on bytes have one on every model.
TOPICS = {
    "rank": 3,
    "adapter bytes": 6,
    "half the sequence": 6,
    "attention": 7,
    "checkpointing": 3,
    "all together": 3,
    "base": 3,
    "training adds": 6,
    "total": 6,
    "max_memory": 3,
    "device_map": 3,
    "pinned memory and workers": 1,
    "packing": 2,
    "fewer modules": 2,
    "shorter sequences": 2,
    "lower rank": 1,
    "more accumulation": 2,
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
def kernels(server: virtual_gpu.Server) -> dict[str, str]:
    """The kernel that SDPA picks for the hybrid's attention, by the name of the implementation."""
    content = architecture(HYBRID)
    heads = int(content["num_attention_heads"])
    shape = {
        "heads": heads,
        "key_value_heads": content["num_key_value_heads"],
        "head_dim": content["hidden_size"] // heads,
        "length": 2048,
    }
    cards = {"SDPA, on a card without flash": WITHOUT_FLASH, "SDPA, which is flash here": DEFAULT_CARD}
    jobs = {
        name: server.submit("claims.kernels:attention_kernel", shape, virtual_gpu.get_card(card), timeout=120)
        for name, card in cards.items()
    }
    return {name: str(job.result().value) for name, job in jobs.items()}


@pytest.fixture(scope="module")
def runs(server: virtual_gpu.Server) -> Runs:
    return run_all(server)


@pytest.fixture(scope="module")
def rows(server: virtual_gpu.Server, runs: Runs, kernels: dict[str, str], results_folder: Path) -> Iterator[list[Row]]:
    """Every statement's rows; the table is written once all of them are there."""
    placed = _values(placement.submit(server))
    packed = {model: value["error"] for model, value in _values(host.submit(server)).items()}
    families = (
        adapters.rows(runs),
        sequence.rows(runs, kernels),
        totals.rows(runs),
        placement.rows(placed),
        host.rows(runs, packed),
        ways_out.rows(runs),
    )
    rows = list(chain.from_iterable(families))
    yield rows
    write_claims(results_folder, rows, provenance_record(DEFAULT_CARD, "virtual"))


def test_sdpa_ran_two_kernels(kernels: dict[str, str]) -> None:
    """What the rows on attention are named after."""
    assert kernels == {
        "SDPA, on a card without flash": "memory-efficient",
        "SDPA, which is flash here": "flash",
    }


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
