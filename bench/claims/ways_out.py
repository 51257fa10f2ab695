"""What to do when it is still too much: fewer modules, shorter sequences, lower rank, more accumulation."""

from collections.abc import Iterator

from claims.rows import Row, Side, judged, megabytes_text, percent
from claims.runs import DENSE_3B, OPTIMISED, TITLES, Runs, attention_layers
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
    """One way out after the other, from the optimised recipe, each on every model that has it."""
    for model in TITLES:
        yield _fewer_modules(runs, model)
    for model in TITLES:
        yield _from_all_linear(runs, model)
    for before, after in ((OPTIMISED, "seq 512"), ("seq 512", "seq 256")):
        for model in TITLES:
            yield _shorter(runs, model, before, after)
    for model in TITLES:
        yield _lower_rank(runs, model)
    for model in TITLES:
        yield _more_accumulation(runs, model)
    for model in TITLES:
        yield _accumulation_for_batch(runs, model)
    yield _packing_off(runs)


def _fewer_parameters(runs: Runs, model: str, more: str, fewer: str) -> str:
    many, few = (runs.run(model, name).trainable_parameters for name in (more, fewer))
    attention, layers = attention_layers(model)
    return f"{many - few:,} adapter parameters fewer, in the {attention} of {layers} layers that have attention"


def _fewer_modules(runs: Runs, model: str) -> Row:
    why = _fewer_parameters(runs, model, OPTIMISED, "q and v")
    return saving(
        runs,
        model,
        "fewer modules",
        "adapters on q and v instead of q, k, v and o save memory",
        OPTIMISED,
        "q and v",
        {"partly": f"{why}: a little.", "false": f"{why}: next to nothing."},
    )


def _from_all_linear(runs: Runs, model: str) -> Row:
    every, four = (runs.run(model, name).trainable_parameters for name in ("all-linear", OPTIMISED))
    why = f"{every - four:,} adapter parameters fewer, with their gradients and moments"
    return saving(
        runs,
        model,
        "fewer modules",
        "adapters on q, k, v and o instead of all linear layers save memory",
        "all-linear",
        OPTIMISED,
        {"partly": f"{why}: a little, for {every / four:.1f} times fewer trained weights.", "true": f"{why}."},
    )


def _shorter(runs: Runs, model: str, before: str, after: str) -> Row:
    base = runs.steady(model, after) / runs.steady(model, before)
    return saving(
        runs,
        model,
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


def _lower_rank(runs: Runs, model: str) -> Row:
    why = _fewer_parameters(runs, model, OPTIMISED, "r 4")
    return saving(
        runs,
        model,
        "lower rank",
        "r 4 instead of r 8 saves memory",
        OPTIMISED,
        "r 4",
        {"partly": f"{why}: a little.", "false": f"{why}: next to nothing."},
    )


def _more_accumulation(runs: Runs, model: str) -> Row:
    more = runs.steady(model, "accumulation 16") - runs.steady(model, "accumulation 8")
    return saving(
        runs,
        model,
        "more accumulation",
        "16 accumulation steps instead of 8 save memory",
        "accumulation 8",
        "accumulation 16",
        {
            "false": "gradients are summed in place whatever the number of micro-batches, and what is more is the "
            f"batches themselves, which the Trainer puts on the card together: {more:,} B for 8 more."
        },
    )


def _accumulation_for_batch(runs: Runs, model: str) -> Row:
    return saving(
        runs,
        model,
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
            "false": f"a packed row is as long as a full sample, and only its position ids ({packed - plain:,} B) are "
            f"more; where every sample has 256 tokens or fewer, packing costs {megabytes_text(packed - short)}, for "
            "its rows are full all the same.",
        },
    )
