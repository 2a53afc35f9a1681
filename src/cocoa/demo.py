"""`cocoa demo`: the whole pipeline on a few real photographs, with a tiny random backbone.

It shows that every part runs and how the pieces fit; a backbone that has learned nothing cannot show what
the method does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cocoa.errors import CocoaError
from cocoa.evaluation import evaluate
from cocoa.photos import write_photos
from cocoa.pipeline import train
from cocoa.recipe import load_recipe
from cocoa.sources import DataConfig, load_pairs
from cocoa.tiny import write_tiny_backbone

BACKBONES = {"tiny-qwen2-vl": "qwen2_vl", "tiny-qwen2.5-vl": "qwen2_5_vl"}


def run(output: Path, backbone: str = "tiny-qwen2-vl") -> dict[str, dict[str, Any]]:
    """Write data, backbone and recipe, train the three stages, and score before and after.

    Args:
        output: where everything is written; run again, it goes on where it was.
        backbone: a key of `BACKBONES`.

    Returns:
        Evaluation summaries by model name.

    Raises:
        CocoaError: an unknown backbone.
    """
    if backbone not in BACKBONES:
        raise CocoaError(f"backbone {backbone!r}: choose one of {', '.join(BACKBONES)}")
    data = output / "data"
    write_photos(data)
    pairs = load_pairs(DataConfig(train=str(data / "MMEB-train")), seed=0).pairs
    texts = [side.prompt() for pair in pairs for side in (pair.query, pair.target)]
    folder = output / backbone
    if not (folder / "model.safetensors").exists():
        write_tiny_backbone(folder, texts, BACKBONES[backbone])
    recipe = output / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(_recipe(output, folder, data), sort_keys=False), encoding="utf-8")
    final = train(load_recipe(recipe))
    models = {f"{backbone}, untouched": folder, "CoCoA": final}
    return {name: evaluate(model, data / "MMEB-eval", output / "scores" / model.name) for name, model in models.items()}


def _recipe(output: Path, backbone: Path, data: Path) -> dict[str, Any]:
    """Three short stages over the photographs, full tuning."""
    common = {"batch_size": 16, "learning_rate": 3e-3, "report_to": "none"}
    return {
        "backbone": str(backbone),
        "output_dir": str(output / "run"),
        "dtype": "float32",
        "data": {"train": str(data / "MMEB-train"), "validation_rows": 4},
        "image": {"train_tokens": [4, 16], "eval_tokens": [4, 16]},
        "stages": [
            {"joint_reconstruction": {**common, "max_steps": 40}},
            {"eos_bridge": {**common, "max_steps": 40}},
            {"contrastive": {**common, "max_steps": 60, "mini_batch_size": 16}},
        ],
    }
