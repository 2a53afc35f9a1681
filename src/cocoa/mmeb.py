"""MMEB's folders of parquet files, and the reader of MMEB-train, which gives `Pair`s (MMEB-eval: `cocoa.mmeb_eval`).

A folder whose name is not one of the 36 data sets is a data set too (`cocoa.catalogue`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cocoa.catalogue import (
    NEGATIVE_COLUMNS,
    TRAIN_COLUMNS,
    find_dataset,
    pair_reader,
)
from cocoa.errors import CocoaError, first_line
from cocoa.image_files import image_locator
from cocoa.pairs import Pair, PairSet, sample_rows


def list_subsets(folder: str | Path) -> list[str]:
    """The data sets in an MMEB folder: its sub-folders that hold parquet files, by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CocoaError(f"{folder}: no such folder; name one that holds a folder for each data set")
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and any(path.glob("*.parquet")))
    if not names:
        raise CocoaError(f"{folder}: no data set in it; name a folder that holds a folder of parquet files for each")
    return names


def select_subsets(wanted: str | Sequence[str], there: Sequence[str], where: str) -> list[str]:
    """The wanted names in the order they are there, found under either spelling of a name.

    Raises:
        CocoaError: a name is not there; the message says which are.
    """
    if wanted == "all":
        return list(there)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    chosen = set()
    for name in names:
        entry = find_dataset(name)
        spellings = {name, entry.name, entry.train_name} if entry else {name}
        found = spellings.intersection(there)
        if not found:
            raise CocoaError(f"{where}: no data set {name!r} (key `subsets`); there are {', '.join(there)}")
        chosen |= found
    return [name for name in there if name in chosen]


class Shard(NamedTuple):
    """A file of a split, its number, and how many there are, by its name."""

    path: Path
    number: int
    total: int


def list_splits(folder: Path) -> dict[str, list[Shard]]:
    """The splits in a data set's folder, each with the files that go by its name."""
    shards: dict[str, list[Shard]] = defaultdict(list)
    for path in sorted(folder.glob("*.parquet")):
        match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.parquet", path.name)
        if match:
            shards[match[1]].append(Shard(path, int(match[2]), int(match[3])))
    return dict(shards)


def read_split(folder: Path, split: str, needed: Sequence[str], optional: Sequence[str]) -> pa.Table:
    """The columns of one split in shard order; other splits beside it are left alone, two uploads of it an error."""
    shards = list_splits(folder)
    if split not in shards:
        there = ", ".join(sorted(shards)) or "none"
        raise CocoaError(f"{folder}: no split {split!r} (key `split`); there are: {there}")
    total, *others = sorted({shard.total for shard in shards[split]})
    if others:
        names = ", ".join(f"{split}-*-of-{count:05}.parquet" for count in (total, *others))
        raise CocoaError(f"{folder}: split {split!r} is there more than once ({names}); remove the older files")
    absent = sorted(set(range(total)) - {shard.number for shard in shards[split]})
    if absent:
        raise CocoaError(f"{folder}: file {split}-{absent[0]:05}-of-{total:05}.parquet is missing; download it again")
    tables = []
    for path, _, _ in shards[split]:  # sorted by name, and so by number
        try:
            with pq.ParquetFile(path) as file:
                missing = [name for name in needed if name not in file.schema_arrow.names]
                if missing:
                    raise CocoaError(
                        f"{path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}; "
                        "rename its columns, or download it again"
                    )
                columns = [name for name in (*needed, *optional) if name in file.schema_arrow.names]
                for name in columns:
                    _check_type(path, name, file.schema_arrow.field(name).type)
                tables.append(file.read(columns=columns))
                tables[-1].validate(full=True)  # else a damaged text is read beyond its end
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last in a column's name
            raise CocoaError(f"{path}: not a readable parquet file ({first_line(error)}); download it again") from None
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise CocoaError(f"{folder}: the files of split {split!r} differ in type ({error}); write them alike") from None


def _check_type(path: Path, column: str, kind: pa.DataType) -> None:
    """Refuse a column that does not hold strings (in evaluation lists of them, of negatives either), or nulls."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if column in LISTS and not is_list:
        raise CocoaError(f"{path}: column {column} holds {kind}, not lists of one string a candidate")
    if is_list and column in (*LISTS, *NEGATIVE_COLUMNS):
        kind = kind.value_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise CocoaError(f"{path}: column {column} holds {kind}, not strings; write it anew as strings")


LISTS = ("tgt_text", "tgt_img_path")
"""The columns of MMEB-eval that hold a list a row."""
ROWS_AT_ONCE = 1000


def read_train(
    folder: str | Path,
    split: str = "original",
    subsets: str | Sequence[str] = "all",
    max_rows_per_subset: int | None = None,
    image_root: str | Path | None = None,
    seed: int = 0,
    negatives: bool = True,
) -> PairSet:
    """Reads a folder in MMEB-train's layout: a folder a data set, `<split>-00000-of-00001.parquet` in it.

    Args:
        folder: holds the data sets' folders.
        split: which files of each folder to read.
        subsets: names of data sets, or `all`.
        max_rows_per_subset: read no more than that many rows of each, a random sample that `seed` decides.
        image_root: the folder or archive that image paths are relative to; by default `folder`, or the archives
            in it or in its `images_zip` (`cocoa.image_files.image_locator`).
        seed: of the sample.
        negatives: read hard negatives where there are any.

    Returns:
        The pairs in file order, and how many rows had an empty query or target (neither image nor content).

    Raises:
        CocoaError: a folder, split, subset, shard or column is missing.
    """
    folder = Path(folder)
    result = PairSet()
    for name in select_subsets(subsets, list_subsets(folder), str(folder)):
        result.roots[name] = str(image_root or folder)
        table = read_split(folder / name, split, TRAIN_COLUMNS, NEGATIVE_COLUMNS if negatives else ())
        rows = sample_rows(len(table), max_rows_per_subset, name, seed)
        to_pair = pair_reader(name, image_locator(folder, image_root))
        chunks = table.take(pa.array(rows, pa.int64())).to_batches(ROWS_AT_ONCE)
        records = (record for chunk in chunks for record in chunk.to_pylist())  # never all of them at once
        for row, record in zip(rows, records, strict=True):
            pair = to_pair(record, row)
            if isinstance(pair, Pair):
                result.pairs.append(pair)
            else:
                result.leave_out(name, pair)
    return result
