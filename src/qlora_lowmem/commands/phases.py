"""The peak of every phase of a run's life on a card: a card that trains must also load, evaluate, save and merge.

    qlora-lowmem phases --config bench/recipes/optimised.yaml bench/recipes/lean.yaml
    qlora-lowmem phases --config bench/recipes/lean.yaml --card rtx-2060-6gb --json phases.json

Runs on a virtual card, from a checkpoint of the recipe's architecture at full size: load it, try the longest batch,
train two steps, evaluate and save after each, go on from the first checkpoint in a fresh process, merge the adapter
into the 16-bit weights in another. `qlora_lowmem.report.page` shows what `--json` writes.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import Command, add_json_argument, write_json
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK, QloraLowmemError
from qlora_lowmem.memory.profile import PHASES, MemoryProfile, Peak
from qlora_lowmem.models.sources import resolve_model
from qlora_lowmem.plan.recipe_runs import recipe_card, recipe_server
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, recipe_from_dict, replace_fields
from qlora_lowmem.recipe.overrides import add_override_arguments, overrides_from
from qlora_lowmem.results.kinds.phases import PhaseBytes, phase_bytes, phases_content
from qlora_lowmem.results.tables import floor_lines, phase_table
from qlora_lowmem.units import format_bytes

PARTS = ("train", "resume", "merge")
_EVAL_FRACTION = 0.2


@dataclass(frozen=True)
class Life:
    """A recipe's whole life on a card.

    Attributes:
        profile: the highest readings of each phase over all processes.
        out_of_memory: the phases in which memory ran out, with torch's message.
        floor_bytes: what no method of training the recipe avoids; 0 if training did not end.
    """

    recipe: Recipe
    profile: MemoryProfile
    out_of_memory: dict[str, str]
    floor_bytes: int

    def fits(self, card: virtual_gpu.Card) -> bool:
        """Whether every phase stays within what a job can count on there."""
        return not self.out_of_memory and self.profile.peak_device_bytes <= card.usable_bytes

    def phases(self, device_budget: int, allocated_budgets: Mapping[str, int] | None = None) -> tuple[PhaseBytes, ...]:
        """Its phases beside their budgets in bytes, as `report.phases.phase_bytes` says."""
        return phase_bytes(self.profile.phases, device_budget, allocated_budgets, self.out_of_memory, self.floor_bytes)


def live(recipe: Recipe, card: virtual_gpu.Card, server: virtual_gpu.Server) -> Life:
    """Run every phase of `recipe` on `card`, each process a fork of its own.

    Raises:
        QloraLowmemError: a part failed for another reason than memory.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for part in PARTS:
            arguments = {"content": recipe.to_dict(), "folder": folder, "part": part}
            job: Future[virtual_gpu.JobResult] = server.submit(
                "qlora_lowmem.commands.phases:live_here", arguments, card
            )
            done = job.result()
            if done.value is None:
                raise QloraLowmemError(
                    f"{recipe.name}: the part {part!r} failed: {done.error}\n{done.output_tail[-2000:]}"
                )
            results.append(done.value)
            if "out_of_memory" in done.value:
                break  # what would come next needs what this part did not leave
    profiles = [MemoryProfile.from_dict(result["profile"]) for result in results]
    ran_out = {result["phase"]: result["out_of_memory"] for result in results if "out_of_memory" in result}
    return Life(recipe, _joined(profiles), ran_out, results[0].get("floor_bytes", 0))


def _joined(profiles: Sequence[MemoryProfile]) -> MemoryProfile:
    there = [name for name in PHASES if any(name in profile.phases for profile in profiles)]
    found = {name: Peak.highest(p.phases[name] for p in profiles if name in p.phases) for name in there}
    first = profiles[0]
    outside = max(profile.outside_allocator_bytes for profile in profiles)
    return MemoryProfile(first.device, first.provenance, first.total_bytes, outside, found)


