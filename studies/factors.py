"""One factor at a time, exploratory: four seeds, validation scenes, no tuning beyond `deciding.py tune`.

    python studies/factors.py            # as often as there are cores
    python studies/report.py

Differences are to `published` as `deciding.py` has it, on the same seeds. All numbers of pairs have the same steps: of
each data set, 4000 are seen about once and 100 about forty times. What a stage is without, it hides as little of as it
can, an element of each row, and is not trained on. Nothing here is a result: what looks good is confirmed elsewhere on
fresh seeds, and with four of them a difference below three points is likely to be luck.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from deciding import AS_MOCA, BACKBONE, PAIRS, phases_after, scores
from lab import Phase, open_lab
from results import FOLDER, read, work

from cocoa.adapters import Lora

SEEDS = (201, 202, 203, 204)
RESULTS = FOLDER / "factors.csv"
ADAPTERS = Lora(
    r=8,
    alpha=64,
    dropout=0.1,
    dora=True,
    init="gaussian",
    text=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    vision=(),  # it is frozen
)
STEPS = 800
"""Contrastive steps: half of the deciding experiment's."""
LORA_RATE = 4.0
"""Times the learning rate of full tuning."""
LEAST = 0.01
"""A ratio that hides one element of a row."""
PAIR_COUNTS = (100, 250, 1000, 4000)
"""Beside `PAIRS`."""
OVER_PAIRS = ("published", "full", "contrastive")
OTHER_BACKBONE = "mini-qwen2.5-vl"


def found_with(backbone: str, pairs: int) -> list[dict[str, str]]:
    """The rows of the results with that backbone and number of pairs."""
    return [row for row in read(RESULTS) if (row["backbone"], row["pairs"]) == (backbone, str(pairs))]


def variants() -> dict[str, list[Phase]]:
    """The phases of each variant, by its name."""
    joint, bridge, last = phases_after("published")
    last = last.having(max_steps=STEPS)
    alone = [last]
    found = {"published": [joint, bridge, last], "contrastive": alone}
    for layout in ("full", "strict"):
        found[layout] = [joint, bridge.having(layout=layout), last]
    found["stage 2 at half the learning rate"] = [
        joint,
        bridge.having(learning_rate=bridge.options["learning_rate"] / 2),
        last,
    ]
    found["without stage 1"] = [bridge, last]
    found["without stage 2"] = [joint, last]
    found["without MAE"] = [joint.having(patch_loss_weight=0.0, patch_mask_ratio=LEAST), bridge, last]
    found["without MNTP in stage 1"] = [replace(joint.having(text_mask_ratio=LEAST), token_weight=0.0), bridge, last]
    for ratio in (0.1, 0.4):
        found[f"stage 1 hides {ratio:.0%} of the text"] = [joint.having(text_mask_ratio=ratio), bridge, last]
    for ratio in (0.25, 0.75):
        found[f"stage 1 hides {ratio:.0%} of the patches"] = [joint.having(patch_mask_ratio=ratio), bridge, last]
    for ratio in (0.4, 1.0):
        found[f"stage 2 hides {ratio:.0%} of the text"] = [joint, bridge.having(text_mask_ratio=ratio), last]
    found["equal targets are negatives"] = [joint, bridge, last.having(mask_equal_targets=False)]
    found["full, pooled as MoCa is"] = [*found["full"][:-1], last.having(**AS_MOCA)]
    found["adapters in all stages"] = [with_adapters(phase) for phase in found["published"]]
    found["contrastive, adapters"] = [with_adapters(phase) for phase in alone]
    return found


def with_adapters(phase: Phase) -> Phase:
    """The phase with CoCoA's adapters, at a higher rate."""
    rate = LORA_RATE * phase.options["learning_rate"]
    return replace(phase.having(learning_rate=rate), lora=ADAPTERS)


def main() -> None:
    """Run what is missing."""
    lab, found = open_lab(), variants()
    runs = [(BACKBONE, PAIRS, name) for name in found]
    runs += [(BACKBONE, pairs, name) for pairs in PAIR_COUNTS for name in OVER_PAIRS]
    runs += [(OTHER_BACKBONE, PAIRS, name) for name in OVER_PAIRS]
    tasks = [
        (
            {"backbone": backbone, "pairs": pairs, "arm": name, "seed": seed},
            partial(scores, lab, pairs, seed, found[name], len(found[name]) - 1, backbone),
        )
        for seed in SEEDS
        for backbone, pairs, name in runs
    ]
    work(RESULTS, tasks)


if __name__ == "__main__":
    main()
