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


@dataclass(frozen=True, slots=True)
class Mistake:
    """A query whose first hit is wrong.

    Attributes:
        dataset: its name.
        found: what was found; the first of `nearest` is the wrong one.
        margin: how much nearer the wrong one is than the right one, in cosine.
    """

    dataset: str
    found: Found
    margin: float


def mistakes(datasets: Sequence[EvalDataset], embeddings: Sequence[Tensor], number: int) -> list[Mistake]:
    """The queries of some data sets whose first hit is wrong, the most confidently wrong ones first.

    Confidence is the margin in cosine by which the wrong candidate beats the right one. A query stands there once.

    Args:
        datasets: who is compared with whom; the right candidate stands first.
        embeddings: for each the (inputs, D), normalised.
        number: how many to give, at most.

    Raises:
        CocoaError: an embedding is not finite.
    """
    worst: list[tuple[float, int, int]] = []  # margin, data set, row
    for place, (dataset, rows) in enumerate(zip(datasets, embeddings, strict=True)):
        wrong = (rank(dataset, rows) > 1).nonzero().flatten().tolist()
        worst += [(margin(dataset, rows, row), place, row) for row in wrong]
    found: dict[Side, Mistake] = {}
    for lead, place, row in sorted(worst, key=lambda one: (-one[0], *one[1:])):
        if len(found) == number:
            break
        (one,) = gallery(datasets[place], embeddings[place], [row], top=1)
        found.setdefault(one.query, Mistake(datasets[place].name, one, lead))
    return list(found.values())


def margin(dataset: EvalDataset, embeddings: Tensor, row: int) -> float:
    """How much nearer a query's best wrong candidate is than its right one, in cosine; below 0 where it is not."""
    ids = torch.from_numpy(dataset.candidates[row])
    scores = (embeddings[ids] * embeddings[dataset.queries[row]]).sum(1)
    return (scores[ids != ids[0]].max() - scores[0]).item()
