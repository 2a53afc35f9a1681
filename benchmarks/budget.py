"""What each published recipe takes on each device, and in all: counted, not measured (`cocoa.estimate`).

    python benchmarks/budget.py [--tflops 400] [--devices 8] [--image 256] [--text 60]

For every stage: memory that does not depend on the batch, the most tokens that a pass may have on devices of 24, 80 and
141 GB (8 % of it left free), and GPU-hours at the throughput that `--tflops` says. Every image takes `--image` tokens,
every text `--text`; a pair has 1.3 images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, build

from cocoa.preview_cost import estimate_stage, stage_model
from cocoa.preview_samples import Measured
from cocoa.recipe import Recipe, load_recipe

RECIPES = Path(__file__).parents[1] / "recipes"
CAPACITIES = (24, 80, 141)
USABLE = 0.92
ROWS = {"joint_reconstruction": 300_000, "eos_bridge": 280_000, "compression": 1_000_000, "contrastive": 1_000_000}
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
    options = parser.parse_args()
    fits = [f"tokens a pass, {capacity} GB" for capacity in CAPACITIES]
    table = Table("recipe", "stage", "GB without activations", *fits, "GPU-hours")
    for path in sorted(RECIPES.glob("*b.yaml")):
        recipe = load_recipe(path)
        for stage in recipe.stages:
            backbone = build(SHAPES[shape_of(recipe)], torch.device("meta"))
            args = recipe.arguments(stage, Path("unused"), use_cpu=True)
            backbone.compression_tokens = getattr(args, "compression_tokens", None) or 0
            model, measured = stage_model(recipe, backbone, args), lengths(stage.name, options.image, options.text)
            steps = args.max_steps if args.max_steps > 0 else 0
            rows = steps * args.batch_size or round(args.num_train_epochs * ROWS[stage.name])
            known = (recipe, args, backbone, model, measured, rows, options.tflops, options.devices)
            hours = estimate_stage(*known).hours * options.devices
            total = {}
            for args.tokens_per_pass in PASSES:
                memory = estimate_stage(*known).memory
                total[args.tokens_per_pass] = memory.total(bool(args.gradient_checkpointing)) / 1e9
            most = [max((t for t, gb in total.items() if gb < USABLE * each), default=None) for each in CAPACITIES]
            table.add_row(
                path.stem,
                stage.name,
                f"{(memory.weights + memory.states) / 1e9:.1f}",
                *("does not fit" if each is None else f"{each:,}" for each in most),
                f"{hours:.0f}",
            )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
