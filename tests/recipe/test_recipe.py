"""A recipe is read strictly: every fault names the field, where it was written, what is allowed and what to do."""

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lowmem.commands.frame import CommandParser
from qlora_lowmem.errors import EXIT_USAGE, UsageError
from qlora_lowmem.recipe import CAME_LATER, SECTIONS, Recipe, recipe_fields, recipe_hash
from qlora_lowmem.recipe.checks import field_specs
from qlora_lowmem.recipe.io import (
    add_override_arguments,
    lasting_path,
    load_recipe,
    overrides_from,
    recipe_from_dict,
    replace_field,
    words_for_another,
)
from qlora_lowmem.recipe.sections import Memory
from qlora_lowmem.units import GIB

RECIPES = Path(__file__).parents[2] / "bench" / "recipes"


def write(folder: Path, content: str | bytes, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


# (the file, the field or line that the message names, what is wrong, what to do)
BAD_RECIPES = [
    ("lora:\n  lora_r: 0", "line 2: lora.lora_r = 0", "out of range", "an integer at least 1"),
    ("lora:\n  lora_r: -8", "line 2: lora.lora_r = -8", "out of range", "an integer at least 1"),
    ('lora:\n  lora_r: "8"', 'line 2: lora.lora_r = "8"', "is text, because of the quotes", "write 8 without them"),
    ("lora:\n  lora_r: 1.5", "lora.lora_r = 1.5", "is not an integer", "an integer at least 1"),
    ("lora:\n  lora_r: 8.0", "lora.lora_r = 8.0", "is not written as an integer", "write 8"),
    ("lora:\n  lora_r: true", "lora.lora_r = true", "is not an integer", "the default (8)"),
    ("lora:\n  lora_r: null", "lora.lora_r = null", "is not allowed", "an integer at least 1"),
    ("lora:\n  lora_r:", "lora.lora_r = null", "is not allowed", "an integer at least 1"),
    ("lora:\n  lora_r: [8]", "lora.lora_r = [8]", "is not an integer", "an integer at least 1"),
    ("lora:\n  lora_r: {a: 1}", "lora.lora_r = a mapping", "is not a single value", "write `lora_r: value`"),
    ("lora:\n  lora_r: 010", "lora.lora_r = 010", "is octal", "plain decimal"),
    ("lora:\n  lora_r: 0x10", "lora.lora_r = 0x10", "hexadecimal", "plain decimal"),
    ("lora:\n  lora_r: !!python/name:os.system 1", "lora.lora_r", "cannot be read", "without a tag"),
    ("lora:\n  lora_dropout: 1.5", "lora.lora_dropout = 1.5", "out of range", "at least 0 and below 1"),
    ("lora:\n  lora_dropout: .nan", "lora.lora_dropout = .nan", "out of range", "at least 0 and below 1"),
    ("lora:\n  lora_dropout: none", "lora.lora_dropout = none", "is not a number", "at least 0 and below 1"),
    ("lora:\n  target_modules: atention", "lora.target_modules = atention", "not a preset", "did you mean attention?"),
    ("lora:\n  target_modules: q_proj", "lora.target_modules = q_proj", "not a preset", "write a list: [q_proj]"),
    ("lora:\n  target_modules: []", "lora.target_modules = []", "train nothing", "a list such as"),
    ("lora:\n  target_modules: [q_proj, 3]", "lora.target_modules", "holds 3", "names look like q_proj"),
    ("lora:\n  target_modules: [q_proj, q_proj]", "lora.target_modules", "q_proj twice", "remove the second"),
    ("lora:\n  target_modules: [attention, x]", "lora.target_modules", "mixes the preset", "or modules only"),
    ("lora:\n  target_modules: [[q], [v]]", "lora.target_modules", "not a single value", "write `target_modules"),
    (
        "lora:\n  target_modules: '.*[q_proj'",
        "lora.target_modules = '.*[q_proj'",
        "is not a regular expression (",
        "or a regular expression",
    ),
    (
        "lora:\n  exclude_modules: attention",
        "lora.exclude_modules = attention",
        "is not a regular expression",
        "write a list: [attention]",
    ),
    ("lora:\n  exclude_modules: []", "lora.exclude_modules = []", "excludes nothing", "the default (null)"),
    ("lora:\n  exclude_modules: [0]", "lora.exclude_modules", "holds 0", "names look like q_proj"),
    ("lora:\n  modules_to_save: lm_head", "lora.modules_to_save = lm_head", "is not a list", "[embed_tokens, lm_head]"),
    ("lora:\n  modules_to_save: [a.b, a.b]", "lora.modules_to_save", "names a.b twice", "remove the second"),
    ("lora:\n  trainable_token_indices: 5", "lora.trainable_token_indices = 5", "is not a list", "indices and texts"),
    ("lora:\n  trainable_token_indices: [-1]", "lora.trainable_token_indices", "holds -1", "indices and texts"),
    (
        "data:\n  added_tokens: [7]",
        "data.added_tokens = [7]",
        "holds 7, which is no token",
        '["<|step|>", "<|answer|>"]',
    ),
    ("optimizer:\n  warmup_ratio: 1", "optimizer.warmup_ratio = 1", "out of range", "at least 0 and below 1"),
    ("data:\n  eval_data: held.csv", "data.eval_data = held.csv", "is neither JSON Lines", "a .jsonl or .parquet file"),
    ("data:\n  neftune_noise_alpha: -5", "data.neftune_noise_alpha = -5", "out of range", "at most 1000"),
    ("lora:\n  target_modules: 3", "lora.target_modules = 3", "is not a list", "a list such as"),
    ("batch:\n  max_seq_length: 0", "batch.max_seq_length = 0", "out of range", "an integer at least 2"),
    ("batch:\n  packing: 'yes'", "batch.packing = 'yes'", "is not true or false", "without quotes"),
    ("batch:\n  packing: 1", "batch.packing = 1", "is not true or false", "true or false"),
    ("batch:\n  max_seq_lenght: 8", "batch.max_seq_lenght", "unknown key", "did you mean batch.max_seq_length?"),
    ("batch:\n  lora_r: 8", "line 2: batch.lora_r", "unknown key here", "stands in the section lora"),
    ("batch:\n  zzz: 8", "batch.zzz", "unknown key", "Known here: max_seq_length, batch_size"),
    ("lora_r: 8", "line 1: lora_r", "unknown key here", "stands in the section lora"),
    ("optimizer: sgd", "line 1: optimizer", "unknown key here", "stands in the section optimizer"),
    ("lora:\n  r: 8", "lora.r", "unknown key", "did you mean lora.lora_r?"),
    ("lorra:\n  lora_r: 8", "line 1: lorra", "unknown section", "did you mean lora?"),
    ("lora: 8", "line 1: the section lora", "holds 8 instead of fields", "write its fields indented"),
    ("lora:\nbatch:\n  packing: true", "line 1: the section lora", "is empty", "or remove the section"),
    ("lora:\n  lora_r: 8\n  lora_r: 4", "line 3: lora.lora_r", "twice (first on line 2)", "remove one"),
    ("lora:\n  lora_r: 8\nlora:\n  lora_r: 4", "line 3: lora", "twice (first on line 1)", "remove one"),
    ("3: x", "line 1: 3", "not a field's name", "name: value"),
    ("quantization:\n  quant_type: nf5", "quantization.quant_type = nf5", "did you mean nf4?", "nf4, fp4"),
    ("quantization:\n  compute_dtype: [bf16]", "quantization.compute_dtype", "not allowed", "auto, bf16"),
    ("optimizer:\n  learning_rate: '2e-4'", "optimizer.learning_rate = '2e-4'", "the quotes", "write 2e-4 without"),
    ("optimizer:\n  learning_rate: 0", "optimizer.learning_rate = 0", "out of range", "above 0 and at most 1"),
    ("optimizer:\n  learning_rate: .inf", "optimizer.learning_rate = .inf", "out of range", "at most 1"),
    ("optimizer:\n  learning_rate: 1" + "0" * 400, "optimizer.learning_rate", "out of range", "at most 1"),
    ("memory:\n  max_memory: 101%", "memory.max_memory = 101%", "not a percentage", '"N%" with N above 0'),
    ("memory:\n  max_memory: 0%", "memory.max_memory = 0%", "not a percentage", '"N%" with N above 0'),
    ("memory:\n  max_memory: -5%", "memory.max_memory = -5%", "not a percentage", '"N%" with N above 0'),
    ("memory:\n  max_memory: 5 Gb/s", "memory.max_memory = 5 Gb/s", "not a size", '"5.5 GiB"'),
    ("memory:\n  max_memory: 5 XB", "memory.max_memory = 5 XB", "unknown unit 'XB'", '"5.5 GiB"'),
    ("memory:\n  max_memory: 0.9", "memory.max_memory = 0.9", "is a fraction", 'write "90%"'),
    ("memory:\n  max_memory: 6", "memory.max_memory = 6", "less than anything needs", '"5.5 GiB"'),
    ("memory:\n  max_memory: true", "memory.max_memory = true", "is not a limit", '"5.5 GiB"'),
    ("base:\n  revision: 1234567", "base.revision = 1234567", "is not text", "put quotes around it"),
    ("base:\n  model: ''", "base.model = ''", "is empty", "the default (ibm-granite/"),
    ('base:\n  model: "a\\nb"', "base.model", "line break", "the default"),
    ("data:\n  data: train.json", "data.data = train.json", "is neither JSON Lines nor Parquet", ".jsonl"),
    ("data:\n  data: synthetc", "data.data = synthetc", "is neither JSON Lines", "did you mean synthetic?"),
    ("name: a/b", "line 1: name = a/b", "cannot name a folder", "use letters"),
    ("run:\n  output_dir: out/{recipe}", "run.output_dir", "holds a brace", "only {name} is replaced"),
    ("run:\n  device: gpu", "run.device = gpu", "is not allowed", "cuda"),
    ("", "mine.yaml", "is empty", "write at least one section"),
    ("# a comment", "mine.yaml", "is empty", "write at least one section"),
    ("- lora_r: 8", "mine.yaml", "holds a list", "a recipe is sections"),
    ("lora", "mine.yaml", "holds a single value", "a recipe is sections"),
    ("lora:\n  lora_r: [8", "mine.yaml, line 2", "not valid YAML", "correct that line"),
    ("lora:\n\tlora_r: 8", "mine.yaml, line 2", "not valid YAML", "spaces, not tabs"),
    ("lora:\n  lora_r: 8\n---\nlora: 3", "mine.yaml, line 3", "not valid YAML", "correct that line"),
    ("lora:\n  lora_r: *x", "mine.yaml, line 2", "undefined alias", "correct that line"),
    ("lora:\n  lora_r: \x01", "mine.yaml, line 2", "not valid YAML", "remove the character"),
    ("[" * 5000, "mine.yaml", "not valid YAML", ""),
]


@pytest.mark.parametrize(
    ("content", "named", "said", "advice"), BAD_RECIPES, ids=[f"{each[0][:30]!r}" for each in BAD_RECIPES]
)
def test_a_bad_recipe_is_refused(tmp_path: Path, content: str, named: str, said: str, advice: str) -> None:
    message = refusal(write(tmp_path, content))
    for part in (named, said, advice):
        assert part in message


CONTRADICTIONS = [
    ({"compute_dtype": "fp16", "adapter_dtype": "bf16"}, "loss scaling", "set adapter_dtype to fp32"),
    ({"warmup_steps": "9", "max_steps": "8"}, "longer than the run of 8", "set warmup_steps to 8 or less"),
    ({"warmup_steps": "9", "lr_scheduler": "constant"}, "has no warm-up", "constant_with_warmup"),
    ({"warmup_steps": "2", "warmup_ratio": "0.1"}, "how long the warm-up is", "set warmup_ratio to 0, or warmup_steps"),
    ({"warmup_ratio": "0.1", "lr_scheduler": "constant"}, "has no warm-up", "constant_with_warmup"),
    ({"eval_fraction": "0.1", "eval_data": "held.jsonl"}, "what is evaluated on", "set eval_fraction to 0"),
    ({"eval_data": "synthetic", "data": "here.jsonl"}, "show nothing that was learned", "name a file"),
    ({"revision": "main", "model": "./here"}, "this model is on disk", "remove revision"),
    ({"weights": "random", "model": "a.gguf"}, "a GGUF file is its weights", "set weights to pretrained"),
    ({"device": "cpu", "max_memory": "5 GiB"}, "the cap is one of GPU memory", 'set max_memory to "100%"'),
    ({"device": "cpu", "activation_offloading": "true"}, "in host memory already", "activation_offloading to false"),
    ({"device": "cpu", "optimizer": "paged_adamw_8bit"}, "has no GPU", "set optimizer to adamw_8bit"),
    ({"device": "cpu", "optimizer": "paged_adamw_32bit"}, "has no GPU", "set optimizer to adamw_torch"),
    ({"device": "cpu", "compute_dtype": "fp16"}, "is for GPUs", "set compute_dtype to auto"),
    ({"quantised_embeddings": "8bit", "lean": "false"}, "one of the lean implementations", "set lean to true"),
    ({"lean": "true", "gradient_checkpointing": "false"}, "which is checkpointing", "gradient_checkpointing to true"),
    ({"lean": "true", "loss": "full"}, "never holds the full logits", "set loss to fused"),
    ({"lean": "true", "activation_offloading": "true"}, "what is kept and where", "set checkpoints to host"),
    ({"optimizer_state_dtype": "fp32", "optimizer": "adamw_8bit"}, "of its own", "set optimizer to adamw_torch"),
    ({"gradient_release": "true", "optimizer": "sgd"}, "all weights at once", "set optimizer to adamw_torch"),
    ({"gradient_release": "true", "gradient_accumulation_steps": "2"}, "stay until the last", "steps to 1, or"),
    ({"gradient_release": "true", "compute_dtype": "fp16"}, "loss scaling", "set compute_dtype to bf16 or fp32"),
]


@pytest.mark.parametrize(("overrides", "why", "advice"), CONTRADICTIONS)
def test_a_contradiction_names_both_fields(tmp_path: Path, overrides: dict[str, str], why: str, advice: str) -> None:
    message = refusal(write(tmp_path, "lora:\n  lora_r: 8\n"), overrides)
    for leaf, value in overrides.items():
        spec = field_specs()[leaf]
        plain = value.replace(".", "").isdigit() or value in ("true", "false")
        shown = value if plain else repr(value)
        assert f"{spec.path} = {shown} ({spec.flag})" in message
    assert "contradict each other: " in message
    assert why in message
    assert advice in message


@pytest.mark.parametrize("leaf", ["modules_to_save", "trainable_token_indices", "added_tokens"])
def test_what_is_trained_is_not_quantised(tmp_path: Path, leaf: str) -> None:
    message = refusal(write(tmp_path, "lean:\n  lean: true\n  quantised_embeddings: 8bit\n"), {leaf: "lm_head"})
    assert f"(line 3) and {field_specs()[leaf].path} = ['lm_head']" in message
    assert f"set quantised_embeddings to none, or {leaf} to null" in message


def test_released_gradients_go_with_what_needs_no_gradient_later(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer:\n  gradient_release: true\n")
    message = refusal(path)
    assert "2 problems" in message, "accumulation and clipping are there by default"
    assert "optimizer.gradient_release = true (line 2) and optimizer.max_grad_norm = 1.0 (the default)" in message
    assert "set max_grad_norm to 0, or gradient_release to false" in message
    recipe = load_recipe(path, {"gradient_accumulation_steps": 1, "max_grad_norm": 0, "optimizer_state_dtype": "fp32"})
    assert recipe.optimizer.gradient_release


def test_a_contradiction_names_the_line_or_the_default(tmp_path: Path) -> None:
    path = write(tmp_path, "run:\n  device: cpu\nmemory:\n  max_memory: 5 GiB\n")
    message = refusal(path)
    assert "memory.max_memory = '5 GiB' (line 4) and run.device = 'cpu' (line 2)" in message
    assert load_recipe(path, {"device": "cuda"}).memory.max_memory == "5 GiB"


def test_all_faults_come_in_one_message(tmp_path: Path) -> None:
    path = write(tmp_path, "lora:\n  lora_r: 0\n  r: 1\nbatch:\n  packing: 3\n")
    message = refusal(path, {"seed": "x", "compute_dtype": "fp16", "adapter_dtype": "bf16"})
    assert message.splitlines()[0] == f"{path}: 5 problems"
    assert len(message.splitlines()) == 6


def test_a_faulty_field_is_not_also_a_contradiction(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "run:\n  device: cpu\nmemory:\n  max_memory: 500%\n"))
    assert "1 problem" in message


# (arguments, what the message names, what to do)
BAD_ARGUMENTS = [
    (["--lora-r", "0"], "--lora-r: lora.lora_r = '0'", "an integer at least 1"),
    (["--lora-r", "eight"], "--lora-r: lora.lora_r = 'eight' is not an integer", "an integer at least 1"),
    (["--lora-r", "8.5"], "--lora-r: lora.lora_r = '8.5' is not an integer", "an integer at least 1"),
    (["--lora-r", ""], "--lora-r: lora.lora_r = ''", "an integer at least 1"),
    (["--seed", "9" * 5000], "--seed: schedule.seed", "at most 4294967295"),
    (["--learning-rate", "nan"], "--learning-rate: optimizer.learning_rate = 'nan' is out of range", "at most 1"),
    (["--learning-rate", "fast"], "--learning-rate: optimizer.learning_rate = 'fast' is not a number", "at most 1"),
    (["--packing", "maybe"], "--packing: batch.packing = 'maybe' is not true or false", "true or false"),
    (["--loss", "fusd"], "--loss: memory.loss = 'fusd'", "did you mean fused?"),
    (["--max-memory", "0.9"], "--max-memory: memory.max_memory = '0.9' is a fraction", 'write "90%"'),
    (["--max-memory", "200%"], "--max-memory: memory.max_memory = '200%' is not a percentage", "up to 100"),
    (["--target-modules", "all_linear"], "--target-modules: lora.target_modules", "did you mean all-linear?"),
    (["--target-modules", "q_proj,,v_proj"], "--target-modules: lora.target_modules", "names look like q_proj"),
    (["--batch-size", "none"], "--batch-size: batch.batch_size = 'none'", "an integer at least 1"),
    (["--lora-rr", "8"], "unrecognized arguments: --lora-rr 8", "did you mean --lora-r?"),
    (["--max-seq", "8"], "unrecognized arguments: --max-seq 8", "--help lists every flag"),
    (["--lora-r"], "argument --lora-r: expected one argument", "--help lists every flag"),
]


def parse(arguments: list[str]) -> dict[str, str]:
    parser = CommandParser("train")
    add_override_arguments(parser)
    return overrides_from(parser.parse_args(arguments))


@pytest.mark.parametrize(("arguments", "named", "advice"), BAD_ARGUMENTS)
def test_a_bad_argument_is_refused(arguments: list[str], named: str, advice: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(RECIPES / "baseline.yaml", parse(arguments))
    assert named in str(caught.value)
    assert advice in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "leaf", "value"),
    [
        (["--max-seq-length", "512"], "max_seq_length", 512),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--max-steps", "none"], "max_steps", None),
        (["--packing"], "packing", True),
        (["--packing", "true"], "packing", True),
        (["--no-double-quant"], "double_quant", False),
        (["--gradient-checkpointing"], "gradient_checkpointing", True),
        (["--no-gradient-checkpointing"], "gradient_checkpointing", False),
        (["--double-quant", "false"], "double_quant", False),
        (["--target-modules", "attention-qv"], "target_modules", "attention-qv"),
        (["--target-modules", "q_proj"], "target_modules", ("q_proj",)),
        (["--target-modules", "q_proj, mamba.in_proj"], "target_modules", ("q_proj", "mamba.in_proj")),
        (["--target-modules", r".*[0-3]\.q_proj"], "target_modules", r".*[0-3]\.q_proj"),
        (["--exclude-modules", "layers.0,lm_head"], "exclude_modules", ("layers.0", "lm_head")),
        (["--exclude-modules", r".*\.[0-9]{1,2}\..*"], "exclude_modules", r".*\.[0-9]{1,2}\..*"),
        (["--exclude-modules", "none"], "exclude_modules", None),
        (["--modules-to-save", "embed_tokens, lm_head"], "modules_to_save", ("embed_tokens", "lm_head")),
        (["--trainable-token-indices", "5,<|a|>"], "trainable_token_indices", (5, "<|a|>")),
        (["--added-tokens", "<|a|>,7"], "added_tokens", ("<|a|>", "7")),
        (["--eval-data", "held.jsonl"], "eval_data", "held.jsonl"),
        (["--warmup-ratio", "0.03"], "warmup_ratio", 0.03),
        (["--max-memory", "5368709120"], "max_memory", 5 * GIB),
        (["--max-memory", "5.5 GiB"], "max_memory", "5.5 GiB"),
        (["--data", "here.jsonl"], "data", "here.jsonl"),
        (["--output-dir", "out/{name}"], "output_dir", "out/baseline"),
        (["--name", "other"], "output_dir", "outputs/other"),
    ],
)
def test_every_kind_of_field_is_overridden(arguments: list[str], leaf: str, value: object) -> None:
    recipe = load_recipe(RECIPES / "baseline.yaml", parse(arguments))
    assert getattr(getattr(recipe, field_specs()[leaf].section), leaf) == value


