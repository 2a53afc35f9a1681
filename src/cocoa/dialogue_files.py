"""The file of captions and conversations on images that `data.train` reads: `image_path`, `caption`, `dialogue`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa

from cocoa.pairs import Turn
from cocoa.parquet import write_table

DIALOGUE = pa.list_(pa.struct([(name, pa.string()) for name in Turn._fields]))
COLUMNS = pa.schema([("image_path", pa.string()), ("caption", pa.string()), ("dialogue", DIALOGUE)])
FILE_NAME = "dialogues.parquet"


def write_dialogues_file(path: Path, rows: Iterable[tuple[str, str, Sequence[Turn]]]) -> None:
    """Write rows of (image path, caption, turns), whole or not at all; what is empty is null in the file.

    Args:
        path: of the file. Image paths in it are relative to its folder.
        rows: in the order of the file.
    """
    records = [
        {"image_path": image, "caption": caption or None, "dialogue": as_records(turns)}
        for image, caption, turns in rows
    ]
    write_table(path, pa.Table.from_pylist(records, COLUMNS))


def as_records(turns: Sequence[Turn]) -> list[dict[str, str]] | None:
    """A conversation as a column holds it; None for none."""
    return [turn._asdict() for turn in turns] or None
