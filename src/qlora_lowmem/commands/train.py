"""Fine-tune with QLoRA in as little GPU memory as the recipe allows, or learn why it does not fit.

    qlora-lowmem train --config bench/recipes/optimised.yaml --data my.jsonl --weights pretrained
    qlora-lowmem train --config bench/recipes/optimised.yaml --device virtual --card rtx-4050-laptop-6gb

Every field of the recipe is a flag. Training stays on the GPU and fails rather than spill into system memory.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import Command, add_json_argument, check_json_target, write_json
from qlora_lowmem.data import CheckedData, check_data
from qlora_lowmem.environment import is_first, processes, words_of
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.plan.recipe_runs import recipe_card
from qlora_lowmem.recipe import SYNTHETIC, Recipe, recipe_hash
from qlora_lowmem.recipe.io import add_override_arguments, load_recipe, overrides_from
from qlora_lowmem.run.summary import last_lines, summary_of
from qlora_lowmem.training.loggers import check_logger

if TYPE_CHECKING:
    from qlora_lowmem.recipe.moves import Change
    from qlora_lowmem.tokens.store import TokenReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own flags, then one for each field of the recipe."""
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
    add_override_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """The command. Returns the exit code: 0 done, 1 a failure of ours, 2 usage, 3 does not fit, 130 interrupted."""
    recipe = load_recipe(options.config, overrides_from(options))
    makes_folder = recipe.run.device != "virtual" and not options.dry_run
    check_json_target(options.json, coming=Path(recipe.run.output_dir) if makes_folder else None)
    checked = _read_data(recipe, quiet=options.quiet)
    source_of(recipe)
    check_logger(recipe.run.report_to)
    card = recipe_card(recipe) if recipe.run.device == "virtual" else None
    if options.dry_run:
        return _dry_run(recipe, checked, options)
    if recipe.run.device == "virtual" and virtual_gpu.current_card() is None:
        assert card is not None
        return _on_virtual_card(recipe, card, options.words, options)
    return _train(recipe, checked, options)


def _read_data(recipe: Recipe, *, quiet: bool) -> CheckedData | None:
    """The checked data, or None for synthetic samples."""
    return None if recipe.data.data == SYNTHETIC else check_data(recipe.data.data, recipe.data.train_on, quiet=quiet)


def _data_line(checked: CheckedData | None) -> str:
    return "synthetic, every sample at full length" if checked is None else checked.report.line


def _data_lines(recipe: Recipe, checked: CheckedData, tokens: "TokenReport", notes: Sequence[str]) -> Iterator[str]:
    """What was found in the data, and what is cut of them."""
    yield from (f"note: {note}" for note in checked.report.notes)
    yield from tokens.lines(recipe.batch.max_seq_length, checked.report.unit)
    yield from (f"note: {note}" for note in notes)


def _data_summary(checked: CheckedData, tokens: "TokenReport") -> dict[str, Any]:
    return asdict(checked.report) | {"tokens": asdict(tokens)}


def _dry_run(recipe: Recipe, checked: CheckedData | None, options: argparse.Namespace) -> int:
    from qlora_lowmem.models.targets import what_is_left_out
    from qlora_lowmem.run.execute import check_lean, check_model, check_samples
    from qlora_lowmem.training.progress import quiet_libraries

    quiet_libraries(bars=not options.quiet)
    modules, parameters = check_model(recipe)
    lean = check_lean(recipe)
    summary = {"recipe": recipe.to_dict(), "recipe_hash": recipe_hash(recipe), "dry_run": True}
    summary |= {"adapted_modules": modules, "trainable_parameters": parameters}
    if lean is not None:
        summary["lean"] = lean.to_dict()
    lines = [_data_line(checked)]
    if checked is not None:
        tokens, notes = check_samples(recipe, checked)
        lines += _data_lines(recipe, checked, tokens, notes)
        summary["data"] = _data_summary(checked, tokens)
    if options.json != "-":
        print(recipe.to_yaml())
        print(f"# would train {parameters:,} parameters in adapters of {modules} modules")
        for text in what_is_left_out(lean) if lean is not None else ():
            print(f"# note: {text}")
        print("# data: " + "\n# ".join(lines))
    write_json(options.json, summary)
    return EXIT_OK


