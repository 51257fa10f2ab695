"""A training as the command `train` runs it: told as it goes, taken up where it was left, here or on a virtual card."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from qlora_lowmem import virtual_gpu
from qlora_lowmem.environment import command, is_first, processes, words_of
from qlora_lowmem.errors import EXIT_DOES_NOT_FIT, EXIT_OK, UsageError
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.recipe.moves import Change
from qlora_lowmem.run.imports import heavy_imports
from qlora_lowmem.run.preflight import Inputs, count_evaluation_of, count_tokens_of, preflight
from qlora_lowmem.scratch import scratch_folder

# What a run that is out of memory changes, if anything, before it starts again.
NextChange = Callable[[Recipe], Change | None]


def say(*lines: str) -> None:
    """Tell the user, once for all processes."""
    if lines and is_first():
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def dry_run(inputs: Inputs, *, quiet: bool) -> tuple[dict[str, Any], list[str]]:
    """What would be trained, for machines and as lines of comments. Nothing is. Raises what `preflight` does."""
    with heavy_imports():
        from qlora_lowmem.models.targets import what_is_left_out
        from qlora_lowmem.run.summary import data_lines, data_summary
        from qlora_lowmem.training.progress import quiet_libraries

    quiet_libraries(bars=not quiet)
    recipe, samples = inputs.recipe, inputs.samples
    checked = preflight(inputs)
    modules, parameters = len(checked.adapted.modules), checked.adapted.parameters
    content = {"recipe": recipe.to_dict(), "recipe_hash": recipe_hash(recipe), "dry_run": True}
    content |= {"adapted_modules": modules, "trainable_parameters": parameters}
    if checked.adapted.base:
        content["trained_of_the_base"] = list(checked.adapted.base)
    lines = [f"would train {parameters:,} parameters in {checked.adapted.where}"]
    lines += [f"note: {text}" for text in checked.notes]
    if checked.lean is not None:
        content["lean"] = checked.lean.to_dict()
        lines += [f"note: {text}" for text in what_is_left_out(checked.lean)]
    if samples is None:
        lines.append("data: synthetic, every sample at full length")
    else:
        tokens, notes = count_tokens_of(checked, samples)
        lines += data_lines(recipe, samples, tokens, notes)
        content["data"] = data_summary(samples, tokens)
    if inputs.evaluation is not None:
        tokens, notes = count_evaluation_of(checked, inputs.evaluation)
        lines += data_lines(recipe, inputs.evaluation, tokens, notes, of="evaluation")
        content["evaluation_data"] = data_summary(inputs.evaluation, tokens)
    return content, lines


def finished_before(recipe: Recipe) -> dict[str, Any] | None:
    """The summary of the recipe's run where it has ended already and nothing is left to train; it is said.

    Raises:
        UsageError: data that cannot be read.
    """
    from qlora_lowmem.run_folder.resumption import finished_run

    if recipe.run.device == "virtual" or virtual_gpu.current_card() is not None:
        return None  # which leaves nothing in a folder
    summary = finished_run(recipe)
    if summary is not None:
        came_to = (
            f"{summary['first_loss']:.4f} -> {summary['final_loss']:.4f}" if "final_loss" in summary else "not logged"
        )
        say(
            f"this run has ended already, on {summary['environment']['date']}, after {summary['steps']} steps: loss "
            f"{came_to}, adapter in {recipe.run.output_dir}. Nothing is left to train; to train again, give another "
            "--output-dir, or remove that folder"
        )
    return summary


def train_here(
    inputs: Inputs, words: Sequence[str], *, quiet: bool, next_change: NextChange | None = None
) -> tuple[int, dict[str, Any] | None]:
    """Train in this process, on the GPU that CUDA shows (real or virtual) or on the CPU.

    Args:
        words: the command line, to start again with.
        next_change: where the GPU's memory runs out, this process starts again with the change.

    Returns:
        The exit code, and what `--json` writes; None in other processes than the first.

    Raises:
        QloraLowmemError: as `execute`; of memory that ran out only in other processes than the first.
    """
    from qlora_lowmem.run_folder.resumption import mark_finished

    recipe, real = inputs.recipe, virtual_gpu.current_card() is None
    output_dir = Path(recipe.run.output_dir)
    with _held(recipe) as resume_from:
        with heavy_imports():
            from qlora_lowmem.run.brevity import Brevity
            from qlora_lowmem.run.execute import execute
            from qlora_lowmem.run.out_of_memory import OutOfGpuMemoryError
            from qlora_lowmem.run.summary import data_summary, last_lines, summary_of, write_model_card
            from qlora_lowmem.training.ending import Interruption
            from qlora_lowmem.training.progress import Heartbeat, LogFile, ProgressLine, quiet_libraries

        quiet_libraries(bars=not quiet)
        log, heartbeat = LogFile(output_dir, say), Heartbeat(recipe)
        line = ProgressLine(real_values=real, quiet=quiet or not is_first())

        def ready(job: Any, recorder: Any) -> None:
            if not real and recorder is not None and inputs.samples is None and processes() == 1:
                Brevity(job, recorder)  # samples are all alike, and there is no loss to tell
            for each in (line, heartbeat, log):
                each.watch(job, recorder)
            _describe(job, inputs, quiet=quiet)

        try:
            with heartbeat, Interruption() as interruption:
                outcome = execute(
                    inputs,
                    output_dir=output_dir,
                    resume_from=resume_from,
                    callbacks=[line, heartbeat, log] if real else [line, heartbeat],  # there are no values to log
                    on_ready=ready,
                    save=real,
                    warm_up=inputs.samples is not None,  # synthetic samples are all as long as the first
                    interruption=interruption,
                )
        except OutOfGpuMemoryError as error:
            if not is_first():
                raise
            checkpoint = str(error.checkpoint) if error.checkpoint else None
            failure = {"phase": error.phase, "message": error.torch_message, "checkpoint": checkpoint}
            content = summary_of(recipe, error.profile) | {"fits": False, "failure": failure}
            # On a virtual card, the process that started this one tells it, and changes what is to be changed.
            change = _change(recipe, failure, next_change) if real else None
            if change is not None:
                log.note({"out_of_memory": error.phase, "retreat": change.changes})
                _start_again(words, change.flags)
            return EXIT_DOES_NOT_FIT, content
        if not is_first():
            return EXIT_OK, None
        content = summary_of(recipe, outcome.profile, outcome)
        if inputs.samples is not None and outcome.data is not None:
            content["data"] = data_summary(inputs.samples, outcome.data)
        if inputs.evaluation is not None and outcome.evaluation_data is not None:
            content["evaluation_data"] = data_summary(inputs.evaluation, outcome.evaluation_data)
        if real:
            write_model_card(output_dir, inputs, outcome, str(content["device"]))
            content["adapter"] = recipe.run.output_dir
            mark_finished(recipe, content)
        say(*last_lines(outcome, content))
        return EXIT_OK, content


def train_on_virtual_card(
    inputs: Inputs, words: Sequence[str], *, next_change: NextChange | None = None, stdout: Any = None
) -> tuple[int, dict[str, Any] | None]:
    """Run the command again as a process on the virtual card, which is given the inputs as they were found.

    Args:
        next_change: what to change where the card's memory runs out; then it runs again.

    Returns:
        The exit code, and what `--json` writes; None where that process has told why there is nothing.
    """
    assert inputs.card is not None
    while True:
        with scratch_folder() as folder:
            found, result = folder / "inputs.json", folder / "summary.json"
            found.write_bytes(msgspec.json.encode(replace(inputs, card=None), enc_hook=str))
            started = [*words_of("train"), *words, "--no-advice", "--json", str(result), "--inputs", str(found)]
            # That values are not real is said by the summary, which has no loss.
            env = os.environ | {"QLORA_LOWMEM_QUIET": "1"}
            code = virtual_gpu.run(started, inputs.card, env=env, stdout=stdout).exit_code
            content = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
        if content is None:
            return code, None
        content["environment"]["command"] = command()
        change = _change(inputs.recipe, content["failure"], next_change) if code == EXIT_DOES_NOT_FIT else None
        if change is None:
            return code, content
        inputs, words = replace(inputs, recipe=change.recipe), [*words, *change.flags]


def handed_inputs(path: str) -> Inputs:
    """What `train_on_virtual_card` handed to the process that it started."""
    return msgspec.json.decode(Path(path).read_bytes(), type=Inputs, dec_hook=lambda kind, text: kind(text))


@contextmanager
def _held(recipe: Recipe) -> Iterator[Path | None]:
    """Hold the output folder; the checkpoint to go on from, if there is one. A virtual card leaves nothing there."""
    from qlora_lowmem.run_folder.checkpoints import newest_complete
    from qlora_lowmem.run_folder.resumption import checkpoint_to_resume, held_folder

    output_dir = Path(recipe.run.output_dir)
    if virtual_gpu.current_card() is not None:
        yield None
    elif not is_first():  # the first process holds the folder for all
        yield newest_complete(output_dir).checkpoint
    else:
        made = not output_dir.exists()
        with held_folder(output_dir):
            found = checkpoint_to_resume(recipe)
            say(*(f"note: {note}" for note in found.notes))
            if found.checkpoint is not None:
                say(f"resuming from {found.checkpoint}")
            try:
                yield found.checkpoint
            except UsageError:
                if made and not _worth_keeping(output_dir):
                    shutil.rmtree(output_dir, ignore_errors=True)
                raise


def _worth_keeping(output_dir: Path) -> bool:
    """Whether a run that was refused had trained, or tokenised its samples, which can take long."""
    from qlora_lowmem.memory.profile import MEMORY_FILE
    from qlora_lowmem.run_folder.ownership import RECIPE_FILE
    from qlora_lowmem.tokens.dataset import EVALUATION_FOLDER, TOKENS_FOLDER

    tokens = (TOKENS_FOLDER, EVALUATION_FOLDER)
    others = {path.name for path in output_dir.iterdir()} - {RECIPE_FILE, MEMORY_FILE, ".lock", *tokens}
    return bool(others) or any(path.is_dir() for folder in tokens for path in output_dir.glob(f"{folder}/*"))


def _describe(job: Any, inputs: Inputs, *, quiet: bool) -> None:
    """What is about to be trained, and the first sample as the model sees it."""
    from qlora_lowmem.models.adapters import Adapted
    from qlora_lowmem.models.targets import what_is_left_out
    from qlora_lowmem.run.summary import data_lines
    from qlora_lowmem.tokens.dataset import show_sample

    say(*(f"note: {text}" for text in job.checked.notes))
    if job.lean is not None:
        say(*(f"note: {text}" for text in what_is_left_out(job.lean)))
    if quiet:
        return
    adapted = Adapted.of(job.model)
    say(f"training {adapted.parameters:,} parameters in {adapted.where}")
    if job.lean is not None:
        say(f"lean: {', '.join(job.lean.applied) or 'nothing'}")
    if inputs.samples is not None:
        say(*data_lines(inputs.recipe, inputs.samples, job.data.report, job.data.notes))
        if inputs.evaluation is not None:
            found = job.data.evaluation
            say(*data_lines(inputs.recipe, inputs.evaluation, found.report, found.notes, of="evaluation"))
        say("the first sample as the model sees it, the loss on what is between [[ and ]]:")
        say(show_sample(job.trainer.train_dataset, job.trainer.processing_class))


def _change(recipe: Recipe, failure: dict[str, Any], next_change: NextChange | None) -> Change | None:
    """The knob to start again with, said aloud; None where none is asked for or left."""
    if next_change is None:
        return None
    change = next_change(recipe)
    if change is None:
        say("retreat: no knob is left that keeps what is trained")
        return None
    say(f"out of memory in phase {failure['phase']!r}: {failure['message']}")
    say(f"retreat: {' '.join(change.flags)}; starting again from {failure['checkpoint'] or 'the beginning'}")
    return change


def _start_again(words: Sequence[str], flags: Sequence[str]) -> NoReturn:
    """Replace this process by the command with more flags: a fresh process has the card's memory to itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*words_of("train"), *words, *flags])
