"""Which images there are in a folder, in parquet files or in a file of paths, each picture once.

A picture is told by its pixels: the same under two names, or in another encoding without loss, is one picture.
Images that lie in a parquet file are written out as they are.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import UnidentifiedImageError

from cocoa.embedding_cache import content_key
from cocoa.errors import CocoaError
from cocoa.files import whole
from cocoa.image_files import OUTSIDE, leaves
from cocoa.images import load_image, open_image
from cocoa.pair_files import read_turns
from cocoa.pairs import Side, Turn
from cocoa.parquet import open_parquet, parquet_batches
from cocoa.parsing import check_keys
from cocoa.processes import shared
from cocoa.records import csv_records, json_records, read_text, stored_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
FILE_SUFFIXES = (".jsonl", ".json", ".csv")
ROW_KEYS = ("image_path", "caption", "dialogue")
IMAGE_COLUMN = "image"
IMAGES_FOLDER = "images"
"""In the output folder, the images that lay in parquet files."""
READ_ROWS = 64
NO_IMAGE = "no image"


@dataclass(frozen=True, slots=True)
class Picture:
    """An image file with what is known of it.

    Attributes:
        path: absolute.
        digest: of its pixels, in hexadecimal.
        caption: empty where it has none.
        turns: its conversation, if it has one.
    """

    path: str
    digest: str
    caption: str = ""
    turns: tuple[Turn, ...] = ()


@dataclass
class Listing:
    """Distinct pictures in the order of the source.

    Attributes:
        pictures: of pictures that are the same the first; with the caption and the conversation of the first of them
            that has one.
        duplicates: how many more images show one of them.
        unreadable: where the others stand, and what is wrong with each.
    """

    pictures: list[Picture] = field(default_factory=list)
    duplicates: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)


class _Row(NamedTuple):
    where: str
    image: str | bytes | None
    caption: str = ""
    turns: tuple[Turn, ...] = ()
    root: str = ""  # that the path must not leave; empty where the source is the folder that it was found in


class _Seen(NamedTuple):
    """A row after its image was read: the picture, or what is wrong with it."""

    where: str
    picture: Picture | None
    fault: str = ""


def list_pictures(source: Path, output: Path, image_root: Path | None = None) -> Listing:
    """Read every image of a source; the processes of a run share the work.

    Args:
        source: a folder of images (any depth) or of parquet files, a parquet file with a column `image` (as the
            library `datasets` writes it, or bytes, or paths) or `image_path` and perhaps `caption` and `dialogue`, or
            a JSONL or JSON file with these three keys, or a CSV file with the first two. An `output` inside the folder
            is no part of it.
        output: its `images` is where images that lie in parquet files are written.
        image_root: what the paths in a file are relative to, and must not leave; by default the file's folder.

    Raises:
        CocoaError: no such source, one without images, or a row that is not of this form.
    """
    if source.is_dir():
        images, tables = _files(source, output)
    elif not source.is_file():
        raise CocoaError(f"{source}: no such file or folder; name a folder of images, or a file that lists them")
    elif source.suffix == ".parquet":
        images, tables = [], [source]
    elif source.suffix in FILE_SUFFIXES:
        images, tables = list(_file_rows(source, image_root or source.parent)), []
    else:
        raise CocoaError(f"{source}: not a folder, nor a file of {', '.join(('.parquet', *FILE_SUFFIXES))}")
    seen = shared(partial(_look, output), images, "images")
    groups = [group for table in tables for group in _row_groups(table)]
    seen += [row for rows in shared(partial(_look_into, output, image_root), groups, "parquet") for row in rows]
    listing = Listing()
    found: dict[str, Picture] = {}
    for where, picture, fault in seen:
        if picture is None:
            listing.unreadable[where] = fault
            continue
        first = found.setdefault(picture.digest, picture)
        if first is not picture:
            listing.duplicates += 1
            caption, turns = first.caption or picture.caption, first.turns or picture.turns
            found[picture.digest] = replace(first, caption=caption, turns=turns)
    listing.pictures = list(found.values())
    if not listing.pictures:
        unread = next((f"; {where}: {fault}" for where, fault in listing.unreadable.items()), "")
        raise CocoaError(f"{source}: no image that can be read{unread}; name a folder or file that has some")
    return listing


def _files(source: Path, output: Path) -> tuple[list[_Row], list[Path]]:
    """The image files and the parquet files below a folder, in the order of their paths."""
    if output.resolve() == source.resolve():
        raise CocoaError(f"{source}: source and output are the same folder; choose another --output")
    own = output.resolve() if output.resolve().is_relative_to(source.resolve()) else None
    paths = [path for path in source.rglob("*") if path.is_file()]
    if own is not None:
        paths = [path for path in paths if not path.resolve().is_relative_to(own)]
    paths.sort(key=lambda path: path.relative_to(source).as_posix())
    files = [os.path.abspath(path) for path in paths if path.suffix.lower() in SUFFIXES]
    images = [_Row(file, file) for file in files]
    tables = [path for path in paths if path.suffix == ".parquet"]
    if images and tables:
        raise CocoaError(f"{source}: both images ({images[0].where}) and parquet files ({tables[0]}); name one of them")
    return images, tables


def _file_rows(path: Path, root: Path) -> Iterator[_Row]:
    """The rows of a JSONL, JSON or CSV file of image paths."""
    is_csv = path.suffix == ".csv"
    keys = ROW_KEYS[:2] if is_csv else ROW_KEYS  # a conversation has no place in CSV
    for _, where, record in (csv_records if is_csv else json_records)(path):
        if not isinstance(record, dict):
            raise CocoaError(f"{where}: not a JSON object; write one image a line")
        check_keys(record, keys, f"{where}: ")
        if not read_text(record, "image_path", where):
            raise CocoaError(f"{where}: image_path is empty; fill it in or drop the row")
        yield _row(record, "image_path", where, root)


def _row(record: dict[str, Any], column: str, where: str, root: Path) -> _Row:
    """A record's image, as bytes or as an absolute path, with its caption and conversation."""
    image = stored_image(record.get(column))
    if isinstance(image, str):
        image = os.path.abspath(root / image) if image.strip() else None
    elif image is not None and not isinstance(image, bytes):
        raise CocoaError(f"{where}: {column} is {type(image).__name__}; write bytes, a path, or {{bytes, path}}")
    turns = read_turns(record.get("dialogue"), f"{where}, dialogue")
    return _Row(where, image, read_text(record, "caption", where), turns, str(root))