def _train(recipe: Recipe, checked: CheckedData | None, options: argparse.Namespace) -> int:
    """Train in this process, on the GPU that CUDA shows (real or virtual) or on the CPU."""
    from qlora_lowmem.run_folder.checkpoints import newest_whole
    from qlora_lowmem.run_folder.resumption import checkpoint_to_resume, held_folder

    if virtual_gpu.current_card() is not None:
        return _train_here(recipe, checked, options, None)
    if not is_first():  # the first process holds the folder for all
        found = newest_whole(Path(recipe.run.output_dir))
        return _train_here(recipe, checked, options, found.checkpoint)
    with held_folder(Path(recipe.run.output_dir)):
        found = checkpoint_to_resume(recipe)
        for note in found.notes:
            _say(f"note: {note}")
        if found.checkpoint is not None:
            _say(f"resuming from {found.checkpoint}")
        return _train_here(recipe, checked, options, found.checkpoint)


def _train_here(
    recipe: Recipe,
    checked: CheckedData | None,
    options: argparse.Namespace,
    resume_from: Path | None,
) -> int:
    from qlora_lowmem.files import json_values
    from qlora_lowmem.models.targets import what_is_left_out
    from qlora_lowmem.run.execute import OutOfGpuMemoryError, execute
    from qlora_lowmem.run.model_card import write_model_card
    from qlora_lowmem.training.heartbeat import Heartbeat
    from qlora_lowmem.training.interruption import Interruption
    from qlora_lowmem.training.log_file import LogFile
    from qlora_lowmem.training.progress import ProgressLine, quiet_libraries

    quiet_libraries(bars=not options.quiet)
    virtual = virtual_gpu.current_card() is not None
    output_dir = Path(recipe.run.output_dir)
    line = ProgressLine(real_values=not virtual, quiet=options.quiet or not is_first())
    heartbeat = Heartbeat(recipe)
    log = LogFile(output_dir, _say)

    def ready(job: Any, recorder: Any) -> None:
        line.watch(recorder)
        heartbeat.watch(recorder)
        log.watch(job, recorder)
        for text in what_is_left_out(job.lean) if job.lean is not None else ():
            _say(f"note: {text}")
        if not options.quiet:
            _describe(job, checked)

    try:
        with heartbeat, Interruption() as interruption:
            outcome = execute(
                recipe,
                checked,
                output_dir=output_dir,
                resume_from=resume_from,
                # On a virtual GPU there are no values to log.
                callbacks=[line, heartbeat] if virtual else [line, heartbeat, log],
                on_ready=ready,
                save=not virtual,
                warm_up=checked is not None,  # synthetic samples are all as long as the first
                interruption=interruption,
            )
    except OutOfGpuMemoryError as error:
        if not is_first():
            raise
        failure: dict[str, str | None] = {"phase": error.phase, "message": error.torch_message}
        failure["checkpoint"] = str(error.checkpoint) if error.checkpoint else None
        # On a virtual card, the process that started this one falls back.
        fallback = None if virtual else _next_fallback(recipe, failure, options)
        if fallback is not None:
            from qlora_lowmem.plan.fallback import start_again

            log.note({"out_of_memory": error.phase, "retreat": fallback.changes})
            start_again(options.words, fallback.flags)
        content = summary_of(recipe, None) | error.profile.to_dict() | {"fits": False, "failure": failure}
        return _does_not_fit(recipe, content, options)
    if not is_first():
        return EXIT_OK
    summary = summary_of(recipe, outcome)
    if checked is not None and outcome.data is not None:
        summary["data"] = _data_summary(checked, outcome.data)
    if not virtual:
        write_model_card(output_dir, recipe, outcome, str(summary["device"]))
        summary["adapter"] = recipe.run.output_dir
    for text in last_lines(outcome, summary):
        _say(text)
    write_json(options.json, json_values(summary))
    return EXIT_OK


