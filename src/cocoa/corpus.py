"""What `cocoa embed` reads: a folder of images, parquet files or a file of rows, in parts that are read one at a time.

A row may have an `id`, an `instruction`, a `text` and an `image` (the content of a file, a path, or what the library
`datasets` makes of an image); the columns may have other names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from cocoa.errors import CocoaError
from cocoa.image_files import missing_images
from cocoa.image_listing import FILE_SUFFIXES, SUFFIXES
from cocoa.pairs import Side
from cocoa.parquet import open_parquet, parquet_batches
from cocoa.records import csv_records, json_records, read_text, stored_image

READ_ROWS = 64
"""Rows of a parquet file in memory at a time."""


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; one that is not there is empty in every row."""

    id: str = "id"
    text: str = "text"
    image: str = "image"
    instruction: str = "instruction"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a corpus, why it cannot be embedded (empty where it can), and what its other columns hold."""

    id: str
    side: Side
    fault: str = ""
    other: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that are read, embedded and written together.

    Attributes:
        name: of the file that will hold their embeddings; another one once the rows change.
        source: the file they stand in as it is called below the corpus, or empty for a folder of images.
        path: the file, or the folder whose images they are.
        start: the first row of the file, from 0.
        stop: the row behind the last.
        images: image paths in the folder; empty for a file.
    """

    name: str
    source: str
    path: Path
    start: int
    stop: int
    images: tuple[str, ...] = ()


def list_parts(source: Path, size: int, output: Path) -> list[Part]:
    """The parts of a corpus, in the order of its paths and rows.

    Args:
        source: a folder of images or of parquet files (any depth), or a parquet, JSONL, JSON or CSV file.
        size: rows of a part, at most; no part spans two files.
        output: no part of the source where it lies inside.

    Raises:
        CocoaError: there is no such source, or nothing in it.
    """
    source = Path(os.path.abspath(source))
    _records.cache_clear()  # the file may have changed since
    if source.is_dir():
        paths = [path for path in _below(source) if not path.is_relative_to(output)]
        tables = [path for path in paths if path.suffix == ".parquet"]
        images = [path for path in paths if path.suffix.lower() in SUFFIXES]
        if images and tables:
            raise CocoaError(f"{source}: both images ({images[0]}) and parquet files ({tables[0]}); name one of them")
        parts = _image_parts(source, images, size) if images else _table_parts(source, tables, size)
    elif not source.is_file():
        raise CocoaError(f"{source}: no such file or folder; name a folder of images, or a file of rows")
    elif source.suffix in (".parquet", *FILE_SUFFIXES):
        parts = _table_parts(source.parent, [source], size)
    else:
        raise CocoaError(f"{source}: not a folder, nor a file of {', '.join(('.parquet', *FILE_SUFFIXES))}")
    if not parts:
        raise CocoaError(
            f"{source}: nothing to embed in it; name a folder of images or parquet files, or a file of rows"
        )
    return parts


def read_part(
    part: Part, columns: Columns, size: int, image_root: Path | None = None, others: bool = False
) -> Iterator[list[Row]]:
    """The rows of a part in blocks of `size`, one after the other; the images that are files are seen to exist.

    Args:
        part: of `list_parts`.
        columns: of the file.
        size: rows in memory at a time.
        image_root: what image paths are relative to, and must not leave; by default the file's folder.
        others: read the other columns of a parquet file too.

    Raises:
        CocoaError: the file cannot be read, or has none of the columns.
    """
    if part.images:
        rows: Iterator[Row] = (Row(_printable(name), Side(image=str(part.path / name))) for name in part.images)
        root = None  # links in a folder that the user has named are the user's own
    else:
        root = os.path.abspath(image_root or part.path.parent)
        records = _parquet_rows(part, columns, others) if part.path.suffix == ".parquet" else _file_rows(part, columns)
        rows = (_row(record, columns, root, part, n) for n, record in enumerate(records, part.start + 1))
    while block := list(islice(rows, size)):
        missing = missing_images((row.side.image for row in block if isinstance(row.side.image, str)), root)
        yield [
            replace(row, fault=f"{row.side.image}: {missing[row.side.image]}")
            if isinstance(row.side.image, str) and row.side.image in missing
            else row
            for row in block
        ]


def _below(folder: Path) -> list[Path]:
    """All files below a folder; linked folders are not entered, and links to nothing are none."""
    found = [Path(at, name) for at, _, names in os.walk(folder) for name in names]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.as_posix())


