"""What need not be there may be null or empty, as many programs write it; and what the documentation shows is read."""

import json
import re
from pathlib import Path

import pytest

from data.cases import ANSWER, CALL, CHAT, CHAT_PAIR, TEXT, TOOL, USER
from helpers import ROOT
from qlora_lowmem.data import check_data
from qlora_lowmem.errors import UsageError

CHAT_WITH_TOOLS = f'{{"messages": [{USER}, {ANSWER}], "tools": [{TOOL}]}}'


def beside(line: str, key: str, value: str) -> str:
    return f'{line[:-1]}, "{key}": {value}}}'


@pytest.mark.parametrize("value", ["null", "[]", '""', '"[]"', '"null"'])
@pytest.mark.parametrize("line", [CHAT, CHAT_PAIR, TEXT])
def test_no_tools(tmp_path: Path, line: str, value: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{line}\n{beside(line, 'tools', value)}\n")
    checked = check_data(str(path))
    assert [sample for _, sample in checked.samples()] == [json.loads(line)] * 2
    assert (checked.report.with_tools, checked.report.duplicates.count) == (0, 1)


@pytest.mark.parametrize("key", ["tool_calls", "name", "tool_call_id"])
@pytest.mark.parametrize("value", ["null", "[]"])
def test_no_calls(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "data.jsonl"
    messages = ", ".join(beside(message, key, value) for message in (USER, ANSWER))
    path.write_text(f'{{"messages": [{messages}]}}\n')
    if key != "tool_calls" and value != "null":
        with pytest.raises(UsageError, match=f"unknown key '{key}'"):
            check_data(str(path))
        return
    checked = check_data(str(path))
    assert next(sample for _, sample in checked.samples()) == json.loads(CHAT)
    assert checked.report.with_tool_calls == 0


def test_what_is_there_stays(tmp_path: Path) -> None:
    calls = f'{{"messages": [{USER}, {{"role": "assistant", "content": null, "tool_calls": [{CALL}]}}]}}'
    (tmp_path / "data.jsonl").write_text(f"{beside(calls, 'tools', f'[{TOOL}]')}\n{CHAT_WITH_TOOLS}\n")
    report = check_data(str(tmp_path / "data.jsonl")).report
    assert (report.with_tools, report.with_tool_calls) == (2, 1)


@pytest.mark.parametrize("page", ["data.md", "train.md"])
def test_the_samples_of_the_documentation(tmp_path: Path, page: str) -> None:
    blocks = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert len(lines) >= 3
    for number, line in enumerate(lines):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(line + "\n")
        assert check_data(str(path)).report.samples == 1


def test_a_file_that_cannot_be_read_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(CHAT)

    def fails(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(UsageError, match=r"data\.data: .*Permission denied.*or copy it .* with data\.data or --data"):
        check_data(str(path))
