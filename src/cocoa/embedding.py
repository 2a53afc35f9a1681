"""Embedding many inputs: in batches of equal work, images decoded while the model is busy."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from rich.progress import Progress
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import functional as F

from cocoa.images import image_size
from cocoa.inputs import ImageBudget, chat_messages
from cocoa.pairs import Side

T = TypeVar("T")

MOST_SHORT = 16
"""A batch of short inputs holds at most so many times as many as one of the longest."""
TOKEN_AREA = 28 * 28
"""Pixels of a merged token."""
WORKERS, AHEAD = 4, 3
"""Threads that prepare batches, and how many batches are ready or being prepared at a time."""


def equal_work(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches, the longest inputs first, so that a batch is hardly padded and memory is known at once.

    Args:
        lengths: tokens of each input.
        batch_size: inputs in a batch of the longest; of shorter ones as many as take no more tokens, padding
            counted, up to `MOST_SHORT` times as many.

    Returns:
        Batches that hold every index once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    room = batch_size * max(lengths, default=0)
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        size = min(room // max(lengths[order[start]], 1), batch_size * MOST_SHORT)
        batches.append(order[start : start + size])
        start += size
    return batches


def prepared(batches: Sequence[list[int]], prepare: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
    """Each batch with what `prepare` makes of it, made in threads a few batches ahead."""
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque[tuple[list[int], Future[T]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(prepare, batch)))
            if len(waiting) > AHEAD:
                ready, future = waiting.popleft()
                yield ready, future.result()
        while waiting:
            ready, future = waiting.popleft()
            yield ready, future.result()


def token_counts(
    model: SentenceTransformer, images: ImageBudget, sides: Sequence[Side], patch_size: int = 28
) -> list[int]:
    """How many tokens each input takes, but for markers: its text's, and its image's as the budget allows."""
    counts = [
        len(ids) for ids in model.tokenizer([side.prompt() for side in sides], add_special_tokens=False)["input_ids"]
    ]
    shown = [i for i, side in enumerate(sides) if side.image is not None]
    least, most = images.tokens
    with ThreadPoolExecutor(WORKERS) as pool:
        for i, (width, height) in zip(shown, pool.map(image_size, [sides[i].image for i in shown]), strict=True):
            counts[i] += min(max(round(width * height / patch_size**2), least), most)
    return counts


def embed(
    model: SentenceTransformer, images: ImageBudget, sides: Sequence[Side], batch_size: int = 8, progress: bool = False
) -> Tensor:
    """Embeddings of sides, rendered as in training: (len(sides), D), float32, on the CPU.

    Args:
        model: of sentence-transformers.
        images: the token budget of an image, and whether images are squashed to a square.
        sides: what to embed.
        batch_size: sides embedded at once where they are the longest; of shorter ones more.
        progress: show a bar on a terminal.
    """
    batches = equal_work(token_counts(model, images, sides), batch_size)
    rows: list[Tensor] = []
    for _, embeddings in embed_batches(model, images, sides, batches, progress):
        rows.append(embeddings)
    order = [index for batch in batches for index in batch]
    return torch.cat(rows)[torch.from_numpy(np.argsort(order))]


def embed_batches(
    model: SentenceTransformer,
    images: ImageBudget,
    sides: Sequence[Side],
    batches: Sequence[list[int]],
    progress: bool = False,
) -> Iterator[tuple[list[int], Tensor]]:
    """The embeddings (n, D) of each batch of sides, as `embed` gives them, one after the other.

    Normalised once more in float32: in bfloat16 sentence-transformers' lengths are off by up to 0.4 %, enough
    to change who is nearest.
    """
    with Progress(disable=not (progress and sys.stderr.isatty())) as bar:
        task = bar.add_task("embedding", total=sum(map(len, batches)))
        for batch, messages in prepared(batches, lambda batch: [chat_messages(sides[i], images) for i in batch]):
            encoded = model.encode(messages, batch_size=len(batch), convert_to_tensor=True, show_progress_bar=False)
            yield batch, F.normalize(encoded.float(), dim=-1).cpu()
            bar.advance(task, len(batch))
