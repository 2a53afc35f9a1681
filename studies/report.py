"""`python studies/report.py`: every table of docs/results.md and every plot in docs/images/results, from the CSV files.

A table stands in the page between `<!-- NAME -->` and `<!-- end -->`; what is between is written anew.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import beyond
import over_seeds
from bridge import DECIDING_NATS, NATS, ZERO_SHOT
from deciding import BACKBONE, COMPARED, PAIRS, SIZES, SPREAD, TUNING
from factors import OTHER_BACKBONE, OVER_PAIRS, PAIR_COUNTS, found_with
from mmeb_hours import run_hours, stage_hours
from nats import CLASSES
from plots import draw_all
from probes import DECODED, PROBES
from real_pixels import ARMS as REAL_ARMS
from real_pixels import PIECES
from real_pixels import RESULTS as REAL_PIXELS
from real_pixels import SEEDS as REAL_SEEDS
from results import read
from tables import by_seed, compared, explored, more, table

from cocoa.metrics import GROUPS

PAGE = Path(__file__).parents[1] / "docs" / "results.md"


def bridge_nats(file: Path = NATS) -> str:
    """Nats by model and class of token, the mean of the seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read(file):
        found[row["model"]][row["class"]].append(float(row["nats"]))
    columns = ("text", "token", "first", *CLASSES, "grammar", "loss")
    rows = [[model, *(f"{mean(own[name]):.2f}" for name in columns)] for model, own in found.items()]
    return table(["after", "a text", "a token", "its first token", *CLASSES, "grammar", "loss a token"], rows)


def zero_shot(file: Path = ZERO_SHOT, named: str = "model") -> str:
    """hit@1 straight after each stage, the mean of the seeds."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in read(file):
        found[row[named]].append(row)
    rows = [
        [name, *(f"{mean(float(row[group]) for row in own):.1f}" for group in GROUPS)] for name, own in found.items()
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


def real_pixels() -> str:
    """Digits and photographs."""
    parts = []
    for name in ("digits", "photographs"):
        rows = [row for row in read(REAL_PIXELS) if row["dataset"] == name]
        together = PIECES if name == "photographs" else 1
        told_here = compared(rows, REAL_ARMS, ("full", "contrastive"), lambda _: len(REAL_SEEDS), together)
        parts.append(f"{name}:\n\n{told_here}")
    return "\n\n".join(parts)


def mmeb_hours() -> str:
    """Hours of the runs on MMEB, and of the stage that three of them share."""
    taken = stage_hours()
    runs = {"stage 1, for all but the first": taken["1 joint reconstruction"]} | run_hours(taken)
    return table(["run", "hours on 8 devices"], [[run, f"{value:.1f}"] for run, value in runs.items()])


TABLES: dict[str, Callable[[], str]] = {
    "bridge nats": bridge_nats,
    "bridge nats deciding": partial(bridge_nats, DECIDING_NATS),
    "zero shot": zero_shot,
    "probes": probes,
    "decoded": decoded,
    "sizes": sizes,
    "tuning": tuning,
    "spread": spread,
    "deciding": over_seeds.deciding,
    "by meta-task": over_seeds.by_meta_task,
    "factors": factors,
    "over pairs": over_pairs,
    "bridges": bridges,
    "bridges straight": partial(zero_shot, beyond.STRAIGHT, "arm"),
    "confirmed": over_seeds.confirmed,
    "pooled": over_seeds.pooled,
    "leads": over_seeds.leads,
    "single seeds": over_seeds.single_seeds,
    "grounding lost": over_seeds.grounding_lost,
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
