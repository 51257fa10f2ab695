"""Memory against sequence length, every length run: `qlora-lowmem lengths --config RECIPE`.

    qlora-lowmem lengths --config bench/recipes/optimised.yaml bench/recipes/lean.yaml --card t4-16gb
    qlora-lowmem lengths --config bench/recipes/lean.yaml --lengths 1024 8192 65536 --table results/mine

Each length is a whole run on a virtual card with room for all of them, so that one that does not fit has its need too:
two optimizer steps of one or two micro-batches, every sample at full length. All runs are forks of one worker, so
imports are paid once.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from qlora_lowmem.commands.frame import add_json_argument, whole_number, write_json
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from qlora_lowmem.memory.profile import Peak
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.plan.questions import measure_lengths
from qlora_lowmem.plan.recipe_runs import recipe_server
from qlora_lowmem.recipe.io import add_override_arguments, load_recipe, overrides_from
from qlora_lowmem.results.kinds.lengths import lengths_table, write_lengths
from qlora_lowmem.results.subject import model_names
from qlora_lowmem.results.tables import gib, peak_fields, plain_row
from qlora_lowmem.run.preflight import recipe_card
from qlora_lowmem.targets import check_folder, write_each, writing

# Up to where a model of one billion parameters without lean no longer fits a 6 GB card.
DEFAULT_LENGTHS = (512, 1024, 2048, 4096, 8192)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, nargs="+", metavar="RECIPE", help="one recipe or more")
    parser.add_argument(
        "--lengths",
        type=whole_number(2),  # the loss predicts each next token
        nargs="+",
        metavar="N",
        help=f"tokens of a sample (default: {' '.join(map(str, DEFAULT_LENGTHS))})",
    )
    parser.add_argument("--table", metavar="DIR", help="write lengths.json, .md and .csv there, as in results/CARD")
    add_json_argument(parser)
    add_override_arguments(parser, synthetic=True)


def run(options: argparse.Namespace) -> int:
    """The command. Exit code 3 if a length that was asked for does not fit the card, or a recipe at none of the default
    lengths, which are meant to go past its end.
    """
    started = time.perf_counter()
    check_folder("--table", options.table)
    recipes = [load_recipe(path, overrides_from(options)) for path in options.config]
    card = recipe_card(recipes[0])
    for recipe in recipes:
        source_of(recipe)
    with recipe_server() as server:
        rows = measure_lengths(recipes, sorted(set(options.lengths or DEFAULT_LENGTHS)), card, server)
    seconds = time.perf_counter() - started
    print(lengths_table(rows), file=sys.stderr)
    usable = f"virtual {card.name}, {gib(card.usable_bytes)} GiB usable"
    print(f"{len(rows)} runs in {seconds:.1f} s ({usable})", file=sys.stderr)
    record, model = provenance_record(card.name, "virtual"), model_names(recipe.base.model for recipe in recipes)
    highest = peak_fields(Peak.highest(row.peak for row in rows))
    report = {"device": card.name, "provenance": "virtual", "usable_bytes": card.usable_bytes, "seconds": seconds}
    content = highest | report | {"cases": [plain_row(row) for row in rows]}

    def write_table() -> None:
        if options.table is not None:
            with writing("--table", options.table, "folder", instead=f"{lengths_table(rows)}\n"):
                write_lengths(Path(options.table), model, rows, card, seconds, record)

    write_each(write_table, partial(write_json, options.json, content))
    fitting = [row for row in rows if row.fits]
    fits = len(fitting) == len(rows) if options.lengths else {row.recipe for row in fitting} == {r.recipe for r in rows}
    return EXIT_OK if fits else EXIT_DOES_NOT_FIT
