"""A data file is checked line by line; each fault names its line and what to do."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_lowmem.data import FAULTS_SHOWN, check_data, read_samples
from qlora_lowmem.errors import EXIT_USAGE, UsageError

TEXT = '{"text": "a"}'
CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
USER = '[{"role": "user", "content": "a"}]'
ASSISTANT = '[{"role": "assistant", "content": "b"}]'
DEMO = Path(__file__).parent.parent / "bench" / "recipes" / "demo.jsonl"


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "data.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        read_samples(path, **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


# (the second line of a file, what the message says, what to do)
BAD_LINES = [
    ('{"text": "a"', "is not JSON: Expecting ',' delimiter at column 13", "write one JSON object a line"),
    ("{'text': 'a'}", "is not JSON", "double quotes"),
    ('{"text": "a"},', "is not JSON: Extra data at column 14", "no comma between the lines"),
    ("[", "is not JSON", "no brackets around the lines"),
    ("{", "is not JSON", "a whole sample stands on one line"),
    ("plain words", "is not JSON", "one JSON object a line"),
    ('"text"', "is text, not an object", "write one object a line"),
    ("[1]", "is a list, not an object", "write one object a line"),
    ("17", "is a number, not an object", "write one object a line"),
    ("null", "is null, not an object", "write one object a line"),
    ("{}", "is an empty object", "a sample is one of"),
    ('{"txt": "a"}', "unknown key 'txt'", "did you mean 'text'?"),
    ('{"text": "a", "id": 3}', "unknown key 'id'", "remove or rename it"),
    ('{"prompt": "a"}', "has 'prompt' but no 'completion'", "add it"),
    ('{"completion": "a"}', "has 'completion' but no 'prompt'", "add it"),
    ('{"text": "a", "prompt": "b"}', "mixes 'prompt' and 'text'", "a sample is one of"),
    ('{"text": ""}', "'text' is empty", "write it or remove the line"),
    ('{"text": "  "}', "'text' is empty", "write it or remove the line"),
    ('{"text": 3}', "'text' is a number, not text", "put it in quotes"),
    ('{"text": null}', "'text' is null, not text", "put it in quotes"),
    ('{"text": NaN}', "holds NaN", "text only"),
    ('{"text": -Infinity}', "holds -Infinity", "text only"),
    ('{"text": "a", "text": "b"}', "has the key 'text' twice", "remove one"),
    ('{"text": "\\ud800"}', "half a surrogate pair", "write the character whole"),
    ('{"text": ' + "9" * 5000 + "}", "number that is too long", "text only"),
    ("[" * 100_000, "nested too deeply", "write a flat object"),
    ('{"messages": "a"}', "'messages' is text, not a list of messages", '[{"role": "user"'),
    ('{"messages": []}', "'messages' is an empty list", "write at least one message"),
    ('{"messages": ["a"]}', "messages[0] is text, not a message", "write [{"),
    ('{"messages": [{"content": "a"}]}', "messages[0] has no 'role'", "write [{"),
    ('{"messages": [{"role": "user"}]}', "messages[0] has no 'content'", "write [{"),
    ('{"messages": [{"role": "bot", "content": "a"}]}', "has the role 'bot'", "allowed: system, user, assistant, tool"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}', "has the role ['user']", "allowed: system"),
    ('{"messages": [{"role": "user", "content": ""}]}', "'messages[0].content' is empty", "write it"),
    ('{"messages": [{"role": "user", "content": [1]}]}', "'messages[0].content' is a list, not text", "in quotes"),
    ('{"messages": [{"role": "user", "content": "a", "name": "b"}]}', "unknown key 'name'", "remove it"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "has no assistant message", "--train-on all"),
    (f'{{"prompt": "a", "completion": {ASSISTANT}}}', "'prompt' is text but 'completion' is a list", "write two texts"),
    (f'{{"prompt": {USER}, "completion": {USER}}}', "'completion' has no assistant message", "add the answer"),
    ('{"prompt": "", "completion": "b"}', "'prompt' is empty", "write it"),
    ('{"prompt": "a", "completion": true}', "'completion' is true or false, not text", "put it in quotes"),
    (CHAT, "holds messages, but line 1 holds text", "one format a file"),
]


@pytest.mark.parametrize(("line", "said", "advice"), BAD_LINES, ids=[said[:40] for _, said, _ in BAD_LINES])
def test_a_faulty_line_is_named_with_its_reason_and_what_to_do(
    tmp_path: Path, line: str, said: str, advice: str
) -> None:
    path = write(tmp_path, f"{TEXT}\n{line}\n{TEXT}\n")
    message = refusal(path)
    assert f"{path}: 1 fault in 3 lines" in message
    assert f"{path}:2: " in message
    assert said in message
    assert advice in message


BAD_FILES = [
    (b"", "no samples (0 lines", "write one JSON object a line"),
    (b"\n \n\n", "no samples (3 lines, all blank)", "write one JSON object a line"),
    (b'{"text": "caf\xe9"}\n', ":1: byte 0xe9 at 14 is not UTF-8", "save the file as UTF-8"),
    (TEXT.encode("utf-16"), ":1: is UTF-16", "save the file as UTF-8"),
    (
        f'{{"prompt": {USER}, "completion": {ASSISTANT}}}\n{{"prompt": "a", "completion": "b"}}\n'.encode(),
        ":2: holds prompt/completion texts, but line 1 holds prompt/completion messages",
        "one format a file",
    ),
]


@pytest.mark.parametrize(("content", "said", "advice"), BAD_FILES, ids=[said[:30] for _, said, _ in BAD_FILES])
def test_a_faulty_file_is_refused(tmp_path: Path, content: bytes, said: str, advice: str) -> None:
    message = refusal(write(tmp_path, content))
    assert said in message
    assert advice in message


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, TEXT)
    message = refusal(tmp_path / "dat.jsonl")
    assert "no such data file (in that folder: data.jsonl)" in message
    assert "--data" in message


def test_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)


def test_many_faults_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "x\n" * (FAULTS_SHOWN + 3)))
    assert f"{FAULTS_SHOWN + 3} faults" in message
    assert message.count("is not JSON") == FAULTS_SHOWN
    assert message.endswith("... and 3 more")


def test_exactly_as_many_faults_as_are_shown(tmp_path: Path) -> None:
    message = refusal(write(tmp_path, "x\n" * FAULTS_SHOWN))
    assert message.count("is not JSON") == FAULTS_SHOWN
    assert "more" not in message


@pytest.mark.parametrize(
    ("line", "form"),
    [
        (TEXT, "text"),
        (CHAT, "messages"),
        ('{"prompt": "a", "completion": "b"}', "prompt/completion"),
        (f'{{"prompt": {USER}, "completion": {ASSISTANT}}}', "prompt/completion"),
    ],
)
def test_each_format_is_read(tmp_path: Path, line: str, form: str) -> None:
    found = read_samples(write(tmp_path, f"{line}\r\n{line}"))
    assert found.report.format == form
    assert found.report.count == 2
    assert found.samples == [json.loads(line)] * 2


def test_training_on_all_needs_no_assistant(tmp_path: Path) -> None:
    path = write(tmp_path, f'{{"messages": {USER}}}')
    assert check_data(path, train_on="all").count == 1


def test_a_byte_order_mark_blank_lines_and_duplicates_are_noted(tmp_path: Path) -> None:
    report = check_data(write(tmp_path, b"\xef\xbb\xbf" + f'{TEXT}\n\n{TEXT}\n{{"text": "b"}}\n'.encode()))
    assert (report.count, report.blank_lines, report.duplicates, report.byte_order_mark) == (3, 1, 1, True)
    assert ["1 of 3 samples repeat" in note for note in report.notes] == [True, False, False]
    assert "1 blank lines skipped" in report.notes[1]
    assert "byte order mark" in report.notes[2]


def test_a_line_separator_inside_a_text_ends_no_line(tmp_path: Path) -> None:
    path = write(tmp_path, '{"text": "a\u2028b\u0085c"}\n')
    assert read_samples(path).samples == [{"text": "a\u2028b\u0085c"}]


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    samples = [{"text": text} for text in texts]
    path = write(tmp_path_factory.mktemp("data"), "".join(json.dumps(each) + "\n" for each in samples))
    assert read_samples(path).samples == samples


@given(st.binary(max_size=200))
def test_no_bytes_do_worse_than_a_refusal(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = write(tmp_path_factory.mktemp("data"), content)
    with contextlib.suppress(UsageError):
        assert read_samples(path).report.count > 0


def test_the_demo_is_clean_and_in_one_style() -> None:
    found = read_samples(DEMO)
    assert found.report.notes == ()
    assert found.report.count >= 60
    assert all(each["messages"][-1]["content"].startswith("Short answer: ") for each in found.samples)
