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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import Command, add_json_argument, write_json
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK, QloraLowmemError, UsageError
from qlora_lowmem.plan.recipe_runs import recipe_card, recipe_server, roomy, shortened, submit_recipe
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe, replace_field
from qlora_lowmem.recipe.overrides import add_override_arguments, overrides_from
from qlora_lowmem.results.kinds.lengths import Length, lengths_table, write_lengths
from qlora_lowmem.results.tables import gib

# Up to where a model of one billion parameters without lean no longer fits a 6 GB card.
DEFAULT_LENGTHS = (512, 1024, 2048, 4096, 8192)


def measure_lengths(
    recipes: Sequence[Recipe], lengths: Sequence[int], card: virtual_gpu.Card, server: virtual_gpu.Server
) -> list[Length]:
    """Every recipe at every length, in that order.

    Raises:
        QloraLowmemError: a run fails.
    """
    room = roomy(card)
    submitted = []
    for recipe in recipes:
        short = shortened(recipe)
        for length in lengths:
            future = submit_recipe(server, replace_field(short, "max_seq_length", length), room)
            submitted.append((recipe.name, length, future))
    rows = []
    for name, length, future in tqdm(submitted, desc="lengths", unit="run"):
        run = future.result()
        if run.profile is None or run.out_of_memory is not None:
            reason = (run.failure or run.out_of_memory or "").strip().splitlines()[-1]
            raise QloraLowmemError(f"{name} at {length:,} tokens fails: {reason}")
        peaks = run.profile
        rows.append(
            Length(
                name,
                length,
                peaks.peak_device_bytes <= card.usable_bytes,
                peaks.peak_allocated_bytes,
                peaks.peak_reserved_bytes,
                peaks.peak_device_bytes,
                run.floor_bytes,
            )
        )
    return rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--config", required=True, nargs="+", metavar="RECIPE", help="one recipe or more")
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="N",
        help=f"tokens of a sample (default: {' '.join(map(str, DEFAULT_LENGTHS))})",
    )
    parser.add_argument("--table", metavar="DIR", help="write lengths.json, .md and .csv there, as in results/CARD")
    add_json_argument(parser)
    add_override_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """The command. Exit code 3 if a length that was asked for does not fit the card, or a recipe at none of the default
    lengths, which are meant to go past its end.
    """
    started = time.perf_counter()
    for length in options.lengths or ():
        if length < 2:
            raise UsageError(f"--lengths: {length} is too short; the loss predicts each next token, so give 2 or more")
    recipes = [load_recipe(path, overrides_from(options)) for path in options.config]
    card = recipe_card(recipes[0])
    with recipe_server() as server:
        rows = measure_lengths(recipes, sorted(set(options.lengths or DEFAULT_LENGTHS)), card, server)
    seconds = time.perf_counter() - started
    print(lengths_table(rows), file=sys.stderr)
    print(
        f"{len(rows)} runs in {seconds:.1f} s (virtual {card.name}, {gib(card.usable_bytes)} GiB usable)",
        file=sys.stderr,
    )
    if options.table:
        write_lengths(Path(options.table), rows, card, seconds, provenance_record(card.name, "virtual"))
    peaks = {
        key: max(getattr(row, key) for row in rows)
        for key in ("peak_allocated_bytes", "peak_reserved_bytes", "peak_device_bytes")
    }
    report = {"device": card.name, "provenance": "virtual", "usable_bytes": card.usable_bytes, "seconds": seconds}
    write_json(options.json, peaks | report | {"cases": [asdict(row) for row in rows]})
    return EXIT_OK if _fits(rows, asked=options.lengths is not None) else EXIT_DOES_NOT_FIT


def _fits(rows: Sequence[Length], asked: bool) -> bool:
    """Whether every length fits that was asked for; else, whether every recipe fits at some length."""
    if asked:
        return all(row.fits for row in rows)
    return {row.recipe for row in rows if row.fits} == {row.recipe for row in rows}


COMMAND = Command("lengths", __doc__, add_arguments, run)
main, parser = COMMAND.main, COMMAND.parser
