"""The peak of every phase of a run's life on a card: a card that trains must also load, evaluate, save and merge.

    qlora-lowmem phases --config bench/recipes/optimised.yaml bench/recipes/lean.yaml
    qlora-lowmem phases --config bench/recipes/lean.yaml --card rtx-2060-6gb --json phases.json

Runs on a virtual card, from a checkpoint of the recipe's architecture at full size: load it, try the longest batch,
train two steps, evaluate and save after each, go on from the first checkpoint in a fresh process, merge the adapter
into the 16-bit weights in another. `qlora_lowmem.report.page` shows what `--json` writes.
"""

import argparse
import sys
from collections.abc import Sequence

from tqdm.auto import tqdm

from qlora_lowmem.commands.frame import add_json_argument, write_json
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.plan.questions import Life, live
from qlora_lowmem.plan.recipe_runs import recipe_server
from qlora_lowmem.recipe.io import add_override_arguments, load_recipe, overrides_from
from qlora_lowmem.results.kinds.phases import phases_content
from qlora_lowmem.results.subject import model_names
from qlora_lowmem.results.tables import floor_lines, phase_table
from qlora_lowmem.run.preflight import recipe_card
from qlora_lowmem.units import format_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, nargs="+", metavar="RECIPE", help="recipes, YAML files")
    add_json_argument(parser)
    add_override_arguments(parser, synthetic=True)


def run(options: argparse.Namespace) -> int:
    recipes = [load_recipe(path, {"device": "virtual"} | overrides_from(options)) for path in options.config]
    cards = [recipe_card(recipe) for recipe in recipes]
    for recipe in recipes:
        source_of(recipe, weights="random")
    with recipe_server(max_workers=1) as server:
        asked = list(zip(recipes, cards, strict=True))
        lives = [live(recipe, card, server) for recipe, card in tqdm(asked, desc="phases", unit="recipe")]
    for found, card in zip(lives, cards, strict=True):
        print(f"\n{found.recipe.name}", file=sys.stderr)
        print(phase_table(found.profile), file=sys.stderr)
        if found.floor_bytes:
            print(*floor_lines(found.profile.peak.allocated, found.floor_bytes), sep="\n", file=sys.stderr)
        for phase, message in found.out_of_memory.items():
            print(f"out of memory in phase {phase!r}: {message}", file=sys.stderr)
        verdict = "every phase fits" if found.fits(card) else "does not fit"
        print(f"{verdict}: {card.name} has {format_bytes(card.usable_bytes)} usable", file=sys.stderr)
    named = zip(_names(lives), lives, cards, strict=True)
    phases = {name: found.phases(card.usable_bytes) for name, found, card in named}
    devices = ", ".join(dict.fromkeys(card.name for card in cards))
    model = model_names(recipe.base.model for recipe in recipes)
    write_json(options.json, phases_content(model, phases, provenance_record(devices, "virtual")))
    return EXIT_OK if all(map(Life.fits, lives, cards)) else EXIT_DOES_NOT_FIT


def _names(lives: Sequence[Life]) -> list[str]:
    """The recipes' names; those that are there several times with their place in the command."""
    names = [life.recipe.name for life in lives]
    return [f"{name} ({place})" if names.count(name) > 1 else name for place, name in enumerate(names, start=1)]
