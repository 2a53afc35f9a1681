"""`python studies/report.py`: every table of docs/results.md and every plot in docs/images/results, from the CSV files.

A table stands in the page between `<!-- NAME -->` and `<!-- end -->`; what is between is written anew.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import beyond
from arms_compared import UNSATURATED, Difference, averages, bootstrap, compare, paired, seeds_of, stacked
from bridge import MODELS, NATS, ZERO_SHOT
from deciding import ARMS, BACKBONE, COMPARED, PAIRS, RESULTS, SIZES, SPREAD, TUNING
from factors import OTHER_BACKBONE, OVER_PAIRS, PAIR_COUNTS, found_with
from mmeb_hours import run_hours, stage_hours
from nats import CLASSES
from plots import draw_all
from probes import DECODED, PROBES
from real_pixels import ARMS as REAL_ARMS
from real_pixels import PIECES
from real_pixels import RESULTS as REAL_PIXELS
from results import read

from cocoa.metrics import GROUPS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"
BASELINES = ("full", "published", "contrastive")
"""What every arm of the deciding experiment is compared with."""

Rows = Sequence[Mapping[str, str]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, or that there is nothing yet."""
    if not rows:
        return "*Not run yet.*"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bridge_nats() -> str:
    """Nats by model and class of token, the mean of the seeds."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in read(NATS):
        found[row["model"], row["class"]].append(float(row["nats"]))
    columns = ("text", "token", "first", *CLASSES, "grammar", "loss")
    rows = [
        [model, *(f"{mean(found[model, name]):.2f}" for name in columns)]
        for model in MODELS
        if (model, "token") in found
    ]
    return table(["after", "a text", "a token", "its first token", *CLASSES, "grammar", "loss a token"], rows)


def zero_shot() -> str:
    """hit@1 straight after each stage, the mean of the seeds."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read(ZERO_SHOT):
        found[row["model"]].append(row)
    rows = [
        [model, *(f"{mean(float(row[group]) for row in found[model]):.1f}" for group in GROUPS)]
        for model in MODELS
        if model in found
    ]
    return table(["after", *GROUPS], rows)


def probes() -> str:
    """Area under the ROC curve of linear probes, by model and kind of attribute."""
    rows = read(PROBES)
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found = {(row["model"], row["kind"]): row["auc"] for row in rows}
    models = dict.fromkeys(row["model"] for row in rows)
    return table(["after", *kinds], [[model, *(found[model, kind] for kind in kinds)] for model in models])


def decoded() -> str:
    """Words of captions that are right, decoded through EOS; in brackets those with another picture's."""
    rows = read(DECODED)
    found = {(row["model"], row["class"]): f"{row['right']} ({row['with another picture']})" for row in rows}
    models = dict.fromkeys(row["model"] for row in rows)
    return table(["after", *CLASSES], [[model, *(found[model, name] for name in CLASSES)] for model in models])


def sizes() -> str:
    """What the number of pairs and steps was chosen by."""
    rows = [
        [
            *(row[name] for name in ("arm", "pairs", "bridge_steps", "steps", "batch")),
            *(row[group] for group in GROUPS),
            row["seconds"],
        ]
        for row in read(SIZES)
    ]
    return table(["arm", "pairs a set", "steps of stage 2", "contrastive steps", "batch", *GROUPS, "seconds"], rows)


def tuning() -> str:
    """hit@1 on validation scenes by learning rate."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in read(TUNING):
        found[row["pairs"], row["arm"]].append(f"{float(row['rate']):g}: {row['All']}")
    rows = [[pairs, arm, ", ".join(rates)] for (pairs, arm), rates in found.items()]
    return table(["pairs a set", "arm", "learning rate: hit@1 on validation scenes"], rows)


def spread() -> str:
    """hit@1 on validation scenes seed by seed, and how much the difference of two arms varies."""
    found: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in read(SPREAD):
        found[row["pairs"], row["seed"]][row["arm"]] = float(row["All"])
    lines = []
    for pairs in dict.fromkeys(pairs for pairs, _ in found):
        seeds = [own for (each, _), own in found.items() if each == pairs and len(own) == len(COMPARED)]
        one, other = ([own[arm] for own in seeds] for arm in COMPARED)
        more = [a - b for a, b in zip(one, other, strict=True)]
        scores = [", ".join(f"{value:.1f}" for value in values) for values in (one, other)]
        lines.append([pairs, *scores, f"{mean(more):+.1f} ± {stdev(more):.1f}" if len(more) > 1 else ""])
    return table(["pairs a set", *COMPARED, "difference (mean ± sd over seeds)"], lines)


def compared(rows: Rows, arms: Iterable[str], baselines: Sequence[str], together: int = 1) -> str:
    """Every arm's hit@1, and its difference to the baselines on the seeds that both have; see `stacked`."""
    lines = []
    for arm in arms:
        if not (seeds := seeds_of(rows, arm)):
            continue
        values = averages(stacked(rows, arm, seeds)).tolist()
        deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        seconds = min(float(row["seconds"]) for row in rows if row["arm"] == arm)
        cells = [arm, str(len(seeds)), f"{mean(values):.1f}{deviation}", f"{seconds:.0f}"]
        for baseline in baselines:
            found = None if arm == baseline else compare(rows, arm, baseline, together=together)
            cells.append(told(found) if found else "")
        lines.append(cells)
    against = [f"less `{baseline}` [95 %]" for baseline in baselines]
    return table(["arm", "seeds", "hit@1 (mean ± sd over seeds)", "seconds (least)", *against], lines)