def _next_fallback(recipe: Recipe, failure: Mapping[str, str | None], options: argparse.Namespace) -> "Change | None":
    """The knob to start again with, said aloud; None where none is asked for or left."""
    from qlora_lowmem.plan.fallback import next_fallback

    if not options.retreat or processes() > 1:
        return None
    step = next_fallback(recipe)
    if step is None:
        _say("retreat: no knob is left that keeps what is trained")
        return None
    _say(f"out of memory in phase {failure['phase']!r}: {failure['message']}")
    _say(f"retreat: {' '.join(step.flags)}; starting again from {failure['checkpoint'] or 'the beginning'}")
    return step


def _on_virtual_card(recipe: Recipe, card: virtual_gpu.Card, arguments: list[str], options: argparse.Namespace) -> int:
    """Start this command again as a process on the virtual card, and add the advice that needs more such runs."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "summary.json"
        command = [*words_of("train"), *arguments, "--no-advice", "--json", str(result)]
        # That values are not real is said by the summary, which has no loss.
        env = os.environ | {"QLORA_LOWMEM_QUIET": "1"}
        report = virtual_gpu.run(command, card, env=env, stdout=sys.stderr if options.json == "-" else None)
        content = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    if content is None:
        return report.exit_code
    if report.exit_code == EXIT_DOES_NOT_FIT:
        fallback = _next_fallback(recipe, content["failure"], options)
        if fallback is not None:
            return _on_virtual_card(fallback.recipe, card, [*arguments, *fallback.flags], options)
        return _does_not_fit(recipe, content, options)
    write_json(options.json, content)
    return report.exit_code


def _say_failure(content: dict[str, Any]) -> None:
    failure = content["failure"]
    _say(f"does not fit: {content['device']} ran out of memory in phase {failure['phase']!r} ({content['provenance']})")
    _say(f"torch says: {failure['message']}")
    if failure["checkpoint"]:
        _say(f"{failure['checkpoint']} is whole: with a change that keeps what is trained, training goes on from there")


def _does_not_fit(recipe: Recipe, content: dict[str, Any], options: argparse.Namespace) -> int:
    """Say what was needed, what there was and which knobs would help most."""
    if virtual_gpu.current_card() is None:  # else the process that started this one says it
        _say_failure(content)
    if options.no_advice or processes() > 1:  # advice is for one card
        write_json(options.json, content)
        return EXIT_DOES_NOT_FIT
    from qlora_lowmem.memory.device import card_like
    from qlora_lowmem.plan.advice import advise

    card = card_like(content["device"], content["total_bytes"])
    if card is None:
        _say(f"no virtual card is known for {content['device']}; shorter sequences and checkpointing save most")
    else:
        try:
            advice = advise(recipe, card, note=_say)
            content["advice"] = msgspec.to_builtins(advice)
            for text in advice.lines():
                _say(text)
        except virtual_gpu.VirtualGPUError as error:
            _say(f"which knobs would help most cannot be tried here: {error}")
    write_json(options.json, content)
    return EXIT_DOES_NOT_FIT


def _describe(job: Any, checked: CheckedData | None) -> None:
    from qlora_lowmem.tokens.dataset import show_sample

    trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    _say(f"training {trained:,} parameters in adapters of {len(job.targets.modules)} modules")
    if job.lean is not None:
        _say(f"lean: {', '.join(job.lean.applied) or 'nothing'}")
    if checked is not None:
        _say(f"data: {_data_line(checked)}")
        for text in _data_lines(job.recipe, checked, job.data.report, job.data.notes):
            _say(text)
        _say("the first sample as the model sees it, the loss on what is between [[ and ]]:")
        _say(show_sample(job.trainer.train_dataset, job.trainer.processing_class))


def _say(text: str) -> None:
    if is_first():
        print(text, file=sys.stderr, flush=True)


COMMAND = Command("train", __doc__, add_arguments, run)
main, parser = COMMAND.main, COMMAND.parser
