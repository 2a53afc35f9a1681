"""What a difference of hit@1 between two arms is worth: bootstrap over seeds and queries, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from results import unpack
from scipy.stats import norm, t

from cocoa.catalogue import find_dataset
from cocoa.metrics import group_members

RESAMPLES = 10_000
SMALLEST = 1.0
"""Points of hit@1: the smallest difference that would matter."""

Hits = Mapping[str, np.ndarray]
"""By data set, (seeds, queries): whether the right candidate came first, or the share of a few queries whose did."""


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

    Seeds and, within each data set, queries are drawn with replacement, the same ones for both arms. Seeds are few: one
    less than there are is drawn, which keeps their variance unbiased, and the intervals are widened as Student's t is.

    Args:
        one: hits of the first arm.
        other: of the second, seeds in the same order.
        group: what is averaged over, see `members`.
        resamples: how many samples.

    Raises:
        ValueError: a single seed.
    """
    rng = np.random.default_rng(0)
    names = members(one, group)
    seeds = len(next(iter(one.values())))
    if seeds < 2:
        raise ValueError("an interval over seeds takes two of them")
    drawn = rng.multinomial(seeds - 1, np.full(seeds, 1 / seeds), resamples) / (seeds - 1)  # (R, S)
    total, mean = np.zeros(resamples), 0.0
    for name in names:
        change = one[name].astype(float) - other[name]  # (S, Q)
        queries = change.shape[1]
        weights = rng.multinomial(queries, np.full(queries, 1 / queries), resamples) / queries  # (R, Q)
        total += ((drawn @ change) * weights).sum(1)
        mean += change.mean()
    points, center = 100 * total / len(names), 100 * mean / len(names)

    def interval(level: float) -> tuple[float, float]:
        tails = np.array([(1 - level) / 2, (1 + level) / 2])
        low, high = center + (np.quantile(points, tails) - center) * t.ppf(tails[1], seeds - 1) / norm.ppf(tails[1])
        return float(low), float(high)

    return Difference(center, interval(0.90), interval(0.95), seeds)


def compare(
    rows: Sequence[Mapping[str, str]], one: str, other: str, group: str = "All", together: int = 1
) -> Difference | None:
    """The difference of two arms of a results file on the seeds that both have; None with fewer than two.

    See `difference` and `stacked`.
    """
    common = sorted(set(seeds_of(rows, one)) & set(seeds_of(rows, other)))
    if len(common) < 2:
        return None
    first, second = (stacked(rows, arm, common, together) for arm in (one, other))
    return difference(first, second, group)


def members(names: Iterable[str], group: str) -> list[str]:
    """The data sets that a group averages over; all of them where none is in a table of data sets."""
    names = list(names)
    known = [name for name in group_members(names)[group] if name in names]
    return names if not any(find_dataset(name) for name in names) else known


def averages(hits: Hits, group: str = "All") -> np.ndarray:
    """(seeds,) hit@1 in percent, averaged over the data sets of a group."""
    return 100 * np.mean([hits[name].mean(1) for name in members(hits, group)], axis=0)


def stacked(
    rows: Sequence[Mapping[str, str]], arm: str, seeds: Sequence[int], together: int = 1
) -> dict[str, np.ndarray]:
    """The hits of an arm, (seeds, queries), from the rows of a results file, seeds in the given order.

    Args:
        rows: of the file.
        arm: which.
        seeds: which.
        together: so many queries in a row are of one thing, and count as one: the mean of their hits.

    Raises:
        KeyError: a seed is missing.
    """
    found = {(row["dataset"], int(row["seed"])): row for row in rows if row["arm"] == arm}
    names = dict.fromkeys(name for name, _ in found)

    def one(name: str, seed: int) -> np.ndarray:
        row = found[name, seed]
        return unpack(row["hits"], int(row["queries"])).reshape(-1, together).mean(1)

    return {name: np.stack([one(name, seed) for seed in seeds]) for name in names}


def seeds_of(rows: Sequence[Mapping[str, str]], arm: str) -> list[int]:
    """The seeds that an arm has."""
    return sorted({int(row["seed"]) for row in rows if row["arm"] == arm})
