"""What a run says of itself: for machines, for people, and in the README.md beside its adapter."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_lowmem.data import CheckedData
from qlora_lowmem.environment import provenance_record, versions
from qlora_lowmem.files import replace_text
from qlora_lowmem.memory.profile import MemoryProfile
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.results.tables import floor_lines, phase_table
from qlora_lowmem.run.preflight import Inputs
from qlora_lowmem.units import format_bytes

if TYPE_CHECKING:
    from qlora_lowmem.lean import LeanReport
    from qlora_lowmem.run.execute import Outcome
    from qlora_lowmem.tokens.store import TokenReport


def data_lines(
    recipe: Recipe, samples: CheckedData, tokens: "TokenReport", notes: Sequence[str], of: str = "data"
) -> Iterator[str]:
    """What is trained or evaluated on, what was found in the data, and what is cut of them."""
    yield f"{of}: {samples.report.line}"
    yield from (f"note: {note}" for note in samples.report.notes)
    yield from tokens.lines(recipe.batch.max_seq_length, samples.report.unit)
    yield from (f"note: {note}" for note in notes)


def data_summary(samples: CheckedData, tokens: "TokenReport") -> dict[str, Any]:
    """The same for machines."""
    return asdict(samples.report) | {"tokens": asdict(tokens)}


def summary_of(recipe: Recipe, profile: MemoryProfile | None, outcome: "Outcome | None" = None) -> dict[str, Any]:
    """What `--json` writes of a run; without an outcome, what is known of one that ran out of memory."""
    peaks: dict[str, Any] = {"device": "cpu", "provenance": "measured"}
    peaks |= dict.fromkeys(("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes"), 0)
    peaks = profile.to_dict() if profile is not None else peaks
    content = peaks | {"fits": True, "recipe": recipe.to_dict(), "recipe_hash": recipe_hash(recipe)}
    content["environment"] = provenance_record(peaks["device"], peaks["provenance"])
    if outcome is not None:
        content["trainable_parameters"] = outcome.trainable_parameters
        content["adapted_modules"] = outcome.adapted_modules
        if outcome.trained_of_the_base:
            content["trained_of_the_base"] = list(outcome.trained_of_the_base)
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


def write_model_card(folder: Path, inputs: Inputs, outcome: "Outcome", device: str) -> None:
    """Write `folder/README.md` in the hub's model card format, whole or not at all (`UsageError`)."""
    record = provenance_record(device, "measured")
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    if outcome.profile is None:
        memory = "Trained on a CPU: no GPU memory was used."
    else:
        peaks = outcome.profile
        memory = (
            f"Peak, {peaks.provenance} on {peaks.device}: {format_bytes(peaks.peak.allocated)} allocated, "
            f"{format_bytes(peaks.peak.reserved)} reserved, {format_bytes(peaks.peak.device)} on the card "
            "with the CUDA context."
        )
    recipe, base = inputs.recipe, inputs.source.hub_id or inputs.source.name
    loss = " at first, at last ".join(losses_in_words(outcome)) or "not logged"
    evaluation = f"{outcome.evaluations[-1][1]:.4f}" if outcome.evaluations else "no samples were held out"
    text = f"""---
base_model: {base}
library_name: peft
tags: [lora, qlora, qlora_lowmem]
---

# {recipe.name}

A LoRA adapter of `{recipe.base.model}`, made with qlora_lowmem.

- Trained parameters: {outcome.trainable_parameters:,} in {outcome.adapted_modules} modules{_of_the_base(outcome)}
- Steps: {outcome.steps}, tokens: {outcome.tokens:,}
- Training loss: {loss}
- Loss on held-out samples: {evaluation}
- Memory: {memory}
{_lean_lines(outcome.lean)}- Recipe hash: `{recipe_hash(recipe)}`
- Made by: `{record["command"]}` at commit `{record["commit"]}` on {record["date"]}, {device}
- Versions: {packages}

```python
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{folder.name}")
```

## Recipe

```yaml
{recipe.to_yaml()}```
"""
    replace_text(folder / "README.md", text, "the model card")


def _of_the_base(outcome: "Outcome") -> str:
    """What of the base model was trained too; nothing where that is nothing."""
    return f" with adapters, and {', '.join(outcome.trained_of_the_base)}" if outcome.trained_of_the_base else ""


def _lean_lines(report: "LeanReport | None") -> str:
    """Which lean implementations the run had, a list item each; nothing where they were not asked for."""
    if report is None:
        return ""
    ideas = (f"  - {idea.name}: {'' if idea.applied else 'left out, '}{idea.detail}\n" for idea in report.ideas)
    return f"- Lean implementations:\n{''.join(ideas)}"
