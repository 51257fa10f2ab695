"""What the tests run on a virtual card, each in a fork of a worker."""

from pathlib import Path
from typing import Any


def train(content: dict[str, Any], warm_up: bool = False, resume: bool = False) -> dict[str, Any]:
    """Train with checkpoints; the peaks by phase, and how it ended if memory ran out."""
    from qlora_lowmem.recipe.io import recipe_from_dict
    from qlora_lowmem.run.execute import execute
    from qlora_lowmem.run.out_of_memory import OutOfGpuMemoryError
    from qlora_lowmem.run.preflight import inputs_of
    from qlora_lowmem.run_folder.checkpoints import newest_complete

    recipe = recipe_from_dict(content)
    output_dir = Path(recipe.run.output_dir)
    resume_from = newest_complete(output_dir).checkpoint if resume else None
    try:
        outcome = execute(inputs_of(recipe), output_dir=output_dir, resume_from=resume_from, warm_up=warm_up)
    except OutOfGpuMemoryError as error:
        return {"phase": error.phase, "checkpoint": error.checkpoint and error.checkpoint.name}
    assert outcome.profile is not None
    return {"steps": outcome.steps, "phases": {name: peak.allocated for name, peak in outcome.profile.phases.items()}}
