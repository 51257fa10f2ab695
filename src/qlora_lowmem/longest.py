"""The longest sequence that trains on a card, found by running: `python -m qlora_lowmem.longest --config RECIPE`.

    python -m qlora_lowmem.longest --config bench/recipes/optimised.yaml bench/recipes/lean.yaml --card t4-16gb

Each probe is a whole run on a virtual card: two optimizer steps of the recipe's micro-batches, two at most, every
sample at full length. A step of more micro-batches takes as much, and a few bytes a token for the batches that wait.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.command import add_json_argument, run_command, write_json
from qlora_lowmem.environment import provenance_record
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK, QloraLowmemError, UsageError
from qlora_lowmem.overrides import RecipeArgumentParser, add_override_arguments, overrides_from
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe_io import load_recipe, replace_field
from qlora_lowmem.report.tables import gib, markdown_table, provenance_lines, write_result
from qlora_lowmem.virtual_runs import RecipeRun, recipe_card, recipe_server, submit_recipe


@dataclass(frozen=True)
class Longest:
    """The longest sequence of a recipe on a card, in tokens, and its peaks in bytes. 0 tokens: not even the shortest.

    Attributes:
        limited_by: `memory`, or `limit` where the longest length asked for fits.
        next_tokens: the shortest length that was seen not to fit; 0 where none was.
        host_bytes: page-locked host memory at the longest length.
    """

    recipe: str
    card: str
    tokens: int
    next_tokens: int
    limited_by: str
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    peak_device_bytes: int
    host_bytes: int


def longest_sequence(
    probe: Callable[[int], "Future[RecipeRun]"],
    room: Callable[[RecipeRun], int],
    *,
    start: int,
    limit: int,
    step: int,
    note: Callable[[int, bool], None],
) -> tuple[int, int, RecipeRun | None]:
    """The largest multiple of `step` up to `limit` at which `probe` leaves room, taking need to grow with the length.

    Need is nearly a line in the length, so two lengths that fit say where it will run out: the multiple below and the
    one above are run next, side by side. Where a line says nothing new, the open interval is halved.

    Args:
        room: bytes that a run left; negative if it did not fit.
        start: the length to begin with.

    Returns:
        (the longest that fits or 0, the shortest seen not to fit or 0, the run at the longest).
    """
    left: dict[int, int] = {}
    good, bad, best = 0, limit // step * step + step, None
    tries = [min(max(start // step, 1) * step, bad - step)]
    while tries:
        runs = {length: probe(length) for length in tries}
        for length in tries:
            run = runs[length].result()
            left[length] = room(run)
            note(length, left[length] >= 0)
            if left[length] < 0:
                bad = min(bad, length)
            elif good < length < bad:
                good, best = length, run
        tries = _next_tries(left, good, bad, step)
    return good, bad if bad in left else 0, best


def _next_tries(left: dict[int, int], good: int, bad: int, step: int) -> list[int]:
    """The lengths strictly between `good` and `bad` to run next, shortest first; none when nothing is open."""
    if bad - good <= step:
        return []
    fitting = sorted(length for length in left if left[length] >= 0 and length <= good)
    if len(fitting) == 1:
        guess = 2 * good
    elif len(fitting) > 1 and left[fitting[-2]] > left[good]:
        slope = (left[fitting[-2]] - left[good]) / (good - fitting[-2])
        guess = good + int(left[good] / slope)
    else:
        guess = (good + bad) // 2
    below = guess // step * step
    tries = [length for length in (below, below + step) if good < length < bad]
    middle = (good + bad) // 2 // step * step
    return tries or [middle if middle > good else good + step]


def find(recipe: Recipe, card: virtual_gpu.Card, server: virtual_gpu.Server, *, limit: int, step: int) -> Longest:
    """The longest sequence of `recipe` on `card`, within what a job can count on there.

    Raises:
        QloraLowmemError: a run fails for another reason than memory.
    """
    # From the second micro-batch of a step on, gradients are there from the start: more would show nothing new.
    micro_batches = min(recipe.batch.gradient_accumulation_steps, 2)
    short = replace_field(replace_field(recipe, "gradient_accumulation_steps", micro_batches), "max_steps", 2)
    bar = tqdm(desc=recipe.name, unit="run")

    def probe(length: int) -> "Future[RecipeRun]":
        return submit_recipe(server, replace_field(short, "max_seq_length", length), card)

    def room(run: RecipeRun) -> int:
        if run.profile is None:
            raise QloraLowmemError(f"{recipe.name} fails: {(run.failure or '').strip().splitlines()[-1]}")
        return -1 if run.out_of_memory is not None else card.usable_bytes - run.profile.peak_device_bytes

    def note(length: int, fit: bool) -> None:
        bar.update(1)
        bar.set_postfix_str(f"{length:,} tokens {'fit' if fit else 'do not fit'}")

    start = recipe.batch.max_seq_length
    good, bad, run = longest_sequence(probe, room, start=start, limit=limit, step=step, note=note)
    bar.close()
    profile = run.profile if run is not None else None
    return Longest(
        recipe.name,
        card.name,
        good,
        bad,
        "memory" if bad else "limit",
        profile.peak_allocated_bytes if profile else 0,
        profile.peak_reserved_bytes if profile else 0,
        profile.peak_device_bytes if profile else 0,
        run.pinned_host_bytes if run is not None else 0,
    )


def write_table(folder: Path, rows: Sequence[Longest], record: dict[str, Any]) -> None:
    """Write the table as JSON, Markdown and CSV."""
    cells = [
        [
            row.recipe,
            f"{row.tokens:,}",
            f"{row.next_tokens:,}" if row.next_tokens else "(not looked further)",
            gib(row.peak_allocated_bytes),
            gib(row.peak_device_bytes),
            gib(row.host_bytes),
        ]
        for row in rows
    ]
    headers = ["recipe", "longest that trains", "does not fit", "allocated GiB", "on the card GiB", "pinned host GiB"]
    markdown = (
        f"# The longest sequence on {record['device']}\n\nTokens of one sample, batch 1, found by running each length "
        "(two optimizer steps of one or two micro-batches); the card's usable memory holds the CUDA context too.\n\n"
        f"{markdown_table(headers, cells)}\n\n{provenance_lines(record)}\n"
    )
    plain = [asdict(row) for row in rows]
    content = {"environment": record, "device": record["device"], "provenance": "virtual", "cases": plain}
    write_result(folder, "longest", content, markdown, plain)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit code 3 if a recipe does not fit at any length."""
    return run_command(_run, list(sys.argv[1:] if arguments is None else arguments))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = RecipeArgumentParser(
        prog="python -m qlora_lowmem.longest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, nargs="+", metavar="RECIPE", help="one recipe or more")
    parser.add_argument("--limit", type=int, default=131072, metavar="N", help="look no further (default: 131072)")
    parser.add_argument("--step", type=int, default=1024, metavar="N", help="precision in tokens (default: 1024)")
    parser.add_argument("--table", metavar="DIR", help="write longest.json, .md and .csv there, as in results/CARD")
    add_json_argument(parser)
    add_override_arguments(parser)
    return parser


def _run(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    for flag in ("limit", "step"):
        if getattr(options, flag) < 1:
            raise UsageError(f"--{flag}: {getattr(options, flag)} is not a number of tokens; give 1 or more")
    recipes = [load_recipe(path, overrides_from(options)) for path in options.config]
    card = recipe_card(recipes[0])
    with recipe_server() as server:
        rows = [find(recipe, card, server, limit=options.limit, step=options.step) for recipe in recipes]
    record = provenance_record(card.name, "virtual")
    for row in rows:
        further = f"{row.next_tokens:,} do not fit" if row.next_tokens else "no longer one was tried"
        print(
            f"{row.recipe}: {row.tokens:,} tokens on {row.card} (virtual); {further}; "
            f"{gib(row.peak_device_bytes)} GiB on the card, {gib(row.host_bytes)} GiB of host memory pinned",
            file=sys.stderr,
        )
    if options.table:
        write_table(Path(options.table), rows, record)
    peaks = {key: max(getattr(row, key) for row in rows) for key in ("peak_allocated_bytes", "peak_reserved_bytes")}
    peaks["peak_device_bytes"] = max(row.peak_device_bytes for row in rows)
    cases = json.loads(json.dumps([asdict(row) for row in rows]))
    write_json(options.json, peaks | {"device": card.name, "provenance": "virtual", "cases": cases})
    return EXIT_OK if all(row.tokens for row in rows) else EXIT_DOES_NOT_FIT


if __name__ == "__main__":
    sys.exit(main())
