"""What `data.train` of a recipe may name: folders in MMEB-train's layout, and JSON or CSV files of one's own.

Files: JSONL, or a JSON list, of `{"query": {"text", "image", "instruction"}, "target": {...}}` and perhaps
`"negatives": [{...}]`, or `"dialogue": [{"question", "answer"}]` on the query's image, then with or without a target;
the two forms that the released CoCoA code reads, `image_path, caption` (stage 1) and `qry, qry_image_path, pos_text`
(stage 2); `image_path, dialogue` (CoMa), perhaps with a caption; parquet with any of these as columns; CSV with the
columns of `CSV_COLUMNS`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from cocoa.bad_rows import Policy
from cocoa.catalogue import NEGATIVE_COLUMNS, TRAIN_COLUMNS, pair_reader
from cocoa.errors import CocoaError
from cocoa.mmeb import list_subsets, read_train, select_subsets
from cocoa.pairs import Pair, PairSet, Side, Turn, check_images, sample_rows
from cocoa.records import Broken, csv_records, json_records, parquet_records, read_text, refuse

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
RECORDS = "records"
"""What the data set of records in memory is called."""
SIDE_KEYS = ("text", "image", "instruction")
CSV_COLUMNS = tuple(f"{side}_{key}" for side in ("query", "target") for key in SIDE_KEYS)


@dataclass(frozen=True)
class DataConfig:
    """The `data:` block of a recipe.

    Attributes:
        train: a folder or file, or a list of them; their pairs are concatenated.
        split: which split of MMEB-train folders.
        subsets: `all`, or names of data sets (a file's name is its stem).
        max_rows_per_subset: a random sample of at most that many rows of each data set, decided by the seed.
        validation_rows: rows of each data set held out of training, at most a fifth of it.
        validation: a file of pairs to validate on instead; training rows that stand in it too are left out.
        on_bad_row: a row of a file that is not of one of the forms, or one whose image is missing or cannot be read, is
            an `error`, or left out (`skip`).
        max_bad_share: share of the rows that may be left out so.
        hard_negatives: how many negatives of its own each pair keeps, if the data has them.
        image_root: what image paths are relative to, and must not leave; by default the folder, or the file's folder.
    """

    train: str | list[str]
    split: str = "original"
    subsets: str | list[str] = "all"
    max_rows_per_subset: int | None = None
    validation_rows: int = 200
    hard_negatives: int = 0
    image_root: str | None = None
    validation: str | None = None
    on_bad_row: Policy = "error"
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        if not self.train:
            raise CocoaError("data.train: empty; name a folder in MMEB-train's layout, or a JSONL or CSV file")
        if self.max_rows_per_subset is not None and self.max_rows_per_subset < 1:
            raise CocoaError("data.max_rows_per_subset: must be 1 or more, or left out")
        for key in ("validation_rows", "hard_negatives"):
            if getattr(self, key) < 0:
                raise CocoaError(f"data.{key}: must be 0 or more")
        if not 0 < self.max_bad_share <= 1:
            raise CocoaError(f"data.max_bad_share: {self.max_bad_share} must be above 0 and at most 1")


def list_sources(config: DataConfig) -> list[tuple[Path, list[str]]]:
    """What `data.train` names, each with the data sets in it; no row is read.

    Raises:
        CocoaError: one is not there, or two hold a data set of the same name.
    """
    sources = [Path(path) for path in ([config.train] if isinstance(config.train, str) else config.train)]
    listed = [(path, list_subsets(path) if path.is_dir() else [_file_name(path)]) for path in sources]
    names = [name for _, there in listed for name in there]
    for name in names:
        if names.count(name) > 1:
            raise CocoaError(f"data.train: data set {name!r} is there twice; rename one, or drop its source")
    return listed


def load_pairs(config: DataConfig, seed: int) -> PairSet:
    """All pairs that `data:` names, in the order of its sources, and the rows left out by reason.

    Raises:
        CocoaError: a source, subset or column is missing, two sources hold a data set of the same name, a row
            of a file is broken, or nothing is left.
    """
    listed = list_sources(config)
    wanted = select_subsets(config.subsets, [name for _, there in listed for name in there], "data.train")
    result = PairSet()
    for path, there in listed:
        subsets = [name for name in there if name in wanted]
        if not subsets:
            continue
        if path.is_dir():
            limit, root = config.max_rows_per_subset, config.image_root
            found = read_train(path, config.split, subsets, limit, root, seed, config.hard_negatives > 0)
        else:
            found = _read_some(path, config, seed)
        n = config.hard_negatives
        result.pairs += [replace(p, negatives=p.negatives[:n]) if len(p.negatives) > n else p for p in found.pairs]
        result.left_out |= found.left_out
        result.roots |= found.roots
    if not result.pairs:
        raise CocoaError(
            f"data.train: no usable row in {', '.join(str(path) for path, _ in listed)} ({dict(result.left_out)})"
        )
    return result


def read_pairs(source: str | Path | Sequence[Mapping[str, Any]], image_root: str | Path | None = None) -> list[Pair]:
    """Pairs from a file, from a folder in MMEB-train's layout, or from records in memory.

    Args:
        source: a file or folder as `data.train` of a recipe names it, read whole, with all negatives; or records of
            the forms that stand in such files, whose images may be pictures in memory too.
        image_root: what image paths are relative to, and must not leave; by default the folder, the file's folder,
            or, for records, the working directory.

    Returns:
        The pairs; each of their image files is there. Rows that are no pairs are left out, with a warning.

    Raises:
        CocoaError: no such source, a record of another form, or a missing image; the message names file and row.

    Example:
        >>> import cocoa
        >>> query = {"text": "a red star", "instruction": "Find the same."}
        >>> (pair,) = cocoa.read_pairs([{"query": query, "target": {"text": "a star, red"}}])
        >>> pair.query.prompt(), pair.target.text
        ('Find the same. a red star', 'a star, red')
    """
    if isinstance(source, str | Path):
        root = None if image_root is None else str(image_root)
        found = load_pairs(DataConfig(str(source), image_root=root, hard_negatives=sys.maxsize), seed=0)
    else:
        base = os.path.abspath(image_root or "")
        reader = pair_reader(RECORDS, lambda image: os.path.join(base, image))
        rows = enumerate(source, 1)
        pairs = [_json_pair(record, f"record {row}", RECORDS, row, base, reader) for row, record in rows]
        found = PairSet(pairs, roots={RECORDS: base})
    for dataset, reasons in found.left_out.items():
        logger.warning("data set %s: rows left out: %s", dataset, dict(reasons))
    check_images(found.pairs, found.roots)
    return found.pairs


def _file_name(path: Path) -> str:
    """A file's data set name, once it is known to be there and of a form that is read."""
    if not path.is_file():
        raise CocoaError(f"data.train: {path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise CocoaError(f"data.train: {path}: not a file of {', '.join(SUFFIXES)}, nor a folder")
    return path.stem


def _read_some(path: Path, config: DataConfig, seed: int) -> PairSet:
    """A file's pairs without its broken rows, as far as `config` lets some be left out."""
    faults: list[CocoaError] = []

    def note(row: int, error: CocoaError) -> None:
        logger.warning("left out: %s", error)
        faults.append(error)

    found = read_file(path, config.image_root, note if config.on_bad_row == "skip" else refuse)
    rows = len(found) + len(faults)
    if len(faults) > config.max_bad_share * rows:
        raise CocoaError(
            f"{path}: {len(faults)} of {rows} rows are broken, more than data.max_bad_share {config.max_bad_share:g} "
            f"allows; repair them, or raise it. The first: {faults[0]}"
        )
    for _ in faults:
        found.leave_out(path.stem, "not of a form that is read")
    kept = sample_rows(len(found), config.max_rows_per_subset, path.stem, seed)
    found.pairs = [found.pairs[index] for index in kept]
    return found


def read_file(path: str | Path, image_root: str | Path | None = None, broken: Broken = refuse) -> PairSet:
    """Reads one JSONL, JSON, CSV or parquet file; the data set is named by the file's stem.

    Args:
        path: the file.
        image_root: what image paths are relative to, and must not leave (which `check_images` sees to); by default
            the file's folder.
        broken: told about each row that is not of one of the forms, which is left out; by default an error.

    Raises:
        CocoaError: a row is not of one of the forms, or the file cannot be read; the message names file and line.
    """
    path = Path(path)
    root = os.path.abspath(image_root or path.parent)
    read = _csv_pairs if path.suffix == ".csv" else _json_pairs
    return PairSet(list(read(path, root, broken)), roots={path.stem: root})


def _csv_pairs(path: Path, root: str, broken: Broken) -> Iterator[Pair]:
    for line, where, record in csv_records(path, CSV_COLUMNS, broken):
        try:
            query, target = (
                _side({key: record.get(f"{name}_{key}") for key in SIDE_KEYS}, root, f"{where}, {name}")
                for name in ("query", "target")
            )
        except CocoaError as error:
            broken(line, error)
        else:
            yield Pair(query, target, (), path.stem, line)


def _json_pairs(path: Path, root: str, broken: Broken) -> Iterator[Pair]:
    mmeb_pair = pair_reader(path.stem, lambda image: os.path.join(root, image))
    for row, where, record in (parquet_records if path.suffix == ".parquet" else json_records)(path, broken):
        try:
            pair = _json_pair(record, where, path.stem, row, root, mmeb_pair)
        except CocoaError as error:
            broken(row, error)
        else:
            yield pair


def _json_pair(
    record: Any, where: str, dataset: str, row: int, root: str, mmeb_pair: Callable[[Any, int], Pair | str]
) -> Pair:
    """A record in any of the forms; the one of MMEB-train as `mmeb_pair` reads it."""
    if not isinstance(record, dict):
        raise CocoaError(f"{where}: not a JSON object; write one pair a line")
    keys = set(record)
    if keys & {"query", "target"}:
        _check_keys(record, ("query", "target", "negatives", "dialogue"), where)
        turns = read_turns(record.get("dialogue"), f"{where}, dialogue")
        query = _side(record.get("query"), root, f"{where}, query")
        spoken = turns and record.get("target") is None
        target = Side() if spoken else _side(record.get("target"), root, f"{where}, target")
        negatives = record.get("negatives") or []
        if not isinstance(negatives, list):
            raise CocoaError(f"{where}, negatives: not a list; write [{{...}}, ...]")
        others = tuple(_side(side, root, f"{where}, negatives") for side in negatives)
        return Pair(query, target, others, dataset, row, turns)
    if keys & {"image_path", "caption", "dialogue"}:
        _check_keys(record, ("image_path", "caption", "dialogue"), where)
        query = _side({"image": record.get("image_path")}, root, f"{where}, image_path")
        turns = read_turns(record.get("dialogue"), f"{where}, dialogue")
        spoken = not read_text(record, "caption", where) and turns
        target = Side() if spoken else _side({"text": record.get("caption")}, root, f"{where}, caption")
        return Pair(query, target, (), dataset, row, turns)
    _check_keys(record, (*TRAIN_COLUMNS, *NEGATIVE_COLUMNS), where)
    for key in (*TRAIN_COLUMNS, *NEGATIVE_COLUMNS):
        value = record.get(key)
        for each in value if key in NEGATIVE_COLUMNS and isinstance(value, list) else [value]:
            read_text({key: each}, key, where)
    pair = mmeb_pair(record, row)
    if isinstance(pair, str):
        raise CocoaError(f"{where}: {pair}: neither text nor image; fill it in or drop the row")
    return pair


def read_turns(value: Any, where: str) -> tuple[Turn, ...]:
    """A conversation, checked: every question and every answer is there."""
    if value is not None and not isinstance(value, list):
        raise CocoaError(f"{where}: not a list; write [{{question, answer}}, ...]")
    turns = []
    for number, turn in enumerate(value or (), 1):
        if not isinstance(turn, dict):
            raise CocoaError(f"{where}, turn {number}: not an object; write {{question, answer}}")
        _check_keys(turn, Turn._fields, f"{where}, turn {number}")
        said = Turn(*(read_text(turn, key, f"{where}, turn {number}") for key in Turn._fields))
        if not all(said):
            raise CocoaError(f"{where}, turn {number}: question or answer is empty; fill it in or drop the turn")
        turns.append(said)
    return tuple(turns)


def _side(value: Any, root: str, where: str) -> Side:
    if not isinstance(value, dict):
        raise CocoaError(f"{where}: not an object; write {{{', '.join(SIDE_KEYS)}}}, any of them left out")
    _check_keys(value, SIDE_KEYS, where)
    text, instruction = (read_text(value, key, where) for key in ("text", "instruction"))
    if isinstance(picture := value.get("image"), Image.Image):
        return Side(instruction, text, picture)
    image = read_text(value, "image", where)
    if not text and not image:
        raise CocoaError(f"{where}: neither text nor image; fill it in or drop the row")
    return Side(instruction, text, os.path.join(root, image) if image else None)


def _check_keys(record: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in record:
        if key not in known:
            raise CocoaError(f"{where}: unknown key {key!r}; the keys are {', '.join(known)}")
