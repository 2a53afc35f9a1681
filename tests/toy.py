"""Small made-up data on real machinery: coloured squares with captions, and a backbone to learn them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from cocoa.adapters import Lora, add_adapters
from cocoa.architectures import set_attention
from cocoa.backbone import Backbone
from cocoa.embedding import Embedder
from cocoa.pairs import ContentPair, Pair, Side, Turn
from cocoa.special_tokens import close_with_compression_tokens
from cocoa.stages.reconstruction import ReconstructionTrainer

WORDS = ["red", "green", "blue", "cat", "dog", "rocket", "coffee", "cup", "table", "sky", "moon", "star"]
VISION = {"qwen2_vl": ("qkv", "fc1", "fc2"), "qwen2_5_vl": ("qkv", "gate_proj", "up_proj", "down_proj")}


def pictures(n: int, seed: int = 0) -> list[Image.Image]:
    """Images of 84 x 84 px, nine colours each."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (n, 3, 3, 3))
    return [Image.fromarray(np.kron(b, np.ones((28, 28, 1))).astype("uint8")) for b in blocks]


def captions(n: int, words: int = 6, seed: int = 0) -> list[str]:
    """Captions of a fixed number of words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, words)) for _ in range(n)]


def content_rows(n: int, bridge: bool) -> list[ContentPair]:
    """Rows of a reconstruction stage."""
    sides = [Side("Describe the picture." if bridge else "", "", image) for image in pictures(n)]
    return [ContentPair(side, text, f"toy/{i}") for i, (side, text) in enumerate(zip(sides, captions(n), strict=True))]


def toy_pairs(n: int, negatives: int = 0, datasets: int = 1) -> list[Pair]:
    """Image-to-text pairs, with made-up hard negatives."""
    others = captions(n * max(negatives, 1), seed=1)
    return [
        Pair(
            Side("Find the caption.", "", image),
            Side("", text),
            tuple(Side("", other) for other in others[i * negatives : (i + 1) * negatives]),
            f"toy{i % datasets}",
            i,
        )
        for i, (image, text) in enumerate(zip(pictures(n), captions(n), strict=True))
    ]


def with_adapters(backbone: Backbone, dropout: float = 0.1) -> PeftModel:
    """DoRA on text and tower, and the rows of the compression tokens, or the mask token's; the peft handle."""
    lora = Lora(dropout=dropout, vision=VISION[backbone.model.config.model_type])
    return add_adapters(backbone.model, lora, backbone.compression_token_ids or [backbone.mask_token_id])


def prepared(backbone: Backbone, stage: str, count: int = 4) -> Backbone:
    """The backbone as the stage reads it: through compression tokens for `compression` and `matching`."""
    if stage in ("compression", "matching") and not backbone.compression_tokens:
        embeddings = backbone.model.get_input_embeddings().weight
        close_with_compression_tokens(embeddings, backbone.processor, count, backbone.name)
        backbone.pooling, backbone.compression_tokens = "compression", count
        set_attention(backbone.model.config, "causal")
    return backbone


class MadeUp(Embedder):
    """Around a made-up model, which is asked as one that is not ours."""

    def prepare(self, items: list[Any]) -> list[Any]:
        """As they are."""
        return items


def dialogues(n: int) -> list[ContentPair]:
    """Rows of compression: images with one to three turns."""
    turns = [
        Turn(question, answer) for question, answer in zip(captions(3 * n, 4, 2), captions(3 * n, 2, 3), strict=True)
    ]
    images = pictures(n)
    return [
        ContentPair(Side(image=images[i]), "", f"toy/{i}", tuple(turns[3 * i : 3 * i + 1 + i % 3])) for i in range(n)
    ]


def states_of(backbone: Backbone, side: Side, model: PreTrainedModel | None = None) -> Tensor:
    """(T, D) final states of one side, unpadded; of another model with the same processor, if one is given."""
    encoded = backbone.encode_side(side)
    ids = encoded.pop("input_ids")[None]
    positions = backbone.rope_positions(ids, torch.ones_like(ids), encoded.get("image_grid_thw"))
    if "pixel_values" in encoded:
        encoded["pixel_values"] = backbone.pixels.values(encoded["pixel_values"])
    with torch.no_grad():
        inner = (model or backbone.model).eval().model
        return inner(input_ids=ids, position_ids=positions, **encoded).last_hidden_state[0]


def arguments(cls, folder, **options):
    """Arguments of a stage for a short quiet run on the CPU."""
    defaults = {
        "output_dir": str(folder),
        "batch_size": 8,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 3,
    }
    return cls(**{**defaults, **options})


def row_of(trainer: ReconstructionTrainer, samples: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Samples in the one row that the trainer makes of them."""
    (row,) = trainer.data_collator(samples)["passes"]
    return row
