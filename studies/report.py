"""`python studies/report.py`: every table of docs/results.md and every plot in docs/images/results, from the CSV files.

A table stands in the page between `<!-- NAME -->` and `<!-- end -->`; what is between is written anew.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
from arms_compared import averages, difference, stacked
from bridge import MODELS, NATS, PATCHING, ZERO_SHOT
from deciding import ARMS, RESULTS, SIZES, TUNING
from mmeb_hours import run_hours, stage_hours
from nats import CLASSES
from probes import DECODED, PROBES
from real_pixels import ARMS as REAL_ARMS
from real_pixels import RESULTS as REAL_PIXELS
from results import read

from cocoa.metrics import GROUPS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results.md"
PLOTS = ROOT / "docs" / "images" / "results"
BASELINES = ("full", "contrastive")
"""What every arm is compared with."""


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
    """hit@1 on validation scenes by learning rate, the mean of the tuning seeds."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read(TUNING):
        found[row["arm"]][row["rate"]].append(float(row["All"]))
    rows = [
        [arm, ", ".join(f"{float(rate):g}: {mean(values):.1f}" for rate, values in rates.items())]
        for arm, rates in found.items()
    ]
    return table(["arm", "learning rate: hit@1 on validation scenes"], rows)


def seeds_of(rows: Sequence[dict[str, str]], arm: str) -> list[int]:
    """The seeds that an arm has."""
    return sorted({int(row["seed"]) for row in rows if row["arm"] == arm})


def compared(rows: Sequence[dict[str, str]], arms: Sequence[str], baselines: Sequence[str]) -> str:
    """Every arm's hit@1, and its difference to the baselines on the seeds that both have."""
    lines = []
    for arm in arms:
        if not (seeds := seeds_of(rows, arm)):
            continue
        values = averages(stacked(rows, arm, seeds)).tolist()
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        seconds = mean(float(row["seconds"]) for row in rows if row["arm"] == arm)
        cells = [arm, str(len(seeds)), f"{mean(values):.1f}{spread}", f"{seconds:.0f}"]
        for baseline in baselines:
            common = sorted(set(seeds) & set(seeds_of(rows, baseline)))
            if arm == baseline or not common:
                cells.append("")
                continue
            found = difference(stacked(rows, arm, common), stacked(rows, baseline, common))
            cells.append(f"{found.mean:+.1f} [{found.outer[0]:+.1f}, {found.outer[1]:+.1f}], {found.verdict}")
        lines.append(cells)
    against = [f"less `{baseline}` [95 %]" for baseline in baselines]
    return table(["arm", "seeds", "hit@1 (mean ± sd over seeds)", "seconds", *against], lines)


def deciding() -> str:
    """The deciding experiment."""
    return compared(read(RESULTS), ARMS, BASELINES)


def real_pixels() -> str:
    """Digits and photographs."""
    parts = []
    for name in ("digits", "photographs"):
        rows = [row for row in read(REAL_PIXELS) if row["dataset"] == name]
        parts.append(f"{name}:\n\n{compared(rows, tuple(REAL_ARMS), ('full', 'contrastive'))}")
    return "\n\n".join(parts)


def mmeb_hours() -> str:
    """Hours of the runs on MMEB."""
    return table(
        ["run", "hours on 8 devices"], [[run, f"{value:.1f}"] for run, value in run_hours(stage_hours()).items()]
    )


def draw_patching(path: Path) -> None:
    """What B loses where EOS has another picture's keys and values: one layer alone, and all from a layer on."""
    found: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read(PATCHING):
        found[row["model"], row["patched"]][int(row["layer"])].append(float(row["share"]))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for axis, (kind, title) in zip(
        axes, {"alone": "this layer alone", "from": "this layer and all above"}.items(), strict=True
    ):
        for model in ("published", "strict"):
            shares = found[model, kind]
            layers = sorted(shares)
            axis.plot([layer + 1 for layer in layers], [mean(shares[layer]) for layer in layers], "o-", label=model)
        axis.axhline(0, color="#bbb", linewidth=0.8)
        axis.set(title=title, xlabel="layer")
    axes[0].set_ylabel("nats lost (%)")
    axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_deciding(path: Path) -> None:
    """Every arm's difference to contrastive learning alone."""
    rows, found = read(RESULTS), {}
    for arm in ARMS:
        common = sorted(set(seeds_of(rows, arm)) & set(seeds_of(rows, "contrastive")))
        if arm != "contrastive" and common:
            found[arm] = difference(stacked(rows, arm, common), stacked(rows, "contrastive", common))
    figure, axis = plt.subplots(figsize=(7, 0.4 * len(found) + 1), layout="constrained")
    for place, each in enumerate(reversed(found.values())):
        axis.plot(each.outer, [place, place], color="#3b78b5")
        axis.plot(each.inner, [place, place], color="#3b78b5", linewidth=4)
        axis.plot(each.mean, place, "o", color="#e07b00")
    axis.set_yticks(range(len(found)), [f"{arm} ({each.seeds} seeds)" for arm, each in reversed(found.items())])
    axis.axvline(0, color="#888", linewidth=0.8)
    axis.set_xlabel("points of hit@1 over contrastive learning alone (95 % and 90 %)")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


TABLES = {
    "bridge nats": bridge_nats,
    "zero shot": zero_shot,
    "probes": probes,
    "decoded": decoded,
    "sizes": sizes,
    "tuning": tuning,
    "deciding": deciding,
    "real pixels": real_pixels,
    "hours": mmeb_hours,
}


def written(page: str) -> str:
    """The page with its tables written anew."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        page = block.sub(lambda match, make=make: f"{match[1]}\n{make()}\n\n{match[2]}", page)
    return page


def main() -> None:
    """Write the page and the plots."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "cocoa"
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    if read(PATCHING):
        draw_patching(PLOTS / "patching.svg")
    if read(RESULTS):
        draw_deciding(PLOTS / "deciding.svg")


if __name__ == "__main__":
    main()
