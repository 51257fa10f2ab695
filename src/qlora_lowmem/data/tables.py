"""Tables: a Parquet file, or a data set of the hub through the package `datasets`.

Columns of one format are read, the others are named in the report. pyarrow and datasets are imported when a table is
opened, and not before. A data set that is JSON Lines is read line by line: `load_dataset` (5.2) turns every text of a
block of 10 MB into its JSON source, quotation marks and all, where one line of it has a number or a list in its place.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_lowmem.data.formats import COLUMNS, FORMATS, TOOLS
from qlora_lowmem.data.sources import JsonLines
from qlora_lowmem.data.values import FaultySampleError, Reader, Row
from qlora_lowmem.errors import UsageError
from qlora_lowmem.units import MIB

BATCH_ROWS = 256


class ParquetTable(Reader):
    """A `.parquet` file, read in batches of rows."""

    def __init__(self, name: str) -> None:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        self._name = name
        self._faults = (ArrowException, OSError)
        try:
            # Without pre-buffering and with a buffer, columns are read page by page, not row group by row group.
            self._file = ParquetFile(name, buffer_size=MIB, pre_buffer=False)
            columns = self._file.schema_arrow.names
            self.total = int(self._file.metadata.num_rows)
        except self._faults as fault:
            raise self._unreadable(fault) from None
        self._used, self.unused_columns = _columns_of(name, columns)

    def rows(self) -> Iterator[Row]:
        """Every row."""
        number = 0
        try:
            for batch in self._file.iter_batches(batch_size=BATCH_ROWS, columns=self._used):
                yield from _rows_of(values_of(batch), number)
                number += len(batch)
        except self._faults as fault:
            raise self._unreadable(fault, number) from None

    def _unreadable(self, fault: Exception, after: int = 0) -> UsageError:
        where = f"{self._name}, after row {after}" if after else self._name
        advice = "write the file again, or use JSON Lines"
        return UsageError(f"{where}: cannot be read as Parquet ({_reason(fault)}); {advice}")


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
        files = (builder.config.data_files or {}).get(split.partition("[")[0], [])
        if files and all(".jsonl" in Path(file).name for file in files):
            downloaded = datasets.DownloadManager(dataset_name=name).download_and_extract(list(files))
            return _HubLines([str(path) for path in downloaded], split)
        return _HubTable(f"{name}:{split}", datasets.load_dataset(name, split=split))
    except (OSError, ValueError, RuntimeError, ArrowException, datasets.exceptions.DatasetsError) as fault:
        # RuntimeError: the repository holds a script.
        raise UsageError(
            f"data.data: the data set {name!r}, split {split!r}, could not be loaded ({_reason(fault)}). Check the "
            "name, the split (owner/name:split) and the connection to the hub, and log in if it is gated. Without a "
            f"connection, download it where there is one (hf download --repo-type dataset {name}) and name one of its "
            ".parquet or .jsonl files"
        ) from None


class _HubLines(Reader):
    """A split, or slices of one (`train[:10%]`), in JSON Lines; rows are numbered over all files, blank lines out."""

    def __init__(self, paths: Sequence[str], split: str) -> None:
        import datasets

        self._paths = paths
        lines = sum(1 for _ in self._lines())
        asked = datasets.ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: lines})
        self._parts = [(part.from_ or 0, lines if part.to is None else part.to) for part in asked]
        self.total = sum(end - start for start, end in self._parts)

    def _lines(self) -> Iterator[Row]:
        for path in self._paths:
            yield from (row for row in JsonLines(path).rows() if row.value is not None)

    def rows(self) -> Iterator[Row]:
        """Every row."""
        for index, row in enumerate(self._lines()):
            if any(start <= index < end for start, end in self._parts):
                yield Row(index + 1, 1, row.value)


class _HubTable(Reader):
    """A split that is memory-mapped from the cache of `datasets`."""

    def __init__(self, shown: str, found: Any) -> None:
        used, self.unused_columns = _columns_of(shown, found.column_names)
        self._table = found.select_columns(used)
        self.total = len(found)

    def rows(self) -> Iterator[Row]:
        """Every row, decoded by `datasets`: a column of its feature `Json` is stored as its source."""
        yield from _rows_of(self._table)


def _reason(fault: Exception) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0]


def _columns_of(name: str, columns: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """(those of the first format that a table has, in the order of `COLUMNS`; the others)."""
    for required, optional in COLUMNS.values():
        if set(required) <= set(columns):
            used = [*required, *(column for column in optional if column in columns)]
            check_once(name, [column for column in columns if column in used])
            return used, tuple(column for column in columns if column not in used)
    found = ", ".join(columns[:12]) or "none"
    raise UsageError(f"{name}: its columns ({found}) are of no known format; rename them: a sample is {FORMATS}")


def check_once(name: str, columns: Sequence[str]) -> None:
    """Raise `UsageError` for a column that a table has twice: a row would keep one of the two values, in silence."""
    twice = next((column for column in columns if columns.count(column) > 1), None)
    if twice is not None:
        raise UsageError(f"{name}: the column {twice!r} is there twice; remove or rename one of the two")


def values_of(batch: Any) -> list[Any]:
    """The rows of a batch; text that is not UTF-8 is its row's fault, and so is a field that an object has twice."""
    try:
        return list(batch.to_pylist())
    except ValueError as fault:
        if len(batch) > 1:
            return [value for index in range(len(batch)) for value in values_of(batch.slice(index, 1))]
        if isinstance(fault, UnicodeDecodeError):
            return [FaultySampleError("encoding", f"holds text that is not UTF-8 ({fault.reason}); write it as UTF-8")]
        return [FaultySampleError("wrong keys", f"cannot be read ({fault}); remove or rename what is there twice")]


def _rows_of(values: Iterable[Any], before: int = 0) -> Iterator[Row]:
    """Rows that `before` rows precede. An optional column is empty where a sample has no tools; a required one is
    there, empty or not.
    """
    for number, value in enumerate(values, start=before + 1):
        if isinstance(value, dict):
            value = {key: _present(each) for key, each in value.items() if each is not None or key != TOOLS}
        yield Row(number, 1, value)


def _present(value: Any) -> Any:
    """Without the nulls that a table puts where another row has a key."""
    if isinstance(value, dict):
        return {key: _present(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_present(each) for each in value]
    return value
