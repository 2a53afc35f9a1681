"""A file of pairs as an evaluation data set: every query against the targets of the whole file."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from cocoa.bad_rows import BadRows
from cocoa.errors import CocoaError
from cocoa.mmeb_eval import EvalDataset
from cocoa.pair_files import read_file
from cocoa.pairs import Side

CANDIDATES = 1000
"""Candidates of a query, at most, as in MMEB; of more targets a random sample, decided by the row."""


def read_pair_eval(path: str | Path, image_root: str | Path | None = None, bad: BadRows | None = None) -> EvalDataset:
    """Reads a file in one of the forms of `cocoa.pair_files` to score a model on.

    A query's candidates are its own target, which comes first, and the other targets of the file, but for those
    that are right as well: targets of another row with the same query content. Targets of equal text and image are
    one candidate. A row that stands there twice is one, and one without a target (a dialogue), or for which every
    target is right, asks nothing. Negatives of the rows do not matter.

    Args:
        path: the file; the data set is called by its stem.
        image_root: what image paths are relative to, and must not leave; by default the file's folder.
        bad: told about rows that are not of one of the forms, where its policy leaves them out.

    Raises:
        CocoaError: a row is not of one of the forms, or no row has a target that is wrong for it.
    """
    bad = bad or BadRows()

    def broken(row: int, error: CocoaError) -> None:
        if bad.policy == "error":
            raise error
        bad.add(Path(path).stem, [row], str(error))

    pairs = [pair for pair in read_file(path, image_root, broken).pairs if pair.target != Side()]
    inputs: dict[Side, int] = {}
    targets: dict[int, int] = {}  # by content: the index of the target that is compared
    right: dict[int, set[int]] = {}
    rows: dict[tuple[int, int], tuple[int, int]] = {}  # distinct (query, target) -> content of the query, row
    for pair in pairs:
        query = inputs.setdefault(pair.query, len(inputs))
        target = targets.setdefault(pair.target.content_id(), inputs.setdefault(pair.target, len(inputs)))
        right.setdefault(pair.query.content_id(), set()).add(target)
        rows.setdefault((query, target), (pair.query.content_id(), pair.row))
    pool = list(targets.values())
    queries, candidates, numbers = [], [], []
    for (query, target), (content, row) in rows.items():
        count = min(len(pool), CANDIDATES - 1 + len(right[content]))
        sample = random.Random(f"{Path(path).stem}/{row}").sample(range(len(pool)), count)
        others = [pool[i] for i in sample if pool[i] not in right[content]][: CANDIDATES - 1]
        if others:
            queries.append(query)
            candidates.append(np.array([target, *others]))
            numbers.append(row)
    if not queries:
        raise CocoaError(f"{path}: no row has a target that is wrong for it, so there is nothing to confuse; add rows")
    dataset = EvalDataset(Path(path).stem, list(inputs), np.array(queries), candidates, np.array(numbers))
    return dataset.renumbered(dataset.inputs, np.arange(len(inputs)))[0]
