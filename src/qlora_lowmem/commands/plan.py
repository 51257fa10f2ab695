"""Will it fit, how far does it reach, and what to change: answered by running it on a virtual card.

    qlora-lowmem plan --config bench/recipes/optimised.yaml --card rtx-4050-laptop-6gb
    qlora-lowmem plan --model ibm-granite/granite-4.0-h-1b --card rtx-3060-laptop-6gb --write mine.yaml
    qlora-lowmem plan --model granite-4.0-h-1b llama-3.2-3b --card rtx-3060-12gb rtx-3090-24gb

With --config: does the recipe fit as it is, where do its bytes go, what is the longest sequence and the largest batch,
which single changes save how much for which cost, each of them run. If it does not fit, a recipe that does.

With --model: the best recipe that fits. Recipes are tried from the fastest to the leanest: nothing computed twice,
checkpointing, this project's tiles (or offloading, for models that they do not know), checkpoints in host memory, and
only then embeddings of fewer bits. The first that fits at the wanted length is proposed: at that length where --seq
asked for it, else at the longest sequence that it reaches; the next longer one was run and does not fit. Then a table
of every recipe: how far it reaches, and what it costs. Of a model on the hub, config.json is fetched.

What a field on the command line says, every recipe keeps: --attention eager, --optimizer adamw_8bit, ...

Many recipes, models and cards: every combination, in one table; --full looks into each as deeply as into one, and
shows that below the table. A model that cannot be planned is a row with its reason. Runs are cached, so that an
interrupted sweep goes on where it stopped.

Exit code: 0 fits, 3 does not (or not at the wanted length), 2 bad input (in a sweep: of a pair, after the answers to
the others), 1 a pair failed, 130 interrupted.
"""

import argparse
import itertools
import os
import shlex
import sys
from pathlib import Path

from tqdm.auto import tqdm

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import add_json_argument, whole_number, write_json
from qlora_lowmem.environment import provenance_record, typed
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_FAILURE, EXIT_OK, EXIT_USAGE, UsageError
from qlora_lowmem.memory.device import card_of_this_machine
from qlora_lowmem.plan import screen
from qlora_lowmem.plan.answers import Plan, recipe_file
from qlora_lowmem.plan.asked import Pair
from qlora_lowmem.plan.kept_runs import RunCache, Runs
from qlora_lowmem.plan.pair import Planner
from qlora_lowmem.plan.recipe_runs import recipe_server
from qlora_lowmem.plan.sweep import pairs_of, sweep
from qlora_lowmem.recipe import SYNTHETIC, Recipe
from qlora_lowmem.recipe.io import add_override_arguments, load_recipe, overrides_from, replace_fields
from qlora_lowmem.targets import check_file, write
from qlora_lowmem.units import format_bytes, parse_bytes

DEFAULT_SEQ = 2048
DEFAULT_LIMIT = 32768
DEFAULT_STEP = 256
# Asked for in this command's own words.
_OWN = ("name", "model", "weights", "max_seq_length", "data", "train_on", "device", "card", "output_dir", "resume")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to plan")
    what.add_argument("--config", nargs="+", metavar="RECIPE", help="one recipe or more (bench/recipes/)")
    what.add_argument(
        "--model",
        dest="models",
        nargs="+",
        metavar="MODEL",
        help="hub ids, local folders or known architectures; with --config, in place of the recipes' own",
    )
    what.add_argument(
        "--card",
        dest="cards",
        nargs="+",
        metavar="NAME",
        help="cards of the table; all: every one; a size such as 12GB: a generic card of that memory",
    )
    what.add_argument(
        "--memory", metavar="SIZE", help="of --card, where it is not the table's; alone or of an unknown card, its size"
    )
    what.add_argument("--gpu", action="store_true", help="the GPU of this machine, with the memory that is free now")
    what.add_argument(
        "--seq",
        "--max-seq-length",  # as the other commands have it
        type=whole_number(2),
        metavar="N",
        help=f"the length that you want, in tokens (default: the recipe's own; with --model alone {DEFAULT_SEQ})",
    )
    how = parser.add_argument_group("how far to look")
    how.add_argument(
        "--limit",
        type=whole_number(2),
        metavar="N",
        help=f"no longer sequence (default: {DEFAULT_LIMIT}, or --seq where that is more)",
    )
    how.add_argument(
        "--step",
        type=whole_number(1),
        default=DEFAULT_STEP,
        metavar="N",
        help=f"of the lengths tried (default: {DEFAULT_STEP})",
    )
    how.add_argument("--full", action="store_true", help="in a sweep: breakdown, batch and single changes of each pair")
    how.add_argument("--no-cache", action="store_true", help="run everything again, and keep nothing")
    out = parser.add_argument_group("what to write")
    add_json_argument(parser)
    out.add_argument("--write", metavar="FILE", help="write the recipe that fits, each knob with what it does")
    out.add_argument("--force", action="store_true", help="let --write replace a file")
    add_override_arguments(parser, without=_OWN)


