"""Parquet files opened and read, damaged ones refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cocoa.errors import CocoaError


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


def first_line(error: Exception) -> str:
    """Of an error's message, which may have none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
