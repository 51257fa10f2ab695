"""What sound data hold: formats, counts, notes."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.cases import CALL, CHAT, CHAT_PAIR, PAIR, TEXT, TOOL, USER
from helpers import RECIPES
from qlora_lowmem.data import CheckedData, check_data
from qlora_lowmem.data.report import DuplicateCounter, Duplicates
from qlora_lowmem.errors import UsageError


def checked(folder: Path, content: str | bytes, **options: str) -> CheckedData:
    path = folder / "data.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return check_data(str(path), **options)  # type: ignore[arg-type]


def samples(found: CheckedData) -> list[object]:
    return [sample for _, sample in found.samples()]


@pytest.mark.parametrize(
    ("line", "form", "conversational"),
    [
        (TEXT, "text", False),
        (CHAT, "messages", True),
        (PAIR, "prompt/completion", False),
        (CHAT_PAIR, "prompt/completion", True),
    ],
)
def test_each_format_is_read(tmp_path: Path, line: str, form: str, conversational: bool) -> None:
    found = checked(tmp_path, f"{line}\r\n\n{line}")
    assert (found.report.format, found.report.conversational, found.report.samples) == (form, conversational, 2)
    assert list(found.samples()) == [(1, json.loads(line)), (3, json.loads(line))]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    assert samples(checked(tmp_path, '{"text": "a\u2028b\u0085c"}\n')) == [{"text": "a\u2028b\u0085c"}]


def test_training_on_all_needs_no_assistant(tmp_path: Path) -> None:
    assert checked(tmp_path, f'{{"messages": [{USER}]}}', train_on="all").report.samples == 1


def test_tools_and_calls_are_counted_and_made_ready(tmp_path: Path) -> None:
    call = '{"id": "1", "function": {"name": "f", "arguments": "{\\"x\\": 1}"}}'
    calls = f'{{"role": "assistant", "content": null, "tool_calls": [{call}]}}'
    result = '{"role": "tool", "name": "f", "tool_call_id": "1", "content": "7"}'
    found = checked(tmp_path, f'{{"messages": [{USER}, {calls}, {result}], "tools": [{TOOL}]}}\n{CHAT}\n')
    assert (found.report.with_tools, found.report.with_tool_calls) == (1, 1)
    message = next(found.samples())[1]["messages"][1]
    assert message["content"] == ""
    assert message["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert message["tool_calls"][0]["type"] == "function"
    assert "1 with tools" in found.report.line


def test_notes(tmp_path: Path) -> None:
    lines = [TEXT, "", TEXT, '{"text": "caf\ufffd"}', '{"text": "a\\u0000b"}', '{"text": "\\\\u0000 is written out"}']
    report = checked(tmp_path, b"\xef\xbb\xbf" + "\n".join(lines).encode()).report
    assert (report.samples, report.blank_lines, report.byte_order_mark) == (5, 1, True)
    assert (report.duplicates, report.replacement_characters) == (Duplicates(1, (3, 1)), 1)
    assert report.control_characters == 1, "a backslash and what follows it are six harmless characters"
    notes = "\n".join(report.notes)
    for words in ("1 of 5 samples repeat an earlier one (first line 3, which repeats line 1)", "1 blank lines skipped",
                  "byte order mark", "1 samples hold U+FFFD", "1 samples hold control characters"):  # fmt: skip
        assert words in notes
    assert json.loads(json.dumps(dataclasses.asdict(report)))["duplicates"] == {"count": 1, "first": [3, 1]}


def test_the_same_sample_in_another_order_of_keys_is_a_duplicate(tmp_path: Path) -> None:
    report = checked(tmp_path, '{"prompt": "a", "completion": "b"}\n{"completion": "b", "prompt": "a"}\n').report
    assert report.duplicates.count == 1


def test_a_clean_file_has_no_notes() -> None:
    found = check_data(str(RECIPES / "demo.jsonl"))
    assert found.report.notes == ()
    assert found.report.samples >= 60
    assert all(sample["messages"][-1]["content"].startswith("Short answer: ") for _, sample in found.samples())


def test_the_demo_is_not_tested_on_what_it_learns() -> None:
    learned, held_out = (samples(check_data(str(RECIPES / f"demo{name}.jsonl"))) for name in ("", "-held-out"))
    questions = [{sample["messages"][0]["content"] for sample in each} for each in (learned, held_out)]  # type: ignore[index]
    assert len(questions[1]) >= 10
    assert not questions[0] & questions[1]


@pytest.mark.parametrize("pass_samples", [1, 7, 50, 10_000])
def test_duplicates_are_counted_in_any_number_of_passes(pass_samples: int) -> None:
    values = [number % 37 for number in range(100)] + [200, 201, 202, 200]
    with tempfile.TemporaryFile() as scratch:
        counter = DuplicateCounter(scratch, pass_samples)
        for number, value in enumerate(values, start=10):
            counter.add(number, str(value).encode())
        assert counter.count() == Duplicates(len(values) - len(set(values)), (47, 10))


def test_no_sample_no_duplicate() -> None:
    with tempfile.TemporaryFile() as scratch:
        assert DuplicateCounter(scratch).count() == Duplicates(0, None)


def test_a_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    message = {"role": "user", "content": "a", "tool_calls": None}
    calls = [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    reply = {"role": "assistant", "content": None, "tool_calls": calls}
    plain = {"role": "assistant", "content": "b", "tool_calls": None}
    columns = {
        "id": [1, 2, 3],
        "messages": [[message, reply, plain], [message, plain], [message, plain]],
        "tools": [f"[{TOOL}]", None, None],
        "prompt": ["x", "y", "z"],
    }
    pq.write_table(pa.table(columns), path, row_group_size=2)
    found = check_data(str(path))
    report = found.report
    assert (report.format, report.samples, report.with_tools, report.with_tool_calls) == ("messages", 3, 1, 1)
    assert report.unused_columns == ("id", "prompt")
    assert "columns that are not read: id, prompt" in report.notes[1]
    assert "first row 3, which repeats row 2" in report.notes[0]
    rows = samples(found)
    assert rows[1] == json.loads(CHAT)
    assert rows[0]["tools"] == [json.loads(TOOL)]  # type: ignore[index]
    called = rows[0]["messages"][1]["tool_calls"][0]  # type: ignore[index]
    assert called == json.loads(CALL)


def test_a_file_that_changes_between_the_check_and_its_use_is_refused(tmp_path: Path) -> None:
    found = checked(tmp_path, f"{TEXT}\n{TEXT}\n")
    (tmp_path / "data.jsonl").write_text(f"{TEXT}\noops\n")
    with pytest.raises(UsageError, match=r"data\.jsonl:2: is not JSON"):
        list(found.samples())


def test_a_link_is_followed_and_a_pipe_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x.jsonl").write_text(TEXT)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real" / "x.jsonl")
    assert check_data(str(tmp_path / "link.jsonl")).report.samples == 1
    assert check_data(str(tmp_path / "real" / ".." / "link.jsonl")).report.samples == 1
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UsageError, match="no regular file"):
        check_data(str(tmp_path / "pipe.jsonl"))


class TestHub:
    """`load_dataset` itself, on a folder that stands for a repository: `owner/name` in the working directory."""

    @pytest.fixture(autouse=True)
    def repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        folder = tmp_path / "owner" / "name"
        folder.mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        return folder

    def test_a_data_set_and_its_split(self, repository: Path) -> None:
        for split, count in (("train", 3), ("test", 2)):
            lines = [json.dumps({"prompt": f"{split} {n}", "completion": "b", "id": n}) for n in range(count)]
            (repository / f"{split}.jsonl").write_text("\n".join(lines))
        whole, part = check_data("owner/name"), check_data("owner/name:test")
        assert (whole.report.name, whole.report.samples) == ("owner/name:train", 3)
        assert (part.report.name, part.report.samples) == ("owner/name:test", 2)
        assert part.report.unused_columns == ("id",)
        assert list(part.samples())[1] == (2, {"prompt": "test 1", "completion": "b"})

    def test_a_faulty_row_is_named(self, repository: Path) -> None:
        (repository / "train.jsonl").write_text(f'{TEXT}\n{{"text": ""}}\n')
        with pytest.raises(UsageError, match="owner/name:train, row 2: 'text' is empty"):
            check_data("owner/name")

    def test_a_split_that_is_not_there(self, repository: Path) -> None:
        (repository / "train.jsonl").write_text(TEXT)
        with pytest.raises(UsageError, match=r"split 'dev'.*could not be loaded.*owner/name:split"):
            check_data("owner/name:dev")

    def test_what_cannot_be_fetched(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        with pytest.raises(UsageError, match=r"nobody/nothing.*connection.*hf download --repo-type dataset"):
            check_data("nobody/nothing")

    def test_a_script_in_a_repository_is_not_run(self, repository: Path, tmp_path: Path) -> None:
        (repository / "name.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        (repository / "train.jsonl").write_text(TEXT)
        with pytest.raises(UsageError, match="scripts are no longer supported"):
            check_data("owner/name")
        assert not (tmp_path / "ran").exists()
