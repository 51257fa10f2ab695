"""Samples that are none: the tests' table of them by command, tables with columns twice, files of other kinds."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bad_inputs import Case, Place
from data.cases import BAD_FILES, BAD_LINES, BAD_ROWS

_CONVERTED: dict[str, tuple[str, bytes]] = {
    "an object without an array": ("a.json", b'{"a": 1}'),
    "two arrays": ("a.json", b'{"a": [], "b": []}'),
    "an empty array": ("a.json", b"[]"),
    "an array of numbers": ("a.json", b"[1, 2]"),
    "NaN": ("a.json", b'[{"text": NaN}]'),
    "a key twice": ("a.json", b'[{"text": "a", "text": "b"}]'),
    "a number of 5,000 digits": ("a.json", b'[{"text": ' + b"9" * 5000 + b"}]"),
    "Latin-1": ("a.json", b'[{"text": "caf\xe9"}]'),
    "JSON Lines under a wrong name": ("a.json", b'{"text": "a"}\n{"text": "b"}\n'),
    "no header": ("a.csv", b""),
    "a header alone": ("a.csv", b"text\n"),
    "an unknown column": ("a.csv", b"words\na\n"),
    "a column twice": ("a.csv", b"text,text\na,b\n"),
    "a cell too many": ("a.csv", b"text\na,b\n"),
    "a cell too few": ("a.csv", b"prompt,completion\na\n"),
    "an open quote": ("a.csv", b'text\n"a\n'),
    "Latin-1 in a cell": ("a.csv", b"text\ncaf\xe9\n"),
    "UTF-16 in a table": ("a.csv", "text\na\n".encode("utf-16")),
    "a column twice between tabs": ("a.tsv", b"text\ttext\na\tb\n"),
    "commas for tabs": ("a.tsv", b"prompt,completion\na,b\n"),
    "no Parquet": ("a.parquet", b"PAR1PAR1"),
    "another kind": ("a.xlsx", b"PK\x03\x04"),
    "no kind": ("a", b"text"),
}


def cases() -> Iterator[Case]:
    """A line, a file, a row; the same for `train` and `generate` where the command is not what matters."""
    for number, line in enumerate(BAD_LINES):
        first = line.first.encode()
        bad = line.line if isinstance(line.line, bytes) else line.line.encode()
        made = _data("bad.jsonl", b"\n".join([first, bad, first, b""]))
        of_answers = line.name in ("context alone", "nobody answers")  # which matters to whom trains on answers
        if not of_answers:
            yield Case("data", f"a line, {line.kind}: {line.name}", made, (":2: ",))
        if number % 6 == 0 or of_answers:
            yield Case("train", f"a line, {line.kind}: {line.name}", _to_train(made), (":2: ",))
    for file in BAD_FILES:
        yield Case("data", f"a file: {file.name}", _data("bad.jsonl", file.content))
    for row in BAD_ROWS:
        table = _table(row.columns)
        if row.name == "nobody answers":
            yield Case("train", f"a row: {row.name}", _to_train(table), ("row 2",))
        else:
            yield Case("data", f"a row: {row.name}", table)
    for name, names in {"a text twice": ["text", "text"], "a prompt twice": ["prompt", "prompt", "completion"]}.items():
        table = _table_twice(names)
        yield Case("data", f"a table: {name}", table, (names[0], "twice"))
        yield Case("train", f"a table: {name}", _to_train(table), (names[0], "twice"))
        yield Case("data", f"a table to convert: {name}", _to_convert(table), (names[0], "twice"))
    yield Case("data", "a table: a role twice in a message", _twice_within, ("row 1",))
    yield Case("data", "a table to convert: a role twice in a message", _to_convert(_twice_within))
    for what, (name, content) in _CONVERTED.items():
        yield Case("data", f"convert: {what}", _to_convert(_data(name, content)))


def _data(name: str, content: bytes) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        (place.folder / name).write_bytes(content)
        return ["check", str(place.folder / name)]

    return words


def _table(columns: dict[str, list[Any]]) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        pq.write_table(pa.table(columns), place.folder / "bad.parquet")
        return ["check", str(place.folder / "bad.parquet")]

    return words


def _table_twice(names: list[str]) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        pq.write_table(pa.table([pa.array([f"{n} a", "b"]) for n in names], names=names), place.folder / "bad.parquet")
        return ["check", str(place.folder / "bad.parquet")]

    return words


def _twice_within(place: Place) -> list[str]:
    fields = [pa.field(name, pa.string()) for name in ("role", "role", "content")]
    message = pa.StructArray.from_arrays([pa.array([each]) for each in ("user", "assistant", "a")], fields=fields)
    messages = pa.ListArray.from_arrays(pa.array([0, 1]), message)
    pq.write_table(pa.table({"messages": messages}), place.folder / "bad.parquet")
    return ["check", str(place.folder / "bad.parquet")]


def _to_train(made: Callable[[Place], list[str]]) -> Callable[[Place], list[str]]:
    def words(place: Place) -> list[str]:
        out = ["--output-dir", str(place.folder / "out")]
        return ["--config", place.recipe, "--quiet", "--data", made(place)[1], *out]

    return words


def _to_convert(made: Callable[[Place], list[str]]) -> Callable[[Place], list[str]]:
    return lambda place: ["convert", made(place)[1], str(place.folder / "made.jsonl")]
