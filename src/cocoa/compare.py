"""`cocoa compare`: runs beside each other, in scores with their uncertainty, and in what training them took.

The first run is the baseline; each other one's difference to it has an interval from a paired bootstrap over
queries (`cocoa.bootstrap`). Averages are the plain means of `cocoa.metrics.summary`, over the data sets that
all runs were scored on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cocoa.account import stages_of
from cocoa.bootstrap import interval, outcomes, resampled_differences
from cocoa.catalogue import find_dataset
from cocoa.checkpoint import RECORD_NAME, read_record, training_part
from cocoa.errors import CocoaError
from cocoa.metrics import group_members
from cocoa.scores import RANKS_NAME, SUMMARY_NAME, read_ranks, short_name

FINAL, SCORES = "final", "scores"
"""In a training run's folder: its last checkpoint, and where its scores are looked for."""


@dataclass(frozen=True)
class Run:
    """One column.

    Attributes:
        name: of the model, for people.
        folder: as it was named.
        stages: `cocoa.account.FACTS` of every stage that trained it.
        hits: hit@1 in percent by data set; empty where there are no scores.
        hashes: of the data, by data set.
        ranks: (queries,) by data set; empty for an evaluation that left none.
    """

    name: str
    folder: Path
    stages: list[dict[str, Any]]
    hits: dict[str, float] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """One cell, in percent and in points.

    Attributes:
        hit: hit@1; None where the run has no scores.
        difference: to the baseline; None in its own column.
        low: lower end of the interval of the difference; None where ranks are missing.
        high: its upper end.
    """

    hit: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """The cell as it is shown; a star where the interval excludes 0."""
        if self.hit is None:
            return "-"
        text = f"{self.hit:.1f}"
        if self.difference is not None:
            text += f" {self.difference:+z.1f}"
        if self.low is None or self.high is None:
            return text
        return f"{text} [{self.low:+z.1f}, {self.high:+z.1f}]{'*' if self.low > 0 or self.high < 0 else ''}"


@dataclass(frozen=True)
class Comparison:
    """What there is to say about runs.

    Attributes:
        runs: the baseline first.
        averages: by what is averaged, a score for each run.
        members: the data sets of each average.
        datasets: by data set, a score for each run.
        notes: sentences on what was left out and why.
        resamples: of the bootstrap.
        seed: of the bootstrap.
    """

    runs: list[Run]
    averages: dict[str, list[Score]]
    members: dict[str, list[str]]
    datasets: dict[str, list[Score]]
    notes: list[str]
    resamples: int
    seed: int


