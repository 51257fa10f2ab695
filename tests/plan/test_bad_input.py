"""What a user can get wrong: exit code 2 and one message that says what to do, before anything heavy is imported."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import EXIT_USAGE

main = partial(run_command, "plan")

OPTIMISED = ["--config", str(RECIPES / "optimised.yaml")]
CARD = ["--card", "rtx-4050-laptop-6gb"]
MODEL = ["--model", "granite-4.0-h-1b"]


def flags(*given: str) -> Callable[[Path], list[str]]:
    return lambda _folder: list(given)


CASES = [
    pytest.param(flags(*CARD), ("--config RECIPE", "--model MODEL"), id="nothing to plan"),
    pytest.param(flags(*OPTIMISED), ("--card NAME", "rtx-4050-laptop-6gb", "--gpu"), id="no card"),
    pytest.param(flags(*OPTIMISED, "--card", "rtx-4050"), ("--card", "Did you mean rtx-4050-laptop-6gb"), id="card"),
    pytest.param(flags(*MODEL, "--card", "rtx-5070"), ("--card", "a size such as 12GB"), id="card not in the table"),
    pytest.param(flags(*MODEL, "--card", "12"), ("--card: unknown card '12'",), id="a number is no card"),
    pytest.param(flags(*MODEL, "--card", "100MB"), ("the CUDA context alone takes",), id="no card's memory"),
    pytest.param(flags(*MODEL, "--memory", "lots"), ("--memory: 'lots' is not a size",), id="no size"),
    pytest.param(flags(*MODEL, "--gpu", "--memory", "8GB"), ("--memory: --gpu has its own",), id="two memories"),
    pytest.param(flags("--config", "nowhere.yaml", *CARD), ("nowhere.yaml: no such recipe",), id="recipe missing"),
    pytest.param(flags("--model", "granite-4.0-h-2b", *CARD), ("base.model", "Did you mean"), id="model"),
    pytest.param(flags(*MODEL, *CARD, "--seq", "1"), ("--seq", "1 is too few; give 2 to"), id="length of one"),
    pytest.param(
        flags(*MODEL, *CARD, "--seq", "65536", "--limit", "32768"), ("--seq: 65536", "--limit 32768"),
        id="length beyond limit",
    ),
    pytest.param(
        flags("--model", "smollm2-135m-instruct", *CARD, "--seq", "16384"), ("--seq", "8192 tokens at most"),
        id="length beyond the model",
    ),
    pytest.param(
        flags(*MODEL, *CARD, "--max-seq-length", "513", "--limit", "512"), ("--seq: 513", "--limit 512"),
        id="by its other name",
    ),
    pytest.param(flags(*OPTIMISED, "--card", "all", "rtx-4050"), ("Did you mean rtx-4050-lap",), id="all and one"),
    pytest.param(
        flags("--model", "nosuch", "nor-this", *CARD, "t4-16gb"), ("'nosuch' is no folder", "'nor-this' is no folder"),
        id="no model of a sweep",
    ),
    pytest.param(
        flags("--model", "someone/some-model", *CARD), ("config.json could not be fetched", "a local folder"),
        id="a hub that cannot be reached",
    ),
    pytest.param(flags(*MODEL, *CARD, "--step", "0"), ("--step: 0 is too few; give 1 to",), id="step"),
    pytest.param(flags(*MODEL, *CARD, "--lora-r", "0"), ("lora.lora_r", "at least 1"), id="a field"),
    pytest.param(flags(*MODEL, *CARD, "--cards", "x"), ("--cards", "did you mean --card"), id="unknown flag"),
    pytest.param(flags(*MODEL, *CARD, "--write", "mine.txt"), ("--write", ".yaml"), id="no recipe's name"),
    pytest.param(flags(*MODEL, *CARD, "--write", "no/such/mine.yaml"), ("--write", "does not exist"), id="no folder"),
    pytest.param(
        flags(*MODEL, *CARD, "t4-16gb", "--write", "mine.yaml"), ("--write", "2 pairs"), id="two pairs, one file"
    ),
]  # fmt: skip


@pytest.mark.parametrize(("build", "said"), CASES)
def test_bad_input(
    build: Callable[[Path], list[str]], said: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(build(tmp_path)) == EXIT_USAGE
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 1
    assert "Traceback" not in printed.err
    for text in said:
        assert text in printed.err


def test_a_file_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("lora:\n  lora_r: 8\n")
    assert main([*MODEL, *CARD, "--write", str(target)]) == EXIT_USAGE
    assert "--force" in capsys.readouterr().err
    assert target.read_text() == "lora:\n  lora_r: 8\n"


@pytest.mark.parametrize("arguments", [[*OPTIMISED, "--card", "none"], ["--help"]])
def test_it_is_refused_before_anything_heavy_is_imported(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom qlora_lowmem.commands.frame import run_command\n"
        f"try:\n    run_command('plan', {arguments!r})\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.splitlines()[-1] == "[]"


def test_without_a_gpu_the_one_of_this_machine_cannot_be_asked(capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for cards in (["--gpu"], ["--card", "all", "--gpu"]):
        assert main([*MODEL, *cards]) == EXIT_USAGE
        assert "--gpu needs a GPU that torch can use" in capsys.readouterr().err
