"""What a run says of itself: its summary for machines, and its last lines for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qlora_lowmem.environment import provenance_record
from qlora_lowmem.recipe import Recipe, recipe_hash

if TYPE_CHECKING:
    from qlora_lowmem.run.execute import Outcome


def summary_of(recipe: Recipe, outcome: "Outcome | None") -> dict[str, Any]:
    """What `--json` writes of a run; without an outcome, what is known of one that ran out of memory."""
    profile = outcome.profile if outcome else None
    if profile is None:
        peaks: dict[str, Any] = dict.fromkeys(
            ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes"), 0
        ) | {"device": "cpu", "provenance": "measured"}
    else:
        peaks = profile.to_dict()
    content = peaks | {"fits": True, "recipe": recipe.to_dict(), "recipe_hash": recipe_hash(recipe)}
    content["environment"] = provenance_record(peaks["device"], peaks["provenance"])
    if outcome is not None:
        content["trainable_parameters"] = outcome.trainable_parameters
        content["adapted_modules"] = outcome.adapted_modules
        content["steps"] = outcome.steps
        content["floor_bytes"] = outcome.floor.total
        if outcome.lean is not None:
            content["lean"] = outcome.lean.to_dict()
        if len(outcome.profiles) > 1:
            content["ranks"] = [profile.to_dict() for profile in outcome.profiles]
        # A virtual GPU computes nothing: a loss of it would be a made-up figure.
        if peaks["provenance"] == "measured" and outcome.losses:
            content |= {"losses": list(outcome.losses), "loss_steps": list(outcome.loss_steps)}
            content["evaluations"] = [{"step": step, "loss": loss} for step, loss in outcome.evaluations]
            content |= {"first_loss": outcome.losses[0], "final_loss": outcome.losses[-1]}
            content |= {"tokens": outcome.tokens, "tokens_per_second": round(outcome.new_tokens / outcome.seconds, 1)}
    return content


def last_lines(outcome: "Outcome", summary: dict[str, Any]) -> Iterator[str]:
    """What a run came to, for people: memory, losses, and where the adapter is."""
    from qlora_lowmem.results.tables import floor_lines, phase_table

    if outcome.profile is not None:
        yield phase_table(outcome.profile)
        yield from floor_lines(outcome.profile.peak.allocated, outcome.floor.total)
    if "final_loss" in summary:
        yield f"loss {' -> '.join(losses_in_words(outcome))} in {outcome.steps} steps"
        if summary["evaluations"]:
            yield f"loss on the samples held out: {summary['evaluations'][-1]['loss']:.4f}"
    if "adapter" in summary:
        yield f"adapter saved to {summary['adapter']}"


def losses_in_words(outcome: "Outcome") -> list[str]:
    """The first logged loss and the last, which of several steps is the mean: `2.3107 (mean of steps 1 to 3)`."""
    words = []
    for place in sorted({0, len(outcome.losses) - 1}):
        first = outcome.loss_steps[place - 1] + 1 if place else 1
        last = outcome.loss_steps[place]
        words.append(f"{outcome.losses[place]:.4f}" + (f" (mean of steps {first} to {last})" if first < last else ""))
    return words
