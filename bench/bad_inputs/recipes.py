"""What a recipe's fields do not take, in a file and on the command line of every command that has them."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from bad_inputs import Case, Place
from qlora_lowmem.recipe.checks import FieldSpec, field_specs

_LONG = "9" * 30
_OF_ANY_KIND: dict[str, Any] = {"a mapping": {"a": 1}, "lists in a list": [["a"]]}
_BY_KIND: dict[str, dict[str, Any]] = {
    "bool": {"text": "true", "a number": 2, "a list": [True], "a fraction": 0.5},
    "int": {
        "text": "eight",
        "a quoted number": "8",
        "a fraction": 1.5,
        "true": True,
        "a list": [8],
        "nan": float("nan"),
        "30 digits": int(_LONG),
        "minus 30 digits": -int(_LONG),
    },
    "float": {
        "text": "much",
        "a quoted number": "0.5",
        "true": True,
        "nan": float("nan"),
        "inf": float("inf"),
        "minus inf": -float("inf"),
        "1e300": 1e300,
        "negative": -1.0,
    },
    "choice": {
        "an unknown one": "nonesuch",
        "a number": 3,
        "a list": ["none"],
        "empty": "",
        "10,000 letters": "x" * 10**4,
    },
    "str": {"a number": 3, "empty": "", "blanks": "  ", "a line break": "a\nb", "a list": ["a"]},
    "name": {"a slash": "a/b", "a dot first": ".a", "empty": "", "a number": 3, "braces": "{name}"},
    "path": {"empty": "", "a number": 3, "a brace": "out/{nam}", "a control character": "a\x07", "above": "../../x"},
    "data": {"a spreadsheet": "a.xlsx", "empty": "", "a number": 3, "a list": ["a.jsonl"], "not there": "none.jsonl"},
    "memory": {
        "a fraction": 0.9,
        "more than all": "101%",
        "an unknown unit": "5 Gb/s",
        "nothing": 0,
        "negative": -5,
        "true": True,
        "empty": "",
        "a share of 400 digits": "9" * 400 + "%",
    },
    "modules": {
        "a misspelt preset": "all-linaer",
        "an empty list": [],
        "a number": 3,
        "no module's name": ["q-proj"],
        "a name twice": ["q_proj", "q_proj"],
        "no expression": "(q_proj",
        "none of the model's": ["nonesuch_proj"],
    },
    "exclusions": {"a number": 3, "an empty list": [], "no expression": "*(q", "no module's name": ["q proj"]},
    "names": {"text": "lm_head", "a number": 3, "an empty list": [], "no module's name": ["lm head"]},
    "tokens": {"text": "<|a|>", "a number": 3, "an empty list": [], "below 0": [-1], "a fraction": [1.5]},
    "words": {"text": "<|a|>", "a number": 3, "an empty list": [], "an index": [7]},
}
_ON_THE_COMMAND_LINE: dict[str, list[str]] = {
    "bool": ["maybe", "2"],
    "int": ["eight", "1.5", _LONG, "-" + _LONG, "nan", ""],
    "float": ["much", "nan", "inf", "-inf", "1e999", "0x1p3", ""],
    "choice": ["nonesuch", "", "None of these"],
    "str": ["", "a\tb"],
    "name": ["a/b", "..", ""],
    "path": ["", "a{b}", "a\nb"],
    "data": ["a.xlsx", "", "nowhere/none.jsonl"],
    "memory": ["101%", "-5", "6 GiB of it", "0", "nan", "9" * 400],
    "modules": ["all-linaer", "q-proj,v-proj", "q_proj,q_proj", "(q_proj", ","],
    "exclusions": ["*(q", "q-proj", ","],
    "names": ["lm-head", ","],
    "tokens": [",", "5,5"],
    "words": [",", "<|a|>,<|a|>"],
}
_CONTRADICTIONS: list[dict[str, Any]] = [
    {"compute_dtype": "fp16", "adapter_dtype": "bf16", "device": "cuda"},
    {"optimizer": "sgd", "optimizer_state_dtype": "fp32"},
    {"gradient_release": True, "optimizer": "sgd", "max_grad_norm": 0, "gradient_accumulation_steps": 1},
    {"gradient_release": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0},
    {"gradient_release": True, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0},
    {"warmup_steps": 9, "max_steps": 2},
    {"warmup_steps": 1, "warmup_ratio": 0.5},
    {"lr_scheduler": "constant", "warmup_ratio": 0.5},
    {"lr_scheduler": "constant", "warmup_steps": 1},
    {"eval_steps": 1},
    {"eval_data": "synthetic"},
    {"eval_fraction": 0.5, "eval_data": "GOOD"},
    {"model": "./none.gguf", "weights": "random"},
    {"model": "./none.gguf", "revision": "main"},
    {"quantised_embeddings": "int8"},
    {"lean": True, "gradient_checkpointing": False},
    {"lean": True, "loss": "full"},
    {"lean": True, "activation_offloading": True},
    {"device": "cpu", "max_memory": "50%"},
    {"device": "cpu", "activation_offloading": True},
    {"device": "cpu", "optimizer": "paged_adamw_8bit"},
    {"device": "cpu", "compute_dtype": "fp16"},
    {"report_to": "mlflow"},
]
_TEXTS = {
    "empty": "",
    "blanks": "  \n\n",
    "a comment alone": "# nothing\n",
    "a list": "- a\n- b\n",
    "one value": "lora_r\n",
    "a brace that stays open": "lora: {lora_r: 8\n",
    "a tab for indentation": "lora:\n\tlora_r: 8\n",
    "two documents": "lora:\n  lora_r: 8\n---\nlora:\n  lora_r: 9\n",
    "a tag of Python": "lora: !!python/object/apply:os.system ['true']\n",
    "a tag on a value": "lora:\n  lora_r: !!binary aGk=\n",
    "an alias without an anchor": "lora: *nobody\n",
    "an alias in itself": "lora: &a [*a]\n",
    "aliases of aliases": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrstuvwxyz")),
    "merged keys": "lora: {<<: {lora_r: 8}}\n",
    "an unknown section": "loras:\n  lora_r: 8\n",
    "an unknown field": "lora:\n  rank: 8\n",
    "a field in another section": "batch:\n  lora_r: 8\n",
    "a field twice": "lora:\n  lora_r: 8\n  lora_r: 9\n",
    "a section twice": "lora:\n  lora_r: 8\nlora:\n  lora_r: 9\n",
    "an empty section": "lora:\n",
    "a section that is a list": "lora: [8]\n",
    "a section that is a number": "lora: 8\n",
    "a number for a key": "8: lora\n",
    "null for a key": "~: lora\n",
    "a list for a key": "? [a]\n: 8\n",
    "an octal number": "lora:\n  lora_r: 010\n",
    "a hexadecimal number": "lora:\n  lora_r: 0x10\n",
    "a date": "lora:\n  lora_r: 2020-01-01\n",
    "minutes": "lora:\n  lora_r: 1:30\n",
    "5,000 digits": f"lora:\n  lora_r: {'9' * 5000}\n",
    "a control character": "lora:\n  lora_r: 8 \x07\n",
    "100,000 open brackets": "[" * 100_000,
    "100,000 levels": "".join(f"{' ' * n}a:\n" for n in range(600)),
    "JSON that is torn": '{"lora": {"lora_r": ',
    "no YAML but TOML": "[lora]\nlora_r = 8\n",
    "Axolotl's": "base_model: x\nadapter: qlora\nmicro_batch_size: 1\n",
    "LLaMA-Factory's": "model_name_or_path: x\nfinetuning_type: lora\nstage: sft\n",
    "1,000 unknown keys": "".join(f"key{n}: 1\n" for n in range(1000)),
}


def cases() -> Iterator[Case]:
    """Every field with every kind of wrong value, contradictions, texts that are no recipe."""
    specs = field_specs()
    for name, spec in specs.items():
        for what, value in _values(spec):
            yield Case("train", f"{spec.path}: {what}", _with_field(spec, value), (name,))
    for number, changes in enumerate(_CONTRADICTIONS):
        yield Case("train", f"contradiction {number}: {json.dumps(changes)}", _with_flags(changes), _named(changes))
    for what, text in _TEXTS.items():
        yield Case("train", f"a recipe: {what}", _with_text(text))
    others = itertools.cycle(["explain", "longest", "lengths", "phases", "plan", "train"])
    own = {
        "plan": (
            "name",
            "model",
            "weights",
            "max_seq_length",
            "data",
            "train_on",
            "device",
            "card",
            "output_dir",
            "resume",
        )
    }
    for name, spec in specs.items():
        for text in _ON_THE_COMMAND_LINE[spec.kind]:
            command = next(each for each in others if name not in own.get(each, ()))
            command = "train" if spec.kind == "data" else command  # the others train on synthetic samples
            yield Case(command, f"{spec.flag}: {text[:40]!r}", _with_flag(command, spec, text), (name,))


def _values(spec: FieldSpec) -> Iterator[tuple[str, Any]]:
    if not spec.optional:
        yield "null", None
    for key, step in (("min", -1), ("max", 1), ("above", 0), ("below", 0)):
        if key in spec.limits:
            yield f"beyond {key}", spec.limits[key] + step
    for what, value in (_BY_KIND[spec.kind] | _OF_ANY_KIND).items():
        if spec.kind == "float" and what == "negative" and spec.limits.get("min", spec.limits.get("above", -2)) < -1:
            continue
        yield what, value


def _with_field(spec: FieldSpec, value: Any) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        content = yaml.safe_load((place.good / "good.yaml").read_text())
        content["data"]["data"] = str(place.good / "data.jsonl")
        if spec.section:
            content.setdefault(spec.section, {})[spec.name] = value
        else:
            content[spec.name] = value
        path = place.folder / "bad.yaml"
        path.write_text(yaml.safe_dump(content, allow_unicode=True))
        return ["--config", str(path), "--quiet"]

    return words


def _with_flags(changes: dict[str, Any]) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        flags = ["--config", place.recipe, "--quiet", "--output-dir", str(place.folder / "out")]
        for name, value in changes.items():
            text = {True: "true", False: "false"}.get(value, value) if isinstance(value, bool) else value
            flags += [f"--{name.replace('_', '-')}", str(place.good / "held-out.jsonl" if text == "GOOD" else text)]
        return flags

    return words


def _named(changes: dict[str, Any]) -> tuple[str, ...]:
    return (next(iter(changes)),)


def _with_text(text: str) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        (place.folder / "bad.yaml").write_text(text)
        return ["--config", str(place.folder / "bad.yaml"), "--quiet"]

    return words


def _with_flag(command: str, spec: FieldSpec, text: str) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        more = {"plan": ["--card", "12GB", "--no-cache"], "train": ["--quiet"]}.get(command, [])
        return ["--config", place.recipe, *more, f"{spec.flag}={text}"]

    return words
