"""Samples as other programs write them: what is read as ours, what is said of it, and what is converted."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_lowmem.commands.frame import run_command
from qlora_lowmem.data import CheckedData, check_data
from qlora_lowmem.errors import EXIT_OK, EXIT_USAGE, UsageError

main = partial(run_command, "data")

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
ALPACA = {"instruction": "a", "input": "", "output": "b"}


def checked(folder: Path, *rows: dict[str, Any]) -> CheckedData:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return check_data(str(path))


@pytest.mark.parametrize(
    ("row", "sample", "says"),
    [
        ({"conversations": SHAREGPT}, {"messages": [USER, ANSWER]}, "'conversations' (ShareGPT) are read as messages"),
        ({"conversations": SHAREGPT, "system": "s", "id": "7"}, {"messages": [SYSTEM, USER, ANSWER]}, "ShareGPT"),
        ({"conversations": [USER, ANSWER]}, {"messages": [USER, ANSWER]}, "ShareGPT"),
        (ALPACA, {"prompt": "a", "completion": "b"}, "(Alpaca) are read as prompt and completion"),
        (ALPACA | {"input": "x", "text": "..."}, {"prompt": "a\n\nx", "completion": "b"}, "a blank line between"),
        (ALPACA | {"system": "s"}, {"messages": [SYSTEM, USER, ANSWER]}, "(Alpaca) are read as messages"),
        (
            ALPACA | {"history": [["q", "r"]]},
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r", "weight": 0},
                          USER, ANSWER]},
            "'weight' 0 is context",
        ),
        ({"messages": [SYSTEM | {"role": "developer"}, USER, ANSWER]}, {"messages": [SYSTEM, USER, ANSWER]},
         "the role 'developer' is read as system"),
        ({"messages": [USER | {"content": [{"type": "text", "text": "a"}]}, ANSWER]}, {"messages": [USER, ANSWER]},
         "content in parts of text is read as one text"),
        ({"messages": [USER, ANSWER | {"weight": 1}]}, {"messages": [USER, ANSWER]}, ""),
        ({"messages": [USER, ANSWER], "id": 3, "source": "x"}, {"messages": [USER, ANSWER]},
         "keys that are not read: id, source"),
        ({"text": "a", "meta": {"url": "u"}}, {"text": "a"}, "keys that are not read: meta"),
        ({"messages": [USER, ANSWER | {"thinking": ""}]}, {"messages": [USER, ANSWER]}, ""),
    ],
)  # fmt: skip
def test_read_as_ours_and_said_once(tmp_path: Path, row: dict[str, Any], sample: dict[str, Any], says: str) -> None:
    found = checked(tmp_path, row, row)
    assert [each for _, each in found.samples()] == [sample, sample]
    notes = "\n".join(found.report.notes)
    assert notes.count(says) == 1 if says else not found.report.read_as


def test_reasoning_is_kept_and_counted(tmp_path: Path) -> None:
    answer = ANSWER | {"reasoning_content": "since"}
    found = checked(tmp_path, {"messages": [USER, answer]})
    assert found.report.reasoning_keys == ("reasoning_content",)
    assert next(found.samples())[1] == {"messages": [USER, answer]}


def in_csv(path: Path) -> None:
    path.write_text('question,answer,n\n"What, exactly?","two\nlines",1\nWho?,me,2\n')


def in_array(path: Path) -> None:
    path.write_text(json.dumps([{"question": "What, exactly?", "answer": "two\nlines"},
                                {"question": "Who?", "answer": "me"}]))  # fmt: skip


def in_object(path: Path) -> None:
    in_array(path)
    path.write_text(f'{{"version": 1, "data": {path.read_text()}}}')


def in_parquet(path: Path) -> None:
    columns = {"question": ["What, exactly?", "Who?"], "answer": ["two\nlines", "me"]}
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize(
    ("name", "write"), [("a.csv", in_csv), ("a.json", in_array), ("b.json", in_object), ("a.parquet", in_parquet)]
)
def test_converted(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    source, target = tmp_path / name, tmp_path / "out.jsonl"
    write(source)
    words = ["convert", str(source), str(target)]
    assert main([*words, "--prompt", "question", "--completion", "answer"]) == EXIT_OK
    assert [each for _, each in check_data(str(target)).samples()] == [
        {"prompt": "What, exactly?", "completion": "two\nlines"}, {"prompt": "Who?", "completion": "me"},
    ]  # fmt: skip
    before = target.read_bytes()
    assert main([*words, "--prompt", "question", "--completion", "answer"]) == EXIT_USAGE, "never replaced unasked"
    assert main([*words, "--prompt", "question", "--completion", "nothing", "--force"]) == EXIT_USAGE
    assert target.read_bytes() == before, "a conversion that fails leaves what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "out.jsonl"])


def test_known_forms_need_no_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text(json.dumps([ALPACA] * 3))
    assert main(["convert", str(tmp_path / "a.json"), str(tmp_path / "out.jsonl"), "--json", "-"]) == EXIT_OK
    printed = capsys.readouterr()
    assert json.loads(printed.out)["samples"] == 3
    assert "Alpaca" in printed.err


def test_chosen_answers_of_preferences(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    assert main(["convert", str(tmp_path / "a.jsonl"), str(out), "--completion", "chosen"]) == EXIT_OK
    assert json.loads(out.read_text()) == {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["convert", "a.csv"], "OUT.jsonl is missing"),
        (["convert", "a.csv", "b.csv"], "is no .jsonl file"),
        (["convert", "a.xlsx", "b.jsonl"], "cannot be converted; allowed: .json, .csv"),
        (["convert", "nothing.csv", "b.jsonl"], "cannot be read (No such file"),
        (["convert", "a.csv", "there/b.jsonl"], "does not exist; make it"),
        (["convert", "a.csv", "b.jsonl", "--prompt", "q"], "name the keys of one"),
        (["convert", "two.json", "b.jsonl"], "holds 2 arrays"),
        (["convert", "empty.json", "b.jsonl"], "holds no samples"),
        (["convert", "object.jsonl", "b.jsonl"], "row 2: is an empty object"),
        (["convert", "latin.csv", "b.jsonl", "--text", "t"], "write it again, as UTF-8"),
        (["check", "a.csv"], "qlora-lowmem data convert a.csv a.jsonl"),
        (["check", "two.json", "b.jsonl"], "OUT.jsonl is convert's"),
        (["convert", "twice.csv", "b.jsonl"], "the column 'text' is there twice"),
        (["convert", "twice.parquet", "b.jsonl"], "the column 'text' is there twice"),
        (["check", "twice.parquet"], "the column 'text' is there twice"),
        (["check", "within.parquet"], "row 1: cannot be read"),
        (["convert", "within.parquet", "b.jsonl"], "row 1: cannot be read"),
        (["convert", "wide.csv", "b.jsonl"], "row 1: has more or fewer cells"),
        (["convert", "deep.json", "b.jsonl"], "nested too deeply"),
        (["convert", "keys.json", "b.jsonl"], "has the key 'text' twice"),
        (["convert", "utf16.json", "b.jsonl"], "it is UTF-16"),
        (["convert", "endless.csv", "b.jsonl"], "is no regular file"),
        (["convert", "x" * 300 + ".csv", "b.jsonl"], "File name too long"),
    ],
)
def test_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    in_csv(Path("a.csv"))
    Path("a.xlsx").write_bytes(b"PK")
    Path("two.json").write_text('{"a": [], "b": []}')
    Path("empty.json").write_text("[]")
    Path("object.jsonl").write_text('{"text": "a"}\n{}\n')
    Path("latin.csv").write_bytes("t\nh\u00e9\n".encode("latin-1"))
    Path("twice.csv").write_text("text,text\na,b\n")
    Path("wide.csv").write_text("text\na,b\n")
    Path("deep.json").write_text("[" * 100_000)
    Path("keys.json").write_text('[{"text": "a", "text": "b"}]')
    Path("utf16.json").write_text("[]", encoding="utf-16")
    Path("endless.csv").symlink_to("/dev/zero")
    texts = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.table(texts, names=["text", "text"]), "twice.parquet")
    message = pa.StructArray.from_arrays(texts, fields=[pa.field("role", pa.string())] * 2)
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 1]), message)}), "within.parquet")
    assert main(words) == EXIT_USAGE
    assert says in capsys.readouterr().err
    assert not Path("b.jsonl").exists()


def test_a_set_of_the_hub_in_json_lines_keeps_its_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_dataset` itself would give each of these answers with quotation marks, for one of them is a number."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = Path("owner/name")
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"prompt": f"question {n}", "completion": "yes"} for n in range(300)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [each["completion"] for _, each in check_data("owner/name").samples()] == ["yes"] * 300
    assert [number for number, _ in check_data("owner/name:train[10:20]").samples()] == list(range(11, 21))
    (folder / "train.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "n", "completion": 7}])
    )
    with pytest.raises(UsageError, match=r"owner/name:train, row 301: 'completion' is a number"):
        check_data("owner/name")
