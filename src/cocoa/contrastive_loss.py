"""InfoNCE over the embeddings of a batch, and its gradients a few inputs at a time (GradCache).

Gradients equal those of sentence-transformers' cached loss; beyond it, equal targets are no negatives (by option).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers.sentence_transformer.losses.cached_multiple_negatives_ranking import RandContext
from sentence_transformers.util import all_gather, all_gather_with_grad
from torch import Tensor, nn
from torch.nn import functional as F

FILLER_ID = -1
"""Content id of a hard negative that a row does not have; never a negative."""


def info_nce(
    vectors: Tensor, ids: Tensor, temperature: float, mask_equal_targets: bool = True, dims: Sequence[int] = ()
) -> Tensor:
    """InfoNCE of this process' queries among the targets and negatives of all processes.

    Args:
        vectors: (2 + negatives, B, D) normalised embeddings of queries, targets and negatives.
        ids: (1 + negatives, B) content ids of targets and negatives, int64; `FILLER_ID` stands for no negative.
        temperature: of the softmax.
        mask_equal_targets: what has the content id of a row's own target is no negative of that row.
        dims: Matryoshka: the loss is the mean over D and these, for which embeddings are cut and normalised.

    Returns:
        The mean over the B queries.
    """
    queries, candidates, rank = vectors[0], vectors[1:].transpose(0, 1), 0  # candidates (B, 1 + negatives, D)
    ids = ids.T.contiguous()
    if dist.is_initialized():
        candidates, ids, rank = all_gather_with_grad(candidates.contiguous()), all_gather(ids), dist.get_rank()
    candidates = candidates.flatten(0, 1)  # (rows of all * (1 + negatives), D)
    own = rank * len(queries) + torch.arange(len(queries), device=queries.device)  # (B,) rows of the queries
    width = ids.shape[1]
    excluded = (ids == FILLER_ID).flatten().expand(len(own), -1)
    if mask_equal_targets:
        excluded = excluded | (ids.flatten() == ids[own, 0, None])
    excluded = excluded.scatter(1, own[:, None] * width, False)

    def loss(queries: Tensor, candidates: Tensor) -> Tensor:
        scores = queries @ candidates.T / temperature  # (B, rows of all * (1 + negatives))
        return F.cross_entropy(scores.masked_fill(excluded, float("-inf")), own * width)

    losses = [loss(queries, candidates)]
    for dim in sorted({*dims} - {queries.shape[1]}):
        losses.append(loss(F.normalize(queries[:, :dim], dim=-1), F.normalize(candidates[:, :dim], dim=-1)))
    return torch.stack(losses).mean()


def cached_loss(
    model: nn.Module,
    passes: Sequence[dict[str, Any]],
    loss_of: Callable[[Tensor], Tensor],
    kept: int = 1,
    backward: Callable[[Tensor], None] = Tensor.backward,
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """GradCache: a loss over the embeddings of all passes, with the activations of a few at a time.

    Args:
        model: embeds passes.
        passes: the last ones are embedded once, the others twice, with the same dropout.
        loss_of: all embeddings, pass after pass, to the loss.
        kept: how many are embedded once.
        backward: adds the gradients of a scalar.
        alone: within it a pass does not exchange its gradients with other devices.

    Returns:
        The loss; most gradients are there by now, and its backward pass adds what is left.
    """
    first, last = passes[:-kept], passes[-kept:]
    vectors, chances = [], []
    for row in first:
        chances.append(RandContext(row["input_ids"]))
        with torch.no_grad():
            vectors.append(model(row))
    with alone() if first else nullcontext():
        once = model(*last)  # in one call, so that devices exchange the gradients of all of them
    leaves = [each.detach().requires_grad_() for each in (*vectors, once)]
    loss = loss_of(torch.cat(leaves))
    loss.backward()
    *gradients, gradient = [leaf.grad for leaf in leaves]
    rest = (once * gradient).sum()
    for number, (row, chance, gradient) in enumerate(zip(first, chances, gradients, strict=True), 1):
        with alone():
            backward(rest)
        with chance, nullcontext() if number == len(first) else alone():
            rest = (model(row) * gradient).sum()
    return rest + (loss - rest).detach()