def test_no_argument_overrides_nothing() -> None:
    assert parse([]) == {}


def test_the_help_teaches_each_field_and_its_memory() -> None:
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=10_000))
    add_override_arguments(parser)
    text = parser.format_help()
    for spec in field_specs().values():
        assert f"{spec.flag} " in text
        assert spec.help in text
        assert f"Memory: {spec.memory}." in text


def test_leaf_names_are_unique_and_every_field_is_documented() -> None:
    fields = list(recipe_fields())
    assert len({each.name for _, each in fields}) == len(fields)
    assert {section for section, _ in fields} == {"", *SECTIONS}
    assert all(each.metadata["help"] and each.metadata["memory"] for _, each in fields)


def test_a_plain_exponent_without_a_dot_is_a_number(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer:\n  learning_rate: 2e-4\nbase:\n  revision: 1e10\n")
    recipe = load_recipe(path)
    assert recipe.optimizer.learning_rate == 2e-4
    assert recipe.base.revision == "1e10"


def test_an_unquoted_yaml_truth_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeffbatch:\n  packing: yes\n")
    assert load_recipe(path).batch.packing is True


def test_name_output_folder_and_data_follow_the_file(tmp_path: Path) -> None:
    content = "data:\n  data: sub/../train.jsonl\n  eval_data: held.parquet\n"
    recipe = load_recipe(write(tmp_path, content, "first.yaml"))
    assert recipe.data.eval_data == str(tmp_path / "held.parquet")
    assert recipe.name == "first"
    assert recipe.run.output_dir == "outputs/first"
    assert recipe.data.data == str(tmp_path / "train.jsonl")


def test_a_missing_recipe_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "lora:\n  lora_r: 8\n", "optimised.yaml")
    assert f"Did you mean {tmp_path / 'optimised.yaml'}?" in refusal(tmp_path / "optimized.yaml")
    assert "Recipes near" in refusal(tmp_path / "zzz.yaml")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder, not a recipe" in refusal(tmp_path)


