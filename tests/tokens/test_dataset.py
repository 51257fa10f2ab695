"""Samples become tokens on disk: what is cut is told, and a run makes the tokens that it sees, once."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import RECIPES
from qlora_lowmem.data import CheckedData, check_data
from qlora_lowmem.errors import UsageError
from qlora_lowmem.recipe import Recipe
from qlora_lowmem.recipe.io import load_recipe
from qlora_lowmem.tokens import dataset as making
from qlora_lowmem.tokens.dataset import count_tokens, show_sample, training_data
from qlora_lowmem.tokens.encoding import NO_LOSS
from qlora_lowmem.tokens.store import REPORT_FILE, TOKENS_FILE, TokenReport
from tiny_chat import MARKED, PLAIN, tiny_tokenizer


def recipe(**changes: Any) -> Recipe:
    return load_recipe(RECIPES / "demo.yaml", {"max_steps": None, **changes})


Write = Callable[..., CheckedData]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(*samples: Any) -> CheckedData:
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        return check_data(str(path))

    return make


def texts(*words: int) -> list[dict[str, str]]:
    """Samples of so many tokens and the one that ends each: a space and a letter are at most one token each."""
    return [{"text": "<|im_start|>" * count} for count in words]


def test_what_is_cut_is_counted(write: Write) -> None:
    found = training_data(recipe(max_seq_length=10), write(*texts(4, 9, 12, 30)), tiny_tokenizer(), None)
    assert found.report == TokenReport(
        samples=4, of_samples=4, tokens=5 + 10 + 10 + 10, scored_tokens=35, longest=31,
        truncated_samples=2, truncated_tokens=3 + 21, first_truncated=3, dropped_samples=0, ending_samples=2,
    )  # fmt: skip
    assert [len(row["input_ids"]) for row in found.dataset] == [5, 10, 10, 10]
    said = "\n".join(found.report.lines(10, "line"))
    assert "2 samples are longer than max_seq_length 10 and lose 24 tokens at their ends (first line 3)" in said


def test_nothing_is_cut_at_the_limit(write: Write) -> None:
    found, _ = count_tokens(recipe(max_seq_length=10), write(*texts(9)), tiny_tokenizer())
    assert (found.truncated_samples, found.truncated_tokens, found.tokens) == (0, 0, 10)
    assert "longer" not in "\n".join(found.lines(10, "line"))


def test_a_sample_of_which_nothing_is_left_to_learn_is_left_out_and_told(write: Write) -> None:
    pairs = [{"prompt": "<|im_start|>" * n, "completion": "<|im_end|>"} for n in (4, 12)]
    found = training_data(recipe(max_seq_length=10, template="none"), write(*pairs), tiny_tokenizer(), None)
    assert len(found.dataset) == 1
    assert found.report is not None
    assert (found.report.samples, found.report.dropped_samples) == (1, 1)
    assert "1 samples are left out" in "\n".join(found.report.lines(10, "line"))
    with pytest.raises(UsageError, match="at 3 tokens nothing is left to learn of 2 samples"):
        training_data(recipe(max_seq_length=3, template="none"), write(*pairs), tiny_tokenizer(), None)


def test_counting_says_what_tokenising_says(write: Write) -> None:
    checked = write(*texts(4, 9, 12, 30))
    for changes in ({"max_seq_length": 10}, {"max_seq_length": 8, "max_steps": 1, "batch_size": 2}):
        counted, notes = count_tokens(recipe(**changes), checked, tiny_tokenizer())
        made = training_data(recipe(**changes), checked, tiny_tokenizer(), None)
        assert (counted, notes) == (made.report, made.notes)


def test_a_short_run_tokenises_the_samples_it_sees_chosen_evenly(write: Write) -> None:
    checked = write(*texts(*range(1, 101)))
    chosen = set()
    for seed in range(20):
        short = recipe(max_steps=2, batch_size=3, gradient_accumulation_steps=2, seed=seed)
        found = training_data(short, checked, tiny_tokenizer(), None)
        lengths = [len(row["input_ids"]) for row in found.dataset]
        assert len(lengths) == 12
        assert lengths == sorted(set(lengths)), "each at most once, in the order of the file"
        chosen |= set(lengths)
    assert len(chosen) > 80, "20 draws of 12 of 100 leave out about eight"
    assert found.report is not None
    assert "12 samples of 100: the ones that this run sees" in next(found.report.lines(128, "line"))


def test_several_processes_see_more(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    found = training_data(recipe(max_steps=2, batch_size=1), write(*texts(*range(1, 20))), tiny_tokenizer(), None)
    assert len(found.dataset) == 6


def test_an_interrupted_run_finds_its_tokens_again(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked, out = write(*texts(4, 9)), tmp_path / "out"
    first = training_data(recipe(), checked, tiny_tokenizer(), out)
    folder = first.folder
    assert folder is not None
    (folder.parent / ".0123456789abcdef.17").mkdir()  # of a run that was killed

    def never(*_: Any) -> None:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patched:
        patched.setattr(making, "write_tokens", never)
        again = training_data(recipe(), checked, tiny_tokenizer(), out)
        assert again.folder == folder
        assert again.dataset[:] == first.dataset[:]
        for other in (recipe(max_seq_length=8), recipe(seed=3)):
            with pytest.raises(AssertionError, match="tokenised again"):
                training_data(other, checked, tiny_tokenizer(), out)
        changed = write(*texts(4, 8))
        with pytest.raises(AssertionError, match="tokenised again"):
            training_data(recipe(), changed, tiny_tokenizer(), out)
        with pytest.raises(AssertionError, match="tokenised again"):
            training_data(recipe(), checked, tiny_tokenizer("{{ messages }}"), out)
    replaced = training_data(recipe(), changed, tiny_tokenizer(), out)
    assert [path.name for path in (out / making.TOKENS_FOLDER).iterdir() if path.is_dir()] == [replaced.folder.name]  # type: ignore[union-attr]
    replaced.discard()
    assert not (out / making.TOKENS_FOLDER).exists()


@pytest.mark.parametrize("name", [TOKENS_FILE, REPORT_FILE])
def test_tokens_that_are_damaged_are_made_again(write: Write, tmp_path: Path, name: str) -> None:
    checked, out = write(*texts(4, 9)), tmp_path / "out"
    first = training_data(recipe(), checked, tiny_tokenizer(), out)
    assert first.folder is not None
    (tokens, path) = first.dataset[:], first.folder / name
    whole = path.read_bytes()
    flipped = [whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :] for place in range(7, len(whole), 97)]
    for damaged in (b"", whole[:-9], b"[1]", *flipped):
        path.write_bytes(damaged)
        again = training_data(recipe(), checked, tiny_tokenizer(), out)
        assert (again.dataset[:], again.report) == (tokens, first.report)
        assert path.read_bytes() == whole
    path.unlink()
    assert training_data(recipe(), checked, tiny_tokenizer(), out).dataset[:] == tokens


def test_tokens_that_cannot_be_written_are_told(write: Write, tmp_path: Path) -> None:
    checked = write(*texts(4))
    made = training_data(recipe(), checked, tiny_tokenizer(), tmp_path / "out")
    assert made.folder is not None
    made.discard()
    made.folder.parent.mkdir()
    made.folder.with_suffix("").write_text("in the way")
    with pytest.raises(UsageError, match=r"run\.output_dir: the tokenised data cannot be written"):
        training_data(recipe(), checked, tiny_tokenizer(), tmp_path / "out")
    assert [path.name for path in made.folder.parent.glob(f".{made.folder.name}*")] == []


def test_every_sample_the_template_refuses_is_named(write: Write) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}x{% endfor %}"
    )
    chats = [[{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}] for role in ("user", "system")]
    checked = write(*({"messages": chat} for chat in [*chats, *chats]))
    with pytest.raises(UsageError) as caught:
        training_data(recipe(train_on="all"), dataclasses.replace(checked), tiny_tokenizer(template), None)
    said = str(caught.value)
    assert "2 faults in 4 lines (2 chat template)" in said
    assert "data.jsonl:2: the model's chat template refuses it: no system" in said
    assert "data.jsonl:4: " in said


def test_packing_joins_whole_samples(write: Write) -> None:
    found = training_data(
        recipe(max_seq_length=10, packing=True), write(*texts(3, 5, 4, 20, 2)), tiny_tokenizer(), None
    )
    rows = found.dataset[:]
    assert all(sum(lengths) <= 10 for lengths in rows["seq_lengths"])
    assert len(rows["seq_lengths"]) == 3, "28 tokens in rows of 10"
    assert sorted(length for lengths in rows["seq_lengths"] for length in lengths) == [3, 4, 5, 6, 10]
    assert [len(ids) for ids in rows["input_ids"]] == [sum(lengths) for lengths in rows["seq_lengths"]]


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("none", "a b[[ c<|im_end|>]]"),
        ("auto", "<|im_start|>user\na b<|im_end|>\n<|im_start|>assistant\n[[ c<|im_end|>\n]]"),
    ],
)
def test_the_shown_sample_marks_what_is_learned(write: Write, template: str, shown: str) -> None:
    checked = write({"prompt": "a b", "completion": " c"})
    found = training_data(recipe(template=template), checked, tiny_tokenizer(), None)
    assert show_sample(found.dataset, tiny_tokenizer()) == shown
    assert NO_LOSS in found.dataset[0]["labels"]
    assert any("a turn of the user" in note for note in found.notes) == (template == "auto")


ENDS_OUTSIDE = MARKED.replace(
    "+ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}", "}}{% endgeneration %}{{ '<|im_end|>\\n' }}"
)
WITHOUT_END = "{% for m in messages %}<|im_start|>{{ m['content'] }}{% endfor %}"
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("template", [PLAIN, MARKED, ENDS_OUTSIDE, WITHOUT_END])
@pytest.mark.parametrize("sample", [{"messages": TURNS}, {"prompt": "a", "completion": "b"}])
def test_whether_the_model_learns_to_stop_is_asked_of_the_samples(write: Write, template: str, sample: Any) -> None:
    assert ENDS_OUTSIDE != MARKED
    report, _ = count_tokens(recipe(), write(sample, sample), tiny_tokenizer(template))
    stops = template not in (WITHOUT_END, ENDS_OUTSIDE)
    assert report.ending_samples == (2 if stops else 0)
    assert any("may not learn to stop" in line for line in report.lines(64, "line")) == (not stops)


def test_reasoning_that_the_template_does_not_show_is_told(write: Write) -> None:
    checked = write({"messages": [TURNS[0], TURNS[1] | {"reasoning_content": "since"}]})
    _, notes = count_tokens(recipe(), checked, tiny_tokenizer(PLAIN))
    assert any("'reasoning_content', which the chat template" in note for note in notes)
