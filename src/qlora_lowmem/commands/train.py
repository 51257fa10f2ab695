"""Fine-tune with QLoRA in as little GPU memory as the recipe allows, or learn why it does not fit.

    qlora-lowmem train --config bench/recipes/optimised.yaml --data my.jsonl --weights pretrained
    qlora-lowmem train --config bench/recipes/optimised.yaml --device virtual --card rtx-4050-laptop-6gb

Every field of the recipe is a flag. Training stays on the GPU and fails rather than spill into system memory.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import msgspec

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import add_json_argument, check_json_target, write_json
from qlora_lowmem.environment import processes, share_cores
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from qlora_lowmem.recipe.io import (
    add_override_arguments,
    load_recipe,
    overrides_from,
    recipe_from_dict,
    words_for_another,
)
from qlora_lowmem.run.preflight import inputs_of
from qlora_lowmem.run.train import (
    NextChange,
    dry_run,
    finished_before,
    handed_inputs,
    say,
    train_here,
    train_on_virtual_card,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="RECIPE", help="the recipe, a YAML file (bench/recipes/)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and what would be trained; train nothing"
    )
    add_json_argument(parser, checked=False)
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no sample")
    parser.add_argument(
        "--no-advice", action="store_true", help="on running out of memory, do not try which knobs would help"
    )
    parser.add_argument(
        "--retreat",
        action="store_true",
        help="on running out of memory, change one knob that keeps what is trained, start again from the last good "
        "step, and so on: expandable segments, fused loss, sdpa, checkpointing, half the micro-batch with twice the "
        "accumulation, lean, checkpoints or activations in host memory",
    )
    parser.add_argument("--inputs", help=argparse.SUPPRESS)  # given to the process that the command starts
    add_override_arguments(parser)


def run(options: argparse.Namespace) -> int:
    if options.inputs is not None:
        code, content = train_here(handed_inputs(options.inputs), options.words, quiet=options.quiet)
        write_json(options.json, content)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # on a virtual card; Python's own cleaning up of a million objects would be for nothing
    recipe = load_recipe(options.config, overrides_from(options))
    share_cores(recipe.run.device)
    makes_folder = recipe.run.device != "virtual" and not options.dry_run
    check_json_target(options.json, coming=Path(recipe.run.output_dir) if makes_folder else None)
    finished = None if options.dry_run else finished_before(recipe)
    if finished is not None:
        write_json(options.json, finished)
        return EXIT_OK
    inputs = inputs_of(recipe, quiet=options.quiet)
    if options.dry_run:
        content, lines = dry_run(inputs, quiet=options.quiet)
        if options.json != "-":
            print(recipe.to_yaml(), *lines, sep="\n# ")
        write_json(options.json, content)
        return EXIT_OK
    next_change: NextChange | None = None
    words = options.words
    if options.retreat and processes() == 1:
        from qlora_lowmem.plan.ladder import next_fallback as next_change

        words = [*words, *words_for_another(options.config, recipe)]
    if inputs.card is not None and virtual_gpu.current_card() is None:
        stdout = sys.stderr if options.json == "-" else None
        code, content = train_on_virtual_card(inputs, words, next_change=next_change, stdout=stdout)
    else:
        code, content = train_here(inputs, words, quiet=options.quiet, next_change=next_change)
    if content is None:
        return code
    if code == EXIT_DOES_NOT_FIT:
        if virtual_gpu.current_card() is None:  # else the process that started this one says it
            _say_failure(content)
        if not options.no_advice and processes() == 1:  # advice is for one card
            _advise(content)
    write_json(options.json, content)
    return code


def _say_failure(content: dict[str, Any]) -> None:
    failure = content["failure"]
    say(f"does not fit: {content['device']} ran out of memory in phase {failure['phase']!r} ({content['provenance']})")
    say(f"torch says: {failure['message']}")
    if failure["checkpoint"]:
        say(f"{failure['checkpoint']} is whole: with a change that keeps what is trained, training goes on from there")


def _advise(content: dict[str, Any]) -> None:
    """Say which knobs would help most, and add them to what is written."""
    from qlora_lowmem.memory.device import card_like
    from qlora_lowmem.plan.advice import advise

    card = card_like(content["device"], content["total_bytes"])
    if card is None:
        say(f"no virtual card is known for {content['device']}; shorter sequences and checkpointing save most")
        return
    try:
        advice = advise(recipe_from_dict(content["recipe"]), card, note=say)
    except virtual_gpu.VirtualGPUError as error:
        say(f"which knobs would help most cannot be tried here: {error}")
        return
    content["advice"] = msgspec.to_builtins(advice)
    say(*advice.lines())
