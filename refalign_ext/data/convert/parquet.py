"""Parquet files as rows, in memory that does not grow with them: one row group may hold everything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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


def read_rows(path: Path, columns: Sequence[str], rows: range) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(row number, values of the given columns) of these rows, in the order of the file."""
    first = 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(columns), use_threads=False):
            start, end = max(rows.start, first), min(rows.stop, first + batch.num_rows)
            if start < end:
                part = batch.slice(start - first, end - start)
                yield from zip(range(start, end), zip(*(part.column(name).to_pylist() for name in columns)))
            first += batch.num_rows
            if first >= rows.stop:
                return


def find_columns(path: Path, *accepted: Sequence[str]) -> tuple[list[str], list[str], int]:
    """(of each column the first of its accepted names that the file has, all its columns, the number of its rows).

    Raises:
        ValueError: if a column is missing, or the file is no parquet file.
    """
    with open_parquet(path) as file:
        names, rows = file.schema_arrow.names, file.metadata.num_rows
    found = []
    for choices in accepted:
        present = [name for name in choices if name in names]
        if not present:
            raise ValueError(f"{path}: no column {' or '.join(choices)}; it has {', '.join(names)}")
        found.append(present[0])
    return found, names, rows


def repeated_rows(path: Path, column: str) -> frozenset[int]:
    """The rows whose value an earlier row has; nulls are values too."""
    with open_parquet(path) as file:
        values = file.read([column]).column(0).combine_chunks()
        codes = values.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    first = np.unique(codes, return_index=True)[1]
    return frozenset(np.delete(np.arange(len(codes)), first).tolist())
