"""The paired bootstrap: how far a difference of hit@1 may be due to which queries there happen to be.

Queries are drawn with replacement within each data set, the same ones for both runs. A query's difference is
-1, 0 or 1, so the resampled sum of a data set is exactly multinomial in the three counts, and nothing loops
over queries. Training seeds and the choice of data sets are not drawn: the interval says nothing about them.
"""

from __future__ import annotations

import numpy as np

LEVEL = 0.95


def outcomes(baseline: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(3,) queries that `other` loses against `baseline`, that are equal, and that it wins.

    Args:
        baseline: (queries,) whether each is a hit.
        other: the same of another run, in the same order.
    """
    difference = other.astype(int) - baseline.astype(int)  # (queries,) -1, 0 or 1
    return np.bincount(difference + 1, minlength=3)


def resampled_differences(counts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """(resamples, D) differences of hit@1, as fractions, that other samples of the queries would give.

    Args:
        counts: (D, 3) the `outcomes` of each data set.
        resamples: how many samples.
        seed: of the samples.
    """
    queries = counts.sum(1)  # (D,)
    drawn = np.random.default_rng(seed).multinomial(queries, counts / queries[:, None], (resamples, len(counts)))
    return (drawn[..., 2] - drawn[..., 0]) / queries


def interval(differences: np.ndarray) -> tuple[float, float]:
    """The middle 95 % (`LEVEL`) of resampled differences (resamples,): the percentile interval."""
    low, high = np.quantile(differences, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
