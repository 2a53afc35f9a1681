"""In-pool hit@1 on held-out pairs, taken while a contrastive stage runs."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from cocoa.embedding import Embedder
from cocoa.errors import CocoaError
from cocoa.metrics import distinct_rows
from cocoa.pairs import Pair
from cocoa.processes import WORKERS

logger = logging.getLogger(__name__)


def readable(pairs: Sequence[Pair], embedder: Embedder) -> list[Pair]:
    """The pairs whose query and target can be rendered; the log says which are left out, and why."""

    def fault(pair: Pair) -> str:
        try:
            for side in (pair.query, pair.target):
                embedder.render(side)
        except CocoaError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(WORKERS) as pool:
        faults = list(pool.map(fault, pairs))
    for pair, reason in zip(pairs, faults, strict=True):
        if reason:
            logger.warning("held-out row %s is left out: %s", pair.row_id, reason)
    return [pair for pair, reason in zip(pairs, faults, strict=True) if not reason]


class InPoolEvaluator:
    """How often a query's own target is the nearest among its data set's held-out targets.

    Targets with the same text and image are one target. A tie counts against the model. A data set with
    fewer than two distinct held-out targets has nothing to confuse, and is left out.

    Args:
        pairs: held out of training.
        embedder: the model, asked as in training.
        batch_size: sides embedded at once.
    """

    def __init__(self, pairs: Sequence[Pair], embedder: Embedder, batch_size: int = 8) -> None:
        self.pools: dict[str, list[Pair]] = defaultdict(list)
        for pair in pairs:
            self.pools[pair.dataset].append(pair)
        for dataset, pool in list(self.pools.items()):
            if len({pair.target.content_id() for pair in pool}) < 2:
                del self.pools[dataset]
        self.embedder = embedder
        self.batch_size = batch_size

    def __call__(self) -> dict[str, float]:
        """hit@1 of every data set, and their plain mean under `validation_hit@1`; nothing where nothing can be told."""
        if not self.pools:
            return {}
        scores = {dataset: self._hit_at_1(pairs) for dataset, pairs in self.pools.items()}
        metrics = {f"validation_{dataset}_hit@1": score for dataset, score in scores.items()}
        return metrics | {"validation_hit@1": sum(scores.values()) / len(scores)}

    def _hit_at_1(self, pairs: list[Pair]) -> float:
        targets = {pair.target.content_id(): pair.target for pair in pairs}
        column = {content_id: i for i, content_id in enumerate(targets)}
        queries = self.embedder.embed([pair.query for pair in pairs], self.batch_size)
        pool = self.embedder.embed(list(targets.values()), self.batch_size)
        own = torch.tensor([column[pair.target.content_id()] for pair in pairs])
        vectors, which = distinct_rows(pool)  # equal targets must tie
        with torch.autocast("cpu", enabled=False):  # whose steps would make ties
            scores = (queries @ vectors.T)[:, which]  # (queries, targets)
        positive = scores.gather(1, own[:, None])
        rank = (scores >= positive).sum(1)  # itself and every tie
        return (rank == 1).float().mean().item()
