"""The deciding experiment: the same run with only stage 2's attention layout changed.

    python studies/deciding.py size      # how many steps; on validation scenes
    python studies/deciding.py spread    # how much two arms differ by luck, over pairs; on validation scenes
    python studies/deciding.py tune      # each arm's learning rate; on validation scenes
    python studies/deciding.py run       # 16 seeds of every arm; scored once each, on test scenes

Start a command as often as there are cores: the processes share the work, and go on where they were stopped. The table
and the plot of docs/results.md are made by `python studies/report.py`.

Decided before anything was scored on test scenes, but for what is said under "changed" below:

- The deciding comparison is `published` against `full`: same rows, masks, order, steps, rates and seeds, the bridge cut
  or not. Its measure is hit@1, the mean over the 12 test sets (7,200 queries), seeds 1 to 16, mini-qwen2-vl. A second
  measure is the mean of retrieval and grounding: there is little to be gained in the four other sets.
- The smallest difference of interest is 1 point. Better or worse: the 95 % interval (over seeds and queries) is off
  zero. Equal: the 90 % interval lies within 1 point of zero. Else: not resolved.
- `shuffled` (published, each text with another row's image) tells whether a gain is of content: what survives is not.
- All other comparisons are secondary, and said to be.
- Rows of stages 1 and 2 are those of the contrastive stage: no arm sees a text or an image that another has not, but
  for `coma`, whose dialogues are on the pictures of the whole pool, and have more text than another arm's rows.
- The contrastive stage is the same for all, at the rate that is best for contrastive learning alone. MoCa and CoMa
  have their own pooling and temperature (0.03, not 0.02), as published; `contrastive-mean` is MoCa without its
  pre-training, `contrastive-causal` CoMa with EOS for its compression tokens, both at a rate of their own.
- Three learning rates are tried for every arm that has one of its own, on one seed and the validation scenes, and a
  fourth beyond the best if that is at their edge. All layouts have one rate, that is best in the mean of `published`
  and `full`, so that only the layout differs. Stage 1 has the demo's, 6e-4. Pre-training takes the same number of
  samples in each arm (`stage-1`: the first 2,560 of them; `more-steps`: about the same time, contrastively).
- MoCa's rows, as stage 1's, are of the three data sets in which text and image say the same, stage 2's of five.

Changed when one seed of `published`, `full`, `strict` and `shuffled` had been scored on test scenes with 100 pairs of
each data set (55.3, 64.8, 67.6 and 54.1; not used): a reader's review asked for one rate for all layouts, a `shuffled`
that moves images but not a question's words and others in each epoch, `stage-1` as an arm, and wider intervals, for the
seeds are few. And the two deciding arms differed so much from seed to seed that `spread` was run on validation
scenes, which chose 400 pairs. Before any run with 400 pairs was scored on test scenes, a second review asked for more
queries, an interval that does not count the residual three times, `contrastive-mean`, the fourth rate, and that the
deciding arms be run first. Seeds of the other arms come in turns (8 of the controls, 4 of the secondary arms, then the
rest), so that there is something on all of them early; decided before any of them was scored on test scenes.

Added when the deciding comparison was finished: a third review asked whether the bridge carries anything at the rate
that was chosen. Beyond a text's first word it hardly does (`bridge_nats_deciding.csv`). `published-6e-4` and
`full-6e-4` are the two arms at a rate at which it does, eight seeds, judged by the same rule; decided before either was
scored on test scenes. On validation scenes (`spread`) `published` was behind there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from arms_compared import averages
from lab import MORE_TESTS, Lab, Phase, Start, open_lab
from results import FOLDER, Row, hit_rows, read, work

from cocoa.backbone import Backbone
from cocoa.metrics import GROUPS

BACKBONE = "mini-qwen2-vl"
PAIRS, STEPS = 400, 1600
"""Pairs of each of six data sets, chosen by `spread`, and contrastive steps, by `size`; see docs/results.md."""
SIZE_SEED, TUNING_SEED = 101, 102
SEEDS = tuple(range(1, 17))
RATES = (6e-4, 1.2e-3, 3e-4)
CONTRASTIVE_RATES = (1e-3, 5e-4, 2e-3)
BEYOND_THE_EDGE = {"published": (1.5e-4,), "full": (1.5e-4,), "coma": (2.4e-3,)}
"""A fourth rate of an arm, because the best of its three was at their edge."""
BRIDGE_STEPS = 1000
"""Of 16 samples; with stage 1's 40 steps of 64 that is 1160 steps of 16."""
SIZES_TRIED = (
    *((100, 400, 32), (100, 800, 32), (100, 400, 64), (100, 800, 64), (200, 800, 32), (100, 1600, 32)),
    *((PAIRS, STEPS, 32), (PAIRS, 2 * STEPS, 32)),
)
"""Pairs of each data set, contrastive steps and their batch, for contrastive learning alone."""
COMPARED = ("published", "full")
SPREAD_PAIRS, SPREAD_SEEDS = (100, 400), (102, 103, 104)
SIZES = FOLDER / "deciding_size.csv"
TUNING = FOLDER / "deciding_tuning.csv"
SPREAD = FOLDER / "deciding_spread.csv"
RESULTS = FOLDER / "deciding.csv"