def _row_groups(path: Path) -> list[tuple[Path, str, int, int]]:
    """(file, column of the image, row group, its first row counted from 1) of each row group."""
    file = open_parquet(path)
    column = next((name for name in (IMAGE_COLUMN, "image_path") if name in file.schema_arrow.names), None)
    if column is None:
        names = ", ".join(file.schema_arrow.names)
        raise CocoaError(f"{path}: no column image or image_path (there are: {names}); rename the one with the images")
    groups, start = [], 1
    for number in range(file.metadata.num_row_groups):
        groups.append((path, column, number, start))
        start += file.metadata.row_group(number).num_rows
    return groups


def _look_into(output: Path, image_root: Path | None, group: tuple[Path, str, int, int]) -> list[_Seen]:
    """The images of a row group, a few rows in memory at a time; its other columns are not read."""
    path, column, number, row = group
    columns = [name for name in (column, "caption", "dialogue") if name in open_parquet(path).schema_arrow.names]
    seen = []
    for batch in parquet_batches(path, READ_ROWS, row_groups=[number], columns=columns):
        for record in batch.to_pylist():
            seen.append(_look(output, _row(record, column, f"{path}, row {row}", image_root or path.parent)))
            row += 1
    return seen


def _look(output: Path, row: _Row) -> _Seen:
    """Decode an image; one that is not a file yet becomes one."""
    try:
        if isinstance(row.image, bytes):
            with open_image(io.BytesIO(row.image)) as opened:
                image, suffix = load_image(opened), (opened.format or "").lower()
            path = _write_image(output / IMAGES_FOLDER, row.image, "jpg" if suffix == "jpeg" else suffix)
        elif row.image and row.root and leaves(row.image, row.root):
            return _Seen(row.where, None, f"{row.image}: {OUTSIDE}; name a folder that it lies in (--image-root)")
        elif row.image:
            image, path = load_image(row.image), row.image
        else:
            return _Seen(row.where, None, NO_IMAGE)
    except CocoaError as error:
        return _Seen(row.where, None, str(error).removeprefix(f"{row.where}: "))
    except UnidentifiedImageError:
        return _Seen(row.where, None, "not an image of any format that Pillow reads")
    except Exception as error:  # as in `load_image`
        return _Seen(row.where, None, f"not a readable image ({error})")
    return _Seen(row.where, Picture(path, content_key(Side(image=image)).hex(), row.caption, row.turns))


def _write_image(folder: Path, content: bytes, suffix: str) -> str:
    """Write an image under the hash of its bytes, unless it is there; its absolute path."""
    path = folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}.{suffix}"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            unfinished.write_bytes(content)
    return os.path.abspath(path)


def root_of(paths: Iterable[str], folder: Path) -> str | None:
    """What `data.image_root` has to be for a file in a folder that names these images; None where all lie below it.

    Args:
        paths: absolute.
        folder: of the file.
    """
    root = Path(os.path.abspath(folder))
    folders = {os.path.dirname(path) for path in paths}
    return os.path.commonpath(folders) if any(not Path(each).is_relative_to(root) for each in folders) else None


def path_in(path: str, folder: Path, root: str | None) -> str:
    """How an image stands in a file of a folder: relative to it, or absolute where `root_of` its images is no None."""
    return Path(path).relative_to(os.path.abspath(folder)).as_posix() if root is None else path
