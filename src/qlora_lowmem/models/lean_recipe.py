"""The recipe's section `lean` as the lean implementations take it, and what they say in the recipe's words."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from qlora_lowmem.errors import UsageError
from qlora_lowmem.lean import LeanOptions, LeanReport, RefusedOptionError
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.checks import allowed, field_specs

EMBEDDING_BITS: dict[str, Literal[8, 4] | None] = {"none": None, "8bit": 8, "4bit": 4}
_WAY_OUT = {"scan": "auto", "quantised_embeddings": "none", "lean": "false"}


def lean_options(recipe: Recipe) -> LeanOptions:
    """The section `lean` as options."""
    return LeanOptions(
        tile_length=recipe.lean.tile_length,
        scan_chunk_length=recipe.lean.scan_chunk_length,
        scan=recipe.lean.scan,
        checkpointing=recipe.lean.checkpoints,
        loss_tile_bytes=recipe.lean.loss_tile_bytes,
        dequantised_tile_bytes=recipe.lean.dequantised_tile_bytes,
        quantised_embeddings=EMBEDDING_BITS[recipe.lean.quantised_embeddings],
    )


@contextmanager
def lean_refusals(recipe: Recipe) -> Iterator[None]:
    """Around what applies an idea.

    Raises:
        UsageError: the model or its device refuses an option; names the recipe's field.
    """
    try:
        yield
    except RefusedOptionError as error:
        spec = field_specs()[error.option]
        value = getattr(recipe.lean, error.option)
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        raise UsageError(
            f"{spec.path}: {shown}, and {recipe.base.model!r} cannot: {error.reason}. Allowed here is "
            f"{allowed(spec)}; set {spec.path} to {_WAY_OUT[error.option]} ({spec.flag} {_WAY_OUT[error.option]})"
        ) from error


def what_is_left_out(report: LeanReport) -> list[str]:
    """A line for each reason why ideas were not applied: a model that takes few of them should not seem to take all."""
    by_reason: dict[str, list[str]] = {}
    for idea in report.not_applied:
        by_reason.setdefault(idea.detail, []).append(idea.name)
    return [f"lean leaves out {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
