"""Scores for the report: every figure with its interval, one run's gain over another, published numbers beside.

An interval is a bootstrap over queries (`cocoa.bootstrap`): it says how far a figure depends on which queries there
happen to be, and nothing about the training seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cocoa.bootstrap import interval, outcomes, resampled_differences
from cocoa.catalogue import datasets, find_dataset
from cocoa.compare import Run, Score, compare_runs
from cocoa.metrics import GROUPS
from cocoa.scores import published

OTHER = "other data sets"
"""Where data sets stand that are in no table."""
TASKS = (*GROUPS, OTHER)
"""In this order meta-tasks stand on the page."""


class Estimate(NamedTuple):
    """hit@1 in percent, and the ends of its interval; None where ranks are missing."""

    hit: float
    low: float | None = None
    high: float | None = None


class Published(NamedTuple):
    """A published model, and its hit@1 in percent by group, as printed."""

    model: str
    scores: dict[str, float]


@dataclass(frozen=True)
class ScoreTable:
    """What the report says of scores; every list is in the order of `models`.

    Attributes:
        models: their names.
        groups: by what is averaged; a label that is more than a group's name has data sets missing.
        datasets: by meta-task and data set.
        ood: the data sets that are out of distribution.
        rivals: the two whose difference is shown; None with one model.
        gains: of the second rival over the first, by group, in points.
        published: on the same benchmark; empty where the data sets are not MMEB's.
        notes: what was left out and why.
    """

    models: list[str]
    groups: dict[str, list[Estimate]]
    datasets: dict[str, dict[str, list[Estimate]]]
    ood: frozenset[str] = frozenset()
    rivals: tuple[str, str] | None = None
    gains: dict[str, Score] = field(default_factory=dict)
    published: Sequence[Published] = ()
    notes: Sequence[str] = ()

    @property
    def intervals(self) -> bool:
        """Whether any figure has one."""
        return any(each.low is not None for row in self.groups.values() for each in row)

    def best(self, group: str) -> float | None:
        """The highest score of a row as it is shown, to one decimal; None where there is nothing to be better than."""
        return max(round(each.hit, 1) for each in self.groups[group]) if len(self.models) > 1 else None

    def marks(self, group: str) -> list[tuple[str, float]]:
        """Published models and their scores in a group; empty where ours is over other data sets."""
        return [(row.model, row.scores[group]) for row in self.published if group in row.scores]


def score_table(
    runs: Sequence[Run], rivals: tuple[str, str] | None = None, resamples: int = 10_000, seed: int = 0
) -> ScoreTable | None:
    """The scores of runs over the data sets that all were scored on; None where no run has any.

    Args:
        runs: named apart; those without scores are left out.
        rivals: names of the two whose difference is shown; by default the first and the last run with scores.
        resamples: of the queries, for the intervals.
        seed: of the resamples.

    Raises:
        CocoaError: no data set can be compared.
    """
    scored = [run for run in runs if run.hits]
    if not scored:
        return None
    names = [run.name for run in scored]
    if rivals is None and len(scored) > 1:
        rivals = (names[0], names[-1])
    baseline = names.index(rivals[0]) if rivals else 0
    found = compare_runs([scored[baseline], *scored[:baseline], *scored[baseline + 1 :]], resamples, seed)
    rows = [*found.members.values(), *([name] for name in found.datasets)]
    columns = [estimates(run, rows, resamples, seed) for run in scored]
    cells = [list(row) for row in zip(*columns, strict=True)]
    by_task: dict[str, dict[str, list[Estimate]]] = {}
    entries = {name: find_dataset(name) for name in found.datasets}
    for name, row in zip(found.datasets, cells[len(found.members) :], strict=True):
        by_task.setdefault(meta_task(name), {})[name] = row
    other = [run.name for run in found.runs].index(rivals[1]) if rivals else 0
    known = {entry.name for entry in entries.values() if entry is not None}
    return ScoreTable(
        models=names,
        groups=dict(zip(found.members, cells, strict=False)),
        datasets=dict(sorted(by_task.items(), key=lambda item: TASKS.index(item[0]))),
        ood=frozenset(name for name, entry in entries.items() if entry is not None and entry.ood),
        rivals=rivals,
        gains={group: row[other] for group, row in found.averages.items()} if rivals else {},
        published=_published() if known & datasets().keys() else (),
        notes=found.notes,
    )


def meta_task(name: str) -> str:
    """The meta-task of a data set."""
    entry = find_dataset(name)
    return entry.meta_task if entry else OTHER


def estimates(run: Run, rows: Sequence[Sequence[str]], resamples: int, seed: int) -> list[Estimate]:
    """The mean over each row's data sets; with an interval where all their ranks are there.

    hit@1 is its difference to a run that never hits, so that it is resampled as differences are.
    """
    names = [name for name in run.hits if name in run.ranks]
    places = {name: place for place, name in enumerate(names)}
    hits = [run.ranks[name] == 1 for name in names]
    counts = np.array([outcomes(np.zeros_like(own), own) for own in hits], dtype=int).reshape(-1, 3)
    drawn = 100 * resampled_differences(counts, resamples, seed)  # (R, D)
    found = []
    for row in rows:
        mean = sum(run.hits[name] for name in row) / len(row)
        whole = places.keys() >= set(row)
        ends = interval(drawn[:, [places[name] for name in row]].mean(1)) if whole else (None, None)
        found.append(Estimate(mean, *ends))
    return found


def _published() -> tuple[Published, ...]:
    return tuple(Published(row["model"], _scores(row)) for row in published())


def _scores(row: dict[str, Any]) -> dict[str, float]:
    return {group: row[group] for group in GROUPS if group in row}
