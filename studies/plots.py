"""The plots of docs/results.md, from the CSV files."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from arms_compared import SMALLEST, compare
from bridge import PATCHING
from deciding import ARMS, BACKBONE, COMPARED, HIGH, PAIRS, RESULTS
from factors import PAIR_COUNTS
from factors import RESULTS as FACTORS
from results import read

PLOTS = Path(__file__).parents[1] / "docs" / "images" / "results"
COLOURS = {"published": "#e07b00", "full": "#8a8a8a", "contrastive": "#3b78b5"}


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
    _save(figure, path)


def draw_deciding(path: Path) -> None:
    """The difference that decides, and every arm's to contrastive learning alone."""
    rows, found = read(RESULTS), {}
    for arm, other in (COMPARED, HIGH, *((arm, "contrastive") for arm in ARMS if arm != "contrastive")):
        if each := compare(rows, arm, other):
            found[f"{arm} less {other}"] = each
    figure, axis = plt.subplots(figsize=(7, 0.4 * len(found) + 1), layout="constrained")
    for place, each in enumerate(reversed(found.values())):
        axis.plot(each.outer, [place, place], color="#3b78b5")
        axis.plot(each.inner, [place, place], color="#3b78b5", linewidth=4)
        axis.plot(each.mean, place, "o", color="#e07b00")
    axis.set_yticks(range(len(found)), [f"{name} ({each.seeds} seeds)" for name, each in reversed(found.items())])
    axis.axvline(0, color="#888", linewidth=0.8)
    axis.axvspan(-SMALLEST, SMALLEST, color="#eee", zorder=0)
    axis.set_xlabel("points of hit@1 (95, 90 %); grey: too few to matter")
    _save(figure, path)


def draw_over_pairs(path: Path) -> None:
    """hit@1 over the number of pairs, with and without pre-training: every seed, and their mean."""
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read(FACTORS):
        if row["backbone"] == BACKBONE and row["arm"] in COLOURS:
            found[row["arm"]][int(row["pairs"])].append(float(row["All"]))
    figure, axis = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for arm, values in found.items():
        counts = sorted(values)
        axis.plot(counts, [mean(values[n]) for n in counts], color=COLOURS[arm], label=arm)
        axis.plot(
            [n for n in counts for _ in values[n]],
            [each for n in counts for each in values[n]],
            ".",
            color=COLOURS[arm],
        )
    axis.set_xscale("log")
    axis.set_xticks(sorted({PAIRS, *PAIR_COUNTS}), [str(n) for n in sorted({PAIRS, *PAIR_COUNTS})])
    axis.minorticks_off()
    axis.set(xlabel="pairs of each data set", ylabel="hit@1 (validation scenes)")
    axis.legend(frameon=False)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw_all() -> None:
    """Every plot whose file is there."""
    PLOTS.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "cocoa"
    for source, draw, name in (
        (PATCHING, draw_patching, "patching"),
        (RESULTS, draw_deciding, "deciding"),
        (FACTORS, draw_over_pairs, "pairs"),
    ):
        if source.exists():
            draw(PLOTS / f"{name}.svg")
