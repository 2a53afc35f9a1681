"""A file of pairs as an evaluation data set: every query against the targets of the whole file."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from cocoa.errors import CocoaError
from cocoa.mmeb_eval import EvalDataset
from cocoa.pairs import Side
from cocoa.sources import read_file

CANDIDATES = 1000
"""Candidates of a query, at most, as in MMEB; of more targets a random sample, decided by the row."""


def read_pair_eval(path: str | Path, image_root: str | Path | None = None) -> EvalDataset:
    """Reads a file in one of the forms of `cocoa.sources` to score a model on.

    A query's candidates are its own target, which comes first, and the other targets of the file, but for those
    that are right as well: targets of another row with the same query content. Targets of equal text and image are
    one candidate. Rows without a target (dialogues) ask nothing.

    Args:
        path: the file; the data set is called by its stem.
        image_root: what image paths are relative to; by default the file's folder.

    Raises:
        CocoaError: a row is not of one of the forms, or the file has fewer than two distinct targets.
    """
    pairs = [pair for pair in read_file(path, image_root).pairs if pair.target != Side()]
    inputs: dict[Side, int] = {}
    targets: dict[int, int] = {}  # by content: the index of the target that is compared
    right: dict[int, set[int]] = {}
    rows: dict[tuple[int, int], tuple[int, int]] = {}  # distinct (query, target) -> content of the query, row
    for pair in pairs:
        query = inputs.setdefault(pair.query, len(inputs))
        target = targets.setdefault(pair.target.content_id(), inputs.setdefault(pair.target, len(inputs)))
        right.setdefault(pair.query.content_id(), set()).add(target)
        rows.setdefault((query, target), (pair.query.content_id(), pair.row))
    if len(targets) < 2:
        raise CocoaError(f"{path}: {len(targets)} distinct targets, so there is nothing to confuse; add rows")
    pool = list(targets.values())
    candidates = []
    for (_, target), (content, row) in rows.items():
        others = [other for other in pool if other not in right[content]]
        if len(others) >= CANDIDATES:
            others = random.Random(f"{Path(path).stem}/{row}").sample(others, CANDIDATES - 1)
        candidates.append(np.array([target, *others]))
    numbers = np.array([row for _, row in rows.values()])
    queries = np.array([query for query, _ in rows])
    dataset = EvalDataset(Path(path).stem, list(inputs), queries, candidates, numbers)
    return dataset.renumbered(dataset.inputs, np.arange(len(inputs)))[0]
