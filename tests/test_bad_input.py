"""What a user can get wrong, and what each gets: exit code 2, one message that says what to do, no traceback."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import EXIT_USAGE

main = partial(run_command, "train")

OPTIMISED = str(RECIPES / "optimised.yaml")
GOOD_LINE = json.dumps({"text": "hello"}) + "\n"


def case(name: str, build: Callable[[Path], list[str]], *said: str) -> object:
    return pytest.param(build, said, id=name)


def recipe(text: str) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        (folder / "bad.yaml").write_text(text)
        return ["--config", str(folder / "bad.yaml")]

    return build


def data(content: bytes) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        (folder / "bad.jsonl").write_bytes(content)
        return ["--config", OPTIMISED, "--data", str(folder / "bad.jsonl")]

    return build


def parquet(content: bytes) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        (folder / "bad.parquet").write_bytes(content)
        return ["--config", OPTIMISED, "--data", str(folder / "bad.parquet")]

    return build


def flags(*given: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["--config", OPTIMISED, *given]


CASES = [
    case("no recipe named", lambda folder: [], "--config"),
    case("recipe missing", lambda folder: ["--config", str(folder / "none.yaml")], "none.yaml"),
    case("recipe is a folder", lambda folder: ["--config", str(folder)], "folder"),
    case("recipe empty", recipe(""), "empty"),
    case("recipe not a mapping", recipe("- a\n- b\n"), "bad.yaml"),
    case("YAML syntax", recipe("lora: {lora_r: 8\nbatch: x"), "bad.yaml, line 2"),
    case("unknown section", recipe("loras:\n  lora_r: 8\n"), "loras", "lora"),
    case("unknown field", recipe("lora:\n  rank: 8\n"), "rank", "lora_r"),
    case("field twice", recipe("lora:\n  lora_r: 8\n  lora_r: 16\n"), "lora_r", "twice"),
    case("text for a number", recipe("lora:\n  lora_r: eight\n"), "lora.lora_r", "eight"),
    case("fraction for a whole number", recipe("batch:\n  batch_size: 1.5\n"), "batch.batch_size", "1.5"),
    case("rank zero", recipe("lora:\n  lora_r: 0\n"), "lora.lora_r", "0"),
    case("dropout above one", recipe("lora:\n  lora_dropout: 1.5\n"), "lora.lora_dropout", "1.5"),
    case("unknown optimizer", flags("--optimizer", "adam"), "optimizer.optimizer", "adamw_torch"),
    case("memory over the card", flags("--max-memory", "101%"), "memory.max_memory", "101%"),
    case("memory without a unit that exists", flags("--max-memory", "5.5 Gb/s"), "memory.max_memory"),
    case("fp16 with bf16 adapters", flags("--compute-dtype", "fp16", "--adapter-dtype", "bf16"), "adapter_dtype"),
    case("state of another", flags("--optimizer", "sgd", "--optimizer-state-dtype", "fp32"), "set optimizer to adamw"),
    case("released gradients, summed", flags("--gradient-release", "--max-grad-norm", "0"), "accumulation_steps to 1"),
    case("unknown flag", flags("--max-seq-len", "512"), "--max-seq-length"),
    case("flag without a value", flags("--lora-r"), "--lora-r"),
    case("unknown card", flags("--device", "virtual", "--card", "rtx-4050"), "run.card", "rtx-4050-laptop-6gb"),
    case("unknown device", flags("--device", "tpu"), "run.device", "virtual"),
    case("model nowhere", flags("--model", "granite-4.0-h-2b"), "base.model", "granite-4.0-h-1b"),
    case("model folder missing", flags("--model", "./nowhere"), "base.model", "nowhere"),
    case("random weights, unknown hub id", flags("--model", "someone/model"), "base.model", "config.json"),
    case("data file missing", flags("--data", "nowhere.jsonl"), "nowhere.jsonl"),
    case("data empty", data(b""), "bad.jsonl"),
    case("data of an unknown kind", flags("--data", "some.csv"), "data.data", ".parquet"),
    case("hub data set out of reach", flags("--data", "nobody/nothing"), "nobody/nothing", "hf download"),
    case("Parquet that is none", parquet(b"PAR1"), "bad.parquet", "Parquet"),
    case("packing of a hybrid", flags("--packing", "--dry-run"), "batch.packing", "recurrent"),
    case("data not JSON", data(GOOD_LINE.encode() + b"{oops\n"), "bad.jsonl:2"),
    case("data not an object", data(b"[1, 2]\n"), "bad.jsonl:1"),
    case("data without a known key", data(b'{"question": "x"}\n'), "bad.jsonl:1", "messages"),
    case("data of two formats", data(GOOD_LINE.encode() + b'{"prompt": "a", "completion": "b"}\n'), "bad.jsonl:2"),
    case("data not UTF-8", data(b'{"text": "\xff\xfe"}\n'), "bad.jsonl:1"),
    case("wrong role", data(b'{"messages": [{"role": "robot", "content": "x"}]}\n'), "bad.jsonl:1", "robot"),
    case("no GPU", flags("--device", "cuda"), "run.device", "--device virtual"),
]


@pytest.mark.parametrize(("build", "said"), CASES)
def test_bad_input(
    build: Callable[[Path], list[str]], said: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = build(tmp_path)
    if "cuda" in arguments:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
    exit_code = main([*arguments, "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr()
    assert exit_code == EXIT_USAGE
    assert printed.err.count("error: ") == 1
    assert "Traceback" not in printed.err
    for text in said:
        assert text in printed.err


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        (
            "generate",
            ["--max-new-tokens", "9" * 20],
            "--max-new-tokens: 99999999999999999999 is too many; give 1 to 16777216",
        ),
        ("generate", ["--samples", "1.5"], "--samples: '1.5' is not a whole number"),
        ("longest", ["--config", OPTIMISED, "--limit", "9" * 30], "--limit"),
        ("lengths", ["--config", OPTIMISED, "--lengths", "1"], "--lengths: 1 is too few; give 2"),
        *(
            (command, ["--config", OPTIMISED, flag, value], f"{flag}: data.{flag[2:].replace('-', '_')} would change")
            for command in ("explain", "longest", "lengths", "phases")
            for flag, value in (
                *(("--data", "my.jsonl"), ("--train-on", "all"), ("--template", "none")),
                *(("--eval-data", "my.jsonl"), ("--eval-fraction", "0.1")),
            )
        ),
        ("plan", ["--config", OPTIMISED, "--card", "12GB", "--seq", "9" * 30], "--seq"),
        ("plan", ["--config", OPTIMISED, "--card", "12GB", "--memory", "9" * 30], "--memory"),
        ("plan", ["--config", OPTIMISED, "--card", "rtx-3060-12gb@2000GiB"], "at most (1 TiB)"),
        ("virtual-gpu", ["--card", "12GB", "--memory", "9" * 30, "--", "true"], "at most (1 TiB)"),
    ],
)
def test_bounds(command: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(command, words) == EXIT_USAGE
    assert said in capsys.readouterr().err


def test_target_modules_that_match_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", OPTIMISED, "--target-modules", "gate_proj", "--dry-run", "--output-dir", str(tmp_path)]
    assert main(arguments) == EXIT_USAGE
    assert "these match: in_proj (36)" in capsys.readouterr().err.lower()
