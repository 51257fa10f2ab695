"""Tables: a Parquet file, or a data set of the hub through `datasets.load_dataset`.

A table has the columns that it has: those of one format are read, the others are named in the report. pyarrow and
datasets are imported when a table is opened, and not before.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from qlora_lowmem.data.faults import FaultySampleError
from qlora_lowmem.data.formats import COLUMNS, FORMATS, TOOLS
from qlora_lowmem.data.rows import Row
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


class HubTable:
    """A data set of the hub, downloaded once into the cache of `datasets` and memory-mapped from there.

    `datasets` runs no code of a repository (it has no such option since 4.0). A folder `owner/name` in the working
    directory is taken before the hub, as `load_dataset` does.
    """

    byte_order_mark = False

    def __init__(self, name: str, split: str) -> None:
        import datasets
        from pyarrow import ArrowException

        shown = f"{name}:{split}"
        try:
            found: Any = datasets.load_dataset(name, split=split)
        except (OSError, ValueError, RuntimeError, ArrowException, datasets.exceptions.DatasetsError) as fault:
            raise _cannot_load(name, split, fault) from None  # RuntimeError: the repository holds a script
        columns = list(found.column_names)
        self._used = _used_columns(shown, columns)
        self._table = found.select_columns(list(self._used)).with_format("arrow")
        self.unused_columns = tuple(column for column in columns if column not in self._used)
        self.total = len(found)

    def rows(self) -> Iterator[Row]:
        """Every row."""
        number = 0
        for batch in self._table.iter(batch_size=BATCH_ROWS):
            yield from _rows_of(batch, number)
            number += len(batch)


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
            # An optional column is empty where a sample has no tools; a required one is there, empty or not.
            yield Row(
                number, 1, {key: _present(each) for key, each in value.items() if each is not None or key != TOOLS}
            )


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