def live_here(content: dict[str, Any], folder: str, part: str) -> dict[str, Any]:
    """In the worker: one part of a life, with what the parts before it left in `folder`."""
    from qlora_lowmem.run.execute import OutOfGpuMemoryError, execute
    from qlora_lowmem.run.merge import merge_run

    run = Path(folder) / "run"
    recipe = _lived(recipe_from_dict(content), Path(folder) / "model")
    try:
        if part == "merge":
            profile, floor = merge_run(recipe, run, Path(folder) / "merged", "bf16", "cuda"), {}
        else:
            resume_from = run / "checkpoint-1" if part == "resume" else None
            outcome = execute(recipe, output_dir=run, resume_from=resume_from, warm_up=part == "train")
            profile, floor = outcome.profile, {"floor_bytes": outcome.floor.total}
    except OutOfGpuMemoryError as error:
        return {"profile": error.profile.to_dict(), "phase": error.phase, "out_of_memory": error.torch_message}
    assert profile is not None
    return {"profile": profile.to_dict()} | floor


def _lived(recipe: Recipe, model: Path) -> Recipe:
    """`recipe` from a full-size checkpoint in the folder `model`, over two steps with all that comes between."""
    from qlora_lowmem.models.random_weights import write_zero_checkpoint

    if not model.is_dir():
        architecture = resolve_model(recipe.base.model, "random", recipe.base.revision).architecture
        assert architecture is not None
        write_zero_checkpoint(architecture, model)
    changes: dict[str, Any] = {"weights": "pretrained", "model": str(model), "revision": None, "data": "synthetic"}
    changes |= {"max_steps": 2, "warmup_steps": 0, "eval_fraction": _EVAL_FRACTION, "eval_steps": 1}
    changes |= {"save_steps": 1, "save_total_limit": 2, "device": "virtual"}
    return replace_fields(recipe, changes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own flags, then one for each field of the recipe."""
    parser.add_argument("--config", required=True, nargs="+", metavar="RECIPE", help="recipes, YAML files")
    add_json_argument(parser)
    add_override_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """The command. Returns the exit code, as `qlora_lowmem.train` does."""
    recipes = [load_recipe(path, {"device": "virtual"} | overrides_from(options)) for path in options.config]
    cards = [recipe_card(recipe) for recipe in recipes]
    for recipe in recipes:
        resolve_model(recipe.base.model, "random", recipe.base.revision)
    with recipe_server(max_workers=1) as server:
        asked = list(zip(recipes, cards, strict=True))
        lives = [live(recipe, card, server) for recipe, card in tqdm(asked, desc="phases", unit="recipe")]
    for found, card in zip(lives, cards, strict=True):
        print(f"\n{found.recipe.name}", file=sys.stderr)
        print(phase_table(found.profile), file=sys.stderr)
        if found.floor_bytes:
            print(*floor_lines(found.profile.peak_allocated_bytes, found.floor_bytes), sep="\n", file=sys.stderr)
        for phase, message in found.out_of_memory.items():
            print(f"out of memory in phase {phase!r}: {message}", file=sys.stderr)
        verdict = "every phase fits" if found.fits(card) else "does not fit"
        print(f"{verdict}: {card.name} has {format_bytes(card.usable_bytes)} usable", file=sys.stderr)
    named = zip(_names(lives), lives, cards, strict=True)
    phases = {name: found.phases(card.usable_bytes) for name, found, card in named}
    devices = ", ".join(dict.fromkeys(card.name for card in cards))
    write_json(options.json, phases_content(phases, provenance_record(devices, "virtual")))
    return EXIT_OK if all(map(Life.fits, lives, cards)) else EXIT_DOES_NOT_FIT


def _names(lives: Sequence[Life]) -> list[str]:
    """The recipes' names; those that are there several times with their place in the command."""
    names = [life.recipe.name for life in lives]
    return [f"{name} ({place})" if names.count(name) > 1 else name for place, name in enumerate(names, start=1)]


COMMAND = Command("phases", __doc__, add_arguments, run)
main, parser = COMMAND.main, COMMAND.parser