def run(options: argparse.Namespace) -> int:
    _check_numbers(options)
    target = _checked_target(options)
    recipes = _recipes(options)
    cards = _cards(options)
    given, fixed = bool(options.config), frozenset(overrides_from(options))
    several = given and bool(options.models)
    asked = pairs_of(
        recipes,
        cards,
        given=given,
        several_models=several,
        wanted=options.seq,
        limit=options.limit,
        step=options.step,
        full=options.full or len(recipes) * len(cards) == 1,
        fixed=fixed,
    )
    if target is not None and len(asked) > 1:
        raise UsageError(f"--write: one file holds one recipe, and this asks for {len(asked)} pairs; name one pair")
    unwritten: list[UsageError] = []
    plans = _answers(asked, options, target, unwritten)
    found = plans[0].fits or plans[0].proposal is not None
    if target is not None and not unwritten and found and isinstance(asked[0], Pair):
        _say_what_next(target, asked[0].model.recipe, asked[0].model.asked)
    device = cards[0].name if len(cards) == 1 else f"{len(cards)} cards"
    content = {"device": device, "provenance": "virtual", "fits": all(plan.fits for plan in plans)}
    content["environment"] = provenance_record(device, "virtual")
    write_json(options.json, content | {"cases": [plan.to_dict() for plan in plans]})
    if unwritten:
        raise unwritten[0]
    if any(plan.bad_input for plan in plans):
        return EXIT_USAGE
    if any(plan.failure for plan in plans):
        return EXIT_FAILURE
    return EXIT_OK if all(plan.fits for plan in plans) else EXIT_DOES_NOT_FIT


def _check_numbers(options: argparse.Namespace) -> None:
    if options.limit is None:
        options.limit = max(DEFAULT_LIMIT, options.seq or 0)
    if options.seq is not None and options.seq > options.limit:
        raise UsageError(f"--seq: {options.seq} is beyond --limit {options.limit}; raise the limit, or want less")


def _checked_target(options: argparse.Namespace) -> Path | None:
    if options.write is None:
        return None
    target = Path(options.write)
    if target.suffix not in (".yaml", ".yml"):
        raise UsageError(f"--write: {options.write!r} is no recipe's name; end it in .yaml")
    if target.exists() and not options.force:
        raise UsageError(f"--write: {options.write!r} exists; --force replaces it, or give another name")
    check_file("--write", options.write)
    return target


def _recipes(options: argparse.Namespace) -> list[Recipe]:
    """The recipes asked about; for a model alone, where its ladder starts."""
    overrides = overrides_from(options)
    if options.seq is not None:
        overrides["max_seq_length"] = str(options.seq)
    if options.config:
        given = [load_recipe(path, overrides) for path in options.config]
        if not options.models:
            return given
        return [replace_fields(recipe, {"model": model}) for recipe, model in itertools.product(given, options.models)]
    if not options.models:
        raise UsageError("nothing to plan: give --config RECIPE or --model MODEL (--help shows both)")
    start = {"target_modules": "all-linear", "max_seq_length": str(min(DEFAULT_SEQ, options.limit))}
    named = {model: {"model": model, "name": Path(model).name or model} for model in options.models}
    return [replace_fields(Recipe(), start | overrides | names) for names in named.values()]


def _cards(options: argparse.Namespace) -> list[virtual_gpu.Card]:
    memory = _memory(options.memory)
    asked = options.cards or [memory] * (memory is not None)
    if not asked and not options.gpu:
        known = ", ".join(card.name for card in virtual_gpu.all_cards())
        raise UsageError(f"no card: give --card NAME (one of {known}, or a size: 12GB), or --gpu for this machine's")
    if memory is not None and options.gpu:
        raise UsageError("--memory: --gpu has its own; leave one of them out")
    table = [card.name for card in virtual_gpu.all_cards()]
    names: list[str] = []
    for name in asked:
        names += table if name == "all" else [name]
    cards = list(dict.fromkeys(_card(name, memory if options.cards else None) for name in names))
    for card in cards:
        if card.name not in table:
            like = f"like {card.name.partition('@')[0]}" if "@" in card.name else "a generic card"
            total, usable = format_bytes(card.total_bytes), format_bytes(card.usable_bytes)
            print(f"{card.name}: {like}, of {total}, {usable} usable; an assumption, measured on none", file=sys.stderr)
    if options.gpu:
        card = card_of_this_machine()
        usable = format_bytes(card.usable_bytes)
        print(f"--gpu: {card.title}, {usable} free now; a virtual {card.name} like it", file=sys.stderr)
        cards.append(card)
    return cards


