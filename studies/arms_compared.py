"""What a difference of hit@1 between two arms is worth: bootstrap over seeds and queries, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from results import unpack

from cocoa.catalogue import find_dataset
from cocoa.metrics import group_members

RESAMPLES = 10_000
SMALLEST = 1.0
"""Points of hit@1: the smallest difference that would matter."""

Hits = Mapping[str, np.ndarray]
"""By data set, (seeds, queries) booleans: whether the right candidate came first."""


@dataclass(frozen=True)
class Difference:
    """Points of hit@1, the first arm less the second, averaged over data sets.

    Attributes:
        mean: the difference.
        inner: its 90 % interval, for equivalence (two one-sided tests at 5 %).
        outer: its 95 % interval.
        seeds: how many seeds it is over.
    """

    mean: float
    inner: tuple[float, float]
    outer: tuple[float, float]
    seeds: int

    @property
    def verdict(self) -> str:
        """`better` or `worse` (95 % interval off zero), `equal` (90 % interval within a point), or `not resolved`.

        A resolved difference that is surely smaller than what would matter is called so.
        """
        small = self.inner[0] > -SMALLEST and self.inner[1] < SMALLEST
        if self.outer[0] > 0 or self.outer[1] < 0:
            return ("better" if self.mean > 0 else "worse") + (", by less than a point" if small else "")
        return "equal" if small else "not resolved"


def difference(one: Hits, other: Hits, group: str = "All", resamples: int = RESAMPLES) -> Difference:
    """Compare two arms that ran on the same seeds and queries.

    Seeds and, within each data set, queries are drawn with replacement, the same ones for both arms.

    Args:
        one: hits of the first arm.
        other: of the second, seeds in the same order.
        group: what is averaged over, see `members`.
        resamples: how many samples.
    """
    rng = np.random.default_rng(0)
    names = members(one, group)
    seeds = len(next(iter(one.values())))
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # (R, S)
    total, mean = np.zeros(resamples), 0.0
    for name in names:
        change = one[name].astype(float) - other[name]  # (S, Q)
        queries = change.shape[1]
        weights = rng.multinomial(queries, np.full(queries, 1 / queries), resamples) / queries  # (R, Q)
        total += ((drawn @ change) * weights).sum(1)
        mean += change.mean()
    points = 100 * total / len(names)
    low, inner_low, inner_high, high = np.quantile(points, [0.025, 0.05, 0.95, 0.975]).tolist()
    return Difference(100 * mean / len(names), (inner_low, inner_high), (low, high), seeds)


def members(names: Iterable[str], group: str) -> list[str]:
    """The data sets that a group averages over; all of them where none is in a table of data sets."""
    names = list(names)
    known = [name for name in group_members(names)[group] if name in names]
    return names if not any(find_dataset(name) for name in names) else known


def averages(hits: Hits, group: str = "All") -> np.ndarray:
    """(seeds,) hit@1 in percent, averaged over the data sets of a group."""
    return 100 * np.mean([hits[name].mean(1) for name in members(hits, group)], axis=0)


def stacked(rows: Sequence[Mapping[str, str]], arm: str, seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """The hits of an arm from the rows of a results file, seeds in the given order.

    Raises:
        KeyError: a seed is missing.
    """
    found = {(row["dataset"], int(row["seed"])): row for row in rows if row["arm"] == arm}
    names = dict.fromkeys(name for name, _ in found)

    def one(name: str, seed: int) -> np.ndarray:
        row = found[name, seed]
        return unpack(row["hits"], int(row["queries"]))

    return {name: np.stack([one(name, seed) for seed in seeds]) for name in names}


def seeds_of(rows: Sequence[Mapping[str, str]], arm: str) -> list[int]:
    """The seeds that an arm has."""
    return sorted({int(row["seed"]) for row in rows if row["arm"] == arm})
