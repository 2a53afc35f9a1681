"""What a difference of hit@1 between two arms is worth: an interval over seeds and queries, and a verdict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from results import unpack
from scipy.stats import t

from cocoa.catalogue import find_dataset
from cocoa.metrics import group_members

SMALLEST = 1.0
"""Points of hit@1: the smallest difference that would matter."""

UNSATURATED = "Retrieval and Grounding"
"""A group of our own: the meta-tasks in which arms can still gain."""
PICTURES = "Pictures by captions"
"""A group of our own: the data sets whose queries are captions, of Retrieval."""

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


def difference(one: Hits, other: Hits, group: str = "All") -> Difference:
    """Compare two arms that ran on the same seeds and queries.

    Both are samples, and every seed has every query. So the variance of the mean is that of the seeds' averages, which
    has what a seed and a query do together in it, and that of the queries' averages in each data set without it. (A
    bootstrap that draws both counts it three times.) Intervals are Student's, as if all of it came from the seeds.

    Args:
        one: hits of the first arm.
        other: of the second, seeds in the same order.
        group: what is averaged over, see `members`.

    Raises:
        ValueError: a single seed.
    """
    changes = [100 * (one[name].astype(float) - other[name]) for name in members(one, group)]  # (S, Q) each
    seeds = len(changes[0])
    if seeds < 2:
        raise ValueError("an interval over seeds takes two of them")
    averaged = np.mean([change.mean(1) for change in changes], axis=0)  # (S,)
    of_queries = sum(_variance_of_queries(change) for change in changes) / len(changes) ** 2
    error = np.sqrt(averaged.var(ddof=1) / seeds + of_queries)
    center = float(averaged.mean())

    def interval(level: float) -> tuple[float, float]:
        reach = float(error * t.ppf((1 + level) / 2, seeds - 1))
        return center - reach, center + reach

    return Difference(center, interval(0.90), interval(0.95), seeds)


def _variance_of_queries(change: np.ndarray) -> float:
    """Of a data set's mean, what its queries add: their averages' variance without the residual of (S, Q)."""
    seeds, queries = change.shape
    averages_of = change.mean(0)  # (Q,)
    residual = change - change.mean(1, keepdims=True) - averages_of + change.mean()
    noise = (residual**2).sum() / ((seeds - 1) * (queries - 1))
    return max(0.0, averages_of.var(ddof=1) / queries - noise / (seeds * queries))


def bootstrap(one: Hits, other: Hits, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the same mean by drawing seeds and queries with replacement; see `difference`."""
    rng, total = np.random.default_rng(0), np.zeros(resamples)
    names = members(one, "All")
    seeds = len(next(iter(one.values())))
    drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples) / seeds  # (R, S)
    for name in names:
        change = one[name].astype(float) - other[name]  # (S, Q)
        queries = change.shape[1]
        weights = rng.multinomial(queries, np.full(queries, 1 / queries), resamples) / queries  # (R, Q)
        total += ((drawn @ change) * weights).sum(1)
    low, high = np.quantile(100 * total / len(names), [0.025, 0.975])
    return float(low), float(high)


def compare(
    rows: Sequence[Mapping[str, str]], one: str, other: str, group: str = "All", together: int = 1
) -> Difference | None:
    """The difference of two arms of a results file on the seeds that both have; None with fewer than two.

    See `difference` and `stacked`.
    """
    first, second = paired(rows, one, other, together)
    return difference(first, second, group) if first and len(next(iter(first.values()))) > 1 else None


def paired(rows: Sequence[Mapping[str, str]], one: str, other: str, together: int = 1) -> tuple[Hits, Hits]:
    """The hits of two arms on the seeds that both have, see `stacked`; empty where there is none."""
    common = sorted(set(seeds_of(rows, one)) & set(seeds_of(rows, other)))
    if not common:
        return {}, {}
    return stacked(rows, one, common, together), stacked(rows, other, common, together)


def members(names: Iterable[str], group: str) -> list[str]:
    """The data sets that a group averages over; all of them where none is in a table of data sets."""
    names = list(names)
    if group == UNSATURATED:
        return [*members(names, "Retrieval"), *members(names, "Grounding")]
    if group == PICTURES:
        return [name for name in names if "_t2i" in name]
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
