"""The columns of a store beside its own: what each holds, told by its values, and how they are stored.

Numbers, truth values, texts, dates and timestamps stay what they are, for SQL to compare; all else becomes text.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa

from cocoa.errors import CocoaError, first_line

OWN = ("id", "text", "instruction", "row_hash", "vector", "thumbnail")
"""Columns that every store has."""


def kind_of(value: Any) -> pa.DataType | None:
    """What a column has to hold for a value; None where there is none."""
    match value:
        case None:
            return None
        case bool():
            return pa.bool_()
        case int() if -(2**63) <= value < 2**63:
            return pa.int64()
        case int() | float() | Decimal():
            return pa.float64()
        case datetime.datetime():
            return pa.timestamp("us", "UTC" if value.tzinfo else None)
        case datetime.date():
            return pa.date32()
    return pa.string()


def merged(one: pa.DataType | None, two: pa.DataType | None) -> pa.DataType | None:
    """What a column has to hold for two values: of two kinds of numbers the wider, of other kinds text."""
    if one is None or two is None or one == two:
        return one or two
    return pa.float64() if {one, two} == {pa.int64(), pa.float64()} else pa.string()


def as_stored(value: Any, kind: pa.DataType) -> Any:
    """A value as a column of that kind takes it; what is no text becomes JSON in a column of texts."""
    if value is None:
        return None
    if kind == pa.float64():
        return float(value)
    if kind != pa.string():
        return value
    if isinstance(value, datetime.time):
        value = value.isoformat()
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=_told)
    return text.encode(errors="backslashreplace").decode()


def check_column(name: str, path: Path) -> None:
    """See that a column can stand in a store.

    Raises:
        CocoaError: its name cannot.
    """
    if name in OWN:
        raise CocoaError(f"{path}: column {name!r} has the name of one of the store's own; rename it")
    if not name or "." in name or name.startswith("_") or not name.isprintable():
        raise CocoaError(f"{path}: column {name!r}: such a name cannot be stored; rename it (no dot, no _ in front)")


def stored_kinds(table: Any | None, kinds: Mapping[str, pa.DataType | None], db: Path) -> dict[str, pa.DataType]:
    """What the columns of a store hold, once it has those that are new; also those that the source has no more.

    Args:
        table: of the store; None where there is none yet.
        kinds: of the source's columns, None of one without any value.
        db: names the store in messages.

    Raises:
        CocoaError: a column's values are of another kind now, which the store's do not take.
    """
    there = {} if table is None else {each.name: each.type for each in table.schema}
    for name, kind in kinds.items():
        held = there.get(name, kind)
        if kind is not None and held not in (kind, pa.string()) and (held, kind) != (pa.float64(), pa.int64()):
            raise CocoaError(f"{db}: column {name!r} held {held}, and now holds {kind}; choose another --db")
    wanted = {name: there.get(name) or kind or pa.string() for name, kind in kinds.items()}
    new = [pa.field(name, kind) for name, kind in wanted.items() if name not in there]
    if table is not None and new:
        table.add_columns(new)
    # A column that the source has no more is emptied, row by row as they change; else its old values would stay.
    return wanted | {name: kind for name, kind in there.items() if name not in (*OWN, *wanted)}


def reason(error: Exception) -> str:
    """What LanceDB says is wrong, without the place in its code."""
    return re.sub(r",? ?\S+\.rs:\d+:\d+", "", first_line(error))


def _told(value: Any) -> str:
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)
