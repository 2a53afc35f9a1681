"""The paired bootstrap: equal to resampling queries one by one, with the exact standard error, and covering."""

import numpy as np
import pytest

from cocoa.bootstrap import interval, outcomes, resampled_differences

SIZES = (40, 25, 60)
HITS = [0.3, 0.5, 0.7], [0.45, 0.5, 0.8]
"""Chance of a hit in each data set, of the baseline and the other run."""


def drawn(rng, chances, sizes=SIZES):
    return [rng.random(size) < chance for size, chance in zip(sizes, chances, strict=True)]


def counts_of(baseline, other):
    return np.array([outcomes(one, two) for one, two in zip(baseline, other, strict=True)])


def exact_error(counts):
    """Of the mean over data sets of the mean differences: each has variance (p + q - (p - q)^2) / n."""
    queries = counts.sum(1)
    lost, won = counts[:, 0] / queries, counts[:, 2] / queries
    return (((won + lost - (won - lost) ** 2) / queries).sum() ** 0.5) / len(counts)


def test_outcomes_by_hand():
    baseline = np.array([True, True, False, False, False, True])
    other = np.array([False, True, True, True, False, False])
    assert outcomes(baseline, other).tolist() == [2, 2, 2]
    assert outcomes(baseline, baseline).tolist() == [0, 6, 0]


def test_it_is_a_resampling_of_indices():
    """Quantiles of the average within Monte-Carlo error of those of a plain loop, whose pairs stay together."""
    rng, resamples = np.random.default_rng(1), 20_000
    baseline, other = (drawn(rng, chances) for chances in HITS)
    plain = np.zeros(resamples)
    for one, two in zip(baseline, other, strict=True):
        for place in range(resamples):
            queries = rng.integers(0, len(one), len(one))
            plain[place] += (two[queries].mean() - one[queries].mean()) / len(SIZES)
    found = resampled_differences(counts_of(baseline, other), resamples, seed=0).mean(1)
    for share, density in ((0.025, 0.0584), (0.25, 0.318), (0.5, 0.399), (0.75, 0.318), (0.975, 0.0584)):
        error = plain.std() * (2 * share * (1 - share) / resamples) ** 0.5 / density  # density of a normal there
        assert abs(np.quantile(plain, share) - np.quantile(found, share)) < 4 * error
    apart = resampled_differences(counts_of(baseline, [np.roll(two, 1) for two in other]), resamples, seed=0).mean(1)
    assert abs(apart.std() - found.std()) > 4 * plain.std() / resamples**0.5  # other pairs, another spread


def test_its_spread_is_the_exact_standard_error():
    counts = np.array([[30, 900, 70], [10, 180, 10], [200, 100, 700]])
    found = resampled_differences(counts, 40_000, seed=0)
    assert found.shape == (40_000, 3)
    assert found.mean(0) == pytest.approx([0.04, 0, 0.5], abs=1e-3)
    assert found.mean(1).std() == pytest.approx(exact_error(counts), rel=0.02)
    for place in range(3):
        assert found[:, place].std() == pytest.approx(exact_error(counts[place : place + 1]), rel=0.02)


def test_intervals_cover_the_true_difference_as_often_as_they_say():
    """1,000 simulated pairs of runs with correlated hits; the true difference of the average is 0.06."""
    rng, inside = np.random.default_rng(0), 0
    for seed in range(1000):
        counts = rng.multinomial(200, [[0.1, 0.7, 0.2], [0.05, 0.9, 0.05], [0.11, 0.7, 0.19]])
        low, high = interval(resampled_differences(counts, 400, seed).mean(1))
        inside += low <= 0.06 <= high
    assert 0.93 < inside / 1000 < 0.965


def test_equal_runs_differ_by_nothing_and_seeds_decide():
    same = np.array([[0, 50, 0]])
    assert interval(resampled_differences(same, 100, 0)[:, 0]) == (0, 0)
    counts = np.array([[5, 40, 5]])
    first, again, other = (resampled_differences(counts, 100, seed) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).any()
