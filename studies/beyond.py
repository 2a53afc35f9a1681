"""Beyond the paper: bridges that make the embedding itself carry the content.

    python studies/beyond.py explore     # seeds 201 to 204, validation scenes
    python studies/beyond.py confirm     # seeds 301 to 316, test scenes, both backbones
    python studies/report.py

Decided before `explore` was run: an arm is confirmed if its mean is at least a point above `published` on the four
exploratory seeds, at most the two best ones are, and what is confirmed is compared with `published` and with
contrastive learning alone on fresh seeds. It becomes the recipe `cocoa-plus` if it is better than both by a resolved
margin on both backbones. All bridges have the learning rate of `published`, and as many steps of as many samples.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import mean

from deciding import BACKBONE, PAIRS, phases_after, scores, test
from lab import Phase, open_lab
from results import FOLDER, read, work

EXPLORED, CONFIRMED = FOLDER / "beyond.csv", FOLDER / "beyond_confirmed.csv"
EXPLORATORY, FRESH = (201, 202, 203, 204), tuple(range(301, 317))
BACKBONES = (BACKBONE, "mini-qwen2.5-vl")
BASELINES = ("published", "contrastive")
MARGIN = 1.0
BESIDE_WEIGHT = 0.1
"""Of a reconstruction loss beside the contrastive one."""


def arms() -> dict[str, list[Phase]]:
    """The phases of each arm, by its name."""
    joint, bridge, last = phases_after("published")

    def stage_2(kind: str) -> Phase:
        return replace(bridge, stage=kind)

    strict = bridge.having(layout="strict")
    found = {name: phases_after(name) for name in BASELINES}
    found["strict"] = [joint, strict, last]
    found["final state"] = [joint, stage_2("final"), last]
    found["late bridge"] = [joint, stage_2("late"), last]
    found["picture through EOS"] = [joint, stage_2("picture"), last]
    found["published, bridge loss kept"] = [joint, bridge, beside(last, bridge)]
    found["final state, its loss kept"] = [joint, stage_2("final"), beside(last, stage_2("final"))]
    found["contrastive, final-state loss beside"] = [beside(last, stage_2("final"))]
    found["equal targets are negatives"] = [joint, bridge, last.having(mask_equal_targets=False)]
    return found


def beside(last: Phase, kept: Phase) -> Phase:
    """The contrastive stage with a stage-2 loss beside its own."""
    return replace(last, beside=kept, beside_weight=BESIDE_WEIGHT)


def chosen() -> list[str]:
    """The arms to confirm, by the rule above."""
    rows = read(EXPLORED)
    means = {name: mean(float(row["All"]) for row in rows if row["arm"] == name) for name in arms()}
    better = [name for name in means if name not in BASELINES and means[name] >= means["published"] + MARGIN]
    return sorted(better, key=lambda name: -means[name])[:2]


def main() -> None:
    """One step of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("explore", "confirm"))
    step = parser.parse_args().step
    lab, found = open_lab(), arms()
    if step == "explore":
        for seed in EXPLORATORY:
            tasks = [
                ({"arm": name, "seed": seed}, lambda p=phases, s=seed: [scores(lab, PAIRS, s, p, keep=1)])
                for name, phases in found.items()
            ]
            work(EXPLORED, tasks)
    else:
        names = [*BASELINES, *chosen()]
        for seed in FRESH:
            for backbone in BACKBONES:
                tasks = [
                    (
                        {"backbone": backbone, "arm": name, "seed": seed},
                        lambda p=found[name], s=seed, b=backbone: test(lab, s, p, b),
                    )
                    for name in names
                ]
                work(CONFIRMED, tasks)


if __name__ == "__main__":
    main()
