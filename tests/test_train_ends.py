"""A run's last words, and a warm-up that would never end, once the number of steps is known."""

import json
import math
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import EXIT_USAGE
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.tokens.dataset import steps_over
from tiny_chat import write_tiny_chat

main = partial(run_command, "train")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat(tmp_path_factory.mktemp("model"))


def flags(model: Path, data: Path, *more: str) -> list[str]:
    recipe = ["--config", str(RECIPES / "demo.yaml"), "--model", str(model), "--data", str(data), "--no-resume"]
    return [*recipe, "--max-seq-length", "64", "--quiet", "--output-dir", str(data.parent / "out"), *more]


@pytest.mark.parametrize(
    ("logging_steps", "steps", "said"),
    [
        (1, [1, 2, 3, 4], "loss {first} -> {final} in 4 steps"),
        (3, [3, 4], "loss {first} (mean of steps 1 to 3) -> {final} in 4 steps"),
        (2, [2, 4], "loss {first} (mean of steps 1 to 2) -> {final} (mean of steps 3 to 4) in 4 steps"),
        (9, [4], "loss {first} (mean of steps 1 to 4) in 4 steps"),
    ],
)
def test_the_end_says_of_which_steps_its_losses_are_and_where_the_adapter_is(
    model: Path,
    conversations: Path,
    capsys: pytest.CaptureFixture[str],
    logging_steps: int,
    steps: list[int],
    said: str,
) -> None:
    more = ("--max-steps", "4", "--logging-steps", str(logging_steps), "--json", "-")
    assert main(flags(model, conversations, *more)) == 0
    printed = capsys.readouterr()
    content: dict[str, Any] = json.loads(printed.out)
    assert content["loss_steps"] == steps
    first, final = f"{content['first_loss']:.4f}", f"{content['final_loss']:.4f}"
    assert said.format(first=first, final=final) in printed.err.splitlines()
    assert f"adapter saved to {conversations.parent / 'out'}" in printed.err.splitlines()


def test_the_mean_of_the_rest_is_of_the_rest(
    model: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {}
    for logging_steps in (1, 3):
        more = ("--max-steps", "5", "--logging-steps", str(logging_steps), "--json", "-")
        assert (
            main(flags(model, conversations, "--output-dir", str(conversations.parent / f"{logging_steps}"), *more))
            == 0
        )
        losses[logging_steps] = json.loads(capsys.readouterr().out)["losses"]
    each = losses[1]
    assert losses[3] == pytest.approx([sum(each[:3]) / 3, sum(each[3:]) / 2], rel=1e-3)


@pytest.mark.parametrize("dry", [True, False])
def test_a_warm_up_longer_than_the_epochs(
    model: Path, conversations: Path, capsys: pytest.CaptureFixture[str], dry: bool
) -> None:
    """Eight samples in batches of four for two epochs: four steps."""
    more = ["--max-steps", "none", "--num-epochs", "2", *(["--dry-run"] if dry else [])]
    assert main(flags(model, conversations, *more, "--warmup-steps", "5")) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "optimizer.warmup_steps: 5, and 8 samples in 2 epochs are 4 optimizer steps" in said
    assert "set warmup_steps to 4 or less, or raise schedule.num_epochs" in said
    assert not (conversations.parent / "out" / "adapter_model.safetensors").exists()
    assert main(flags(model, conversations, *more, "--warmup-steps", "4")) == 0


@pytest.mark.parametrize("epochs", ["0.4", "1", "2.5"])
@pytest.mark.parametrize(
    "changes", [{}, {"batch_size": "3", "gradient_accumulation_steps": "2"}, {"eval_fraction": "0.3"}]
)
def test_steps_are_counted_as_transformers_counts_them(
    model: Path, conversations: Path, capsys: pytest.CaptureFixture[str], epochs: str, changes: dict[str, str]
) -> None:
    given = {"max_steps": "none", "num_epochs": epochs, "batch_size": "1"} | changes
    more = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", value)]
    assert main(flags(model, conversations, *more, "--json", "-")) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert steps_over(load_recipe(RECIPES / "demo.yaml", given), 8) == steps >= math.ceil(float(epochs))


class LookedAtDataError(BaseException):
    """As a run does that goes on; no command catches it."""


def test_a_run_that_has_ended_says_so_at_once(
    model: Path, conversations: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--max-steps", "2", "--json", "-", "--resume")
    assert main(flags(model, conversations, *more)) == 0
    first = json.loads(capsys.readouterr().out)

    def never(*_: Any, **__: Any) -> None:
        raise LookedAtDataError

    with monkeypatch.context() as patched:
        patched.setattr("qlora_lowmem.commands.train.inputs_of", never)
        assert main(flags(model, conversations, *more)) == 0
        printed = capsys.readouterr()
        assert json.loads(printed.out) == first
        assert f"this run has ended already, on {first['environment']['date']}, after 2 steps" in printed.err
        assert "Nothing is left to train; to train again, give another --output-dir" in printed.err
        assert main(flags(model, conversations, *more, "--gradient-checkpointing", "false")) == 0
        for other in (["--dry-run"], ["--lora-r", "4"], ["--no-resume"]):
            with pytest.raises(LookedAtDataError):
                main(flags(model, conversations, *more, *other))
        conversations.write_text(conversations.read_text().replace("plus", "and"))
        with pytest.raises(LookedAtDataError):
            main(flags(model, conversations, *more))


def test_a_run_whose_adapter_is_gone_makes_it_again(
    model: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, adapter = ("--max-steps", "2", "--resume"), conversations.parent / "out" / "adapter_model.safetensors"
    assert main(flags(model, conversations, *more)) == 0
    content = adapter.read_bytes()
    adapter.unlink()
    assert main(flags(model, conversations, *more)) == 0
    assert adapter.read_bytes() == content
    assert "ended already" not in capsys.readouterr().err


def test_quiet_is_quiet(
    command: Callable[..., subprocess.CompletedProcess[str]], model: Path, conversations: Path
) -> None:
    run = command("train", *flags(model, conversations, "--max-steps", "1"))
    assert run.returncode == 0, run.stderr
    lines = run.stderr.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["loss", "adapter"], run.stderr
    assert run.stdout == ""
