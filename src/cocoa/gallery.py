"""What a model finds for a query: its nearest candidates in order, and which of them is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cocoa.metrics import rank
from cocoa.mmeb_eval import EvalDataset
from cocoa.pairs import Side


@dataclass(frozen=True, slots=True)
class Candidate:
    """A candidate and its cosine to the query."""

    side: Side
    score: float
    right: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What was found for one query.

    Attributes:
        query: the query.
        nearest: the nearest candidates, the nearest first.
        answer: the right candidate.
        rank: its place among all candidates, as hit@1 counts it.
        candidates: how many there are.
    """

    query: Side
    nearest: tuple[Candidate, ...]
    answer: Candidate
    rank: int
    candidates: int


@dataclass(frozen=True, slots=True)
class Gallery:
    """The same queries of one data set, asked of several models.

    Attributes:
        dataset: its name.
        models: what each found, by its name; query by query in the same order.
    """

    dataset: str
    models: dict[str, list[Found]]


def gallery(dataset: EvalDataset, embeddings: Tensor, rows: Sequence[int], top: int = 5) -> list[Found]:
    """Rank the candidates of some queries, by the rules of `cocoa.metrics.rank`.

    The right candidate stands last among equals, and its exact duplicates leave the list, so that its place in
    the order is its rank.

    Args:
        dataset: who is compared with whom; the right candidate stands first.
        embeddings: (inputs, D), normalised.
        rows: which queries.
        top: how many candidates to show of each.

    Raises:
        CocoaError: an embedding is not finite.
    """
    queries, lists = dataset.queries[list(rows)], [dataset.candidates[row] for row in rows]
    ranks = rank(replace(dataset, queries=queries, candidates=lists), embeddings).tolist()
    found = []
    for query, ids, place in zip(queries.tolist(), lists, ranks, strict=True):
        scores = (embeddings[torch.from_numpy(ids)] * embeddings[query]).sum(1).tolist()
        candidates = [
            Candidate(dataset.inputs[candidate], score, number == 0)
            for number, (candidate, score) in enumerate(zip(ids.tolist(), scores, strict=True))
            if number == 0 or candidate != ids[0]
        ]
        nearest = sorted(candidates, key=lambda candidate: (-candidate.score, candidate.right))
        found.append(Found(dataset.inputs[query], tuple(nearest[:top]), candidates[0], place, len(candidates)))
    return found
