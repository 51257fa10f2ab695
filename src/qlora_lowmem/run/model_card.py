"""The README.md beside a saved adapter: what it is, the recipe that made it, and what it cost in memory."""

from pathlib import Path

from qlora_lowmem.environment import provenance_record
from qlora_lowmem.files import replace_text
from qlora_lowmem.lean import LeanReport
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.run.execute import Outcome
from qlora_lowmem.run.summary import losses_in_words
from qlora_lowmem.units import format_bytes


def write_model_card(folder: Path, recipe: Recipe, outcome: Outcome, device: str) -> None:
    """Write `folder/README.md` in the hub's model card format, whole or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    record = provenance_record(device, "measured")
    packages = ", ".join(f"{name} {version}" for name, version in dict(record["versions"]).items())  # type: ignore[call-overload]
    if outcome.profile is None:
        memory = "Trained on a CPU: no GPU memory was used."
    else:
        peaks = outcome.profile
        memory = (
            f"Peak, {peaks.provenance} on {peaks.device}: {format_bytes(peaks.peak.allocated)} allocated, "
            f"{format_bytes(peaks.peak.reserved)} reserved, {format_bytes(peaks.peak.device)} on the card "
            "with the CUDA context."
        )
    source = source_of(recipe)
    base = source.hub_id or source.name
    loss = " at first, at last ".join(losses_in_words(outcome)) or "not logged"
    evaluation = f"{outcome.evaluations[-1][1]:.4f}" if outcome.evaluations else "no samples were held out"
    text = f"""---
base_model: {base}
library_name: peft
tags: [lora, qlora, qlora_lowmem]
---

# {recipe.name}

A LoRA adapter of `{recipe.base.model}`, made with qlora_lowmem.

- Trained parameters: {outcome.trainable_parameters:,} in {outcome.adapted_modules} modules
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


def _lean_lines(report: LeanReport | None) -> str:
    """Which lean implementations the run had, a list item each; nothing where they were not asked for."""
    if report is None:
        return ""
    ideas = (f"  - {idea.name}: {'' if idea.applied else 'left out, '}{idea.detail}\n" for idea in report.ideas)
    return f"- Lean implementations:\n{''.join(ideas)}"
