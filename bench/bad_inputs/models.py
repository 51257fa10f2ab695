"""Folders of models and of adapters that are not what they should be: configuration, weights, tokenizer."""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bad_inputs import Case, Place

Change = Callable[[Path], object]
_LONG = int("9" * 30)


def _json(name: str, **changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def _text(name: str, text: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def _tensors(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return changed


def _bytes(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _header(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    """Of a safetensors file: its length in eight bytes, JSON, data."""

    def changed(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return _bytes(name, changed)


def _renamed(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    def change(tensors: dict[str, Any]) -> None:
        for name in [each for each in tensors if old in each]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: value})


def _without(part: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: [tensors.pop(name) for name in [each for each in tensors if part in each]]


def _cast(dtype: torch.dtype) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})


_Q = "model.layers.0.self_attn.q_proj.weight"
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
CONFIGS: dict[str, Change] = {
    **{
        f"hidden_size {value!r}": _json(_CONFIG, hidden_size=value)
        for value in (0, -32, 33, 64, 1.5, "32", None, _LONG, [32])
    },
    **{
        f"layers {value!r}": _json(_CONFIG, num_hidden_layers=value)
        for value in (0, -1, 3, 1.5, "2", None, 10**7, _LONG)
    },
    **{f"heads {value!r}": _json(_CONFIG, num_attention_heads=value) for value in (0, -4, 3, "4", None, 10**12)},
    **{f"key heads {value!r}": _json(_CONFIG, num_key_value_heads=value) for value in (0, 5, 4, -2, "2", 10**12)},
    **{f"head_dim {value!r}": _json(_CONFIG, head_dim=value) for value in (0, 7, 16, -8, "8", _LONG)},
    **{f"vocabulary {value!r}": _json(_CONFIG, vocab_size=value) for value in (0, -1, 7, 500, "400", None, _LONG)},
    **{f"width {value!r}": _json(_CONFIG, intermediate_size=value) for value in (0, 65, -64, "64", None)},
    **{f"activation {value!r}": _json(_CONFIG, hidden_act=value) for value in ("nonesuch", None, 3, "", ["silu"])},
    **{
        f"rope {value!r}": _json(_CONFIG, rope_parameters=value)
        for value in (
            {"rope_type": "nonesuch", "rope_theta": 1e4},
            {"rope_type": "yarn"},
            "linear",
            3,
        )
    },
    **{f"epsilon {value!r}": _json(_CONFIG, rms_norm_eps=value) for value in ("small", [1])},
    **{
        f"model_type {value!r}": _json(_CONFIG, model_type=value)
        for value in ("nonesuch", "", None, 3, ["llama"], "bert", "t5", "mamba2", "gpt2", "qwen2_moe")
    },
    "untied": _json(_CONFIG, tie_word_embeddings=False),
    "tied by a word": _json(_CONFIG, tie_word_embeddings="yes please"),
    "biases": _json(_CONFIG, attention_bias=True, mlp_bias=True),
    "an attention of its own": _json(_CONFIG, attn_implementation="nonesuch", _attn_implementation="nonesuch"),
    "an unknown dtype": _json(_CONFIG, dtype="bfloat17", torch_dtype="bfloat17"),
    "positions by a word": _json(_CONFIG, max_position_embeddings="long"),
    "padding beyond the words": _json(_CONFIG, pad_token_id=99999),
    "padding below none": _json(_CONFIG, pad_token_id=-99999),
    "layer types": _json(_CONFIG, layer_types=["nonesuch", "full_attention"]),
    "quantised by nobody": _json(_CONFIG, quantization_config={"quant_method": "nonesuch"}),
    "quantised in 8 bits": _json(_CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "quantised by a word": _json(_CONFIG, quantization_config="nf4"),
    "quantised in 4 bits, but it is not": _json(
        _CONFIG, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}
    ),
    "code of its own": _json(
        _CONFIG, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    ),
    "nothing but a type": _text(_CONFIG, '{"model_type": "llama"}'),
    "a type of a mixture": _text(_CONFIG, '{"model_type": "mixtral"}'),
    "no type": _json(_CONFIG, model_type=...),
    "a list": _text(_CONFIG, "[]"),
    "an empty object": _text(_CONFIG, "{}"),
    "torn": _bytes(_CONFIG, lambda content: content[:-20]),
    "a text_config that is text": _json(_CONFIG, text_config="llama"),
    "100,000 brackets in a field": _text(_CONFIG, '{"model_type": "llama", "x": ' + "[" * 100_000 + "}"),
}
# Wrong whatever the weights are, which a plan does not read.
_NO_MODEL = (
    *("hidden_size 0", "key heads 5", "vocabulary 0", "width 0", "heads 3", "head_dim 7", "layers 10000000"),
    *("activation 'nonesuch'", "model_type 'nonesuch'", "no type", "a list", "torn", "a text_config that is text"),
)
WEIGHTS: dict[str, Change] = {
    "one missing": _tensors(_WEIGHTS, _without(_Q)),
    "a layer missing": _tensors(_WEIGHTS, _without("layers.1.")),
    "the embeddings missing": _tensors(_WEIGHTS, _without("embed_tokens")),
    "the last norm missing": _tensors(_WEIGHTS, _without("model.norm")),
    "one renamed": _tensors(_WEIGHTS, _renamed("layers.0.self_attn.q_proj", "layers.0.self_attn.query")),
    "all renamed": _tensors(_WEIGHTS, _renamed("model.", "transformer.")),
    "another layout": _tensors(_WEIGHTS, _renamed("model.layers", "layers.blocks")),
    "one of another shape": _tensors(_WEIGHTS, _set(_Q, torch.zeros(32, 31))),
    "one turned": _tensors(_WEIGHTS, _set("model.layers.0.mlp.up_proj.weight", torch.zeros(32, 64))),
    "one flat": _tensors(_WEIGHTS, _set(_Q, torch.zeros(1024))),
    "one empty": _tensors(_WEIGHTS, _set(_Q, torch.zeros(0, 32))),
    "one number": _tensors(_WEIGHTS, _set(_Q, torch.zeros(()))),
    "one as integers": _tensors(_WEIGHTS, _set(_Q, torch.zeros(32, 32, dtype=torch.int64))),
    "one as bytes": _tensors(_WEIGHTS, _set(_Q, torch.zeros(32, 32, dtype=torch.uint8))),
    "one as true and false": _tensors(_WEIGHTS, _set(_Q, torch.zeros(32, 32, dtype=torch.bool))),
    "one in 8 bits": _tensors(_WEIGHTS, _set(_Q, torch.zeros(32, 32).to(torch.float8_e4m3fn))),
    "all in 8 bits": _tensors(_WEIGHTS, _cast(torch.int8)),
    "one complex": _tensors(_WEIGHTS, _set(_Q, torch.zeros(32, 32, dtype=torch.complex64))),
    "fewer words": _tensors(_WEIGHTS, _set("model.embed_tokens.weight", torch.zeros(399, 32))),
    "no tensors": _tensors(_WEIGHTS, lambda tensors: tensors.clear()),
    "of an adapter": lambda folder: save_file({"base_model.model.lora_A.weight": torch.zeros(2, 2)}, folder / _WEIGHTS),
    "an empty file": _text(_WEIGHTS, b""),
    "seven bytes": _text(_WEIGHTS, b"1234567"),
    "a header too long": _bytes(_WEIGHTS, lambda content: struct.pack("<Q", 2**62) + content[8:]),
    "a header of nothing": _bytes(_WEIGHTS, lambda content: struct.pack("<Q", 0) + content[8:]),
    "a header that is no JSON": _bytes(_WEIGHTS, lambda content: content[:8] + b"x" + content[9:]),
    "a header of brackets": _text(_WEIGHTS, struct.pack("<Q", 100_000) + b"[" * 100_000),
    "torn in the middle": _bytes(_WEIGHTS, lambda content: content[: len(content) // 2]),
    "one byte too few": _bytes(_WEIGHTS, lambda content: content[:-1]),
    "one byte too many": _bytes(_WEIGHTS, lambda content: content + b"x"),
    "an unknown dtype": _header(_WEIGHTS, lambda header: header[_Q].update(dtype="F17")),
    "a shape below none": _header(_WEIGHTS, lambda header: header[_Q].update(shape=[-32, -32])),
    "a shape too large": _header(_WEIGHTS, lambda header: header[_Q].update(shape=[2**62, 2**62])),
    "offsets beyond the end": _header(_WEIGHTS, lambda header: header[_Q].update(data_offsets=[0, 2**40])),
    "offsets turned": _header(
        _WEIGHTS, lambda header: header[_Q].update(data_offsets=header[_Q]["data_offsets"][::-1])
    ),
    "another name": lambda folder: (folder / _WEIGHTS).rename(folder / "weights.safetensors"),
    "a folder": lambda folder: ((folder / _WEIGHTS).unlink(), (folder / _WEIGHTS).mkdir()),
    "gone": lambda folder: (folder / _WEIGHTS).unlink(),
    "a pickle": lambda folder: (folder / _WEIGHTS).rename(folder / "pytorch_model.bin"),
    "an index of nothing": lambda folder: _indexed(folder, {}),
    "an index without a map": lambda folder: _indexed(folder, None),
    "an index to a file that is not there": lambda folder: _indexed(folder, {_Q: "gone.safetensors"}),
    "an index out of the folder": lambda folder: _indexed(folder, {_Q: "../../x.safetensors"}),
    "an index of numbers": lambda folder: _indexed(folder, {_Q: 3}),
}
TOKENIZERS: dict[str, Change] = {
    "torn": _bytes("tokenizer.json", lambda content: content[:-20]),
    "empty": _text("tokenizer.json", ""),
    "an empty object": _text("tokenizer.json", "{}"),
    "a list": _text("tokenizer.json", "[]"),
    "gone": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "brackets": _text("tokenizer.json", "[" * 100_000),
    "an unknown kind": _json("tokenizer.json", model={"type": "nonesuch"}),
    "its configuration torn": _bytes("tokenizer_config.json", lambda content: content[:-2]),
    "its configuration a list": _text("tokenizer_config.json", "[]"),
    "a template that is none": _text("chat_template.jinja", "{% for message in %}"),
    "a template that fails": _text("chat_template.jinja", "{{ messages.nonesuch.again }}"),
    "a template that refuses": _text("chat_template.jinja", "{{ raise_exception('no') }}"),
    "a template that divides": _text("chat_template.jinja", "{{ 1 / 0 }}"),
}
_SETTINGS = "adapter_config.json"
_ADAPTER = "adapter_model.safetensors"
_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTERS: dict[str, Change] = {
    "r doubled": _json(_SETTINGS, r=4),
    "r halved": _json(_SETTINGS, r=1),
    "r zero": _json(_SETTINGS, r=0),
    "r negative": _json(_SETTINGS, r=-2),
    "r a word": _json(_SETTINGS, r="two"),
    "r true": _json(_SETTINGS, r=True),
    "r gone": _json(_SETTINGS, r=...),
    "r and alpha doubled": _json(_SETTINGS, r=4, lora_alpha=8),
    "alpha doubled": _json(_SETTINGS, lora_alpha=8),
    "alpha zero": _json(_SETTINGS, lora_alpha=0),
    "alpha a word": _json(_SETTINGS, lora_alpha="x"),
    "alpha nan": _json(_SETTINGS, lora_alpha=float("nan")),
    "alpha gone": _json(_SETTINGS, lora_alpha=...),
    "scaled by the root": _json(_SETTINGS, use_rslora=True),
    "DoRA": _json(_SETTINGS, use_dora=True),
    "another method": _json(_SETTINGS, peft_type="LOHA"),
    "an unknown method": _json(_SETTINGS, peft_type="NONESUCH"),
    "no method": _json(_SETTINGS, peft_type=...),
    "ranks of their own": _json(_SETTINGS, rank_pattern={"q_proj": 1}),
    "scales of their own": _json(_SETTINGS, alpha_pattern={"q_proj": 1}),
    "modules saved whole": _json(_SETTINGS, modules_to_save=["lm_head"]),
    "an empty object": _text(_SETTINGS, "{}"),
    "a list": _text(_SETTINGS, "[]"),
    "torn": _bytes(_SETTINGS, lambda content: content[:-20]),
    "brackets": _text(_SETTINGS, "[" * 100_000),
    "settings gone": lambda folder: (folder / _SETTINGS).unlink(),
    "gone": lambda folder: (folder / _ADAPTER).unlink(),
    "a pickle": lambda folder: (folder / _ADAPTER).rename(folder / "adapter_model.bin"),
    "half a pair": _tensors(_ADAPTER, _without(_A)),
    "one of another rank": _tensors(_ADAPTER, _set(_A, torch.zeros(3, 32))),
    "one of another width": _tensors(_ADAPTER, _set(_A, torch.zeros(2, 31))),
    "one flat": _tensors(_ADAPTER, _set(_A, torch.zeros(64))),
    "one as integers": _tensors(_ADAPTER, _set(_A, torch.zeros(2, 32, dtype=torch.int64))),
    "no tensors": _tensors(_ADAPTER, lambda tensors: tensors.clear()),
    "of a module that is not there": _tensors(_ADAPTER, _renamed("layers.0", "layers.7")),
    "of full weights": _tensors(_ADAPTER, _renamed(".lora_A", "")),
    "torn weights": _bytes(_ADAPTER, lambda content: content[: len(content) // 2]),
    "empty weights": _text(_ADAPTER, b""),
    "a recipe torn": _bytes("recipe.json", lambda content: content[: len(content) // 2]),
    "a recipe of nothing": _text("recipe.json", "{}"),
    "a recipe of another model": lambda folder: _recipe(folder, "model", "./none"),
    "a recipe of random weights": lambda folder: _recipe(folder, "weights", "random"),
}


def _indexed(folder: Path, weight_map: dict[str, Any] | None) -> None:
    (folder / _WEIGHTS).rename(folder / "part.safetensors")
    content = {"metadata": {}} | ({} if weight_map is None else {"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def _recipe(folder: Path, field: str, value: str) -> None:
    content = json.loads((folder / "recipe.json").read_text())
    content["recipe"]["base"][field] = value
    (folder / "recipe.json").write_text(json.dumps(content))


def cases() -> Iterator[Case]:
    """A model by `train`, `merge` and, sometimes, `plan`; an adapter by `merge` and `generate`."""
    for kind, changes in (("configuration", CONFIGS), ("weights", WEIGHTS), ("tokenizer", TOKENIZERS)):
        for number, (what, change) in enumerate(changes.items()):
            yield Case("train", f"{kind} of a model: {what}", _train(change))
            if kind != "tokenizer" and what != "an attention of its own":  # which merging has no need of
                yield Case("merge", f"{kind} of the base: {what}", _merge(change, base=True))
            if number % 3 == 0:
                yield Case("generate", f"{kind} of the base: {what}", _generate(change, base=True))
            if kind == "configuration" and what in _NO_MODEL:
                yield Case("plan", f"{kind} of a model: {what}", _plan(change))
    for what, change in ADAPTERS.items():
        yield Case("merge", f"an adapter: {what}", _merge(change))
        if what not in ("a recipe of random weights", "a pickle", "gone"):  # the checkpoint is there
            yield Case("generate", f"an adapter: {what}", _generate(change))


def _copied(place: Place, name: str, change: Change | None) -> Path:
    folder = place.folder / name
    shutil.copytree(place.good / name, folder)
    if change is not None:
        change(folder)
    return folder


def _train(change: Change) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        model = _copied(place, "model", change)
        return ["--config", place.recipe, "--quiet", "--model", str(model), "--output-dir", str(place.folder / "out")]

    return words


def _plan(change: Change) -> Callable[[Place], list[str]]:
    return lambda place: [
        "--model",
        str(_copied(place, "model", change)),
        "--card",
        "12GB",
        "--seq",
        "64",
        "--no-cache",
    ]


def _run(place: Place, change: Change, *, base: bool) -> str:
    run = _copied(place, "run", None if base else change)
    if base:
        _recipe(run, "model", str(_copied(place, "model", change)))
    return str(run)


def _merge(change: Change, *, base: bool = False) -> Callable[[Place], list[str]]:
    return lambda place: [
        "--run",
        _run(place, change, base=base),
        "--to",
        str(place.folder / "merged"),
        "--quiet",
        "--device",
        "cpu",
    ]


def _generate(change: Change, *, base: bool = False) -> Callable[[Place], list[str]]:
    return lambda place: ["--run", _run(place, change, base=base), "--prompt", "a", "--quiet", "--max-new-tokens", "2"]
