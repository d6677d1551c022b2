"""Parquet files as rows, in memory that does not grow with them: one row group may hold everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow.parquet

_BATCH_ROWS = 512


@contextmanager
def open_parquet(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A parquet file that is read through a small buffer, not a row group at a time.

    Raises:
        ValueError: if it is none, or what is read of it in this context is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path}: not a parquet file that can be read, or damaged ({reason})") from None


def read_rows(
    path: Path, columns: Sequence[str], rows: range | None = None
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(row number, values of the given columns) in the order of the file; `rows`: of these alone."""
    with open_parquet(path) as file:
        wanted = range(file.metadata.num_rows) if rows is None else rows
        first = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns), use_threads=False):
            start, end = max(wanted.start, first), min(wanted.stop, first + batch.num_rows)
            if start < end:
                part = batch.slice(start - first, end - start)
                yield from zip(range(start, end), zip(*(part.column(name).to_pylist() for name in columns)))
            first += batch.num_rows
            if first >= wanted.stop:
                return


def find_columns(path: Path, *accepted: Sequence[str]) -> tuple[str, ...]:
    """Of each column the first of its accepted names that the file has.

    Raises:
        ValueError: if a column is missing, or the file is no parquet file.
    """
    with open_parquet(path) as file:
        names = file.schema_arrow.names
    found = []
    for choices in accepted:
        present = [name for name in choices if name in names]
        if not present:
            raise ValueError(f"{path}: no column {' or '.join(choices)}; it has {', '.join(names)}")
        found.append(present[0])
    return tuple(found)


def first_rows_of_repeated(path: Path, column: str) -> dict[str, int]:
    """The values that a column has more than once -> the number of the first row that has it; not for nulls."""
    import pyarrow
    import pyarrow.compute

    with open_parquet(path) as file:
        values = file.read([column]).column(0)
        table = pyarrow.table({"value": values, "row": pyarrow.array(range(len(values)), pyarrow.int64())})
        groups = table.group_by("value").aggregate([("row", "min"), ("row", "count")])
        repeated = groups.filter(pyarrow.compute.greater(groups["row_count"], 1))
        first = dict(zip(repeated["value"].to_pylist(), repeated["row_min"].to_pylist()))
    first.pop(None, None)
    return first
