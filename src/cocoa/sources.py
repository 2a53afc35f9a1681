"""What `data.train` of a recipe may name: folders in MMEB-train's layout, and files of pairs (`cocoa.pair_files`)."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cocoa.bad_rows import Policy
from cocoa.catalogue import pair_reader
from cocoa.errors import CocoaError
from cocoa.mmeb import list_subsets, read_train, select_subsets
from cocoa.pair_files import SUFFIXES, json_pair, read_file
from cocoa.pairs import Pair, PairSet, check_images, sample_rows
from cocoa.records import refuse

logger = logging.getLogger(__name__)

RECORDS = "records"
"""What the data set of records in memory is called."""


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
        pairs = [json_pair(record, f"record {row}", RECORDS, row, base, reader) for row, record in rows]
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
