"""What an embedding will index is known before weights are read: positions, tokens, what batches are padded with."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.models.limits import Limits
from tiny_chat import write_tiny_chat

main = partial(run_command, "train")
generate = partial(run_command, "generate")

WIDTH: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY: dict[str, dict[str, Any]] = {
    "llama": WIDTH | {"intermediate_size": 16, "num_key_value_heads": 2, "max_position_embeddings": 24},
    "bloom": {"vocab_size": 64, "hidden_size": 16, "n_layer": 1, "n_head": 2},
    "opt": WIDTH | {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 24},
    "biogpt": WIDTH | {"intermediate_size": 16, "max_position_embeddings": 24},
    "gpt2": {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24},
    "gptj": {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, "rotary_dim": 4},
    "ctrl": {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24, "dff": 16},
    "mpt": {"vocab_size": 64, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 24},
}


@pytest.mark.parametrize("family", TINY)
def test_a_sequence_ends_where_the_model_says(family: str) -> None:
    config = AutoConfig.for_model(family, **TINY[family])
    with torch.device("meta"):
        limits = Limits.of(AutoModelForCausalLM.from_config(config))
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    assert limits.tokens == 64
    assert limits.positions == (None if family in ("llama", "bloom") else 24)

    def forward(token: int, length: int) -> None:
        with torch.no_grad():
            model(input_ids=torch.full((1, length), token), use_cache=False)

    forward(63, 24)
    with pytest.raises((IndexError, RuntimeError)):
        forward(64, 24)
    if limits.positions is None:
        forward(63, 48)
    else:
        with pytest.raises((IndexError, RuntimeError)):
            forward(63, 25)


def flags(model: Path, data: Path, *more: str) -> list[str]:
    recipe = ["--config", str(RECIPES / "demo.yaml"), "--model", str(model), "--data", str(data), "--quiet"]
    return [*recipe, "--max-steps", "1", "--output-dir", str(data.parent / "out"), *more]


@pytest.mark.parametrize("more", [["--dry-run"], [], ["--device", "virtual", "--card", "rtx-4050-laptop-6gb"]])
def test_positions_that_the_model_does_not_have(
    tmp_path: Path, conversations: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    content = AutoConfig.for_model("opt", **TINY["opt"]).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(content))
    arguments = ["--weights", "random", "--data", "synthetic", "--max-seq-length", "256", *more]
    assert main(flags(tmp_path, conversations, *arguments)) == 2
    if "--device" not in more:  # else the process on the card says it
        said = capsys.readouterr().err
        assert f"batch.max_seq_length: 256, and {str(tmp_path)!r} has a table of 24 positions" in said
        assert "Set batch.max_seq_length to 24 or less" in said
    assert main(flags(tmp_path, conversations, *arguments, "--max-seq-length", "24")) == 0


Change = Callable[[Any], object]


def with_tokenizer(folder: Path, change: Change) -> Path:
    """The tiny model, its tokenizer changed, as people change theirs."""
    write_tiny_chat(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("where", ["data", "eval_data"])
def test_tokens_that_the_model_does_not_know(
    tmp_path: Path, conversations: Path, capsys: pytest.CaptureFixture[str], dry: bool, where: str
) -> None:
    model = with_tokenizer(tmp_path / "model", lambda tokenizer: tokenizer.add_tokens(["<thought>"]))
    known, more = len(AutoTokenizer.from_pretrained(model)) - 1, ["--dry-run"] if dry else []
    assert main(flags(model, conversations, *more)) == 0, "nothing uses it"
    other = tmp_path / "other.jsonl"
    other.write_text(conversations.read_text().replace("It is", "<thought> It is"))
    given = ["--data", str(other)] if where == "data" else ["--eval-data", str(other)]
    capsys.readouterr()
    assert main(flags(model, conversations, *more, *given, "--output-dir", str(tmp_path / "second"))) == 2
    said = capsys.readouterr().err
    assert f"base.model: its tokenizer makes of {other} '<thought>', id {known}, and {str(model)!r} knows" in said
    assert f"knows {known} tokens, 0 to {known - 1}" in said


def test_a_token_to_pad_with_that_the_model_does_not_know(
    tmp_path: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_tokenizer(tmp_path / "model", lambda it: it.add_special_tokens({"pad_token": "[PAD]"}))
    assert main(flags(model, conversations)) == 2
    assert "its tokenizer pads batches with '[PAD]'" in capsys.readouterr().err
    assert main(flags(model, conversations, "--batch-size", "1")) == 0, "nothing is padded"


def test_a_tokenizer_without_pad_and_end(
    tmp_path: Path, conversations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def take_away(tokenizer: Any) -> None:
        tokenizer.pad_token = tokenizer.eos_token = None

    model, losses = tmp_path / "model", []
    for name, change in (("whole", lambda _: None), ("bare", take_away)):
        with_tokenizer(model, change)
        assert main(flags(model, conversations, "--json", "-", "--output-dir", str(tmp_path / name))) == 0
        losses.append(json.loads(capsys.readouterr().out)["losses"])
    assert losses[0] == losses[1], "padding has no loss"
    assert generate(["--run", str(tmp_path / "bare"), "--prompt", "a", "--max-new-tokens", "2", "--quiet"]) == 0
