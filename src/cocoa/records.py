"""The rows of JSONL, JSON, CSV and parquet files, whatever stands in them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from cocoa.errors import CocoaError
from cocoa.parquet import parquet_batches

READ_ROWS = 10_000
Broken = Callable[[int, CocoaError], None]
"""Told which row is broken, and how; the row is left out, unless it raises."""


def refuse(row: int, error: CocoaError) -> None:
    """The first broken row is an error."""
    raise error


@contextmanager
def _opened(path: Path, **options: Any) -> Iterator[TextIO]:
    """A file of text, read within; one that is in another encoding than UTF-8 is an error."""
    try:
        with path.open(encoding="utf-8-sig", **options) as file:
            yield file
    except UnicodeDecodeError as error:
        raise CocoaError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise CocoaError(f"{path}: cannot be read ({error.strerror}); name another file") from None


def csv_records(
    path: Path, columns: Sequence[str] | None = None, broken: Broken = refuse
) -> Iterator[tuple[int, str, Any]]:
    """As `json_records`, the rows of a CSV file, whose columns have to be among `columns` if they are given."""
    with _opened(path, newline="") as file:
        reader = csv.DictReader(file)
        try:
            for column in reader.fieldnames or ():
                if columns is not None and column not in columns:
                    raise CocoaError(f"{path}: unknown column {column!r}; the columns are {', '.join(columns)}")
            for record in reader:
                where = f"{path}, line {reader.line_num}"
                if None in record:
                    error = CocoaError(f"{where}: more fields than columns; put texts with commas in double quotes")
                    broken(reader.line_num, error)
                else:
                    yield reader.line_num, where, record
        except csv.Error as fault:
            raise CocoaError(f"{path}, line {reader.line_num}: not CSV ({fault}); repair or drop the line") from None


def json_records(path: Path, broken: Broken = refuse) -> Iterator[tuple[int, str, Any]]:
    """(number from 1, where it stands, parsed record) of a JSON list or of the non-empty lines of JSONL.

    Args:
        path: of the file.
        broken: told about each line of JSONL that is no JSON; by default an error.
    """
    with _opened(path) as file:
        start = file.readline()
        while start and not start.strip():
            start = file.readline()
        file.seek(0)
        if start.lstrip().startswith("["):
            text = file.read()
            try:
                records = json.loads(text)
            except (ValueError, RecursionError) as error:
                where = f"{path}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
                raise CocoaError(f"{where}: not JSON ({_reason(error)}); repair the line") from None
            yield from ((number, f"{path}, record {number}", record) for number, record in enumerate(records, 1))
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}, line {number}"
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    broken(number, CocoaError(f"{where}: not JSON ({_reason(error)}); repair or drop the line"))
                else:
                    yield number, where, record


def _reason(error: Exception) -> str:
    """Why a text is no JSON; numbers of thousands of digits and deep nesting are no syntax errors."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, json.JSONDecodeError):
        return "something stands behind its end" if error.msg == "Extra data" else error.msg
    return str(error).partition(";")[0]


def parquet_records(path: Path, broken: Broken) -> Iterator[tuple[int, str, Any]]:
    """As `json_records`, the rows of a parquet file, counted from 1, of which none is broken by itself."""
    number = 0
    for batch in parquet_batches(path, READ_ROWS):
        for record in batch.to_pylist():
            number += 1
            yield number, f"{path}, row {number}", record


def stored_image(value: Any) -> Any:
    """What a column holds of an image: its file's content or path, also where the library `datasets` wrote both."""
    return value.get("bytes") or value.get("path") if isinstance(value, dict) else value


def read_text(record: dict[str, Any], key: str, where: str) -> str:
    """A record's text under a key, checked to be text; empty where there is none."""
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        kind = type(value).__name__
        said = repr(value) if isinstance(value, bool | int | float) else f"of type {kind}"
        raise CocoaError(f"{where}: {key} is {said}, not text; write text there, in double quotes where it is JSON")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise CocoaError(f"{where}: {key} is not Unicode (character {error.start}); write it anew") from None
    return (value or "").strip()
