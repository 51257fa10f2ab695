"""Weights of the base model that are trained beside adapters: told as trained, saved once, taken up, merged.

Tiny Llamas, their embedding and LM head tied or not; tokens that their tokenizer has, and one that the recipe adds.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from qlora_lowmem import virtual_gpu
from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.errors import UsageError
from qlora_lowmem.lean import apply_lean
from qlora_lowmem.models import merging
from qlora_lowmem.models.adapters import Adapted, adapt, lora_config
from qlora_lowmem.models.loading import load_base, skeleton
from qlora_lowmem.models.sources import source_of
from qlora_lowmem.plan.recipe_runs import submit_recipe
from qlora_lowmem.recipe import Recipe, recipe_hash
from qlora_lowmem.run.before_after import load_adapted
from qlora_lowmem.run.execute import execute
from qlora_lowmem.run.preflight import inputs_of, preflight
from tiny_chat import tiny_config, write_tiny_chat

WORDS, HIDDEN = 400, 32
ADDED, EMBEDDING, HEAD = "<|step|>", "model.embed_tokens", "lm_head"
TOKENS = torch.tensor([[1, 2, 30, 40, WORDS - 1, 5, 60, 7]])


def write_model(folder: Path, *, tied: bool, spare: int = 0) -> Path:
    """A folder with a tiny Llama, its tokenizer, and rows to spare for more tokens."""
    write_tiny_chat(folder)
    config = tiny_config(WORDS + spare)
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained-base")
    kinds: dict[str, dict[str, Any]] = {
        "tied": {"tied": True},
        "untied": {"tied": False},
        "spare": {"tied": True, "spare": 16},
    }
    return {name: write_model(folder / name, **options) for name, options in kinds.items()}


@pytest.fixture
def recipe_of(tiny_recipe: Callable[..., Recipe], models: dict[str, Path], tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe on one of the models and on samples with the token that may be added."""
    rows = [{"prompt": f"What is {n}?", "completion": f"{ADDED} It is {n}."} for n in range(4)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(model: str, **changes: Any) -> Recipe:
        small = {"weights": "pretrained", "load_in_4bit": False, "max_steps": 2, "gradient_accumulation_steps": 1}
        small |= {"data": str(data), "max_seq_length": 48, "learning_rate": 0.05, "model": str(models[model])}
        return tiny_recipe("run", **small | changes)

    return make


WHOLE, ROWS = f"{EMBEDDING}.weight", f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
HEAD_ROWS = f"{HEAD}.token_adapter.trainable_tokens_delta"
# Changes of a recipe, and what is then in the adapter's file beside LoRA: shapes by name.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "the head of a tied model": ("tied", {"modules_to_save": HEAD}, {WHOLE: (WORDS, HIDDEN)}),
    "both, lean": ("tied", {"modules_to_save": f"embed_tokens,{HEAD}", "lean": True}, {WHOLE: (WORDS, HIDDEN)}),
    "both, grown, and a norm": (
        "untied",
        {"modules_to_save": f"embed_tokens,{HEAD},model.norm", "added_tokens": ADDED},
        {WHOLE: (WORDS + 1, HIDDEN), f"{HEAD}.weight": (WORDS + 1, HIDDEN), "model.norm.weight": (HIDDEN,)},
    ),
    "rows, grown, lean": ("tied", {"added_tokens": ADDED, "lean": True}, {ROWS: (1, HIDDEN)}),
    "rows of both": (
        "untied",
        {"added_tokens": ADDED, "trainable_token_indices": [60, "<|im_start|>"]},
        {ROWS: (3, HIDDEN), HEAD_ROWS: (3, HIDDEN)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_whole_way(recipe_of: Callable[..., Recipe], tmp_path: Path, case: str) -> None:
    """What is told is trained and saved once; a checkpoint gives it back bit for bit; others load and merge it."""
    model, changes, expected = CASES[case]
    recipe, run = recipe_of(model, save_steps=1, **changes), tmp_path / "run"
    inputs = inputs_of(recipe)
    told, jobs = preflight(inputs).adapted, []
    execute(inputs, output_dir=run, on_ready=lambda job, _: jobs.append(job))
    trained: Any = jobs[0].model.eval()
    assert Adapted.of(trained) == told
    saved = load_file(run / "adapter_model.safetensors")
    beside = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items() if ".lora_" not in key}
    assert {name: tuple(tensor.shape) for name, tensor in beside.items()} == expected
    assert sum(tensor.numel() for tensor in saved.values()) == told.parameters

    again = tmp_path / "again"
    shutil.copytree(run / "checkpoint-1", again / "checkpoint-1")
    execute(inputs, output_dir=again, resume_from=again / "checkpoint-1")
    resumed = load_file(again / "adapter_model.safetensors")
    assert resumed.keys() == saved.keys()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in saved.items())

    (run / "recipe.json").write_text(json.dumps({"hash": recipe_hash(recipe), "recipe": recipe.to_dict()}))
    with torch.no_grad():
        said = trained(input_ids=TOKENS).logits
        loaded: Any = AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32)
        assert torch.allclose(loaded.eval()(input_ids=TOKENS).logits, said, atol=1e-5)
        ours = load_adapted(recipe, run)
        assert torch.allclose(ours.model(input_ids=TOKENS).logits, said, atol=1e-5)
        plain: Any = AutoModelForCausalLM.from_pretrained(recipe.base.model, dtype=torch.float32)
        before = plain(input_ids=TOKENS).logits
        with ours.switched_off():
            assert torch.equal(ours.model(input_ids=TOKENS).logits[..., :WORDS], before[..., :WORDS])
        assert torch.allclose(ours.model(input_ids=TOKENS).logits, said, atol=1e-5)
    assert (said[..., :WORDS] - before[..., :WORDS]).abs().max() > 1e-3, "training must matter"

    base = source_of(recipe).folder
    on_meta = skeleton(recipe, source_of(recipe))
    assert base is not None
    to = tmp_path / "merged"
    assert run_command("merge", ["--run", str(run), "--to", str(to), "--device", "cpu", "--quiet"]) == 0
    adapter = merging.Adapter.read(run, recipe).of(on_meta).in_names_of(base, on_meta)
    merging.merge(base, adapter, to, torch.float32, torch.device("cpu"), quiet=True)
    merged: Any = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)
    assert len(AutoTokenizer.from_pretrained(to)) == WORDS + ("added_tokens" in changes)
    assert merged.config.tie_word_embeddings == (model != "untied")
    with torch.no_grad():
        assert torch.allclose(merged(input_ids=TOKENS).logits, said, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("what", ["whole", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lean_gradients_are_those_of_whole_logits(
    recipe_of: Callable[..., Recipe], tied: bool, what: str, dtype: torch.dtype
) -> None:
    """In fp32 the same; in bf16 off those of fp32 as the plain ones are, by rounding, in the mean of a few draws."""
    recipe = recipe_of("tied")
    ends = [EMBEDDING] if tied else [EMBEDDING, HEAD]
    rows = dict.fromkeys(ends, (60, 7)) if what == "rows" else None
    whole = [f"{name}.weight" for name in ends] if what == "whole" else []

    def gradients(lean: bool, of: torch.dtype, draw: int) -> dict[str, torch.Tensor]:
        config = tiny_config(WORDS)
        config.tie_word_embeddings = tied
        torch.manual_seed(2 * draw)
        model: Any = LlamaForCausalLM(config).to(dtype).to(of)  # the same weights, rounded once
        torch.manual_seed(2 * draw + 1)
        adapted: Any = adapt(model, lora_config(recipe, ["q_proj", "v_proj"], rows=rows), whole)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
                parameter.data = parameter.data.to(dtype).to(of)
        if lean:
            report = apply_lean(adapted.train())
            assert "loss" in report.applied
            assert ("token_rows" in report.applied) == (what == "rows")
        adapted.eval()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        return {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}

    off: Counter[str] = Counter()
    allowed: Counter[str] = Counter()
    for draw in range(1 if dtype is torch.float32 else 4):
        exact, ours = gradients(False, torch.float32, draw), gradients(True, dtype, draw)
        assert ours.keys() == exact.keys()
        plain = gradients(False, dtype, draw) if dtype is torch.bfloat16 else exact
        for name, truth in exact.items():
            assert truth.norm() > 0
            for sums, found in ((off, ours), (allowed, plain)):
                sums[name] += float((found[name].float() - truth).norm() / truth.norm())
    for name, far in off.items():
        assert far <= 1e-5 + 1.6 * allowed[name], name


def test_rows_to_spare_are_taken_first(recipe_of: Callable[..., Recipe]) -> None:
    """No embedding grows that is larger than its tokenizer; what was in such a row is replaced by a mean."""
    checked = preflight(inputs_of(recipe_of("spare", added_tokens=ADDED)))
    assert checked.trained_base.rows == {EMBEDDING: (WORDS,)}
    assert checked.limits.tokens == WORDS + 16
    recipe = checked.inputs.recipe
    model: Any = load_base(recipe, checked.inputs.source, torch.float32, torch.device("cpu"))
    weight = model.get_input_embeddings().weight
    assert weight.shape == (WORDS + 16, HIDDEN)
    assert torch.allclose(weight[WORDS], weight[:WORDS].mean(0))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no module": ({"modules_to_save": "embed_token"}, "'embed_token' is no module of this model. .*: embed_tokens, lm"),
    "no weights": ({"modules_to_save": "rotary_emb"}, "'rotary_emb' has no weights"),
    "adapted": ({"modules_to_save": "self_attn"}, "model.layers.0.self_attn.q_proj gets an adapter. Remove it"),
    "in 4 bits": ({"modules_to_save": "mlp", "load_in_4bit": True}, "gate_proj is stored in 4 bits.*load_in_4bit"),
    "lean": ({"modules_to_save": "norm", "lean": True}, "lean trains only model.embed_tokens and lm_head"),
    "both": ({"modules_to_save": HEAD, "trainable_token_indices": [3]}, "trains all rows of .* already"),
    "beyond": ({"trainable_token_indices": [WORDS]}, f"{WORDS}, and the model knows {WORDS} tokens, 0 to {WORDS - 1}"),
    "several": ({"trainable_token_indices": "hello world"}, "is no token of the model; its tokenizer makes 'he', 'll'"),
    "there already": ({"added_tokens": "<|im_start|>"}, "is a token of .* already, id 1.*trainable_token_indices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_weights_are_read(recipe_of: Callable[..., Recipe], case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        preflight(inputs_of(recipe_of("tied", **changes)))


def test_fsdp_is_refused(recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match=r"lora\.modules_to_save: FSDP"):
        preflight(inputs_of(recipe_of("tied", modules_to_save=HEAD)))


def test_what_is_trained_is_as_wide_as_adapters(recipe_of: Callable[..., Recipe], tmp_path: Path) -> None:
    """fp32 weights under bf16 arithmetic: what comes after the embedding stays in bf16."""
    recipe = recipe_of("tied", modules_to_save=HEAD, compute_dtype="bf16", adapter_dtype="fp32", load_in_4bit=True)
    jobs: list[Any] = []
    outcome = execute(inputs_of(recipe), output_dir=tmp_path / "run", on_ready=lambda job, _: jobs.append(job))
    model = jobs[0].model
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    assert model.get_input_embeddings()(TOKENS).dtype is torch.bfloat16
    assert outcome.losses[-1] < outcome.losses[0]


def test_a_plan_holds_their_bytes(recipe_runs: virtual_gpu.Server, tiny_recipe: Callable[..., Recipe]) -> None:
    """The embedding of the tiny hybrid, tied: weight, gradient and two values of AdamW, named as trained."""
    card = virtual_gpu.get_card("rtx-4050-laptop-6gb")
    plain, whole = (
        submit_recipe(recipe_runs, tiny_recipe("run", max_steps=2, **changes), card, attribute=True)
        for changes in ({}, {"modules_to_save": HEAD})
    )
    runs = [each.result() for each in (plain, whole)]
    embedding = 512 * 64
    assert runs[1].trainable_parameters - runs[0].trainable_parameters == embedding
    kinds = [run.attribution.kinds for run in runs if run.attribution is not None]
    more = {kind: kinds[1].get(kind, 0) - kinds[0].get(kind, 0) for kind in ("adapters", "gradients", "optimizer")}
    assert more == {"adapters": 2 * embedding, "gradients": 2 * embedding, "optimizer": 4 * embedding}
    assert kinds[1]["weights_other"] == kinds[0]["weights_other"] - 2 * embedding, "there is no frozen copy"
