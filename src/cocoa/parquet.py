"""Parquet files opened, read and written: damaged ones are refused, none is there before it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cocoa.errors import CocoaError, first_line
from cocoa.files import whole


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file, seen to be one.

    Raises:
        CocoaError: it is none.
    """
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CocoaError(f"{path}: not parquet ({first_line(error)}); write it again") from None


def parquet_batches(path: Path, rows: int, **options: Any) -> Iterator[pa.RecordBatch]:
    """The batches of a parquet file, checked.

    Raises:
        CocoaError: it is none, or damaged.
    """
    try:
        for batch in open_parquet(path).iter_batches(rows, **options):
            batch.validate(full=True)  # else a damaged text is read beyond its end
            yield batch
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CocoaError(f"{path}: not readable parquet ({first_line(error)}); write it again") from None


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file so that it appears only when whole."""
    with whole(path) as unfinished:
        pq.write_table(table, unfinished)
