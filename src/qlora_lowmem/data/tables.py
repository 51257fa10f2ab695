"""Tables: a Parquet file, or a data set of the hub through the package `datasets`.

A table has the columns that it has: those of one format are read, the others are named in the report. pyarrow and
datasets are imported when a table is opened, and not before. A data set that is JSON Lines is read as such, line by
line: `load_dataset` (5.2) turns every text of a block of 10 MB into its JSON source, quotation marks and all, where one
line of the block has a number or a list in its place.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_lowmem.data.formats import COLUMNS, FORMATS, TOOLS
from qlora_lowmem.data.sources import JsonLines
from qlora_lowmem.data.values import FaultySampleError, Reader, Row
from qlora_lowmem.errors import UsageError
from qlora_lowmem.units import MIB

BATCH_ROWS = 256


class ParquetTable:
    """A `.parquet` file, read in batches of rows."""

    byte_order_mark = False

    def __init__(self, name: str) -> None:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        self._name = name
        self._faults = (ArrowException, OSError)
        try:
            # Without pre-buffering and with a buffer, columns are read page by page, not row group by row group.
            self._file = ParquetFile(name, buffer_size=MIB, pre_buffer=False)
            columns = list(self._file.schema_arrow.names)
            self.total = int(self._file.metadata.num_rows)
        except self._faults as fault:
            raise self._unreadable(fault) from None
        self._used = _used_columns(name, columns)
        self.unused_columns = tuple(column for column in columns if column not in self._used)

    def rows(self) -> Iterator[Row]:
        """Every row.

        Raises:
            UsageError: the file is damaged.
        """
        number = 0
        try:
            for batch in self._file.iter_batches(batch_size=BATCH_ROWS, columns=list(self._used)):
                yield from _rows_of(batch, number)
                number += len(batch)
        except self._faults as fault:
            raise self._unreadable(fault, number) from None

    def _unreadable(self, fault: Exception, after: int = 0) -> UsageError:
        reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
        where = f", after row {after}" if after else ""
        return UsageError(
            f"{self._name}{where}: cannot be read as Parquet ({reason}); write the file again, or use JSON Lines"
        )


def open_hub(name: str, split: str) -> Reader:
    """A data set of the hub, downloaded once into the cache of `datasets`.

    `datasets` runs no code of a repository (it has no such option since 4.0). A folder `owner/name` in the working
    directory is taken before the hub, as `load_dataset` does.

    Raises:
        UsageError: it cannot be found or loaded, or has no columns that are known.
    """
    import datasets
    from pyarrow import ArrowException

    try:
        builder = datasets.load_dataset_builder(name)
        base, sliced, _ = split.partition("[")
        files = (builder.config.data_files or {}).get(base, [])
        if files and all(".jsonl" in Path(file).name for file in files):
            downloaded = datasets.DownloadManager(dataset_name=name).download_and_extract(list(files))
            return _HubLines([str(path) for path in downloaded], split if sliced else None)
        return _HubTable(f"{name}:{split}", datasets.load_dataset(name, split=split))
    except (OSError, ValueError, RuntimeError, ArrowException, datasets.exceptions.DatasetsError) as fault:
        raise _cannot_load(name, split, fault) from None  # RuntimeError: the repository holds a script


class _HubLines:
    """A split whose files are JSON Lines; rows are numbered over all of them, blank lines left out.

    Args:
        split: with a slice of it (`train[:10%]`); None for all.
    """

    byte_order_mark = False
    unused_columns: tuple[str, ...] = ()

    def __init__(self, paths: Sequence[str], split: str | None) -> None:
        self._paths = paths
        self.total = sum(1 for _ in self._lines())
        self._parts = [(0, self.total)] if split is None else _parts_of(split, self.total)
        self.total = sum(end - start for start, end in self._parts)

    def _lines(self) -> Iterator[Row]:
        for path in self._paths:
            yield from (row for row in JsonLines(path).rows() if row.value is not None or row.fault is not None)

    def rows(self) -> Iterator[Row]:
        """Every row.

        Raises:
            UsageError: a file cannot be read.
        """
        for index, row in enumerate(self._lines()):
            if any(start <= index < end for start, end in self._parts):
                yield Row(index + 1, 1, row.value, row.fault)


def _parts_of(split: str, rows: int) -> list[tuple[int, int]]:
    """The (first, last + 1) rows that `datasets` means by a split with slices, of `rows` in all."""
    import datasets

    base = split.partition("[")[0]
    asked = datasets.ReadInstruction.from_spec(split).to_absolute({base: rows})
    return [(part.from_ or 0, rows if part.to is None else part.to) for part in asked]


class _HubTable:
    """A split that is memory-mapped from the cache of `datasets`."""

    byte_order_mark = False

    def __init__(self, shown: str, found: Any) -> None:
        columns = list(found.column_names)
        used = _used_columns(shown, columns)
        self._table = found.select_columns(list(used))
        self.unused_columns = tuple(column for column in columns if column not in used)
        self.total = len(found)

    def rows(self) -> Iterator[Row]:
        """Every row, decoded by `datasets`: a column of its feature `Json` is stored as its source."""
        for number, value in enumerate(self._table, start=1):
            yield _row_of(number, value)


def _cannot_load(name: str, split: str, fault: Exception) -> UsageError:
    reason = (str(fault).strip() or type(fault).__name__).splitlines()[0]
    return UsageError(
        f"data.data: the data set {name!r}, split {split!r}, could not be loaded ({reason}). Check the name, the split "
        "(owner/name:split) and the connection to the hub, and log in if it is gated. Without a connection, download "
        f"it where there is one (hf download --repo-type dataset {name}) and name one of its .parquet or .jsonl files"
    )


def _used_columns(name: str, columns: Sequence[str]) -> tuple[str, ...]:
    """The columns of the first format that the table has, in the order of `COLUMNS`."""
    for required, optional in COLUMNS.values():
        if set(required) <= set(columns):
            return (*required, *(column for column in optional if column in columns))
    found = ", ".join(columns[:12]) or "none"
    raise UsageError(f"{name}: its columns ({found}) are of no known format; rename them: a sample is {FORMATS}")


def _rows_of(batch: Any, before: int) -> Iterator[Row]:
    """The rows of a batch that `before` rows precede; text that is not UTF-8 is its row's fault."""
    try:
        values = batch.to_pylist()
    except UnicodeDecodeError:
        values = [_one_of(batch.slice(index, 1)) for index in range(len(batch))]
    for number, value in enumerate(values, start=before + 1):
        if isinstance(value, FaultySampleError):
            yield Row(number, 1, None, value)
        else:
            yield _row_of(number, value)


def _row_of(number: int, value: dict[str, Any]) -> Row:
    """An optional column is empty where a sample has no tools; a required one is there, empty or not."""
    return Row(number, 1, {key: _present(each) for key, each in value.items() if each is not None or key != TOOLS})


def _one_of(row: Any) -> Any:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as fault:
        return FaultySampleError("encoding", f"holds text that is not UTF-8 ({fault.reason}); write it as UTF-8")


def _present(value: Any) -> Any:
    """Without the nulls that a table puts where another row has a key."""
    if isinstance(value, dict):
        return {key: _present(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_present(each) for each in value]
    return value