def _printable(name: str) -> str:
    """A file's name as a table can hold it, which may be no Unicode."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _image_parts(folder: Path, images: Sequence[Path], size: int) -> list[Part]:
    parts = []
    for start in range(0, len(images), size):
        members = images[start : start + size]
        names = tuple(path.relative_to(folder).as_posix() for path in members)
        key = _name("images", start, names, [_state(path) for path in members])
        parts.append(Part(key, "", folder, start, start + len(members), names))
    return parts


def _table_parts(folder: Path, tables: Sequence[Path], size: int) -> list[Part]:
    parts = []
    for path in tables:
        rows = open_parquet(path).metadata.num_rows if path.suffix == ".parquet" else len(_records(path))
        inside = _printable(path.relative_to(folder).as_posix())
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            stem = inside.removesuffix(path.suffix).replace("/", "-")
            parts.append(Part(_name(stem, start, inside, stop, _state(path)), inside, path, start, stop))
    return parts


def _state(path: Path) -> tuple[int, int]:
    """What changes with a file's content, short of reading it."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _name(stem: str, start: int, *state: object) -> str:
    key = hashlib.blake2b(repr(state).encode(), digest_size=6).hexdigest()
    short = stem.encode()[:80].decode(errors="ignore")  # file systems count bytes
    return f"{short}-{start:010}-{key}.parquet"


def _parquet_rows(part: Part, columns: Columns, others: bool) -> Iterator[Any]:
    file = open_parquet(part.path)
    wanted = [name for name in file.schema_arrow.names if others or name in vars(columns).values()]
    _check_columns(part.path, file.schema_arrow.names, columns)
    groups: list[int] = []
    row = first = 0  # `first`: the row that the first of the groups begins with
    for number in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if row < part.stop and row + rows > part.start:
            first = first if groups else row
            groups.append(number)
        row += rows
    for batch in parquet_batches(part.path, READ_ROWS, row_groups=groups, columns=wanted):
        begin, end = max(part.start - first, 0), min(part.stop - first, len(batch))
        if begin < end:
            yield from batch.slice(begin, end - begin).to_pylist()
        first += len(batch)
        if first >= part.stop:
            return


def _file_rows(part: Part, columns: Columns) -> Iterator[Any]:
    records = _records(part.path)
    named = any(isinstance(record, dict) and {columns.text, columns.image} & record.keys() for _, record in records)
    for where, record in records[part.start : part.stop]:
        if isinstance(record, dict):
            try:
                _check_columns(where, record, columns)
            except CocoaError as error:
                if not named:  # in no row, so the columns have other names
                    raise
                yield error
            else:
                yield record
        elif isinstance(record, CocoaError):
            yield record
        else:
            yield CocoaError(f"{where}: not a JSON object; write one row a line")


@lru_cache(maxsize=1)
def _records(path: Path) -> list[tuple[str, Any]]:
    """All rows of a JSONL, JSON or CSV file, and where each stands; of a broken one what is wrong with it."""
    rows: list[tuple[str, Any]] = []

    def broken(row: int, error: CocoaError) -> None:
        rows.append(("", error))

    read = csv_records(path, broken=broken) if path.suffix == ".csv" else json_records(path, broken)
    for _, where, record in read:
        rows.append((where, record))
    return rows


def _check_columns(where: object, there: Sequence[str] | dict[str, Any], columns: Columns) -> None:
    if columns.text not in there and columns.image not in there:
        raise CocoaError(
            f"{where}: neither {columns.text!r} nor {columns.image!r} is there, but {', '.join(map(str, there))}; "
            "say which holds what (--text-column, --image-column)"
        )


def _row(record: Any, columns: Columns, root: str, part: Part, number: int) -> Row:
    name = f"{part.source}#{number}"
    if isinstance(record, CocoaError):
        return Row(name, Side(), str(record))
    where = f"{part.path}, row {number}"
    try:
        given = record.get(columns.id)
        name = read_text({columns.id: given if given is None else str(given)}, columns.id, where) or name
        image = stored_image(record.get(columns.image))
        if not isinstance(image, bytes):
            path = read_text({columns.image: image}, columns.image, where)
            image = os.path.join(root, path) if path else None
        side = Side(
            read_text(record, columns.instruction, where), read_text(record, columns.text, where), image or None
        )
    except CocoaError as error:
        return Row(name, Side(), str(error))
    other = {key: value for key, value in record.items() if key not in vars(columns).values()}
    return Row(name, side, "" if side.text or side.image is not None else "neither text nor image", other)
