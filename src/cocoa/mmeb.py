"""Readers of the two MMEB layouts: MMEB-train gives `Pair`s, MMEB-eval gives `EvalDataset`s.

A folder whose name is not one of the 36 data sets is a data set too (`cocoa.catalogue`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cocoa.catalogue import (
    NEGATIVE_COLUMNS,
    TRAIN_COLUMNS,
    clean,
    find_dataset,
    instructions_of,
    make_side,
    pair_reader,
)
from cocoa.errors import CocoaError
from cocoa.images import check_image_files, image_locator
from cocoa.pairs import Pair, PairSet, Side, sample_rows


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


def _read_split(folder: Path, split: str, needed: Sequence[str], optional: Sequence[str]) -> pa.Table:
    """The columns of one split in shard order; other splits and older files beside it are left alone."""
    shards: dict[str, dict[int, tuple[Path, int]]] = {}
    for path in sorted(folder.glob("*.parquet")):
        match = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.parquet", path.name)
        if match:
            shards.setdefault(match[1], {})[int(match[2])] = (path, int(match[3]))
    if split not in shards:
        there = ", ".join(sorted(shards)) or "none"
        raise CocoaError(f"{folder}: no split {split!r} (key `split`); there are: {there}")
    total = max(count for _, count in shards[split].values())
    absent = sorted(set(range(total)) - shards[split].keys())
    if absent:
        raise CocoaError(f"{folder}: file {split}-{absent[0]:05}-of-{total:05}.parquet is missing; download it again")
    tables = []
    for path, _ in (shards[split][index] for index in range(total)):
        try:
            with pq.ParquetFile(path) as file:
                missing = [name for name in needed if name not in file.schema_arrow.names]
                if missing:
                    raise CocoaError(
                        f"{path}: no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}; "
                        "rename its columns, or download it again"
                    )
                columns = [name for name in (*needed, *optional) if name in file.schema_arrow.names]
                tables.append(file.read(columns=columns))
        except (pa.ArrowInvalid, OSError) as error:
            reason = str(error).splitlines()[0]
            raise CocoaError(f"{path}: not a readable parquet file ({reason}); download it again") from None
    return pa.concat_tables(tables, promote_options="permissive")


# ---------------------------------------------------------------------------------------------- MMEB-train

TRAIN_IMAGES = ("qry_image_path", "pos_image_path")


def _first_image(table: pa.Table, columns: Sequence[str]) -> str:
    """The first image path of a table; empty if it has none."""
    for column in columns:
        there = pc.index(pc.not_equal(pc.fill_null(table[column], ""), ""), True).as_py()
        if there >= 0:
            return table[column][there].as_py()
    return ""


def read_train(
    folder: str | Path,
    split: str = "original",
    subsets: str | Sequence[str] = "all",
    max_rows_per_subset: int | None = None,
    image_root: str | Path | None = None,
    seed: int = 0,
) -> PairSet:
    """Reads a folder in MMEB-train's layout: a folder a data set, `<split>-00000-of-00001.parquet` in it.

    Args:
        folder: holds the data sets' folders.
        split: which files of each folder to read.
        subsets: names of data sets, or `all`.
        max_rows_per_subset: read no more than that many rows of each, a random sample that `seed` decides.
        image_root: the folder or archive that image paths are relative to; by default `folder`, or the archives
            in it or in its `images_zip` (`cocoa.images.image_locator`).
        seed: of the sample.

    Returns:
        The pairs in file order, and how many rows had an empty query or target (neither image nor content).

    Raises:
        CocoaError: a folder, split, subset, shard or column is missing.
    """
    folder = Path(folder)
    result = PairSet()
    for name in select_subsets(subsets, list_subsets(folder), str(folder)):
        table = _read_split(folder / name, split, TRAIN_COLUMNS, NEGATIVE_COLUMNS)
        rows = sample_rows(len(table), max_rows_per_subset, name, seed)
        to_pair = pair_reader(name, image_locator(folder, _first_image(table, TRAIN_IMAGES), image_root))
        for row, record in zip(rows, table.take(pa.array(rows, pa.int64())).to_pylist(), strict=True):
            pair = to_pair(record, row)
            if isinstance(pair, Pair):
                result.pairs.append(pair)
            else:
                result.leave_out(name, pair)
    return result


# ---------------------------------------------------------------------------------------------- MMEB-eval

EVAL_COLUMNS = ("qry_inst", "qry_img_path", "tgt_inst", "tgt_img_path")


@dataclass(frozen=True, slots=True)
class EvalDataset:
    """One evaluation data set: every distinct input once, and who is compared with whom.

    Attributes:
        name: the data set's folder.
        inputs: the distinct sides, by (instruction, text, image).
        queries: (rows,) index into `inputs`.
        candidates: for each row the (candidates,) indices into `inputs`; the right one comes first, and an
            exact duplicate of it has the same index.
    """

    name: str
    inputs: list[Side]
    queries: np.ndarray
    candidates: list[np.ndarray]

    def first_rows(self) -> list[int]:
        """The first row that each input stands in: (inputs,)."""
        found = np.zeros(len(self.inputs), np.int64)
        for row in reversed(range(len(self.queries))):
            found[self.candidates[row]] = found[self.queries[row]] = row
        return found.tolist()


def read_eval(
    folder: str | Path,
    subsets: str | Sequence[str] = "all",
    split: str = "test",
    image_root: str | Path | None = None,
) -> list[EvalDataset]:
    """Reads a folder in the layout of MMEB-eval, in both of its forms.

    Plain: `qry_text, qry_img_path, tgt_text[], tgt_img_path[]`, the instruction inside the texts. Split (with
    `qry_inst` and mostly `tgt_inst`): instructions apart; the image columns may be absent. Image paths are
    relative to `folder`, to `images` or `eval_images` in it, or to an archive in it, unless `image_root` is given.

    Raises:
        CocoaError: a folder, subset, split or column is missing, a row's candidate lists are empty or differ
            in length, or a query or candidate has neither image nor content.
    """
    folder = Path(folder)
    found = []
    for name in select_subsets(subsets, list_subsets(folder), str(folder)):
        table = _read_split(folder / name, split, ("qry_text", "tgt_text"), EVAL_COLUMNS)
        missing = [column for column in ("qry_img_path", "tgt_img_path") if column not in table.column_names]
        if missing and "qry_inst" not in table.column_names:
            raise CocoaError(f"{folder / name}: no column {', '.join(missing)} in split {split!r}; download it again")
        for column in ("tgt_text", "tgt_img_path"):
            if column in table.column_names and not pa.types.is_list(table[column].type):
                raise CocoaError(f"{folder / name}: column {column} holds no lists (of one string a candidate)")
        if not len(table):
            raise CocoaError(f"{folder / name}: no rows in split {split!r}; download it again")
        found.append(_eval_dataset(name, table, folder, image_root))
    return found


def _eval_dataset(name: str, table: pa.Table, folder: Path, image_root: str | Path | None) -> EvalDataset:
    known, query_instructions, target_instructions = instructions_of(name)
    counts = pc.fill_null(pc.list_value_length(table["tgt_text"]), 0).to_numpy()
    columns = {column: table[column] for column in table.column_names}
    if "tgt_img_path" in columns:
        paths = pc.fill_null(pc.list_value_length(columns["tgt_img_path"]), 0).to_numpy()
        for row in np.flatnonzero(counts != paths)[:1]:
            raise CocoaError(
                f"data set {name}, row {row}: {counts[row]} texts in tgt_text but {paths[row]} paths in "
                f"tgt_img_path; give every candidate one of each, empty where absent"
            )
        columns["tgt_img_path"] = pc.list_flatten(columns["tgt_img_path"])
    for row in np.flatnonzero(counts == 0)[:1]:
        raise CocoaError(f"data set {name}, row {row}: no candidates in tgt_text; drop the row")
    columns["tgt_text"] = pc.list_flatten(columns["tgt_text"])

    query_paths = _encode(columns.get("qry_img_path"), len(table))
    target_paths = _encode(columns.get("tgt_img_path"), counts.sum())
    first = next((path for path in (*query_paths[1], *target_paths[1]) if path), "")
    locate = image_locator(folder, first, image_root)
    inputs: dict[Side, int] = {}

    def index(instruction: _Encoded, text: _Encoded, path: _Encoded, instructions: tuple[str, ...]) -> np.ndarray:
        """Adds the distinct sides to `inputs`; which one each row is (numbers: there are a million rows)."""
        key = (instruction[0] * len(text[1]) + text[0]) * len(path[1]) + path[0]
        distinct, inverse = np.unique(key, return_inverse=True)
        ids = np.empty(len(distinct), np.int64)
        for i, number in enumerate(distinct.tolist()):
            rest, p = divmod(number, len(path[1]))
            said, content = clean(instruction[1][rest // len(text[1])]), text[1][rest % len(text[1])]
            image = locate(path[1][p]) if path[1][p] else None
            if said:
                side = Side(said, clean(content), image)
            else:
                side = make_side(content, image, instructions, known)
            ids[i] = inputs.setdefault(side, len(inputs))
        return ids[inverse]

    queries = index(
        _encode(columns.get("qry_inst"), len(table)),
        _encode(columns["qry_text"], len(table)),
        query_paths,
        query_instructions,
    )
    numbers, said = _encode(columns.get("tgt_inst"), len(table))
    targets = index(
        (np.repeat(numbers, counts), said), _encode(columns["tgt_text"], 0), target_paths, target_instructions
    )
    sides = list(inputs)
    empty = [i for i, side in enumerate(sides) if side.image is None and not side.text]
    row_of = np.repeat(np.arange(len(table)), counts)
    for what, rows in (
        ("query", np.flatnonzero(np.isin(queries, empty))),
        ("candidate", row_of[np.isin(targets, empty)]),
    ):
        if len(rows):
            raise CocoaError(f"data set {name}, row {rows[0]}: a {what} without image and content; drop the row")
    return EvalDataset(name, sides, queries, np.split(targets, np.cumsum(counts)[:-1]))


_Encoded = tuple[np.ndarray, list[str]]  # (rows,) numbers of strings, and the distinct strings


def _encode(column: pa.ChunkedArray | None, rows: int) -> _Encoded:
    """A text column as numbers; nulls, and all `rows` of an absent column, are the empty string."""
    if column is None:
        return np.zeros(rows, np.int64), [""]
    encoded = pc.fill_null(pc.cast(column, pa.large_string()), "").combine_chunks().dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def check_eval_images(found: Iterable[EvalDataset], root: str | Path | None = None) -> None:
    """Sees that every image file of the evaluation sets exists (and lies in `root`), as `check_image_files` does."""

    def images() -> Iterator[tuple[str, str, int]]:
        for dataset in found:
            for side, row in zip(dataset.inputs, dataset.first_rows(), strict=True):
                if isinstance(side.image, str):
                    yield side.image, dataset.name, row

    check_image_files(images(), None if root is None else str(root))
