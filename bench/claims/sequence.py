"""Half the sequence: half of what a sequence takes, and three quarters of attention's memory."""

from collections.abc import Iterator, Mapping

from claims.rows import Row, Side, judged, percent
from claims.runs import BASELINE, OPTIMISED, TITLES, WEIGHTS, WITHOUT_FLASH, Runs, attention_layers
from claims.verdicts import about
from qlora_lowmem.gate.plugin import DEFAULT_CARD
from qlora_lowmem.memory.kinds import KINDS

_HALF = about(0.5)
_THREE_QUARTERS = about(0.75)
_ATTENTION = "activations_attention"
# What the implementation is called here -> the two cases.
_IMPLEMENTATIONS = {
    "eager": ("eager", "eager, seq 1024"),
    "SDPA, on a card without flash": ("no flash", "no flash, seq 1024"),
    "SDPA, which is flash here": (BASELINE, "seq 1024"),
}
# The implementations that leave the choice of a kernel to PyTorch -> the card they ran on.
SDPA_CARDS = {"SDPA, on a card without flash": WITHOUT_FLASH, "SDPA, which is flash here": DEFAULT_CARD}
_TOLD = {_ATTENTION, *WEIGHTS}


def rows(runs: Runs, kernels: Mapping[tuple[str, str], str]) -> Iterator[Row]:
    """2048 against 1024 tokens; `kernels` says which one SDPA ran, by model and name of the implementation."""
    for model in TITLES:
        yield _half(runs, model, BASELINE, "seq 1024", "no checkpointing")
    for model in TITLES:
        yield _half(runs, model, "optimised, seq 2048", OPTIMISED, "checkpointing, fused loss")
    for name, (whole, half) in _IMPLEMENTATIONS.items():
        for model in TITLES:
            yield _attention(runs, model, name, whole, half, kernels.get((model, name), "no fused"))


def _half(runs: Runs, model: str, whole: str, half: str, how: str) -> Row:
    base = runs.kinds(model, BASELINE, *WEIGHTS)
    before, after = (runs.steady(model, name) - base for name in (whole, half))
    saved = 1 - after / before
    of_peak = 1 - runs.steady(model, half) / runs.steady(model, whole)
    told = f"the whole peak falls by {percent(of_peak)}, for the weights ({base / 1e6:,.0f} MB) stay"
    return judged(
        "half the sequence",
        f"2048 to 1024 tokens saves about half per sequence ({how})",
        TITLES[model],
        _HALF,
        _HALF.claimed,
        saved,
        percent(saved),
        (Side("beyond the weights at 2048", before), Side("at 1024", after)),
        {
            "true": f"what is kept is proportional to the tokens; {told}.",
            "partly": f"most of what is kept is proportional to the tokens, the rest is not; {told}.",
        },
    )


def _attention(runs: Runs, model: str, name: str, whole: str, half: str, kernel: str) -> Row:
    before, after = (runs.kinds(model, case, _ATTENTION) for case in (whole, half))
    saved = 1 - after / before
    rest = {kind: count for kind, count in runs.attribution(model, whole).kinds.items() if kind not in _TOLD}
    largest = max(rest, key=lambda kind: rest[kind])
    share = before / runs.steady(model, whole)
    attention, layers = attention_layers(model)
    told = (
        f"attention is {percent(share)} of the peak ({attention} of {layers} layers have it), and the largest kind is "
        f"{KINDS[largest]} ({rest[largest] / 1e6:,.0f} MB)"
    )
    linear = f"the {kernel} kernel keeps inputs and output, which are linear in the tokens, and no scores; {told}"
    return judged(
        "attention",
        f"2048 to 1024 tokens saves 75 % of attention's memory ({name})",
        TITLES[model],
        _THREE_QUARTERS,
        _THREE_QUARTERS.claimed,
        saved,
        percent(saved),
        (Side("attention's activations at 2048", before), Side("at 1024", after)),
        {
            "true": f"scores are (heads, tokens, tokens) and kept for backward, quadratic in the tokens; {told}.",
            "partly": f"{linear}.",
            "false": f"{linear}.",
        },
    )
