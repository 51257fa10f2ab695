"""Where every byte of a recipe's peak is: by kind, by line of code, over a step.

    qlora-lowmem explain --config bench/recipes/optimised.yaml --svg peak.svg
    qlora-lowmem explain --config bench/recipes/optimised.yaml --device cuda --snapshot peak.pickle

Runs the recipe's steps with synthetic samples on a virtual card, or on the GPU with --device cuda, and keeps no
adapter. A recipe that the virtual card cannot hold is explained on one of its kind with room for it.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import add_json_argument, write_json
from qlora_lowmem.environment import provenance_record, words_of
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK, UsageError
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.plan.recipe_runs import roomy
from qlora_lowmem.recipe import SYNTHETIC, Recipe, recipe_hash
from qlora_lowmem.recipe.io import add_override_arguments, load_recipe, overrides_from, replace_field, words_for_another
from qlora_lowmem.run.preflight import recipe_card
from qlora_lowmem.scratch import scratch_folder
from qlora_lowmem.signals import importing
from qlora_lowmem.targets import check_file, write, write_each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="RECIPE", help="the recipe, a YAML file (bench/recipes/)")
    add_json_argument(parser)
    parser.add_argument("--markdown", metavar="FILE", help="write the tables as a Markdown page")
    parser.add_argument("--svg", metavar="FILE", help="draw the peak by kind and the step over time")
    parser.add_argument("--png", metavar="FILE", help="the same picture as PNG")
    parser.add_argument("--snapshot", metavar="FILE", help="write what https://pytorch.org/memory_viz opens")
    add_override_arguments(parser, synthetic=True)


def run(options: argparse.Namespace) -> int:
    """Returns the exit code; 3 if the card is too small, and one of its kind with room for everything too."""
    recipe = load_recipe(options.config, {"device": "virtual"} | overrides_from(options))
    if recipe.run.device == "cpu":
        raise UsageError("run.device: 'cpu' has no GPU memory to explain; use --device virtual or --device cuda")
    recipe = replace_field(recipe, "data", SYNTHETIC)
    source_of(recipe)
    for flag in ("markdown", "svg", "png", "snapshot"):
        check_file(f"--{flag}", getattr(options, flag))
    if recipe.run.device == "virtual" and virtual_gpu.current_card() is None:
        return _on_virtual_card(recipe, [*options.words, *words_for_another(options.config, recipe)])
    return _explain(recipe, options)


def _on_virtual_card(recipe: Recipe, arguments: list[str]) -> int:
    """Start this command again as a process on the virtual card; if that is too small, on one of its kind with more."""
    card = recipe_card(recipe)
    command = [*words_of("explain"), *arguments]
    env = os.environ | {"QLORA_LOWMEM_QUIET": "1"}
    code = virtual_gpu.run(command, card, env=env).exit_code
    if code == EXIT_DOES_NOT_FIT and _can_grow(card):
        print("so it is explained on a card of the same kind with room for it", file=sys.stderr)
        code = virtual_gpu.run(command, roomy(card), env=env).exit_code
    return code


def _can_grow(card: virtual_gpu.Card | None) -> bool:
    return card is not None and card.total_bytes < roomy(card).total_bytes


def _explain(recipe: Recipe, options: argparse.Namespace) -> int:
    with importing():
        from qlora_lowmem.memory.attribution_recorder import AttributionRecorder
        from qlora_lowmem.results.kinds import attribution as report
        from qlora_lowmem.run.execute import execute
        from qlora_lowmem.run.out_of_memory import OutOfGpuMemoryError
        from qlora_lowmem.run.preflight import inputs_of
        from qlora_lowmem.training.progress import quiet_libraries

    quiet_libraries()
    recorder = AttributionRecorder()  # synthetic samples are all of full length
    with scratch_folder() as folder:
        try:
            outcome = execute(inputs_of(recipe), output_dir=folder, save=False, attribution=recorder)
        except OutOfGpuMemoryError as error:
            if not _can_grow(virtual_gpu.current_card()):
                raise
            print(f"{error.profile.device} cannot hold it: out of memory in phase {error.phase!r}", file=sys.stderr)
            return EXIT_DOES_NOT_FIT
    found = outcome.attribution
    assert found is not None  # every recipe has at least one step
    name = recipe.name or Path(options.config).stem
    launches = outcome.profile.launches.get(found.phase) if outcome.profile is not None else None
    page = report.markdown(found, name, outcome.floor.total, launches)
    if options.json != "-":
        print(page)
    record = provenance_record(found.device, found.provenance)
    content: dict[str, Any] = {"recipe": recipe.to_dict(), "recipe_hash": recipe_hash(recipe), "environment": record}
    content |= report.attribution_content(found, outcome.floor.total, launches)
    made: dict[str, Callable[[], bytes]] = {"markdown": page.encode, "snapshot": recorder.snapshot}
    made |= {kind: partial(report.picture_as, kind, found, recipe) for kind in ("svg", "png")}
    asked = [(f"--{flag}", target, make) for flag, make in made.items() if (target := getattr(options, flag))]
    write_each(partial(write_json, options.json, content), *(partial(_write_made, *each) for each in asked))
    return EXIT_OK


def _write_made(flag: str, target: str, make: Callable[[], bytes]) -> None:
    write(flag, target, make())
