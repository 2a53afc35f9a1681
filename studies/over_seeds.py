"""Tables of docs/results.md over many seeds: the deciding experiment, and bridges that were confirmed on fresh ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import beyond
import numpy as np
from arms_compared import PICTURES, UNSATURATED, averages, bootstrap, compare, paired, seeds_of, stacked
from deciding import ARMS, BACKBONE, COMPARED, HIGH, RESULTS, TURNS
from results import read
from tables import Rows, by_groups, compared, table, told

from cocoa.metrics import GROUPS

BASELINES = ("full", "published", "contrastive")
"""What every arm of the deciding experiment is compared with."""
LOOKED_INTO = (
    *(("published", other) for other in ("full", "shuffled", "contrastive")),
    HIGH,
    *(("strict", other) for other in ("full", "shuffled", "contrastive")),
    *(("full", other) for other in ("shuffled", "contrastive")),
    *(("published", other) for other in ("ntp", "more-steps", "contrastive-mean")),
    *((arm, "contrastive") for arm in ("stage-1", "contrastive-mean")),
    *(("moca", "contrastive-mean"), ("coma", "contrastive-causal")),
)
"""Arms whose difference is told by groups of data sets; the last two are MoCa and CoMa and what they are without it."""
LOST = 85
"""Percent of SceneGrounding that nearly all runs are above; those below have hardly learnt to ground."""


def planned(arm: str) -> int:
    """The seeds that an arm of the deciding experiment is to have."""
    return sum(len(seeds) for arms, seeds in TURNS if arm in arms)


def by_meta_task() -> str:
    """The deciding arms' differences by groups of data sets."""
    seeds = {(one, other): min(planned(one), planned(other)) for one, other in LOOKED_INTO}
    return by_groups(read(RESULTS), seeds, (*GROUPS, UNSATURATED))


def deciding() -> str:
    """The deciding experiment: the comparison it is about, and every arm."""
    rows, (one, other) = read(RESULTS), COMPARED
    found = compare(rows, one, other)
    if found is None:
        return table([], [])
    low, high = bootstrap(*paired(rows, one, other))
    plain = f"A plain bootstrap over seeds and queries: [{low:+.1f}, {high:+.1f}]."
    inner = f"90 %: [{found.inner[0]:+.1f}, {found.inner[1]:+.1f}]"
    head = f"**`{one}` less `{other}`: {told(found, planned(one))}** (95 %; {inner}"
    return f"{head}; {found.seeds} seeds). {plain}\n\n{compared(rows, ARMS, BASELINES, planned, second=UNSATURATED)}"


def fresh(backbone: str = BACKBONE) -> Rows:
    """What fresh seeds of a backbone gave."""
    return [row for row in read(beyond.CONFIRMED) if row["backbone"] == backbone]


def confirmed() -> str:
    """What was chosen of them, on fresh seeds; how its baselines differ is told, but not judged."""
    parts = []
    for backbone in beyond.BACKBONES:
        if not (rows := fresh(backbone)):  # the other backbone, where there is nothing to confirm
            continue
        seeds = {
            arm: math.inf if arm in beyond.BASELINES else len(beyond.FRESH) for arm in (row["arm"] for row in rows)
        }
        told_here = compared(rows, seeds, beyond.BASELINES, seeds.__getitem__, second=UNSATURATED)
        parts.append(f"{backbone}:\n\n{told_here}")
    return "\n\n".join(parts)


def pooled() -> str:
    """Arms that the deciding experiment and the confirmation both have, over the seeds of both; nobody planned it."""
    pairs = (
        COMPARED,
        ("strict", "full"),
        ("strict", "published"),
        *((arm, "contrastive") for arm in (*COMPARED, "strict")),
    )
    return by_groups([*read(RESULTS), *fresh()], dict.fromkeys(pairs, math.inf), ("All", "VQA", UNSATURATED))


def leads() -> str:
    """What was looked for afterwards in the deciding comparison, and whether fresh seeds have it too."""
    rows = read(RESULTS)
    found: list[tuple[str, Rows, Sequence[str]]] = [
        ("1 to 16", rows, COMPARED),
        ("301 to 308", fresh(), COMPARED),
        ("all of them", [*rows, *fresh()], COMPARED),
        ("1 to 8, at 6e-4", rows, HIGH),
    ]
    groups = ("Grounding", PICTURES)
    lines = [
        [name, *(told(each, math.inf) for group in groups if (each := compare(own, arms[0], arms[1], group)))]
        for name, own, arms in found
    ]
    return table(["`published` less `full`, seeds", *groups], lines)


def single_seeds() -> str:
    """How many seeds alone would have told the deciding two apart, by an interval over their queries."""
    rows = [*read(RESULTS), *fresh()]
    seeds = sorted(set.intersection(*(set(seeds_of(rows, arm)) for arm in COMPARED)))
    one, other = COMPARED
    found = [bootstrap(stacked(rows, one, [seed]), stacked(rows, other, [seed]), resamples=1000) for seed in seeds]
    better, worse = sum(low > 0 for low, _ in found), sum(high < 0 for _, high in found)
    return f"Of the {len(seeds)} seeds, taken one by one, `{one}` is better in {better} and worse in {worse} (95 %)."


def grounding_lost() -> str:
    """How many runs of an arm hardly learn to ground, over the seeds of the deciding experiment and the fresh ones."""
    rows = [*read(RESULTS), *fresh()]
    lines = []
    for arm in ARMS:
        scores = averages(
            stacked([row for row in rows if row["dataset"] == "SceneGrounding"], arm, seeds_of(rows, arm))
        )
        lines.append(
            [arm, str(len(scores)), str((scores < LOST).sum()), f"{scores.min():.1f}", f"{np.median(scores):.1f}"]
        )
    return table(["arm", "runs", f"under {LOST} %", "least", "median"], lines)
