"""The record of a recipe's run, for its baseline."""

from qlora_lowmem.environment import versions
from qlora_lowmem.gate.environment_key import key_of
from qlora_lowmem.gate.records import record_of
from qlora_lowmem.memory.attribution import Attribution
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.results.kinds.matrix import CaseResult
from qlora_lowmem.results.kinds.verdicts import Record


def recipe_record(result: CaseResult, attribution: Attribution | None = None) -> Record:
    """The record of a run that has a profile.

    Raises:
        ValueError: it has none.
    """
    if result.profile is None:
        raise ValueError(f"{result.recipe.name} has no peaks to record: {result.failure or result.out_of_memory}")
    found = versions()
    key = key_of(result.card, result.provenance, allocator_of(result.recipe), result.recipe_hash, found)
    return record_of(key, result.profile, attribution, found)


def allocator_of(recipe: Recipe) -> str:
    """The allocator's options that a recipe pins (`job.set_allocator`)."""
    return f"expandable_segments:{recipe.memory.expandable_segments}"
