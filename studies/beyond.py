"""Beyond the paper: bridges that make the embedding itself carry the content.

    python studies/factors.py            # its `published`, `strict` and `contrastive` are what is compared with
    python studies/beyond.py explore     # seeds 201 to 204, validation scenes
    python studies/beyond.py straight    # the same models' embeddings straight after stage 2
    python studies/beyond.py confirm     # seeds 301 to 308, test scenes, both backbones
    python studies/report.py

Decided before `explore` was run: `explore` has the seeds, scenes and contrastive steps of `factors.py`. The arm with
the best mean (`strict` is one) is confirmed if that is at least two points above `published`, which the best of ten
equal ones is by luck one time in three or four: compared with the baselines on fresh seeds, with the contrastive steps
of `deciding.py`, on one backbone and, if it is better than all of them there, on the other. It becomes the recipe
`cocoa-plus` if it is better than all by a resolved margin on both. All bridges have the learning rate of `published`,
and as many steps of as many samples; those whose loss is kept beside the contrastive one have more of them, and take
longer. "B from either side" has more rows to take them from, some of them of data sets that `published` leaves out of
stage 2. A final-state loss that is kept has its projection start anew.

`straight` was added when `explore` was done: is a bridge's embedding better before any contrastive learning? Nothing is
chosen by it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from statistics import mean

from arms_compared import compare
from deciding import BACKBONE, PAIRS, phases_after, scores, test, validated
from deciding import STEPS as CONTRASTIVE_STEPS
from factors import OTHER_BACKBONE, SEEDS, STEPS, found_with
from lab import Lab, Phase, Start, open_lab
from results import FOLDER, Row, read, work

EXPLORED, CONFIRMED = FOLDER / "beyond.csv", FOLDER / "beyond_confirmed.csv"
STRAIGHT = FOLDER / "beyond_straight.csv"
FRESH = tuple(range(301, 309))
BACKBONES = (BACKBONE, OTHER_BACKBONE)
BASELINES = ("published", "full", "strict", "contrastive")
MARGIN = 2.0
BESIDE_WEIGHT = 0.1
"""Of a reconstruction loss beside the contrastive one."""


def arms(steps: int) -> dict[str, list[Phase]]:
    """The phases of each arm by its name, with that many contrastive steps."""
    joint, bridge, last = phases_after("published")
    last = last.having(max_steps=steps)

    def stage_2(kind: str) -> Phase:
        return replace(bridge, stage=kind)

    found = {
        "final state": [joint, stage_2("final"), last],
        "late bridge": [joint, stage_2("late"), last],
        "picture through EOS": [joint, stage_2("picture"), last],
        "B word by word": [joint, stage_2("word by word"), last],
        "B from either side": [joint, replace(bridge, either_side=True), last],
    }
    found["published, bridge loss kept"] = [joint, bridge, beside(last, bridge)]
    found["final state, its loss kept"] = [joint, stage_2("final"), beside(last, stage_2("final"))]
    found["contrastive, final-state loss beside"] = [beside(last, stage_2("final"))]
    return found


def beside(last: Phase, kept: Phase) -> Phase:
    """The contrastive stage with a stage-2 loss beside its own."""
    return replace(last, beside=kept, beside_weight=BESIDE_WEIGHT)


def baseline_rows() -> list[dict[str, str]]:
    """What `factors.py` found for the baselines on the same scenes and seeds."""
    return [row for row in found_with(BACKBONE, PAIRS) if row["arm"] in BASELINES]


def explore(lab: Lab) -> None:
    """All arms on exploratory seeds; the weights before their contrastive stage are kept."""
    tasks = [
        ({"arm": name, "seed": seed}, partial(scores, lab, PAIRS, seed, phases, keep=len(phases) - 1))
        for seed in SEEDS
        for name, phases in arms(STEPS).items()
    ]
    work(EXPLORED, tasks)


def straight(lab: Lab) -> None:
    """hit@1 of each bridge's embeddings with no contrastive stage; `explore` and `factors.py` have kept the weights."""
    found = {name: phases_after(name) for name in BASELINES} | arms(STEPS)
    behind = {name: phases[:-1] for name, phases in found.items() if len(phases) > 1 and not phases[-1].beside}

    def scored(phases: list[Phase], seed: int) -> list[Row]:
        return [validated(lab, lab.train(Start(BACKBONE, PAIRS, seed), phases, keep=len(phases)))]

    tasks = [
        ({"arm": name, "seed": seed}, partial(scored, phases, seed))
        for seed in SEEDS
        for name, phases in behind.items()
    ]
    work(STRAIGHT, tasks)


def chosen() -> list[str]:
    """The arm to confirm, by the rule above; perhaps none.

    Raises:
        SystemExit: `explore` is not done.
    """
    rows = [*read(EXPLORED), *baseline_rows()]
    names = ("published", "strict", *arms(STEPS))
    values = {name: [float(row["All"]) for row in rows if row["arm"] == name] for name in names}
    if short := [name for name, own in values.items() if len(own) < len(SEEDS)]:
        raise SystemExit(f"{short[0]} has not been run on all seeds; run `factors.py`, then `beyond.py explore`")
    best = max(values, key=lambda name: mean(values[name]))
    return [best] if mean(values[best]) >= mean(values["published"]) + MARGIN else []


def confirm(lab: Lab) -> None:
    """What was chosen and the baselines on fresh seeds; on the other backbone if it is better than all on the first."""
    found = {name: phases_after(name) for name in BASELINES}
    if not (best := chosen()):
        raise SystemExit(f"{EXPLORED}: no arm is {MARGIN:g} points above `published`; there is nothing to confirm")
    found |= {name: arms(CONTRASTIVE_STEPS)[name] for name in best if name not in BASELINES}
    for backbone in BACKBONES:
        tasks = [
            ({"backbone": backbone, "arm": name, "seed": seed}, partial(test, lab, seed, phases, backbone))
            for seed in FRESH
            for name, phases in found.items()
        ]
        work(CONFIRMED, tasks)
        rows = [row for row in read(CONFIRMED) if row["backbone"] == backbone]
        against = [compare(rows, best[0], baseline) for baseline in BASELINES if baseline != best[0]]
        if not all(each and each.verdict.startswith("better") for each in against):
            return


def main() -> None:
    """One step of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = {"explore": explore, "straight": straight, "confirm": confirm}
    parser.add_argument("step", choices=steps)
    steps[parser.parse_args().step](open_lab())


if __name__ == "__main__":
    main()