def test_other_encodings_are_refused_with_the_line(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, b"lora:\n  lora_r: 8 # caf\xe9\n"))
    assert "line 2: byte 0xe9 is not UTF-8; save the file as UTF-8" in message


def test_an_override_of_no_field_suggests_one(tmp_path: Path) -> None:
    path = write(tmp_path, "lora:\n  lora_r: 8\n")
    assert "override lora_rank: unknown key; did you mean lora.lora_r?" in refusal(path, {"lora_rank": "8"})


def test_overrides_need_not_be_text(tmp_path: Path) -> None:
    path = write(tmp_path, "lora:\n  lora_r: 8\n")
    recipe = load_recipe(path, {"lora-r": 4, "packing": True, "target_modules": ["q_proj"], "max_steps": None})
    assert (recipe.lora.lora_r, recipe.batch.packing, recipe.lora.target_modules) == (4, True, ("q_proj",))
    assert "lora.lora_r = 4.5 is not an integer" in refusal(path, {"lora_r": 4.5})


def test_one_field_is_replaced_and_all_is_checked_again() -> None:
    recipe = load_recipe(RECIPES / "baseline.yaml")
    assert replace_field(recipe, "lora_r", 4).lora.lora_r == 4
    assert replace_field(recipe, "lora_r", 16) == recipe
    with pytest.raises(UsageError, match=r"lora\.lora_r = 0 is out of range"):
        replace_field(recipe, "lora_r", 0)
    with pytest.raises(UsageError, match="contradict each other"):
        replace_field(replace_field(recipe, "max_memory", "5 GiB"), "device", "cpu")


