"""LoRA's rank, and what the adapters add."""

from collections.abc import Iterator

from claims.rows import Row, Side, judged, megabytes_text
from claims.runs import ADAPTERS, BASELINE, TITLES, Runs, attention_layers
from claims.verdicts import Within, megabytes

_HALF = Within(0.5, 0.5, "half")
_ADDS = megabytes(100, 200)


def rows(runs: Runs) -> Iterator[Row]:
    """Rank 8 against 16, and the bytes of the adapters at rank 8 by what they adapt."""
    for model in TITLES:
        yield _rank(runs, model)
    for case, targets in (("r 8", "q, k, v and o"), ("all-linear", "all linear layers")):
        for model in TITLES:
            yield _adds(runs, model, case, targets)


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


def _adds(runs: Runs, model: str, case: str, targets: str) -> Row:
    found = runs.attribution(model, case)
    added = sum(found.kinds.get(kind, 0) for kind in ADAPTERS)
    parameters = runs.run(model, case).trainable_parameters
    attention, layers = attention_layers(model)
    where = f" in the {attention} of {layers} layers that have attention" if case == "r 8" else ""
    made_of = (
        f"{parameters:,} parameters{where}, at {added / parameters:.0f} bytes each with gradient and AdamW's two "
        f"moments in bf16, are {added / found.allocated_bytes:.2%} of the peak"
    )
    return judged(
        "adapter bytes",
        f"the adapters add 100 to 200 MB at r 8 (adapters on {targets})",
        TITLES[model],
        _ADDS,
        _ADDS.claimed,
        added,
        megabytes_text(added),
        (Side("peak without them", found.allocated_bytes - added), Side("with them", found.allocated_bytes)),
        {"false": f"{made_of}.", "partly": f"{made_of}, which comes near.", "true": f"{made_of}."},
    )
