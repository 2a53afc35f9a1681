"""Models of any size with random weights, and samples as MMEB has them: nothing is downloaded."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoProcessor

from cocoa.backbone import MODEL_CLASSES, Backbone, budget_of, load_config, locate
from cocoa.corruption import IGNORE_INDEX
from cocoa.special_tokens import MASK_TOKEN, add_tokens, prepare_processor

VOCABULARY = 151_936


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen2-VL: text model (width, MLP, layers, heads, key-value heads), tower (width, depth, heads)."""

    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    tower_width: int
    tower_depth: int
    tower_heads: int


SHAPES = {
    "mini": Shape(128, 384, 6, 4, 2, 96, 4, 4),
    "middle": Shape(512, 1536, 8, 8, 2, 384, 6, 6),
    "2b": Shape(1536, 8960, 28, 12, 2, 1280, 32, 16),
    "7b": Shape(3584, 18944, 28, 28, 4, 1280, 32, 16),
}
"""`middle` has 100M parameters, most of them its vocabulary's; the last two are Qwen2-VL-2B's and 7B's."""


def build(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> Backbone:
    """A backbone with random weights, 152k tokens, and a mini backbone's processor."""
    source = locate("mini-qwen2-vl")
    config = load_config(source)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = shape.width, shape.mlp, shape.layers
    text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.kv_heads
    text.layer_types, text.vocab_size = ["full_attention"] * shape.layers, VOCABULARY
    half = shape.width // shape.heads // 2
    text.rope_parameters["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    vision.hidden_size, vision.embed_dim = shape.width, shape.tower_width
    vision.depth, vision.num_heads, vision.mlp_ratio = shape.tower_depth, shape.tower_heads, 4
    text.is_causal = config.is_causal = False
    torch.manual_seed(0)
    with torch.device(device):
        model = MODEL_CLASSES["qwen2_vl"](config).to(dtype)
    processor = AutoProcessor.from_pretrained(source)
    prepare_processor(processor, source)
    add_tokens(model.get_input_embeddings().weight, processor.tokenizer, [MASK_TOKEN], source)
    return Backbone(model, processor, budget_of(processor), "random")


def bridge_samples(backbone: Backbone, count: int, longest: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Samples of the EOS-bridge: an image, a text, EOS, and a text of which 70 % is hidden.

    Args:
        backbone: that they are for.
        count: how many.
        longest: tokens a sample may have, about; the shortest has a sixth of it.
        seed: of everything.
    """
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    config, samples = backbone.model.config, []
    for _ in range(count):
        total = round(longest / 6 ** rng.random())
        rows = max(2, round((0.75 * total) ** 0.5 * rng.uniform(0.7, 1.0)))
        columns = max(2, round(0.75 * total / rows))
        before, after = max(2, round(0.1 * total)), max(4, round(0.15 * total))
        words = torch.randint(100, 700, (before + after,), generator=generator)
        hidden = torch.rand(after, generator=generator) < 0.7
        hidden[0] = True
        picture = [
            config.vision_start_token_id,
            *[config.image_token_id] * (rows * columns),
            config.vision_end_token_id,
        ]
        block_b = words[before:]
        ids = torch.cat([
            torch.tensor(picture), words[:before], torch.tensor([backbone.eos_token_id]),
            torch.where(hidden, backbone.mask_token_id, block_b),
        ])  # fmt: skip
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[-after:][hidden] = block_b[hidden]
        samples.append({
            "input_ids": ids,
            "labels": labels,
            "pixel_values": torch.randn(4 * rows * columns, 1176, generator=generator),
            "image_grid_thw": torch.tensor([[1, 2 * rows, 2 * columns]]),
            "eos_position": torch.tensor(len(ids) - after - 1),
        })  # fmt: skip
    return samples


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Measured operations a second of one large product: what the machine can do."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device, 5)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of a call, after one that is not counted."""
    measured = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        measured.append(time.perf_counter() - start)
    return statistics.median(measured[1:])


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
