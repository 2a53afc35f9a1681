"""`python studies/mmeb_hours.py`: the hours that studies/mmeb.sh takes, counted, not measured.

Operations of Qwen2-VL-2B by `cocoa.estimate` (adapters on text model and tower, gradient checkpointing), at
the throughput that `--tflops` says. `cocoa preview RECIPE data.train=...` counts the same on the data itself.
"""

from __future__ import annotations

import argparse

from cocoa.estimate import Stack, hours, stage_flops

TEXT, TOWER, HEAD = 1_310_000_000, 665_000_000, 233_000_000
"""Parameters of Qwen2-VL-2B's language model without its embedding, of its vision tower, and of its head."""
IMAGE, WORDS = 256, 60
"""Merged tokens of an image (448 x 448 px; the tower sees four times as many patches), and tokens of text beside it."""
IMAGES_A_PAIR = 1.3
"""Of a contrastive pair, both sides counted: MMEB's retrieval sets have some on either side."""
BRIDGE_ROWS = 299_000
"""Of stage 2: 17 sets of the table in docs/method.md, at most 20,000 rows of each."""
STAGES = {
    "1 joint reconstruction": (3000 * 128, 1.0, HEAD),
    "2 EOS-bridge": (2 * BRIDGE_ROWS, 1.0, HEAD),
    "3 contrastive": (2000 * 1024, IMAGES_A_PAIR, 0),
}
"""Rows seen, images of each, and parameters of the head."""
RUNS = {"contrastive only": ("3",), "full": ("2", "3"), "published": ("2", "3"), "strict": ("2", "3")}
"""Stages that each run trains alone: all but the first share stage 1, which `published` trains."""


def stage_hours(tflops: float = 400.0, devices: int = 8) -> dict[str, float]:
    """Hours of each stage."""
    taken = {}
    for stage, (rows, images, head) in STAGES.items():
        tokens = images * IMAGE + WORDS
        stacks = [
            Stack("text", 28, 1536, 8960, 0, TEXT, tokens, 4096),
            Stack("qwen2_vl", 32, 1280, 5120, 0, TOWER, 4 * images * IMAGE, 4096),
            Stack("text", 0, 1536, 8960, 0, head, 0.5 * WORDS, 4096),
        ]
        taken[stage] = hours(stage_flops(stacks, rows, True, 0.0), tflops, devices)
    return taken


def run_hours(taken: dict[str, float]) -> dict[str, float]:
    """Hours of each run, from those of the stages."""
    return {run: sum(taken[stage] for stage in STAGES if stage[0] in stages) for run, stages in RUNS.items()}


def main() -> None:
    """Print the hours of each stage and each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400.0, help="10^12 operations a second that a device reaches")
    parser.add_argument("--devices", type=int, default=8)
    args = parser.parse_args()
    taken = stage_hours(args.tflops, args.devices)
    for name, value in (taken | run_hours(taken)).items():
        print(f"{name}: {value:.1f} h")


if __name__ == "__main__":
    main()
