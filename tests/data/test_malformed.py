"""Malformed data are refused, all of them: by file, line or row, and reason, with what to do."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.cases import BAD_FILES, BAD_LINES, BAD_ROWS, CALL, CHAT, PAIR, TEXT, TOOL, BadFile, BadLine, BadRow
from qlora_lowmem.data import check_data
from qlora_lowmem.data import sources as reading
from qlora_lowmem.data.formats import check_sample
from qlora_lowmem.data.sources import parse_line
from qlora_lowmem.data.values import FAULTS_SHOWN, FaultySampleError
from qlora_lowmem.errors import EXIT_USAGE, UsageError


def as_bytes(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8")


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        check_data(str(path))
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


def test_the_tables_are_long_and_name_each_case_once() -> None:
    assert len(BAD_LINES) + len(BAD_FILES) + len(BAD_ROWS) >= 180
    assert len({as_bytes(case.line) for case in BAD_LINES}) == len(BAD_LINES)


@pytest.mark.parametrize("case", BAD_LINES, ids=[case.name for case in BAD_LINES])
def test_a_line(tmp_path: Path, case: BadLine) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([as_bytes(case.first), as_bytes(case.line), as_bytes(case.first), b""]))
    message = refusal(path)
    assert message.startswith(f"{path}: 1 fault in 3 lines (1 {case.kind}); correct the data and start again")
    assert f"\n  {path}:2: " in message
    for words in case.says:
        assert words in message


@pytest.mark.parametrize("case", BAD_FILES, ids=[case.name for case in BAD_FILES])
def test_a_file(tmp_path: Path, case: BadFile) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(case.content)
    message = refusal(path)
    assert message.startswith(str(path))
    for words in case.says:
        assert words in message


@pytest.mark.parametrize("case", BAD_ROWS, ids=[case.name for case in BAD_ROWS])
def test_a_row_of_a_table(tmp_path: Path, case: BadRow) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table(case.columns), path)
    message = refusal(path)
    assert message.startswith(str(path))
    for words in case.says:
        assert words in message


def test_a_row_whose_text_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    texts = pa.array([b"a", b"caf\xe9", b"c"]).view(pa.binary())
    pq.write_table(pa.table({"text": pa.StringArray.from_buffers(3, *texts.buffers()[1:3])}), path)
    message = refusal(path)
    assert f"{path}: 1 fault in 3 rows (1 encoding)" in message
    assert f"{path}, row 2: holds text that is not UTF-8" in message


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + b"\x00" * 40 + b"PAR1", TEXT.encode()], ids=["empty", "head", "torn", "JSON"]
)
def test_a_file_that_is_no_parquet(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(content)
    assert "cannot be read as Parquet" in refusal(path)


def test_a_parquet_file_damaged_inside(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"text": [f"text number {n}" for n in range(5000)]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[200:600] = bytes(400)
    path.write_bytes(content)
    assert "cannot be read as Parquet" in refusal(path)


def test_many_faults_are_counted_by_reason_and_the_first_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("x\n" * FAULTS_SHOWN + '{"text": ""}\n' * 3)
    message = refusal(path)
    assert f"{FAULTS_SHOWN + 3} faults in {FAULTS_SHOWN + 3} lines ({FAULTS_SHOWN} not JSON, 3 empty)" in message
    assert message.count("is not JSON") == FAULTS_SHOWN
    assert message.endswith("... and 3 more")


def test_exactly_as_many_faults_as_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("x\n" * FAULTS_SHOWN)
    assert "more" not in refusal(path)


def test_a_line_at_the_limit_is_read_and_one_over_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": "x" * size}) + "\n" for size in (10, 500, 10)]
    path.write_text("".join(lines))
    monkeypatch.setattr(reading, "_BUFFER", 64)
    monkeypatch.setattr(reading, "LINE_LIMIT", len(lines[1]))
    assert check_data(str(path)).report.samples == 3
    monkeypatch.setattr(reading, "LINE_LIMIT", len(lines[1]) - 1)
    message = refusal(path)
    assert f"{path}:2: is longer than" in message
    assert "1 fault in 3 lines (1 too long)" in message


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(TEXT)
    message = refusal(tmp_path / "dat.jsonl")
    assert "no such data file (in that folder: data.jsonl)" in message
    assert "--data" in message
    assert "is a folder" in refusal(tmp_path)
    assert "no .jsonl or .parquet file" in refusal(tmp_path / "data.csv")
    assert "is no .jsonl or .parquet" in refusal(tmp_path / "none" / "x")


# What follows is fuzzed: sound samples, damaged at random.
SOUND = [TEXT, CHAT, PAIR, f'{{"messages": [{{"role": "user", "content": "a"}}, {{"role": "assistant", "tool_calls": [{CALL}]}}], "tools": [{TOOL}]}}']  # fmt: skip  # noqa: E501
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def refused_or_sound(raw: bytes) -> None:
    """A line is a sample, or a `FaultySampleError` says why not; nothing else comes out."""
    try:
        sample, _ = check_sample(parse_line(raw), "completions")
    except FaultySampleError:
        return
    json.dumps(sample, ensure_ascii=False).encode()


@given(st.binary(max_size=200))
def test_any_bytes(content: bytes) -> None:
    refused_or_sound(content)


@given(st.sampled_from(SOUND), st.data())
def test_a_sound_line_with_bytes_changed(line: str, data: st.DataObject) -> None:
    raw = bytearray(line.encode())
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=4)):
        raw[place] = data.draw(st.integers(0, 255))
    refused_or_sound(bytes(raw))


@given(st.sampled_from(SOUND), st.integers(0, 1000))
def test_a_sound_line_cut_short(line: str, length: int) -> None:
    raw = line.encode()
    if length < len(raw):
        with pytest.raises(FaultySampleError):
            parse_line(raw[:length])


@given(JSON)
def test_any_json(value: Any) -> None:
    refused_or_sound(json.dumps(value).encode())


def _damaged(value: Any, path: list[Any], put: Any) -> Any:
    """`value` with `put` where `path` leads."""
    if not path:
        return put
    copy = value.copy()
    copy[path[0]] = _damaged(value[path[0]], path[1:], put)
    return copy


def _paths(value: Any) -> list[list[Any]]:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [[], *([key, *rest] for key in keys for rest in _paths(value[key]))]


@given(st.sampled_from([json.loads(line) for line in SOUND]), JSON, st.data())
def test_a_sound_sample_with_a_value_replaced(sample: Any, put: Any, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(_paths(sample)))
    refused_or_sound(json.dumps(_damaged(sample, path, put)).encode())


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_any_text_survives(texts: list[str]) -> None:
    for text in texts:
        for line in (json.dumps({"text": text}), json.dumps({"text": text}, ensure_ascii=False)):
            sample, _ = check_sample(parse_line(line.encode()), "completions")
            assert sample == {"text": text}