def _memory(size: str | None) -> str | None:
    if size is None:
        return None
    try:
        parse_bytes(size)
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from None
    return size if size[-1].isalpha() else f"{size}B"


def _card(name: str, memory: str | None) -> virtual_gpu.Card:
    """The card of that name, with `memory` where that is given; a generic one of that memory where nobody knows it."""
    try:
        return virtual_gpu.get_card(name if memory is None else f"{name}@{memory}")
    except virtual_gpu.UnknownCardError as error:
        if memory is None:
            raise UsageError(f"--card: {error}") from None
        return virtual_gpu.get_card(memory)


def _answers(
    asked: list[Pair | Plan], options: argparse.Namespace, target: Path | None, unwritten: list[UsageError]
) -> list[Plan]:
    """The answers in their order, and shown; the screen of one alone grows as they become known.

    Why the recipe that fits cannot be written is kept in `unwritten`: the other answers are made all the same.
    """
    cache = RunCache(None) if options.no_cache else RunCache.of_this_user()
    workers = len(os.sched_getaffinity(0))  # a container's or a scheduler's share, not the machine's
    shown = options.json != "-"
    pairs = [each for each in asked if isinstance(each, Pair)]
    with recipe_server(workers) as server:
        if len(asked) == 1:
            return [_answer(pairs[0], server, cache, target, unwritten, shown=shown)]
        planned = iter(_sweep(pairs, server, cache, workers))
    plans = [next(planned) if isinstance(each, Pair) else each for each in asked]
    if shown:
        print("\n".join(screen.sweep_lines(plans, full=options.full)))
    return plans


def _answer(
    pair: Pair,
    server: virtual_gpu.Server,
    cache: RunCache,
    target: Path | None,
    unwritten: list[UsageError],
    *,
    shown: bool,
) -> Plan:
    """One pair's answer, shown as it becomes known; the recipe is written before what else there is to say."""
    lines: list[str] = []

    def say(answer: Plan) -> None:
        new = list(screen.lines(answer))[len(lines) :]
        for line in new if shown else ():
            bar.write(line)
        sys.stdout.flush()
        lines.extend(new)

    def found(answer: Plan) -> None:
        if target is None:
            return
        text = recipe_file(pair, answer, target)
        if text is not None:
            try:
                write("--write", str(target), text)
            except UsageError as fault:
                unwritten.append(fault)
                return
        bar.write(f"{target} is {'written' if text else 'not written: nothing fits'}", file=sys.stderr)

    with tqdm(desc="plan", unit="run") as bar:
        plan = Planner(pair, Runs(server, cache, bar.update), bar.set_postfix_str, say, found).plan()
        say(plan)
    return plan


def _sweep(pairs: list[Pair], server: virtual_gpu.Server, cache: RunCache, workers: int) -> list[Plan]:
    with tqdm(desc="plan", total=len(pairs), unit="pair") as bar:
        made = itertools.count(1)
        runs = Runs(server, cache, lambda: bar.set_postfix_str(f"{next(made)} runs"))
        found: dict[int, Plan] = {}
        for number, plan in sweep(pairs, runs, server, workers=workers):
            found[number] = plan
            bar.update(1)
    return [found[number] for number in range(len(pairs))]


def _say_what_next(target: Path, recipe: Recipe, asked: Recipe) -> None:
    """What trains the recipe in `target`; `recipe` is as it was planned, `asked` as the person gave it."""
    own_data = asked.data.data != SYNTHETIC
    train = f"{typed('train')} --config {shlex.quote(str(target))}"
    # As it was planned: with random weights where those will do, and then there is no tokenizer for a person's data.
    planned = " --weights random" if recipe.base.weights == "random" else ""
    planned += " --data synthetic" if own_data else ""
    print(f"Train: {train}{'' if own_data else ' --data my.jsonl'}", file=sys.stderr)
    print(f"Run it whole on the virtual card: {train} --device virtual{planned}", file=sys.stderr)
