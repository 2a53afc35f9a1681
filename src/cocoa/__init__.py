"""CoCoA: turn a multimodal LLM into an embedding model (arXiv 2603.01471).

What stands in `__all__` is all that a script needs; each name is imported when it is first used. A model that was
trained is used through sentence-transformers: `SentenceTransformer(folder).encode(...)`.

Reading order: `attention`, `corruption`, `reconstruction`, `stages.joint_reconstruction`, `pipeline`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cocoa.adapters import Lora
    from cocoa.backbone import Backbone, load_backbone
    from cocoa.errors import CocoaError
    from cocoa.evaluation import evaluate
    from cocoa.inputs import ImageBudget
    from cocoa.pairs import Pair, Side
    from cocoa.pipeline import train
    from cocoa.recipe import load_recipe
    from cocoa.sources import read_pairs
    from cocoa.stages.compression import CompressionArguments, CompressionTrainer
    from cocoa.stages.contrastive import ContrastiveArguments, ContrastiveTrainer
    from cocoa.stages.eos_bridge import EosBridgeArguments, EosBridgeTrainer
    from cocoa.stages.joint_reconstruction import JointReconstructionArguments, JointReconstructionTrainer

__version__ = "0.1.0.dev0"
__all__ = [
    "Backbone",
    "CocoaError",
    "CompressionArguments",
    "CompressionTrainer",
    "ContrastiveArguments",
    "ContrastiveTrainer",
    "EosBridgeArguments",
    "EosBridgeTrainer",
    "ImageBudget",
    "JointReconstructionArguments",
    "JointReconstructionTrainer",
    "Lora",
    "Pair",
    "Side",
    "evaluate",
    "load_backbone",
    "load_recipe",
    "read_pairs",
    "train",
]

_PLACES = {
    "adapters": ("Lora",),
    "backbone": ("Backbone", "load_backbone"),
    "errors": ("CocoaError",),
    "evaluation": ("evaluate",),
    "inputs": ("ImageBudget",),
    "pairs": ("Pair", "Side"),
    "pipeline": ("train",),
    "recipe": ("load_recipe",),
    "sources": ("read_pairs",),
    "stages.compression": ("CompressionArguments", "CompressionTrainer"),
    "stages.contrastive": ("ContrastiveArguments", "ContrastiveTrainer"),
    "stages.eos_bridge": ("EosBridgeArguments", "EosBridgeTrainer"),
    "stages.joint_reconstruction": ("JointReconstructionArguments", "JointReconstructionTrainer"),
}
"""The modules of the names above."""


def __getattr__(name: str) -> Any:
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"cocoa.{module}"), name)
    raise AttributeError(f"module 'cocoa' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
