"""What to do when it is still too much: fewer modules, shorter sequences, lower rank, more accumulation."""

from collections.abc import Iterator

from claims.rows import Row, Side, judged, megabytes_text, percent
from claims.runs import DENSE_3B, HYBRID, OPTIMISED, TITLES, Runs, attention_layers
from claims.verdicts import Saves, Verdict

_SAVES = Saves()


def saving(
    runs: Runs, model: str, topic: str, statement: str, before: str, after: str, reasons: dict[Verdict, str]
) -> Row:
    """The row of a change that should save memory: `after` against `before`, both named cases."""
    whole, less = runs.steady(model, before), runs.steady(model, after)
    share = 1 - less / whole
    return judged(
        topic,
        statement,
        TITLES[model],
        _SAVES,
        "saves memory",
        share,
        f"{percent(share)} ({megabytes_text(whole - less)})",
        (Side(f"peak: {before}", whole), Side(after, less)),
        reasons,
    )


def rows(runs: Runs) -> Iterator[Row]:
    """One way out after the other, from the optimised recipe."""
    yield _fewer_modules(runs)
    yield _from_all_linear(runs)
    yield _shorter(runs, OPTIMISED, "seq 512")
    yield _shorter(runs, "seq 512", "seq 256")
    yield _lower_rank(runs)
    yield _more_accumulation(runs)
    yield _accumulation_for_batch(runs)
    yield _packing_off(runs)


def _parameters(runs: Runs, *names: str) -> list[int]:
    return [runs.run(HYBRID, name).trainable_parameters for name in names]


def _fewer_modules(runs: Runs) -> Row:
    four, two = _parameters(runs, OPTIMISED, "q and v")
    attention, layers = attention_layers(HYBRID)
    why = f"{four - two:,} adapter parameters fewer, in the {attention} of {layers} layers that have attention"
    return saving(
        runs,
        HYBRID,
        "fewer modules",
        "adapters on q and v instead of q, k, v and o save memory",
        OPTIMISED,
        "q and v",
        {"partly": f"{why}: next to nothing."},
    )


def _from_all_linear(runs: Runs) -> Row:
    every, four = _parameters(runs, "all-linear", OPTIMISED)
    why = f"{every - four:,} adapter parameters fewer, with their gradients and moments"
    return saving(
        runs,
        HYBRID,
        "fewer modules",
        "adapters on q, k, v and o instead of all linear layers save memory",
        "all-linear",
        OPTIMISED,
        {"partly": f"{why}: a little, for {every / four:.0f} times fewer trained weights.", "true": f"{why}."},
    )


def _shorter(runs: Runs, before: str, after: str) -> Row:
    base = runs.steady(HYBRID, after) / runs.steady(HYBRID, before)
    return saving(
        runs,
        HYBRID,
        "shorter sequences",
        f"half the sequence saves memory ({'1024 to 512' if before == OPTIMISED else '512 to 256'} tokens)",
        before,
        after,
        {
            "true": f"checkpoints and one layer's recomputed activations halve, the weights stay: {base:.0%} is left.",
            "partly": f"checkpoints and one layer's activations halve, but the weights are most of it: {base:.0%} is "
            "left.",
        },
    )


def _lower_rank(runs: Runs) -> Row:
    eight, four = _parameters(runs, OPTIMISED, "r 4")
    return saving(
        runs,
        HYBRID,
        "lower rank",
        "r 4 instead of r 8 saves memory",
        OPTIMISED,
        "r 4",
        {"partly": f"{eight - four:,} parameters fewer are of no account beside the activations."},
    )


def _more_accumulation(runs: Runs) -> Row:
    more = runs.steady(HYBRID, "accumulation 16") - runs.steady(HYBRID, "accumulation 8")
    return saving(
        runs,
        HYBRID,
        "more accumulation",
        "16 accumulation steps instead of 8 save memory",
        "accumulation 8",
        "accumulation 16",
        {
            "false": "gradients are summed in place whatever the number of micro-batches, and what is more is the "
            f"batches themselves, which the Trainer puts on the card together: {more:,} B for 8 more."
        },
    )


def _accumulation_for_batch(runs: Runs) -> Row:
    return saving(
        runs,
        HYBRID,
        "more accumulation",
        "batch 1 with 8 accumulation steps instead of batch 8 saves memory",
        "batch 8",
        "accumulation 8",
        {"true": "one sample's activations exist at a time, and the step sees the same 8 samples."},
    )


def _packing_off(runs: Runs) -> Row:
    packed, plain = runs.steady(DENSE_3B, "packing"), runs.steady(DENSE_3B, OPTIMISED)
    short = runs.steady(DENSE_3B, "seq 256")
    return saving(
        runs,
        DENSE_3B,
        "packing",
        "packing off saves memory (samples as long as the longest allowed)",
        "packing",
        OPTIMISED,
        {
            "partly": f"a packed row is as long as a full sample, and only its position ids ({packed - plain:,} B) are "
            f"more; where every sample has 256 tokens or fewer, packing costs {megabytes_text(packed - short)}, for "
            "its rows are full all the same.",
        },
    )
