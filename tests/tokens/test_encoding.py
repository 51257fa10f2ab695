"""Tokens and labels are those of TRL's own preparation; what TRL cannot mark is marked or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from qlora_lowmem.data import FaultySampleError, check_data
from qlora_lowmem.tokens.encoding import NO_LOSS, Encoder
from qlora_lowmem.tokens.templates import choose_marking
from tiny_chat import FORGETFUL, MARKED, PLAIN, WITH_TOOLS, tiny_config, tiny_tokenizer

QWEN3 = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
CHAT = [{"role": "user", "content": "What is NF4?"}, {"role": "assistant", "content": "A data type of 4 bits."}]
LONGER = [*CHAT, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It is small."}]
TEXTS = [{"text": "The quick brown fox."}, {"text": "Ends already.<|im_end|>"}]
PAIRS = [{"prompt": "Two and two", "completion": " is four."}, {"prompt": "Three ", "completion": "is odd"}]
CHAT_PAIRS = [{"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": LONGER[:3], "completion": LONGER[3:]}]


def ours(
    folder: Path, samples: list[Any], template: str, train_on: str = "completions", put: str = "none"
) -> list[tuple[Any, Any]]:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    checked = check_data(str(path), train_on)  # type: ignore[arg-type]
    tokenizer = tiny_tokenizer(template)
    marking = choose_marking(tokenizer, checked.report, train_on, "tiny", put)  # type: ignore[arg-type]
    encoder = Encoder(tokenizer, marking)
    return [tuple(encoder.encode(sample)) for _, sample in checked.samples()]  # type: ignore[misc]


def trls(folder: Path, samples: list[Any], template: str, **options: Any) -> list[tuple[Any, Any]]:
    tokenizer = tiny_tokenizer(template)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(tiny_config(len(tokenizer))),
        args=SFTConfig(output_dir=str(folder), max_length=None, use_cpu=True, report_to="none", **options),
        train_dataset=Dataset.from_list(samples),
        processing_class=tokenizer,
    )
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


@pytest.mark.parametrize(
    ("samples", "template", "train_on", "options"),
    [
        (TEXTS, PLAIN, "completions", {}),
        (PAIRS, PLAIN, "completions", {"completion_only_loss": True}),
        (PAIRS, PLAIN, "all", {"completion_only_loss": False}),
        (CHAT_PAIRS, PLAIN, "completions", {"completion_only_loss": True}),
        (CHAT_PAIRS, MARKED, "all", {"completion_only_loss": False}),
        ([{"messages": CHAT}, {"messages": LONGER}], PLAIN, "all", {}),
        ([{"messages": CHAT}, {"messages": LONGER}], MARKED, "completions", {"assistant_only_loss": True}),
    ],
    ids=["text", "pairs", "whole pairs", "chat pairs", "whole chat pairs", "whole chats", "marked chats"],
)
def test_tokens_and_labels_are_trls(
    tmp_path: Path, samples: list[Any], template: str, train_on: str, options: dict[str, Any]
) -> None:
    assert ours(tmp_path, samples, template, train_on) == trls(tmp_path, samples, template, **options)


def test_a_chat_that_ends_with_its_only_answer_is_a_pair(tmp_path: Path) -> None:
    pair = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    assert ours(tmp_path, [{"messages": CHAT}], PLAIN) == trls(tmp_path, [pair], PLAIN, completion_only_loss=True)


@pytest.mark.parametrize("template", [PLAIN, MARKED, FORGETFUL, QWEN3])
@pytest.mark.parametrize("train_on", ["completions", "all"])
def test_a_pair_of_texts_is_the_conversation_that_it_stands_for(tmp_path: Path, template: str, train_on: str) -> None:
    pairs = [{"prompt": chat[0]["content"], "completion": chat[1]["content"]} for chat in (CHAT, LONGER[2:])]
    chats = [{"messages": chat} for chat in (CHAT, LONGER[2:])]
    assert ours(tmp_path, pairs, template, train_on, "auto") == ours(tmp_path, chats, template, train_on)
    assert ours(tmp_path, pairs, template, train_on, "auto") != ours(tmp_path, pairs, template, train_on, "none")


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_an_answer_of_weight_0_is_context(tmp_path: Path, template: str) -> None:
    earlier = [LONGER[0], LONGER[1] | {"weight": 0}, *LONGER[2:]]
    ((ids, labels),) = ours(tmp_path, [{"messages": earlier}], template)
    assert ids == ours(tmp_path, [{"messages": LONGER}], template)[0][0]
    assert scored(ids, labels).strip() == "It is small.<|im_end|>"


def test_an_answer_of_weight_0_has_no_loss_where_all_else_has(tmp_path: Path) -> None:
    earlier = [LONGER[0], LONGER[1] | {"weight": 0}, *LONGER[2:]]
    ((ids, labels),) = ours(tmp_path, [{"messages": earlier}], PLAIN, "all")
    learned = scored(ids, labels)
    assert "data type" not in learned
    assert all(words in learned for words in ("What is NF4?", "Why?", "It is small."))


def scored(ids: list[int], labels: list[int]) -> str:
    return str(tiny_tokenizer().decode([token for token, label in zip(ids, labels, strict=True) if label != NO_LOSS]))


def test_every_answer_of_a_conversation_is_learned_without_marks(tmp_path: Path) -> None:
    ((ids, labels),) = ours(tmp_path, [{"messages": LONGER}], PLAIN)
    assert scored(ids, labels) == "A data type of 4 bits.<|im_end|>\nIt is small.<|im_end|>\n"


def test_an_answer_that_is_rendered_differently_later_is_refused(tmp_path: Path) -> None:
    assert ours(tmp_path, [{"messages": CHAT}], FORGETFUL)
    with pytest.raises(FaultySampleError, match=r"messages\[1\] is rendered differently once more follow"):
        ours(tmp_path, [{"messages": LONGER}], FORGETFUL)


def test_a_conversation_that_the_assistant_begins_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FaultySampleError, match="begins with the assistant"):
        ours(tmp_path, [{"messages": CHAT[1:]}], PLAIN)
    ((ids, labels),) = ours(tmp_path, [{"messages": CHAT[1:]}], MARKED)
    assert scored(ids, labels) == "A data type of 4 bits.<|im_end|>"


def test_what_a_template_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    picky = "{% if messages[0]['role'] == 'user' %}{{ raise_exception('No users here') }}{% endif %}"
    with pytest.raises(FaultySampleError, match="chat template refuses it: No users here"):
        ours(tmp_path, [{"messages": CHAT}], picky)


def test_tools_and_calls_reach_the_model(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    tool = {"type": "function", "function": {"name": "clock", "description": "the time", "parameters": {}}}
    messages = [
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "clock", "content": "noon"},
        CHAT[1],
    ]
    ((ids, labels),) = ours(tmp_path, [{"messages": messages, "tools": [tool]}], WITH_TOOLS)
    said = str(tiny_tokenizer().decode(ids))
    assert all(words in said for words in ("the time", '"zone": "UTC"', "noon"))
    learned = scored(ids, labels)
    assert '"zone": "UTC"' in learned
    assert "noon" not in learned
    assert "the time" not in learned
