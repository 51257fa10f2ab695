"""Where a recipe's `data` leads: a JSON Lines file, which is read here, a Parquet file or a data set of the hub."""

import codecs
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NoReturn

from qlora_lowmem.data.formats import FORMATS
from qlora_lowmem.data.values import FaultySampleError, Reader, Row, kind_of
from qlora_lowmem.errors import UsageError
from qlora_lowmem.files import is_file, is_folder
from qlora_lowmem.recipe.sections import DATA_SUFFIXES, is_hub_data
from qlora_lowmem.units import MIB

DEFAULT_SPLIT = "train"


@dataclass(frozen=True)
class DataSource:
    """A place that holds samples.

    Attributes:
        name: the file's path or the hub id, as messages name it.
        split: of a hub data set; "" for a file.
    """

    kind: Literal["jsonl", "parquet", "hub"]
    name: str
    split: str = ""

    @property
    def unit(self) -> str:
        """What is numbered, from 1."""
        return "line" if self.kind == "jsonl" else "row"

    @property
    def shown(self) -> str:
        """The name as a person gave it."""
        return f"{self.name}:{self.split}" if self.split else self.name


def resolve_data(name: str) -> DataSource:
    """Say where a recipe's `data` leads.

    A symbolic link is followed, and a path may lead anywhere: data are only read. What is no regular file (a pipe, a
    device) is refused, for it cannot be read twice.

    Raises:
        UsageError: there is no such file, or it is none that can be read as data.
    """
    if is_hub_data(name):
        owner_and_name, _, split = name.partition(":")
        return DataSource("hub", owner_and_name, split or DEFAULT_SPLIT)
    path = Path(name)
    suffix = path.suffix.lower()
    if is_folder(path):
        raise UsageError(f"{path} is a folder; data.data or --data names one .jsonl or .parquet file in it")
    if suffix in (".json", ".csv", ".tsv") and is_file(path):
        raise UsageError(
            f"{path} is a {suffix[1:].upper()} file, and data are read as JSON Lines. Write it as such: "
            f"qlora-lowmem data convert {path} {path.with_suffix('.jsonl')}"
        )
    if suffix not in DATA_SUFFIXES:
        raise UsageError(f"{path} is no .jsonl or .parquet file; data.data or --data names one, or a hub id owner/name")
    if not is_file(path):
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            raise UsageError(f"{path}: no such data file ({_neighbours(path)}); correct data.data or --data") from None
        except (OSError, ValueError) as fault:
            raise UsageError(f"{path}: the data file cannot be read: {fault}; correct data.data or --data") from None
        raise UsageError(f"{path} is no regular file; data are read twice, so copy it into a .jsonl file")
    return DataSource("jsonl" if suffix == ".jsonl" else "parquet", str(path))


def _neighbours(path: Path) -> str:
    names = sorted(each.name for suffix in DATA_SUFFIXES for each in path.parent.glob(f"*{suffix}"))
    near = difflib.get_close_matches(path.name, names, n=1) or names[:5]
    return f"in that folder: {', '.join(near)}" if near else "there is no .jsonl or .parquet file in that folder"


# A sample of the longest sequence a recipe allows (2^24 tokens of about 4 bytes) still fits.
LINE_LIMIT = 64 * MIB
_BUFFER = MIB


class JsonLines(Reader):
    """A `.jsonl` file, read line by line."""

    def __init__(self, name: str) -> None:
        self._path = Path(name)
        try:
            self.total = self._path.stat().st_size
        except OSError as fault:
            raise _cannot_read(self._path, fault) from None

    def rows(self) -> Iterator[Row]:
        """Every line."""
        try:
            with self._path.open("rb", buffering=_BUFFER) as file:
                for number, (size, raw) in enumerate(_lines(file), start=1):
                    yield self._row(number, size, raw)
        except (OSError, ValueError) as fault:
            raise _cannot_read(self._path, fault) from None

    def _row(self, number: int, size: int, raw: bytes | None) -> Row:
        if raw is None:
            limit = f"is longer than {LINE_LIMIT // MIB} MiB; write one sample a line"
            return Row(number, size, FaultySampleError("too long", limit))
        if number == 1 and raw.startswith(codecs.BOM_UTF8):
            self.byte_order_mark, raw = True, raw.removeprefix(codecs.BOM_UTF8)
        if not raw.strip():
            return Row(number, size, None)
        try:
            return Row(number, size, parse_line(raw, first=number == 1))
        except FaultySampleError as fault:
            return Row(number, size, fault)


def _cannot_read(path: Path, fault: Exception) -> UsageError:
    reason = getattr(fault, "strerror", None) or fault
    return UsageError(
        f"data.data: {str(path)!r} cannot be read ({reason}). Make it readable for this user, or copy it to a disk "
        "that answers and name the copy with data.data or --data"
    )


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Each line's length and bytes; None for the bytes of one over the limit, which is never held whole."""
    while raw := file.readline(LINE_LIMIT + 1):
        if len(raw) <= LINE_LIMIT:
            yield len(raw), raw
            continue
        size = len(raw)
        while raw and not raw.endswith(b"\n"):
            raw = file.readline(_BUFFER)
            size += len(raw)
        yield size, None


def parse_line(raw: bytes, *, first: bool = False) -> dict[str, Any]:
    """The object on a line, strict JSON: no NaN, no key twice, nothing but UTF-8.

    Raises:
        FaultySampleError: it holds none.
    """
    if first and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FaultySampleError("encoding", "is UTF-16; save the file as UTF-8")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as fault:
        raise FaultySampleError(
            "encoding", f"byte {raw[fault.start]:#04x} at {fault.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        value = json.loads(text, parse_constant=no_constant, object_pairs_hook=object_once)
    except json.JSONDecodeError as fault:
        raise FaultySampleError(
            "not JSON", f"is not JSON: {fault.msg} at column {fault.colno}; {_advice(text)}"
        ) from None
    except RecursionError:
        raise FaultySampleError("not JSON", "is nested too deeply; write a flat object") from None
    except ValueError:  # an integer of more digits than Python reads
        raise FaultySampleError("not JSON", "holds a number that is too long; a sample holds text only") from None
    if not isinstance(value, dict):
        raise FaultySampleError(
            "not an object", f"is {kind_of(value)}, not an object; write one object a line: {FORMATS}"
        )
    return value


def _advice(text: str) -> str:
    if text.strip() in ("[", "{"):
        return "a whole sample stands on one line, and no brackets around the lines"
    if text.lstrip().startswith("{'"):
        return "quote with double quotes"
    if text.rstrip().endswith("},"):
        return "no comma between the lines"
    return "write one JSON object a line"


def no_constant(name: str) -> NoReturn:
    """For `json.loads`: raises `FaultySampleError` for NaN and infinities."""
    raise FaultySampleError("not JSON", f"holds {name}, which is not JSON; a sample holds text only")


def object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads`: raises `FaultySampleError` for a key that an object has twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise FaultySampleError("not JSON", f"has the key {twice!r} twice; remove one of the two")
    return found