def compare(folders: Sequence[Path], resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare runs with the first of them.

    Args:
        folders: of each run, what `cocoa evaluate` or `cocoa train` wrote.
        resamples: samples of the queries.
        seed: of the samples; every run is compared on samples of this seed.

    Raises:
        CocoaError: a folder is neither, or its files do not fit each other; no data set can be compared.
    """
    return compare_runs(named_apart([read_run(folder) for folder in folders]), resamples, seed)


def compare_runs(runs: list[Run], resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare runs that are read already, and named apart, with the first of them; see `compare`."""
    names, notes = _comparable(runs)
    groups = _groups(names)
    members = [*groups.values(), *([name] for name in names)]
    columns = [_column(run, runs[0], members, resamples, seed) for run in runs]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Comparison(
        runs=runs,
        averages=dict(zip(groups, rows, strict=False)),
        members=groups,
        datasets=dict(zip(names, rows[len(groups) :], strict=True)),
        notes=notes,
        resamples=resamples,
        seed=seed,
    )


def read_run(folder: Path) -> Run:
    """An evaluation's output folder, or a training run's, with its scores if they are in `scores` there.

    Raises:
        CocoaError: it is neither; its files cannot be read, or are not of one checkpoint or evaluation.
    """
    if (folder / SUMMARY_NAME).is_file():
        summary = read_summary(folder / SUMMARY_NAME)
        return _scored(Run(short_name(summary["model"]), folder, stages_of(summary.get("recipe", {}))), folder, summary)
    final = folder / FINAL
    if not (final / RECORD_NAME).is_file():
        raise CocoaError(
            f"{folder}: neither {SUMMARY_NAME} nor {FINAL}/{RECORD_NAME} is here; name what `cocoa evaluate` wrote "
            "(--output), or the output_dir of a finished `cocoa train`"
        )
    record, scores = read_record(final), folder / SCORES
    run = Run(short_name(final), folder, stages_of(record))
    if not (scores / SUMMARY_NAME).is_file():
        return run
    summary = read_summary(scores / SUMMARY_NAME)
    if summary.get("recipe") != training_part(record):
        raise CocoaError(f"{scores}: of another checkpoint than {final}; evaluate again: cocoa evaluate {final} ...")
    return _scored(run, scores, summary)


def read_summary(path: Path) -> dict[str, Any]:
    """An evaluation's summary, seen to have what is needed of it.

    Raises:
        CocoaError: it is none.
    """
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        summary = None
    if not isinstance(summary, dict) or "model" not in summary or not isinstance(summary.get("datasets"), dict):
        raise CocoaError(f"{path}: not a summary of `cocoa evaluate`; evaluate again")
    return summary


def _scored(run: Run, folder: Path, summary: dict[str, Any]) -> Run:
    """The run with the scores of an evaluation's folder."""
    hits, ranks = summary["datasets"], read_ranks(folder)
    for name, own in ranks.items():
        if name in hits and abs(100 * np.mean(own == 1) - hits[name]) > 1e-6:
            raise CocoaError(
                f"data set {name}: {folder}/{RANKS_NAME} and {SUMMARY_NAME} are of two evaluations; evaluate again"
            )
    return replace(run, hits=hits, hashes=summary.get("data_hash", {}), ranks=ranks)


def named_apart(runs: list[Run]) -> list[Run]:
    """The runs with names that differ: where they would not, with the folder, and then a number."""
    names = [run.name for run in runs]
    names = [f"{run.name} ({run.folder})" if names.count(run.name) > 1 else run.name for run in runs]
    numbered = [
        f"{name} #{names[: i + 1].count(name)}" if names.count(name) > 1 else name for i, name in enumerate(names)
    ]
    return [replace(run, name=name) for run, name in zip(runs, numbered, strict=True)]


def _comparable(runs: list[Run]) -> tuple[list[str], list[str]]:
    """The data sets that all runs with scores were scored on alike, and notes on the others and on what is missing.

    Raises:
        CocoaError: there is none.
    """
    scored = [run for run in runs if run.hits]
    notes = [
        f"{run.name}: no scores in {run.folder / SCORES}; only what training took is shown"
        for run in runs
        if not run.hits
    ]
    names: list[str] = []
    left_out: dict[str, list[str]] = {}  # by reason
    there = Counter(name for run in scored for name in run.hits)
    for name, count in there.items():
        hashes = {run.name: run.hashes[name] for run in scored if name in run.hashes}
        one = next(iter(hashes), "")
        other = next((run for run, value in hashes.items() if value != hashes[one]), None)
        if count < len(scored):
            without = ", ".join(run.name for run in scored if name not in run.hits)
            left_out.setdefault(f"not scored in {without}", []).append(name)
        elif other is not None:
            reason = f"{one} and {other} were scored on different data; evaluate both on the same files, with the same "
            left_out.setdefault(reason + "--prompt-style and --on-bad-row", []).append(name)
        else:
            names.append(name)
    problems = [f"left out: {', '.join(own)}: {why}" for why, own in left_out.items()]
    if scored and not names:
        raise CocoaError(f"no data set can be compared: {problems[0] if problems else 'none was scored'}")
    if len(scored) > 1:
        notes += [
            f"{run.name}: not all ranks are in {RANKS_NAME}, so no interval; evaluate again into the same folder"
            for run in scored
            if not all(name in run.ranks for name in names)
        ]
        if not runs[0].hits:
            notes.append(f"{runs[0].name}, the baseline, has no scores: there are no differences")
    return names, problems + notes


def _groups(names: list[str]) -> dict[str, list[str]]:
    """What is averaged over: those of `cocoa.metrics`, with how many are there, and all where not all are in them."""
    entries = {name: find_dataset(name) for name in names}
    known = {entry.name: name for name, entry in entries.items() if entry is not None}
    groups = {}
    whole: list[str] = []
    for group, members in group_members(known).items():
        there = [known[member] for member in members if member in known]
        if there:
            label = group if len(there) == len(members) else f"{group} ({len(there)} of {len(members)} sets)"
            groups[label] = whole = there  # the last group is All
    if set(whole) != set(names):
        groups[f"mean of these {len(names)}" if len(names) > 1 else names[0]] = names
    return groups


def _column(run: Run, baseline: Run, rows: list[list[str]], resamples: int, seed: int) -> list[Score]:
    """A run's scores: each the mean over a row's data sets."""
    if not run.hits:
        return [Score()] * len(rows)
    hits = [_mean(run, row) for row in rows]
    if run is baseline or not baseline.hits:
        return [Score(hit) for hit in hits]
    differences = [hit - _mean(baseline, row) for hit, row in zip(hits, rows, strict=True)]
    names = list(dict.fromkeys(name for row in rows for name in row))
    paired = [name for name in names if all(name in one.ranks and name in one.hashes for one in (run, baseline))]
    places = {name: place for place, name in enumerate(paired)}
    counts = [outcomes(baseline.ranks[name] == 1, run.ranks[name] == 1) for name in paired]
    drawn = 100 * resampled_differences(np.array(counts, dtype=int).reshape(-1, 3), resamples, seed)  # (R, D)
    ends = [
        interval(drawn[:, [places[name] for name in row]].mean(1)) if places.keys() >= set(row) else (None, None)
        for row in rows
    ]
    return [Score(hit, difference, *end) for hit, difference, end in zip(hits, differences, ends, strict=True)]


def _mean(run: Run, names: list[str]) -> float:
    return sum(run.hits[name] for name in names) / len(names)
