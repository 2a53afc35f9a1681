"""Inputs to embed in batches of equal work, each prepared while the model is busy with those before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from cocoa.processes import WORKERS

T = TypeVar("T")

MOST_SHORT = 16
"""A batch of short inputs holds at most so many times as many as one of the longest."""
AHEAD = 3
"""How many batches are ready or being prepared at a time: of images, 19 kB a token."""


def equal_work(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches, the longest inputs first, so that a batch is hardly padded and memory is known at once.

    Args:
        lengths: tokens of each input.
        batch_size: inputs in a batch of the longest; of shorter ones as many as take no more tokens, padding
            counted, up to `MOST_SHORT` times as many.

    Returns:
        Batches that hold every index once.
    """
    lengths = [max(length, 1) for length in lengths]  # of an empty text too
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    room = batch_size * max(lengths, default=0)
    batches: list[list[int]] = []
    start = 0
    while start < len(order):
        size = min(room // lengths[order[start]], batch_size * MOST_SHORT)
        batches.append(order[start : start + size])
        start += size
    return batches


def filled(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices in parts, in the order given, of at most `most` in all, or of one that is larger."""
    parts: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not parts or size > room:
            parts.append([])
            room = most
        parts[-1].append(index)
        room -= size
    return parts


def prepared(batches: Sequence[list[int]], prepare: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
    """Each batch with what `prepare` makes of it, made in threads a few batches ahead."""
    pool = ThreadPoolExecutor(WORKERS)
    try:
        waiting: deque[tuple[list[int], Future[T]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(prepare, batch)))
            if len(waiting) > AHEAD:
                ready, future = waiting.popleft()
                yield ready, future.result()
        while waiting:
            ready, future = waiting.popleft()
            yield ready, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
