"""The longest sequence that trains on a card, found by running: `qlora-lowmem longest --config RECIPE`.

    qlora-lowmem longest --config bench/recipes/optimised.yaml bench/recipes/lean.yaml --card t4-16gb

Each probe is a whole run on a virtual card: two optimizer steps of the recipe's micro-batches, two at most, every
sample at full length. A step of more micro-batches takes as much, and a few bytes a token for the batches that wait.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from qlora_lowmem.commands.frame import add_json_argument, whole_number, write_json
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from qlora_lowmem.memory.profile import Peak
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.plan.maximum import longest
from qlora_lowmem.plan.recipe_runs import recipe_server
from qlora_lowmem.recipe.io import add_override_arguments, load_recipe, overrides_from
from qlora_lowmem.results.kinds.longest import write_longest
from qlora_lowmem.results.subject import model_names
from qlora_lowmem.results.tables import gib, peak_fields, plain_row
from qlora_lowmem.run.preflight import recipe_card
from qlora_lowmem.targets import check_folder, write_each, writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, nargs="+", metavar="RECIPE", help="one recipe or more")
    parser.add_argument(
        "--limit", type=whole_number(1), default=131072, metavar="N", help="look no further (default: 131072)"
    )
    parser.add_argument(
        "--step", type=whole_number(1), default=1024, metavar="N", help="precision in tokens (default: 1024)"
    )
    parser.add_argument("--table", metavar="DIR", help="write longest.json, .md and .csv there, as in results/CARD")
    add_json_argument(parser)
    add_override_arguments(parser, synthetic=True)


def run(options: argparse.Namespace) -> int:
    """The command. Exit code 3 if a recipe does not fit at any length."""
    check_folder("--table", options.table)
    changes = overrides_from(options)
    recipes = [load_recipe(path, changes) for path in options.config]
    card = recipe_card(recipes[0])
    for recipe in recipes:
        source_of(recipe)
    with recipe_server() as server:
        rows = [longest(recipe, card, server, limit=options.limit, step=options.step) for recipe in recipes]
    record = provenance_record(card.name, "virtual")
    lines = []
    for row in rows:
        further = f"{row.next_tokens:,} do not fit" if row.next_tokens else "no longer one was tried"
        lines.append(
            f"{row.recipe}: {row.tokens:,} tokens on {row.card} (virtual); {further}; "
            f"{gib(row.peak.device)} GiB on the card, {gib(row.host_bytes)} GiB of host memory pinned\n"
        )
    print(*lines, sep="", end="", file=sys.stderr)
    highest = peak_fields(Peak.highest(row.peak for row in rows))
    cases = [plain_row(row) for row in rows]
    content = highest | {"device": card.name, "provenance": "virtual", "cases": cases}

    def write_table() -> None:
        if options.table is not None:
            with writing("--table", options.table, "folder", instead="".join(lines)):
                write_longest(Path(options.table), model_names(r.base.model for r in recipes), rows, record, changes)

    write_each(write_table, partial(write_json, options.json, content))
    return EXIT_OK if all(row.tokens for row in rows) else EXIT_DOES_NOT_FIT