@pytest.mark.parametrize(
    ("limit", "total", "count"),
    [
        ("100%", 6 * GIB, 6 * GIB),
        ("50 %", 6 * GIB, 3 * GIB),
        ("99.9%", 1000, 999),
        ("5.5 GiB", 6 * GIB, 11 * GIB // 2),
        ("8 GiB", 6 * GIB, 6 * GIB),
        (2**30, 6 * GIB, GIB),
    ],
)
def test_the_memory_limit_in_bytes(limit: str | int, total: int, count: int) -> None:
    assert Memory(max_memory=limit).memory_limit_bytes(total) == count


# Fields some of whose values contradict what another field says by default.
NEED_ANOTHER_FIELD = (
    "warmup_steps",
    "warmup_ratio",
    "eval_steps",
    "device",
    "adapter_dtype",
    "lean",
    "quantised_embeddings",
)
NEED_ANOTHER_FIELD += ("optimizer_state_dtype", "gradient_release")


@settings(max_examples=25)
@given(data=st.data())
def test_a_recipe_written_out_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    recipe = load_recipe(RECIPES / "baseline.yaml")
    for spec in field_specs().values():
        limits = spec.limits
        values: st.SearchStrategy[Any] | None = {
            "int": st.integers(int(limits.get("min", 0)), int(limits.get("max", limits.get("min", 0) + 9))),
            "float": st.floats(
                max(limits.get("min", 0), limits.get("above", 0)), 1, exclude_min=True, exclude_max=True
            ),
            "choice": st.sampled_from(spec.choices or ("",)),
            "bool": st.booleans(),
        }.get(spec.kind)
        if values is not None and spec.name not in NEED_ANOTHER_FIELD:
            recipe = replace_field(recipe, spec.name, data.draw(values))
    again = load_recipe(write(tmp_path_factory.mktemp("recipe"), recipe.to_yaml()))
    assert again == recipe
    assert recipe_hash(again) == recipe_hash(recipe)


def test_the_hash_is_of_the_job_not_of_its_place() -> None:
    recipe = load_recipe(RECIPES / "demo.yaml", {"device": "virtual"})
    same = {"name": "x", "output_dir": "y", "device": "cuda", "card": "z", "resume": False, "logging_steps": 7}
    other = {"lora_r": 9, "seed": 1, "max_memory": "90%", "pin_memory": True, "max_steps": 3, "data": "b.jsonl"}
    for leaf, value in {**same, "save_steps": 9, "save_total_limit": 9, "data": "/elsewhere/demo.jsonl"}.items():
        assert recipe_hash(replace_field(recipe, leaf, value)) == recipe_hash(recipe), leaf
    for leaf, value in other.items():
        assert recipe_hash(replace_field(recipe, leaf, value)) != recipe_hash(recipe), leaf
    assert len(recipe_hash(recipe)) == 12
    assert int(recipe_hash(recipe), 16) >= 0


def test_a_field_that_came_later_leaves_the_hash_as_it_was_where_it_changes_nothing() -> None:
    recipe = load_recipe(RECIPES / "demo.yaml")
    assert recipe_hash(recipe) == "234782204e5a", "as in results recorded before these fields came"
    later: dict[str, object] = {
        "template": "none",
        "use_rslora": True,
        "exclude_modules": ("q_proj",),
        "warmup_ratio": 0.1,
    }
    later |= {"modules_to_save": ("lm_head",), "trainable_token_indices": (3, "<|a|>"), "added_tokens": ("<|b|>",)}
    for leaf, value in {**later, "eval_data": "held.jsonl", "neftune_noise_alpha": 5.0}.items():
        changed = replace_field(recipe, leaf, value)
        assert recipe_hash(changed) != recipe_hash(recipe), leaf
        assert recipe_from_dict(changed.to_dict()) == changed
    old = recipe.to_dict()
    for section, leaf in CAME_LATER:
        del old[section][leaf]
    assert recipe_from_dict(old) == recipe


def test_recipe_and_data_load_without_torch() -> None:
    code = (
        "import sys, qlora_lowmem.recipe.io, qlora_lowmem.recipe.moves, qlora_lowmem.data\n"
        "print(sorted({'torch', 'transformers', 'trl', 'peft', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# The recipes that ship.

MAY_STAY_DEFAULT = {"name", "logging_steps", "save_steps", "save_total_limit", "eval_steps"} | {
    each.name for section, each in recipe_fields() if section == "run"
}
ONE_CHANGE = {
    ("baseline", "r8"): {"lora_r": 8, "lora_alpha": 16},
    ("baseline", "seq1024"): {"max_seq_length": 1024},
    ("baseline", "checkpointing"): {"gradient_checkpointing": True},
    ("baseline", "targets-qv"): {"target_modules": "attention-qv"},
    ("baseline", "fused-loss"): {"loss": "fused"},
    ("baseline", "optimised"): {
        "lora_r": 8,
        "lora_alpha": 16,
        "max_seq_length": 1024,
        "gradient_checkpointing": True,
        "loss": "fused",
    },
    ("optimised", "seq512"): {"max_seq_length": 512},
    ("optimised", "seq256"): {"max_seq_length": 256},
    ("optimised", "r4"): {"lora_r": 4, "lora_alpha": 8},
    ("optimised", "accumulation16"): {"gradient_accumulation_steps": 16},
    ("optimised", "optimised-qv"): {"target_modules": "attention-qv"},
    ("optimised", "lean"): {
        "lean": True,
        "target_modules": "all-linear",
        "loss_tile_bytes": 16777216,
    },
    ("lean", "lean-host"): {
        "checkpoints": "host",
        "max_seq_length": 131072,
        "gradient_accumulation_steps": 1,
        "expandable_segments": True,
    },
}
SHIPPED = sorted({name for pair in ONE_CHANGE for name in pair} | {"demo"})


def leaves(recipe: Recipe) -> dict[str, Any]:
    plain = recipe.to_dict()
    return {name: (plain[spec.section] if spec.section else plain)[name] for name, spec in field_specs().items()}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_states_every_knob_beside_a_comment(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    text = path.read_text()
    stated = {leaf for section in yaml.safe_load(text).values() for leaf in section}
    assert set(field_specs()) - stated <= MAY_STAY_DEFAULT
    assert text.startswith("# ")
    knobs = [line for line in text.splitlines() if line.startswith("  ")]
    assert len(knobs) == len(stated)
    assert all(" # " in line and len(line) <= 120 for line in knobs)
    assert load_recipe(path).name == name


@pytest.mark.parametrize(("pair", "change"), ONE_CHANGE.items(), ids=[pair[1] for pair in ONE_CHANGE])
def test_a_recipe_of_the_matrix_differs_by_what_its_first_lines_say(
    pair: tuple[str, str], change: dict[str, Any]
) -> None:
    before, after = (leaves(load_recipe(RECIPES / f"{name}.yaml")) for name in pair)
    differing = {leaf: after[leaf] for leaf in after if after[leaf] != before[leaf]}
    assert {leaf: value for leaf, value in differing.items() if leaf not in ("name", "output_dir")} == change
    heading = (RECIPES / f"{pair[1]}.yaml").read_text().split("\n\n")[0]
    assert f"{pair[0]}.yaml" in heading
    heading = " ".join(heading.replace("\n#", " ").split())
    for leaf, value in change.items():
        assert f"{leaf} {str(value).lower() if isinstance(value, bool) else value}" in heading


def test_every_number_has_an_upper_bound() -> None:
    numbers = [spec for spec in field_specs().values() if spec.kind in ("int", "float")]
    assert [spec.path for spec in numbers if not {"max", "below"} & spec.limits.keys()] == []


def test_of_a_thousand_faults_the_first_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text("".join(f"key{number}: 1\n" for number in range(1000)))
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 1000 problems")
    assert message.endswith("... and 960 more")


def test_what_comes_through_a_pipe_can_be_read_again_by_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    reader, writer = os.pipe()
    os.write(writer, b"lora: {lora_r: 5}\ndata: {data: mine.jsonl, eval_data: held.jsonl}\n")
    os.close(writer)
    path = f"/dev/fd/{reader}"
    recipe = load_recipe(path, {"lora_alpha": 7})
    assert recipe.data.data == "mine.jsonl", "relative to the working folder: a pipe lies in none"
    copy = lasting_path(path, recipe)
    for _ in range(2):
        again = load_recipe(copy)
        assert (again.name, again.lora) == (recipe.name, recipe.lora)
        assert (again.data.data, again.data.eval_data) == (f"{tmp_path}/mine.jsonl", f"{tmp_path}/held.jsonl")
    cat = [sys.executable, "-c", "import sys; print(open(sys.argv[1]).read())", copy]
    assert "lora_r: 5" in subprocess.run(cat, capture_output=True, text=True, check=True).stdout
    flag, another = words_for_another(path, recipe)
    assert (flag, load_recipe(another)) == ("--config", again)


def test_a_file_is_read_again_where_it_is(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lora: {lora_r: 5}\n")
    assert lasting_path(file, load_recipe(file)) == str(file)
    assert words_for_another(file, load_recipe(file)) == []


def test_the_fields_of_a_section_are_told_once_however_many_keys_are_unknown(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("".join(f"zzz{n}: 1\n" for n in range(60)) + "lora: {zzz: 1, yyyy: 2}\n")
    with pytest.raises(UsageError) as refused:
        load_recipe(file)
    message = str(refused.value)
    assert message.count("unknown key; remove it") == 40
    assert message.count("Known here: name, base") == 1
    assert message.endswith("... and 22 more")
    assert len(message) < 4000
