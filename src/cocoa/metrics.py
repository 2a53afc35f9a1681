"""hit@1 over each query's own candidates, and the averages over data sets: MMEB's metric.

Ties count against the model (the reference's `argmax` with the right answer first gives a collapsed model
100 %), exact duplicates of the right candidate leave the list, and a NaN is an error. Every average is the
plain mean over data sets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cocoa.catalogue import TABLES, datasets, find_dataset
from cocoa.errors import CocoaError
from cocoa.mmeb_eval import EvalDataset

GROUPS = ("Classification", "VQA", "Retrieval", "Grounding", "IND", "OOD", "All")
"""What is averaged over: the meta-tasks, in and out of distribution, everything."""
CUTOFFS = (1, 5, 10)
SCORES_AT_ONCE = 2**26
"""Entries of the score matrix that are in memory at once (256 MB)."""


def rank(dataset: EvalDataset, embeddings: Tensor) -> Tensor:
    """The rank of each query's right candidate, 1 the best: (queries,).

    Args:
        dataset: who is compared with whom; the right candidate stands first.
        embeddings: (inputs, D), normalised.

    Raises:
        CocoaError: an embedding is not finite; the message names data set and row.
    """
    queries = torch.from_numpy(dataset.queries)  # (Q,)
    counts = np.array([len(ids) for ids in dataset.candidates])
    rows = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))  # (pairs,) whose candidate it is
    ids = torch.from_numpy(np.concatenate(dataset.candidates))  # (pairs,)
    right = torch.from_numpy(np.array([own[0] for own in dataset.candidates]))  # (Q,)
    broken = ~embeddings.isfinite().all(1)  # (inputs,)
    for row in sorted([*broken[queries].nonzero().flatten().tolist(), *rows[broken[ids]].tolist()])[:1]:
        raise CocoaError(
            f"data set {dataset.name}, row {dataset.number(row)}: an embedding is not finite; the model is broken"
        )

    vectors, column = distinct_rows(embeddings)
    beaten = torch.zeros(len(queries), dtype=torch.long)
    ends = torch.from_numpy(np.cumsum(counts))
    step = max(1, SCORES_AT_ONCE // len(vectors))
    for first in range(0, len(queries), step):
        last = min(first + step, len(queries))
        scores = embeddings[queries[first:last]] @ vectors.T  # (q, V)
        pairs = slice(int(ends[first - 1]) if first else 0, int(ends[last - 1]))
        own, candidates = rows[pairs], ids[pairs]
        against = scores[own - first, column[candidates]] >= scores[own - first, column[right[own]]]
        against &= candidates != right[own]  # exact duplicates of the right one leave the list
        beaten += torch.bincount(own[against], minlength=len(queries))
    return 1 + beaten


def distinct_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows of a matrix, and which of them each row is.

    A matrix product may round equal columns differently by their place, and equal candidates must tie.

    Args:
        embeddings: (N, D).

    Returns:
        (V, D) and (N,).
    """
    numbers: dict[bytes, int] = {}
    firsts: list[int] = []
    found = []
    for place, row in enumerate((embeddings + 0.0).numpy()):  # minus zero is zero
        number = numbers.setdefault(row.tobytes(), len(firsts))
        if number == len(firsts):
            firsts.append(place)
        found.append(number)
    return embeddings[firsts], torch.tensor(found)


def metrics(ranks: Tensor) -> dict[str, float]:
    """The metrics of a score file from the ranks (queries,) of the one right candidate, as fractions."""
    ranks = ranks.double()
    found: dict[str, Tensor] = {}
    for k in CUTOFFS:
        hit = (ranks <= k).double()
        gain = hit / torch.log2(ranks + 1)
        precision, recall = hit / k, hit
        found |= {
            f"hit@{k}": hit,
            f"ndcg_linear@{k}": gain,
            f"ndcg_exponential@{k}": gain,
            f"precision@{k}": precision,
            f"recall@{k}": recall,
            f"f1@{k}": hit * 2 / (k + 1),
            f"map@{k}": hit / ranks,
            f"mrr@{k}": hit / ranks,
        }
    means = {name: values.mean().item() for name, values in found.items()}
    return means | {"num_pred": len(ranks), "num_data": len(ranks)}


def summary(scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """hit@1 of every data set and the averages over its table (MMEB's, else scenes'), each with what is missing.

    An average is the plain mean over data sets, in percent; data sets that are in no table stand alone.
    """
    hits = {name: 100 * score["hit@1"] for name, score in scores.items()}
    known = {entry.name: value for name, value in hits.items() if (entry := find_dataset(name)) is not None}
    groups = group_members(known)
    averages = {}
    for group in GROUPS:
        there = [known[name] for name in groups[group] if name in known]
        averages[group] = {
            "hit@1": _mean(there),
            "datasets": len(there),
            "of": len(groups[group]),
            "missing": [name for name in groups[group] if name not in known],
        }
    return {"datasets": hits, "averages": averages}


def group_members(names: Iterable[str]) -> dict[str, list[str]]:
    """The data sets that each average is over: those of the first table (MMEB's, then scenes') with any of `names`."""
    wanted = set(names)
    table = next((table for table in TABLES if wanted & datasets(table).keys()), TABLES[0])
    groups: dict[str, list[str]] = {group: [] for group in GROUPS}
    for entry in datasets(table).values():
        for group in (entry.meta_task, "OOD" if entry.ood else "IND", "All"):
            groups[group].append(entry.name)
    return groups


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
