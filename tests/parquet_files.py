"""Small parquet files for the tests of readers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PLAIN = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
"""The columns of MMEB-eval's plain form."""


def write(path: Path, columns: Sequence[str], *rows: Sequence[Any]) -> Path:
    """Write a parquet file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: [row[i] for row in rows] for i, column in enumerate(columns)}), path)
    return path


def write_eval(folder: Path, name: str, *rows: Sequence[Any], columns: Sequence[str] = PLAIN) -> Path:
    """Write one evaluation data set."""
    return write(folder / name / "test-00000-of-00001.parquet", columns, *rows)