def told(found: Difference) -> str:
    """A difference, its interval and the verdict."""
    return f"{found.mean:+.1f} [{found.outer[0]:+.1f}, {found.outer[1]:+.1f}], {found.verdict}"


def by_meta_task() -> str:
    """The deciding arms' differences by groups of data sets."""
    rows, lines, groups = read(RESULTS), [], (*GROUPS, UNSATURATED)
    for one, other in (("published", "full"), ("published", "shuffled"), ("published", "contrastive")):
        found = [each for group in groups if (each := compare(rows, one, other, group))]
        if len(found) == len(groups):
            lines.append([f"`{one}` less `{other}`", *map(told, found)])
    return table(["", *groups], lines)


def deciding() -> str:
    """The deciding experiment: the comparison it is about, and every arm."""
    rows, (one, other) = read(RESULTS), COMPARED
    found = compare(rows, one, other)
    if found is None:
        return table([], [])
    low, high = bootstrap(*paired(rows, one, other))
    plain = f"A plain bootstrap over seeds and queries: [{low:+.1f}, {high:+.1f}]."
    head = f"**`{one}` less `{other}`: {told(found)}** (95 %; 90 %: [{found.inner[0]:+.1f}, {found.inner[1]:+.1f}]"
    return f"{head}; {found.seeds} seeds). {plain}\n\n{compared(rows, ARMS, BASELINES)}"


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


def factors() -> str:
    """One factor at a time, on the first backbone and the usual number of pairs."""
    return explored(found_with(BACKBONE, PAIRS), "published")


def over_pairs() -> str:
    """With and without pre-training, over the number of pairs and on the other backbone."""
    lines = []
    for backbone, pairs in [*((BACKBONE, n) for n in sorted({PAIRS, *PAIR_COUNTS})), (OTHER_BACKBONE, PAIRS)]:
        values = by_seed(found_with(backbone, pairs))
        if not (seeds := set.intersection(*(set(values[arm]) for arm in OVER_PAIRS))):
            continue
        own = [{seed: values[arm][seed] for seed in seeds} for arm in OVER_PAIRS]
        published, full, contrastive = own
        changes = [more(published, contrastive), more(full, contrastive), more(published, full)]
        lines.append([backbone, str(pairs), str(len(seeds)), *(f"{mean(each.values()):.1f}" for each in own), *changes])
    changed = ["published less contrastive", "full less contrastive", "published less full"]
    return table(["backbone", "pairs", "seeds", *OVER_PAIRS, *changed], lines)


def bridges() -> str:
    """Bridges of our own, on exploratory seeds."""
    return explored([*beyond.baseline_rows(), *read(beyond.EXPLORED)], "published")


def confirmed() -> str:
    """What was chosen of them, on fresh seeds."""
    parts = []
    for backbone in beyond.BACKBONES:
        rows = [row for row in read(beyond.CONFIRMED) if row["backbone"] == backbone]
        parts.append(f"{backbone}:\n\n{compared(rows, dict.fromkeys(row['arm'] for row in rows), beyond.BASELINES)}")
    return "\n\n".join(parts)


def real_pixels() -> str:
    """Digits and photographs."""
    parts = []
    for name in ("digits", "photographs"):
        rows = [row for row in read(REAL_PIXELS) if row["dataset"] == name]
        baselines = ("full", "contrastive")
        parts.append(f"{name}:\n\n{compared(rows, REAL_ARMS, baselines, PIECES if name == 'photographs' else 1)}")
    return "\n\n".join(parts)


def mmeb_hours() -> str:
    """Hours of the runs on MMEB."""
    return table(
        ["run", "hours on 8 devices"], [[run, f"{value:.1f}"] for run, value in run_hours(stage_hours()).items()]
    )


TABLES = {
    "bridge nats": bridge_nats,
    "zero shot": zero_shot,
    "probes": probes,
    "decoded": decoded,
    "sizes": sizes,
    "tuning": tuning,
    "spread": spread,
    "deciding": deciding,
    "by meta-task": by_meta_task,
    "factors": factors,
    "over pairs": over_pairs,
    "bridges": bridges,
    "confirmed": confirmed,
    "real pixels": real_pixels,
    "hours": mmeb_hours,
}


def _filled(make: Callable[[], str], block: re.Match[str]) -> str:
    return f"{block[1]}\n{make()}\n\n{block[2]}"


def written(page: str) -> str:
    """The page with its tables written anew."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        page = block.sub(partial(_filled, make), page)
    return page


def main() -> None:
    """Write the page and the plots."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    draw_all()


if __name__ == "__main__":
    main()
