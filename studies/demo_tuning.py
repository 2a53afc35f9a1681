"""How the demo's learning rates are chosen: `python studies/demo_tuning.py`, on the validation split alone.

Decided before it runs: the contrastive stage's learning rate is the one that is best for the rival, contrastive
alone; CoCoA takes that stage as it is and has as many runs for the learning rate of its stages 1 and 2. Each
run's hit@1 stands in `demo_tuning.csv`, which is also what tells whether the world is balanced (30 to 80 % in
every meta-task for the rival). Runs that are in the file are not repeated.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from cocoa.demo import PAIRS, QUERIES, SCENES_SEED, write_recipes
from cocoa.evaluation import evaluate
from cocoa.pipeline import train
from cocoa.recipe import load_recipe
from cocoa.scenes.write import write_scenes

CONTRASTIVE = (5e-4, 1e-3, 2e-3)
RECONSTRUCTION = (3e-4, 6e-4, 1.2e-3)
SEED = 7  # not one of those that README's table is made with
FIELDS = ("backbone", "model", "learning_rate", "Classification", "VQA", "Retrieval", "Grounding", "IND", "OOD", "All")


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="mini-qwen2-vl")
    parser.add_argument("--output", type=Path, default=Path("runs/demo_tuning"))
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".csv"))
    args = parser.parse_args()
    rows = list(csv.DictReader(args.table.open())) if args.table.exists() else []
    write_scenes(args.output / "scenes", SCENES_SEED, PAIRS, QUERIES, splits=("validation",))
    write_recipes(args.output, args.backbone, SEED)

    def best(model: str) -> float:
        mine = [row for row in rows if (row["backbone"], row["model"]) == (args.backbone, model)]
        return float(max(mine, key=lambda row: float(row["All"]))["learning_rate"])

    def run(model: str, rate: float, overrides: list[str]) -> None:
        if any((r["backbone"], r["model"], float(r["learning_rate"])) == (args.backbone, model, rate) for r in rows):
            return
        name = {"contrastive": "contrastive.yaml", "cocoa": "recipe.yaml"}[model]
        folder = args.output / f"{args.backbone}-{model}-{rate:g}"
        final = train(load_recipe(args.output / name, [f"output_dir={folder}", *overrides]))
        found = evaluate(final, args.output / "scenes" / "MMEB-eval", folder / "scores", "all", 64, split="validation")
        values = {group: f"{average['hit@1']:.1f}" for group, average in found["averages"].items()}
        rows.append({"backbone": args.backbone, "model": model, "learning_rate": f"{rate:g}", **values})
        with args.table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)

    for rate in CONTRASTIVE:
        run("contrastive", rate, [f"stages.contrastive.learning_rate={rate}"])
    same = f"stages.contrastive.learning_rate={best('contrastive')}"
    for rate in RECONSTRUCTION:
        stages = [f"stages.{stage}.learning_rate={rate}" for stage in ("joint_reconstruction", "eos_bridge")]
        run("cocoa", rate, [same, *stages])


if __name__ == "__main__":
    main()