JOINT = Phase("joint_reconstruction", {"max_steps": 40, "learning_rate": RATES[0]})
BRIDGE = Phase("eos_bridge", {"batch_size": 16, "max_steps": BRIDGE_STEPS})
SAME_SAMPLES: dict[str, Any] = {"batch_size": 16, "max_steps": BRIDGE_STEPS + 160}
MORE_STEPS = 600
"""Contrastive steps of 1,166 tokens: 1.45 times the 482,500 tokens of stages 1 and 2, which are slower by the token."""
CONTRASTIVE = Phase(
    "contrastive", {"batch_size": 32, "attention": "bidirectional", "pooling": "lasttoken", "warmup_steps": 0.1}
)

PRETRAINING: dict[str, list[Phase]] = {
    "published": [JOINT, BRIDGE.having(layout="published")],
    "full": [JOINT, BRIDGE.having(layout="full")],
    "strict": [JOINT, BRIDGE.having(layout="strict")],
    "shuffled": [JOINT, replace(BRIDGE.having(layout="published"), shuffled=True)],
    "stage-1": [JOINT],
    "ntp": [Phase("next_token", SAME_SAMPLES)],
    "moca": [Phase("joint_reconstruction", SAME_SAMPLES | {"text_mask_ratio": 0.4, "text_objective": "mlm"})],
    "coma": [
        Phase(
            "compression",
            SAME_SAMPLES | {"compression_tokens": 8, "prompt": "describe the {content}."},
            dialogues=True,
        )
    ],
}
"""What each arm does before its contrastive stage; its last phase has the learning rate that is tuned."""
LAYOUTS = ("published", "full", "strict", "shuffled")
AS_MOCA: dict[str, Any] = {"pooling": "mean", "temperature": 0.03}
CONTRASTIVE_FORMS: dict[str, dict[str, Any]] = {
    "contrastive-causal": {"attention": "causal"},
    "contrastive-mean": AS_MOCA,
    "moca": AS_MOCA,
    "coma": {"attention": "causal", "pooling": "compression", "temperature": 0.03},
}
ALONE = ("contrastive", "contrastive-causal", "contrastive-mean")
CONTROLS = ("strict", "shuffled", "contrastive")
"""Arms that have all seeds, as the deciding two have."""
SECONDARY = ("ntp", "moca", "contrastive-mean", "coma", "contrastive-causal", "more-steps", "stage-1")
"""Arms that have the first eight."""
HIGH = tuple(f"{arm}-6e-4" for arm in COMPARED)
"""The deciding two at the first rate that was tried."""
TUNED = ("ntp", "moca", "contrastive-mean", "coma", "contrastive-causal")
"""Arms whose rate is looked for after those of contrastive learning alone and of the layouts."""
ARMS = (*COMPARED, *HIGH, *CONTROLS, *SECONDARY)
TURNS = (
    (COMPARED, SEEDS),
    (HIGH, SEEDS[:8]),
    (CONTROLS, SEEDS[:8]),
    (SECONDARY, SEEDS[:4]),
    (CONTROLS, SEEDS[8:]),
    (SECONDARY, SEEDS[4:8]),
)
"""Arms and their seeds in the order in which `run` takes them."""


