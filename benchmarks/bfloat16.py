"""What bfloat16 costs in score: a checkpoint evaluated in float32 and, its weights rounded, in bfloat16.

    cocoa demo --output runs/demo
    python benchmarks/bfloat16.py [--model runs/demo/cocoa/final] [--data runs/demo/scenes/MMEB-eval]

The demo's model and scenes are the default.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from cocoa.checkpoint import versions
from cocoa.evaluation import evaluate
from cocoa.scores import read_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/demo/cocoa/final"))
    parser.add_argument("--data", type=Path, default=Path("runs/demo/scenes/MMEB-eval"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rounded = Path(temporary) / "bfloat16"
        shutil.copytree(options.model, rounded, ignore=shutil.ignore_patterns("model*.safetensors"))
        AutoModelForImageTextToText.from_pretrained(options.model, dtype=torch.bfloat16).save_pretrained(rounded)
        hits: dict[str, dict[str, np.ndarray]] = {}
        for name, model in (("float32", options.model), ("bfloat16", rounded)):
            output = Path(temporary) / f"scores-{name}"
            evaluate(str(model), options.data, output)
            hits[name] = {dataset: ranks == 1 for dataset, ranks in read_ranks(output).items()}
    for name, own in hits.items():
        print(
            f"{name:9} hit@1 {100 * np.mean([each.mean() for each in own.values()]):.2f}, mean of {len(own)} data sets"
        )
    first, second = (np.concatenate(list(own.values())) for own in hits.values())
    print(f"{len(first)} queries, of which {(first != second).mean():.2%} are a hit in one of them only")
    print(versions())


if __name__ == "__main__":
    main()
