"""Tables in markdown: arms with their differences, from the rows of a results file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import mean, stdev

from arms_compared import Difference, averages, compare, difference, paired, seeds_of, stacked

Rows = Sequence[Mapping[str, str]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, or that there is nothing yet."""
    if not rows:
        return "*Not run yet.*"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(
    rows: Rows,
    arms: Iterable[str],
    baselines: Sequence[str],
    seeds_of_arm: Callable[[str], float],
    together: int = 1,
    second: str | None = None,
) -> str:
    """Every arm's hit@1, and its difference to the baselines on the seeds that both have.

    Args:
        rows: of a results file.
        arms: in order; those without a row are left out.
        baselines: what each is compared with.
        seeds_of_arm: how many an arm is to have; two are judged once they share as many as one of them is to have.
        together: see `stacked`.
        second: a group of data sets whose hit@1 is told too.
    """
    lines = []
    for arm in arms:
        if not (seeds := seeds_of(rows, arm)):
            continue
        hits = stacked(rows, arm, seeds)
        values = averages(hits).tolist()
        deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        seconds = min(float(row["seconds"]) for row in rows if row["arm"] == arm)
        cells = [arm, str(len(seeds)), f"{mean(values):.1f}{deviation}"]
        if second:
            cells.append(f"{averages(hits, second).mean():.1f}")
        cells.append(f"{seconds:.0f}")
        for baseline in baselines:
            found = None if arm == baseline else compare(rows, arm, baseline, together=together)
            cells.append(told(found, min(map(seeds_of_arm, (arm, baseline)))) if found else "")
        lines.append(cells)
    against = [f"less `{baseline}` [95 %]" for baseline in baselines]
    told_too = [second] if second else []
    return table(["arm", "seeds", "hit@1 (mean ± sd over seeds)", *told_too, "seconds (least)", *against], lines)


def by_groups(rows: Rows, pairs: Mapping[tuple[str, str], float], groups: Sequence[str]) -> str:
    """Differences of pairs of arms by groups of data sets, judged once a pair has as many seeds as it says."""
    lines = []
    for (one, other), seeds in pairs.items():
        first, second = paired(rows, one, other)
        if (common := len(next(iter(first.values()), ()))) > 1:
            found = [told(difference(first, second, group), seeds) for group in groups]
            lines.append([f"`{one}` less `{other}`", str(common), *found])
    return table(["", "seeds", *groups], lines)


def told(found: Difference, seeds: float) -> str:
    """A difference, its interval and, once it has all its seeds, the verdict."""
    verdict = f", {found.verdict}" if found.seeds >= seeds else ""
    return f"{found.mean:+.1f} [{found.outer[0]:+.1f}, {found.outer[1]:+.1f}]{verdict}"


def by_seed(rows: Rows) -> dict[str, dict[str, float]]:
    """hit@1 on validation scenes: arm -> seed -> score."""
    values: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        values[row["arm"]][row["seed"]] = float(row["All"])
    return values


def more(own: dict[str, float], other: dict[str, float]) -> str:
    """How much one arm has more than another on the seeds that both have: mean, least and most."""
    found = [own[seed] - other[seed] for seed in own if seed in other]
    return f"{mean(found):+.1f} ({min(found):+.1f} to {max(found):+.1f})" if found and own is not other else ""


def explored(rows: Rows, baseline: str) -> str:
    """Every arm's hit@1 on validation scenes, and how much more than the baseline's it is, seed by seed."""
    values = by_seed(rows)
    lines = [
        [arm, str(len(own)), f"{mean(own.values()):.1f}", more(own, values.get(baseline, {}))]
        for arm, own in values.items()
    ]
    return table(["arm", "seeds", "hit@1", f"less `{baseline}` (least to most of a seed)"], lines)