def phases_of(arm: str, rate: float, contrastive_rate: float, steps: int = STEPS) -> list[Phase]:
    """The phases of an arm; `rate` is that of its pre-training, or of its contrastive stage where it has no other."""
    last = CONTRASTIVE.having(max_steps=steps, learning_rate=contrastive_rate, **CONTRASTIVE_FORMS.get(arm, {}))
    if arm in PRETRAINING:
        *first, tuned = PRETRAINING[arm]
        return [*first, tuned.having(learning_rate=rate), last]
    return [last.having(learning_rate=rate)]


def scores(
    lab: Lab, pairs: int, seed: int, phases: Sequence[Phase], keep: int = 0, backbone: str = BACKBONE
) -> list[Row]:
    """One row: a run scored on validation scenes, averages in percent, and what its training took."""
    started = time.perf_counter()
    trained = lab.train(Start(backbone, pairs, seed), phases, keep)
    seconds = time.perf_counter() - started
    return [validated(lab, trained) | {"seconds": f"{seconds:.0f}"}]


def validated(lab: Lab, trained: Backbone) -> Row:
    """hit@1 on validation scenes by group of data sets, in percent."""
    hits = {name: own[None] for name, own in lab.hits(trained, "validation").items()}
    return {group: f"{averages(hits, group)[0]:.1f}" for group in GROUPS}


def size(lab: Lab) -> None:
    """Contrastive learning alone over pairs and steps, CoCoA over the length of stages 2 and 3; one seed."""
    tasks = []

    def add(arm: str, pairs: int, steps: int, batch: int, bridge_steps: int, phases: list[Phase]) -> None:
        key = {"arm": arm, "pairs": pairs, "steps": steps, "batch": batch, "bridge_steps": bridge_steps}
        tasks.append((key, partial(scores, lab, pairs, SIZE_SEED, phases)))

    for pairs, steps, batch in SIZES_TRIED:
        phases = [phase.having(batch_size=batch) for phase in phases_of("contrastive", 1e-3, 1e-3, steps)]
        add("contrastive", pairs, steps, batch, 0, phases)
    for bridge_steps in (500, 1000, 2000):
        joint, bridge, last = phases_of("published", 6e-4, 1e-3, 400)
        phases = [joint, bridge.having(max_steps=bridge_steps), last]
        add("published", 100, 400, 32, bridge_steps, phases)
    for arm in COMPARED:  # does twice the time close what is between them?
        add(arm, PAIRS, 2 * STEPS, 32, BRIDGE_STEPS, phases_of(arm, RATES[0], 1e-3, 2 * STEPS))
    work(SIZES, tasks)


def spread(lab: Lab) -> None:
    """The deciding comparison on a few seeds, over the number of pairs: how many seeds will it take?

    Decided before it was run: the experiment is run with the number of pairs at which the difference of the two arms
    varies less from seed to seed.
    """
    phases = {arm: phases_of(arm, RATES[0], CONTRASTIVE_RATES[0]) for arm in COMPARED}
    tasks = [
        ({"pairs": pairs, "arm": arm, "seed": seed}, partial(scores, lab, pairs, seed, phases[arm], 1))
        for seed in SPREAD_SEEDS
        for pairs in SPREAD_PAIRS
        for arm in COMPARED
    ]
    work(SPREAD, tasks)


