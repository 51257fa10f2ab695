"""Pinned memory, worker processes, and packing on the hybrid."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future

from claims.rows import Row, Side, judged
from claims.runs import DENSE_3B, HYBRID, OPTIMISED, TITLES, Runs
from claims.verdicts import Exactly
from claims.ways_out import saving
from qlora_lowmem import virtual_gpu
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.probes.advice import ROOMY_BYTES


def submit(server: virtual_gpu.Server) -> "dict[str, Future[virtual_gpu.JobResult]]":
    """Queue a packed row on the hybrid and on a dense model, with as much memory as it takes."""
    card = virtual_gpu.get_card(DEFAULT_CARD).with_memory(ROOMY_BYTES)
    row = {"length": 1024, "samples": 4}
    return {
        model: server.submit("claims.packed:packed_forward", {"name": model, **row}, card, timeout=120)
        for model in (HYBRID, DENSE_3B)
    }


def rows(runs: Runs, errors: Mapping[str, str | None]) -> Iterator[Row]:
    """What lies on the host, and whether packed rows run at all: `errors` of the jobs of `submit`."""
    yield _pinned(runs)
    yield _packing_runs(errors)


def _pinned(runs: Runs) -> Row:
    pinned = runs.run(HYBRID, "pinned, 2 workers").pinned_host_bytes
    plain = runs.run(HYBRID, OPTIMISED).pinned_host_bytes
    why = (
        f"both are of the host: {pinned:,} bytes page-locked there at most (without: {plain:,}), and worker processes "
        "never touch the card"
    )
    return saving(
        runs,
        HYBRID,
        "pinned memory and workers",
        "no pinned memory and no dataloader workers (against pinned and 2 workers) save GPU memory",
        "pinned, 2 workers",
        OPTIMISED,
        {"false": f"{why}.", "partly": f"{why}."},
    )


def _packing_runs(errors: Mapping[str, str | None]) -> Row:
    refusal = errors[HYBRID]
    packed = 0 if refusal else 1
    dense = "runs" if errors[DENSE_3B] is None else "is refused"
    told = (refusal or "it ran").partition(". ")[0]
    return judged(
        "packing",
        "packing has to be off",
        TITLES[HYBRID],
        Exactly(0),
        "no packed row runs",
        packed,
        f"{packed} of 1 rows",
        (Side("packed rows tried", 1, "count"), Side("that ran", packed, "count")),
        {
            "true": f"a Mamba layer's state runs on from sample to sample, so transformers refuses ({told}), while the "
            f"same packed row {dense} on {TITLES[DENSE_3B]}: off is no saving here but the only way.",
        },
    )
