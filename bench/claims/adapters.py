"""LoRA's rank, and what the adapters add."""

from collections.abc import Iterator

from claims.rows import Row, Side, judged, megabytes_text
from claims.runs import ADAPTERS, BASELINE, ONE_ADAPTER, OPTIMISED_ONE_ADAPTER, TITLES, Runs, attention_layers
from claims.verdicts import Within, megabytes
from qlora_lowmem.memory.kinds import KINDS, OUTSIDE_ALLOCATED

_HALF = Within(0.5, 0.5, "half")
_ADDS = megabytes(100, 200)


def rows(runs: Runs) -> Iterator[Row]:
    """Rank 8 against 16, and what the adapters add at rank 8 by what they adapt."""
    for model in TITLES:
        yield _rank(runs, model)
    for case, least, targets in (
        ("r 8", ONE_ADAPTER, "q, k, v and o, no checkpointing"),
        ("all-linear", OPTIMISED_ONE_ADAPTER, "all linear layers, checkpointing"),
    ):
        for model in TITLES:
            yield _adds(runs, model, case, least, targets)


def _rank(runs: Runs, model: str) -> Row:
    whole = runs.run(model, BASELINE).trainable_parameters
    half = runs.run(model, "r 8").trainable_parameters
    saved = runs.steady(model, BASELINE) - runs.steady(model, "r 8")
    return judged(
        "rank",
        "LoRA r 8 against r 16 halves the adapter parameters",
        TITLES[model],
        _HALF,
        "x 0.5",
        half / whole,
        f"x {half / whole:.3g}",
        (Side("parameters at r 16", whole, "count"), Side("at r 8", half, "count")),
        {
            "true": "A is (r, in) and B is (out, r), so parameters are proportional to r; the whole peak falls by "
            f"{megabytes_text(saved)} with them, {saved / runs.steady(model, BASELINE):.2%} of it."
        },
    )


def _adds(runs: Runs, model: str, case: str, least: str, targets: str) -> Row:
    """The peak with all adapters against the peak with one of rank 1: without any, nothing trains."""
    parameters = runs.run(model, case).trainable_parameters
    before, after = runs.steady(model, least), runs.steady(model, case)
    added = after - before
    attention, layers = attention_layers(model)
    where = f" in the {attention} of {layers} layers that have attention" if case == "r 8" else ""
    own = runs.kinds(model, case, *ADAPTERS)
    made_of = (
        f"{parameters:,} parameters{where} take {megabytes_text(own)} with gradient and AdamW's two moments, at "
        f"{own / parameters:.0f} bytes each, and {_the_rest(runs, model, case, least)}"
    )
    return judged(
        "adapter bytes",
        f"the adapters add 100 to 200 MB at r 8 (adapters on {targets})",
        TITLES[model],
        _ADDS,
        _ADDS.claimed,
        added,
        megabytes_text(added),
        (Side("peak with one adapter of rank 1, the least that trains", before), Side("with all of them", after)),
        {
            "false": f"{made_of}: {'more' if added > _ADDS.high else 'less'} than was claimed.",
            "partly": f"{made_of}: near the claim.",
            "true": f"{made_of}.",
        },
    )


def _the_rest(runs: Runs, model: str, case: str, least: str) -> str:
    """What else changes between the two peaks: what LoRA keeps, and when the peak comes."""
    many, one = runs.attribution(model, case), runs.attribution(model, least)
    grown = {
        kind: many.kinds.get(kind, 0) - one.kinds.get(kind, 0)
        for kind in KINDS
        if kind not in (*ADAPTERS, *OUTSIDE_ALLOCATED)
    }
    most = max(grown, key=lambda kind: grown[kind])
    told = f"all else changes by {sum(grown.values()) / 10**6:+,.1f} MB"
    if most.startswith(("activations_", "recomputed_")):
        told += f" ({KINDS[most]} by {grown[most] / 10**6:+,.1f} MB, with the inputs that LoRA keeps for backward)"
    return told if many.moment == one.moment else f"{told}, the peak being in {many.moment} instead of {one.moment}"
