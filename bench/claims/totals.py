"""The whole: checkpointing, all savings together, the base model, what training adds, the total."""

from collections.abc import Iterator

from claims.rows import Row, Side, gigabytes_text, judged, percent
from claims.runs import BASELINE, OPTIMISED, TITLES, WEIGHTS, Runs
from claims.verdicts import gigabytes, share_between
from qlora_lowmem.memory.kinds import KINDS

_CHECKPOINTING = share_between(0.30, 0.40)
_TOGETHER = share_between(0.60, 0.70)
_BASE = gigabytes(2, 3)
_ADDS = share_between(0.50, 1.00)
_TOTAL = gigabytes(4, 6)


def rows(runs: Runs) -> Iterator[Row]:
    """One statement after the other, each on every model."""
    for model in TITLES:
        yield _saves(runs, model, "checkpointing")
    for model in TITLES:
        yield _saves(runs, model, OPTIMISED)
    for model in TITLES:
        yield _base(runs, model)
    for name in (OPTIMISED, BASELINE):
        for model in TITLES:
            yield _adds(runs, model, name)
    for name in (OPTIMISED, BASELINE):
        for model in TITLES:
            yield _total(runs, model, name)


def _saves(runs: Runs, model: str, name: str) -> Row:
    before, after = runs.steady(model, BASELINE), runs.steady(model, name)
    saved = 1 - after / before
    criterion = _CHECKPOINTING if name == "checkpointing" else _TOGETHER
    what = "gradient checkpointing" if name == "checkpointing" else "all savings together (baseline to optimised)"
    kept = runs.kinds(model, BASELINE, *(kind for kind in KINDS if kind.startswith("activations_")))
    logits = runs.kinds(model, BASELINE, "loss")
    why = (
        f"of the baseline's peak {percent(kept / before)} is activations kept for backward and "
        f"{percent(logits / before)} logits and loss"
    )
    more = (
        f"{why}; with checkpointing the layers' inputs are kept instead"
        if name == "checkpointing"
        else f"{why}; checkpointing removes the first, the fused loss the second, and 1024 tokens halve what is left"
    )
    return judged(
        "checkpointing" if name == "checkpointing" else "all together",
        f"{what} saves {criterion.claimed}",
        TITLES[model],
        criterion,
        criterion.claimed,
        saved,
        percent(saved),
        (Side("peak of the baseline", before), Side(f"with {what.split(' (')[0]}", after)),
        {
            "true": f"{more}.",
            "partly": f"{more}: a little beyond the claim.",
            "false": f"{more}: {'more' if saved > criterion.high else 'less'} than was claimed.",
        },
    )


def _base(runs: Runs, model: str) -> Row:
    four, constants, other = (runs.kinds(model, BASELINE, kind) for kind in WEIGHTS)
    total = four + constants + other
    made_of = (
        f"{gigabytes_text(four)} of 4-bit weights, {gigabytes_text(constants)} of constants and "
        f"{gigabytes_text(other)} of embeddings and norms in bf16"
    )
    return judged(
        "base",
        "the 4-bit base takes 2 to 3 GB",
        TITLES[model],
        _BASE,
        _BASE.claimed,
        total,
        gigabytes_text(total),
        (Side("4-bit weights", four), Side("with constants, embeddings and norms", total)),
        {
            "true": f"{made_of}: the claim fits a model of this size.",
            "false": f"{made_of}: the claim is of a model two to three times as large.",
        },
    )


def _adds(runs: Runs, model: str, name: str) -> Row:
    loaded = runs.kinds(model, name, *WEIGHTS)
    peak = runs.steady(model, name)
    added = peak / loaded - 1
    kinds = {kind: count for kind, count in runs.attribution(model, name).kinds.items() if kind not in WEIGHTS}
    largest = max((kind for kind in kinds if kind not in ("slack", "outside")), key=lambda kind: kinds[kind])
    why = f"the largest part of it is {KINDS[largest]} ({gigabytes_text(kinds[largest])})"
    return judged(
        "training adds",
        f"training adds 50 to 100 % to the loaded model ({name} recipe)",
        TITLES[model],
        _ADDS,
        _ADDS.claimed,
        added,
        percent(added),
        (Side("loaded", loaded), Side("peak", peak)),
        {
            "true": f"{why}.",
            "partly": f"{why}.",
            "false": f"{why}: {'many times' if added > 2 else 'more than' if added > 1 else 'less than'} the claim.",
        },
    )


def _total(runs: Runs, model: str, name: str) -> Row:
    profile = runs.profile(model, name)
    peak, device = profile.peak.allocated, profile.peak.device
    made_of = (
        f"{gigabytes_text(peak)} allocated, {gigabytes_text(profile.peak.reserved - peak)} more reserved and "
        f"{gigabytes_text(profile.outside_allocator_bytes)} of CUDA context"
    )
    return judged(
        "total",
        f"4 to 6 GB in total ({name} recipe)",
        TITLES[model],
        _TOTAL,
        _TOTAL.claimed,
        device,
        gigabytes_text(device),
        (Side("allocated", peak), Side("on the card", device)),
        {
            "true": f"{made_of}.",
            "partly": f"{made_of}: a little outside.",
            "false": f"{made_of}: {'less than was claimed' if device < _TOTAL.low else 'far more than was claimed'}.",
        },
    )
