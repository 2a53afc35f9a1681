"""A recipe for the shortest run that has everything in it, over the photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toy import VISION

NAMES = ("joint_reconstruction", "eos_bridge", "contrastive")
STEPS = {"batch_size": 8, "max_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "report_to": "none"}


def short_recipe(backbone: Path, data: Path, output: Path, tuning: str = "full", **changes: Any) -> dict[str, Any]:
    """A recipe's mapping: three stages of two steps, `full` tuning or `dora`.

    Args:
        backbone: folder of a tiny one.
        data: folder that `write_photos` filled.
        output: `output_dir`.
        tuning: `dora` also trains with gradient checkpointing and dropout.
        **changes: other top-level keys.
    """
    common = STEPS | ({"gradient_checkpointing": True} if tuning == "dora" else {})
    recipe: dict[str, Any] = {
        "backbone": str(backbone),
        "output_dir": str(output),
        "seed": 5,
        "dtype": "float32",
        "data": {"train": str(data / "MMEB-train"), "validation_rows": 2},
        "image": {"train_tokens": [4, 16], "eval_tokens": [4, 25]},
        "stages": [{name: dict(common)} for name in NAMES],
    }
    recipe["stages"][2]["contrastive"] |= {"tokens_per_pass": 100, "eval_steps": 1}
    if tuning == "dora":
        vision = VISION["qwen2_5_vl" if "qwen2_5" in backbone.name else "qwen2_vl"]
        recipe["lora"] = {"r": 4, "alpha": 16, "vision": list(vision)}
    return recipe | changes
