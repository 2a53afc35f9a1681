"""What each published recipe takes on each device, and in all: counted, not measured (`cocoa.estimate`).

    python benchmarks/budget.py [--tflops 400] [--devices 8] [--image 256] [--text 60] [--split]

For every stage: GB that do not depend on the batch, the most tokens that passes may have on devices of 24, 80 and 141
GB (8 % of it left free; `x 3`: three passes are kept), and GPU-hours at the throughput that `--tflops` says, beside the
floor: the same arithmetic with nothing computed twice. Every image takes `--image` tokens, every text `--text`; a pair
has 1.3 images. With `--split` the model is split over the devices (FSDP2), else each has all of it.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shapes import SHAPES, build

from cocoa.estimate import Estimate
from cocoa.preview_cost import estimate_stage, stage_model
from cocoa.preview_samples import Measured
from cocoa.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
CAPACITIES = (24, 80, 141)
USABLE = 0.92
ROWS = {"joint_reconstruction": 300_000, "eos_bridge": 299_000, "compression": 1_000_000, "contrastive": 1_000_000}
"""Rows of an epoch, of stages that are measured in epochs."""
IMAGES_A_PAIR = 1.3
PASSES = [256 * 2**power for power in range(9)]
"""Tokens of a pass that are tried."""


def shape_of(recipe: Recipe) -> str:
    """The real backbone that a recipe names."""
    return next(name for name in SHAPES if name in recipe.backbone.lower())


def lengths(stage: str, image: int, text: int) -> Measured:
    """Tokens of a row of a stage."""
    if stage == "contrastive":
        shown = {"total": [image + text // 2 + 3], "image": [image]}
        other = round((IMAGES_A_PAIR - 1) * image)
        told = {"total": [text // 2 + 1 + other], "image": [other]}
        return Measured(1, {"query": shown, "target": told}, 0)
    counts = {"total": [image + text + 3], "image": [image]}
    counts["answers" if stage == "compression" else "masked"] = [text // 2]
    return Measured(1, {"sequence": counts}, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tflops", type=float, default=400.0)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--image", type=int, default=256)
    parser.add_argument("--text", type=int, default=60)
    parser.add_argument("--split", action="store_true")
    options = parser.parse_args()
    table = Table(
        "recipe", "stage", "GB", *(f"{capacity} GB" for capacity in CAPACITIES), "GPU-hours", "floor", "ratio"
    )
    for path in track(sorted(RECIPES.glob("*b.yaml")), "counting"):
        recipe = load_recipe(path)
        for stage in recipe.stages:
            table.add_row(path.stem, stage.name, *stage_cells(recipe, stage, options))
    Console(width=150).print(table)


def stage_cells(recipe: Recipe, stage: Any, options: argparse.Namespace) -> list[str]:
    """What a stage takes, in cells of the table."""
    backbone = build(SHAPES[shape_of(recipe)], torch.device("meta"))
    args = recipe.arguments(stage, Path("unused"), use_cpu=True)
    backbone.compression_tokens = getattr(args, "compression_tokens", None) or 0
    model, measured = stage_model(recipe, backbone, args), lengths(stage.name, options.image, options.text)
    rows = max(args.max_steps, 0) * args.batch_size or round(args.num_train_epochs * ROWS[stage.name])

    def estimate(**changes: Any) -> Estimate:
        changed = copy.copy(args)
        for name, value in changes.items():
            setattr(changed, name, value)
        return estimate_stage(
            recipe, changed, backbone, model, measured, rows, options.tflops, options.devices, options.split
        )

    taken = estimate()
    floor = estimate(gradient_checkpointing=False, tokens_per_pass=10**9)
    most_kept = getattr(args, "passes_kept", 1)
    sizes = {
        (tokens, kept): estimate(tokens_per_pass=tokens, passes_kept=kept).memory.total(taken.checkpointing)
        for tokens in PASSES
        for kept in range(1, most_kept + 1)
    }
    fits = []
    for capacity in CAPACITIES:
        fitting = [each for each, size in sizes.items() if size < USABLE * capacity * 1e9]
        tokens, kept = max(fitting, key=lambda each: (each[0] * each[1], each[0]), default=(0, 0))
        fits.append(f"{tokens:,}" + (f" x {kept}" if kept > 1 else "") if tokens else "does not fit")
    always = f"{(taken.memory.weights + taken.memory.states) / 1e9:.1f}"
    hours = [each.hours * options.devices for each in (taken, floor)]
    return [always, *fits, *(f"{each:.1f}" for each in hours), f"{hours[0] / hours[1]:.2f}"]


if __name__ == "__main__":
    main()
