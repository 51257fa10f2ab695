"""Before and after by one command: the same words every time, the losses of the model itself, faults told early."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import RECIPES
from qlora_lowmem.commands.frame import run_command
from tiny_chat import write_tiny_chat

main = partial(run_command, "generate")
train = partial(run_command, "train")

HELD_OUT = str(RECIPES / "demo-held-out.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of the demo's recipe on a tiny model in 16 bits, trained hard enough to change its words."""
    folder = tmp_path_factory.mktemp("generate")
    write_tiny_chat(folder / "model")
    flags = ["--config", str(RECIPES / "demo.yaml"), "--model", str(folder / "model"), "--no-load-in-4bit", "--quiet"]
    size = ["--max-steps", "10", "--learning-rate", "0.05", "--save-steps", "5"]
    assert train([*flags, *size, "--output-dir", str(folder / "out")]) == 0
    return folder / "out"


def shown(run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["--run", str(run), "--quiet", "--json", "-", *more]) == 0
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return content


def test_before_is_the_base_and_after_the_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against transformers and PEFT themselves."""
    arguments = ("--prompt", "What is NF4?", "--data", HELD_OUT, "--samples", "5", "--max-new-tokens", "8")
    found = shown(run, capsys, *arguments)
    assert found == shown(run, capsys, *arguments), "greedy: the same every time"
    folder = run.parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in ("before", "after"):
        model = PeftModel.from_pretrained(base, run) if name == "after" else base
        question = [{"role": "user", "content": "What is NF4?"}]
        asked = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        said = model.generate(**asked, max_new_tokens=8, do_sample=False)
        words = tokenizer.decode(said[0, asked["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert found["answers"][0][name] == words
        loss, scored = expected_loss(model, tokenizer)
        assert found["held_out"][name]["loss"] == pytest.approx(loss, rel=1e-5)
        assert found["held_out"][name]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert (found["held_out"]["scored_tokens"], found["held_out"]["samples"]) == (scored, 5)
    assert found["answers"][0]["before"] != found["answers"][0]["after"]
    assert found["held_out"]["after"]["loss"] < found["held_out"]["before"]["loss"], "it has learned the demo's style"
    assert (found["device"], found["provenance"]) == ("cpu", "measured")


def expected_loss(model: Any, tokenizer: Any) -> tuple[float, int]:
    """The mean loss of five held-out answers, from full logits."""
    total, scored = 0.0, 0
    for line in Path(HELD_OUT).read_text().splitlines()[:5]:
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        labels = torch.tensor([[-100] * len(asked) + whole[len(asked) :]])
        with torch.no_grad():
            mean = float(model(input_ids=torch.tensor([whole]), labels=labels).loss)
        total += mean * (len(whole) - len(asked))
        scored += len(whole) - len(asked)
    return total / scored, scored


def test_people_see_both_beside_each_other(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(run), "--quiet", "--prompt", "Hi", "--prompt", "Who?", "--data", HELD_OUT]) == 0
    printed = capsys.readouterr().out
    assert "before (base model)" in printed.splitlines()[1]
    assert "after (with the adapter)" in printed.splitlines()[1]
    assert "perplexity" in printed
    assert "scored tokens of 12 samples" in printed


def test_a_checkpoint_and_a_run_that_has_not_ended(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shown(run, capsys, "--prompt", "Hi", "--max-new-tokens", "3")
    last = shown(run / "checkpoint-10", capsys, "--prompt", "Hi", "--max-new-tokens", "3")
    assert last["answers"] == whole["answers"]
    shutil.copytree(run, tmp_path / "running")
    (tmp_path / "running" / "adapter_model.safetensors").unlink()
    assert main(["--run", str(tmp_path / "running"), "--quiet", "--prompt", "Hi", "--max-new-tokens", "3"]) == 0
    assert "training has not ended; the adapter is that of" in capsys.readouterr().err


def test_what_it_was_trained_on_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run", str(run), "--quiet", "--data", str(RECIPES / "demo.jsonl"), "--samples", "2"]) == 0
    assert "note: that is the file the adapter was trained on" in capsys.readouterr().out


def test_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": ""}\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "recipe.json").write_text("{}")
    pickled = tmp_path / "pickled"
    shutil.copytree(run, pickled, ignore=shutil.ignore_patterns("checkpoint-*"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    foreign = tmp_path / "foreign"
    shutil.copytree(run, foreign, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(config | {"r": 3}))
    for arguments, said in (
        (["--prompt", "a"], "whose words?"),
        (["--run", str(run)], "nothing to show"),
        (["--run", str(run), "--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens: 0 is too few"),
        (["--run", str(run), "--data", HELD_OUT, "--samples", "0"], "--samples: 0 is too few"),
        (["--run", str(tmp_path / "none"), "--prompt", "a"], "there is no folder"),
        (["--run", str(tmp_path / "empty"), "--prompt", "a"], "holds no recipe.json"),
        (["--run", str(tmp_path / "odd"), "--prompt", "a"], "is no recipe of this version"),
        (["--run", str(pickled), "--prompt", "a"], "as a pickle (adapter_model.bin)"),
        (["--run", str(foreign), "--prompt", "a"], "r is 3, and the recipe trained with 8"),
        (["--run", str(run), "--data", str(tmp_path / "bad.jsonl")], "bad.jsonl:1: 'text' is empty"),
        (["--config", str(RECIPES / "optimised.yaml"), "--prompt", "a", "--device", "cpu"], "holds no adapter_model"),
        (["--run", str(run), "--prompt", "a", "--device", "virtual"], "invalid choice: 'virtual'"),
    ):
        capsys.readouterr()
        assert main(arguments) == 2, arguments
        printed = capsys.readouterr().err
        assert said in printed
        assert printed.count("error: ") == 1
        assert "Traceback" not in printed


def test_a_virtual_gpu_has_no_words(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_lowmem.virtual_gpu.current_card", lambda: "a card")
    assert main(["--run", str(run), "--prompt", "a", "--device", "cuda"]) == 2
    assert "no values to show" in capsys.readouterr().err


def test_a_folder_does_not_decide_to_run_its_own_code(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "from-a-stranger"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    content = json.loads((folder / "recipe.json").read_text())
    model = shutil.copytree(run.parent / "model", tmp_path / "model")
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    content["recipe"]["base"] |= {"trust_remote_code": True, "model": str(model)}
    (folder / "recipe.json").write_text(json.dumps(content))
    arguments = ["--run", str(folder), "--quiet", "--prompt", "Hi", "--max-new-tokens", "2"]
    main(arguments)
    assert not (tmp_path / "ran").exists()
    main([*arguments, "--trust-remote-code"])
    assert (tmp_path / "ran").exists(), "a person may; and so this test can fail"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "--run outputs/demo --prompt" in capsys.readouterr().out
