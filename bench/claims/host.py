"""Pinned memory, worker processes, and packing on the hybrid."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from math import ceil

from claims.rows import Row, Side, judged
from claims.runs import OPTIMISED, TITLES, Runs
from claims.verdicts import Exactly
from claims.ways_out import saving
from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.plan.recipe_runs import roomy
from qlora_lowmem.units import MIB


def submit(server: virtual_gpu.Server) -> "dict[str, Future[virtual_gpu.JobResult]]":
    """Queue a packed row on each model, with as much memory as it takes."""
    card = roomy(virtual_gpu.get_card(DEFAULT_CARD))
    row = {"length": 1024, "samples": 4}
    return {
        model: server.submit("claims.packed:packed_forward", {"name": model, **row}, card, timeout=120)
        for model in TITLES
    }


def rows(runs: Runs, packed: Mapping[str, Mapping[str, str | None]]) -> Iterator[Row]:
    """What lies on the host, and whether packed rows run at all: `packed` has a result for every job of `submit`."""
    for model in TITLES:
        yield _pinned(runs, model)
    for model in TITLES:
        yield _packing_runs(packed, model)


def _pinned(runs: Runs, model: str) -> Row:
    # How many batches wait there at once depends on how fast the workers are, so the figure is rounded up.
    pinned = ceil(runs.run(model, "pinned, 2 workers").pinned_host_bytes / MIB)
    why = f"both are of the host: at most {pinned} MiB page-locked there, and worker processes never touch the card"
    return saving(
        runs,
        model,
        "pinned memory and workers",
        "no pinned memory and no dataloader workers (against pinned and 2 workers) save GPU memory",
        "pinned, 2 workers",
        OPTIMISED,
        {"false": f"{why}."},
    )


def _packing_runs(found: Mapping[str, Mapping[str, str | None]], model: str) -> Row:
    refusal, mixed = found[model]["error"], found[model]["mixed"]
    fit = 0 if refusal or mixed else 1
    if refusal:
        why = f"a Mamba layer's state runs on from sample to sample, so transformers refuses ({refusal.split('. ')[0]})"
    else:
        why = f"{mixed}, and runs such a row without a word"
    return judged(
        "packing",
        "packing has to be off",
        TITLES[model],
        Exactly(0),
        "no packed row trains its samples apart",
        fit,
        f"{fit} of 1 rows",
        (Side("packed rows tried", 1, "count"), Side("that ran with their samples apart", fit, "count")),
        {
            "true": f"{why}: off is no saving here but the only way.",
            "false": "transformers ran it, and its attention masks keep the samples apart.",
        },
    )