def best_rate(*arms: str) -> float:
    """The learning rate at which an arm, or the mean of some, does best on the validation scenes."""
    rows = [row for row in read(TUNING) if (row["pairs"], row["seed"]) == (str(PAIRS), str(TUNING_SEED))]
    found = {(row["arm"], float(row["rate"])): float(row["All"]) for row in rows}
    rates = rates_of(arms[0])
    if missing := [(arm, rate) for arm in arms for rate in rates if (arm, rate) not in found]:
        arm, rate = missing[0]
        raise SystemExit(f"{TUNING}: {arm} lacks rate {rate:g}; run `python studies/deciding.py tune` to its end")
    return max(rates, key=lambda rate: sum(found[arm, rate] for arm in arms))


def rates_of(arm: str) -> tuple[float, ...]:
    """The learning rates an arm has to choose from, in the order in which they are tried."""
    return (CONTRASTIVE_RATES if arm in ALONE else RATES) + BEYOND_THE_EDGE.get(arm, ())


def tune(lab: Lab) -> None:
    """Three rates of every arm: first contrastive learning alone, whose rate the others take for their last stage."""

    def tried(arm: str, rate: float, last: float) -> list[Row]:
        phases = phases_of(arm, rate, last)
        return scores(lab, PAIRS, TUNING_SEED, phases, keep=len(phases) - 1)

    def tasks(arms: Sequence[str], last: float) -> list[tuple[Row, Callable[[], list[Row]]]]:
        tries = [(place, arm, rate) for arm in arms for place, rate in enumerate(rates_of(arm))]
        return [
            ({"pairs": PAIRS, "arm": arm, "rate": rate, "seed": TUNING_SEED}, partial(tried, arm, rate, last))
            for _, arm, rate in sorted(tries, key=lambda each: each[0])  # the first rate of every arm first
        ]

    work(TUNING, tasks(["contrastive"], 0.0))
    last = best_rate("contrastive")
    work(TUNING, [*tasks(COMPARED, last), *tasks(TUNED, last)])


def phases_after(arm: str) -> list[Phase]:
    """The phases of an arm at the rates that were chosen."""
    rate = best_rate("contrastive")
    if arm == "more-steps":
        return phases_of(arm, rate, rate, STEPS + MORE_STEPS)
    if arm in HIGH:
        return phases_of(arm.removesuffix("-6e-4"), RATES[0], rate)
    if arm == "stage-1":
        return phases_of(arm, RATES[0], rate)
    return phases_of(arm, best_rate(*COMPARED) if arm in LAYOUTS else best_rate(arm), rate)


def run(lab: Lab) -> None:
    """All seeds of every arm, scored on the test scenes; the deciding arms first, then some seeds of all others."""

    def tested(arm: str, seed: int) -> list[Row]:  # the rate of an arm is asked for when its turn comes
        return test(lab, seed, phases_after(arm))

    tasks = [
        ({"arm": arm, "seed": seed}, partial(tested, arm, seed))
        for arms, seeds in TURNS
        for seed in seeds
        for arm in arms
    ]
    work(RESULTS, tasks)


def test(lab: Lab, seed: int, phases: Sequence[Phase], backbone: str = BACKBONE) -> list[Row]:
    """The hits of a run on every test set, its learning rates, and its seconds (stage 1 is trained once a seed)."""
    started = time.perf_counter()
    trained = lab.train(Start(backbone, PAIRS, seed), phases, keep=1 if phases[0] == JOINT else 0)
    seconds = f"{time.perf_counter() - started:.0f}"
    rates = " ".join(f"{phase.options['learning_rate']:g}" for phase in phases)
    facts = {"pairs": PAIRS, "steps": phases[-1].options["max_steps"], "rates": rates, "seconds": seconds}
    return [row | facts for row in hit_rows(lab.hits(trained, "test", ("scenes", *MORE_TESTS)))]


def main() -> None:
    """One step of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("size", "tune", "spread", "run"))
    {"size": size, "tune": tune, "spread": spread, "run": run}[parser.parse_args().step](open_lab())


if __name__ == "__main__":
    main()
