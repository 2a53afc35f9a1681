"""Models of any size with random weights, and samples as MMEB has them: nothing is downloaded."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor

from cocoa import varlen
from cocoa.adapters import Lora, add_adapters
from cocoa.architectures import MODEL_CLASSES, load_config, locate, recompute_activations
from cocoa.backbone import Backbone, budget_of
from cocoa.corruption import IGNORE_INDEX
from cocoa.pairs import Pair, Side
from cocoa.special_tokens import MASK_TOKEN, add_tokens, prepare_processor

VOCABULARY = 151_936
WORDS = ("red", "car", "in", "the", "rain", "beside", "two", "people", "under", "one", "neon", "sign", "at", "night")


@dataclass(frozen=True)
class Shape:
    """Sizes of a backbone: of its text model, and of its vision tower."""

    model_type: str
    width: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    tower_width: int
    tower_mlp: int
    tower_depth: int
    tower_heads: int
    tied: bool = True


SHAPES = {
    "mini": Shape("qwen2_vl", 128, 384, 6, 4, 2, 96, 384, 4, 4),
    "middle": Shape("qwen2_vl", 512, 1536, 8, 8, 2, 384, 1536, 6, 6),
    "qwen2-vl-2b": Shape("qwen2_vl", 1536, 8960, 28, 12, 2, 1280, 5120, 32, 16),
    "qwen2-vl-7b": Shape("qwen2_vl", 3584, 18944, 28, 28, 4, 1280, 5120, 32, 16, tied=False),
    "qwen2.5-vl-3b": Shape("qwen2_5_vl", 2048, 11008, 36, 16, 2, 1280, 3420, 32, 16),
    "qwen2.5-vl-7b": Shape("qwen2_5_vl", 3584, 18944, 28, 28, 4, 1280, 3420, 32, 16, tied=False),
}
"""`middle` has 100M parameters, most of them its vocabulary's; below it are the real backbones."""
ADAPTERS = ("none", "lora", "dora")


def build(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> Backbone:
    """A backbone with random weights, 152k tokens, and a mini backbone's processor."""
    source = locate({"qwen2_vl": "mini-qwen2-vl", "qwen2_5_vl": "mini-qwen2.5-vl"}[shape.model_type])
    config = load_config(source)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = shape.width, shape.mlp, shape.layers
    text.num_attention_heads, text.num_key_value_heads = shape.heads, shape.kv_heads
    text.layer_types, text.vocab_size = ["full_attention"] * shape.layers, VOCABULARY
    config.tie_word_embeddings = text.tie_word_embeddings = shape.tied
    half = shape.width // shape.heads // 2
    text.rope_parameters["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
    vision.depth, vision.num_heads = shape.tower_depth, shape.tower_heads
    if shape.model_type == "qwen2_vl":
        vision.embed_dim, vision.mlp_ratio, vision.hidden_size = shape.tower_width, 4, shape.width
    else:
        vision.hidden_size, vision.intermediate_size = shape.tower_width, shape.tower_mlp
        vision.out_hidden_size, vision.window_size = shape.width, 112
        vision.fullatt_block_indexes = [7, 15, 23, 31]
    text.is_causal = config.is_causal = False
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = MODEL_CLASSES[shape.model_type](config)
    finally:
        torch.set_default_dtype(before)
    processor = AutoProcessor.from_pretrained(source)
    prepare_processor(processor, source)
    add_tokens(model.get_input_embeddings().weight, processor.tokenizer, [MASK_TOKEN], source)
    return Backbone(model, processor, budget_of(processor), "random")


def build_for(args: argparse.Namespace) -> Backbone:
    """The backbone of a benchmark's options, with adapters in place, as the stages train it.

    On a GPU where there is one: in bfloat16 under adapters, which are float32, else in float32 (see `precision`).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lowered = device.type == "cuda" and args.adapters != "none"
    backbone = build(SHAPES[args.shape], device, torch.bfloat16 if lowered else torch.float32)
    if args.adapters != "none":
        add_lora(backbone, dora=args.adapters == "dora")
    if args.by_length:
        varlen.works = lambda query, key: False
    if args.checkpointing:
        recompute_activations(backbone.model)
    if args.compile:
        for layer in backbone.model.model.language_model.layers:
            layer.compile(dynamic=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what building took is not what a step takes
    return backbone


def add_lora(backbone: Backbone, dora: bool = False) -> None:
    """Put adapters into all layers, the tower's too, as the recipes of real size do."""
    vision = {"qwen2_vl": ("qkv", "fc1", "fc2"), "qwen2_5_vl": ("qkv", "gate_proj", "up_proj", "down_proj")}
    add_adapters(backbone.model, Lora(dora=dora, vision=vision[backbone.model.config.model_type]), [])


def precision(device: torch.device) -> torch.autocast:
    """What models compute in: bfloat16 on a GPU, as the recipes of real size, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def prepared(model: nn.Module, device: torch.device) -> nn.Module:
    """A model for training, as a trainer has it prepared: its forward pass alone is in lower precision; in place."""
    on_cpu = device.type == "cpu"
    return Accelerator(cpu=on_cpu, mixed_precision="no" if on_cpu else "bf16").prepare_model(model).train()


class Floor:
    """Counts what a step has to compute and to move, of real tokens alone.

    Operations are those of a forward pass, two for each multiply and add. Bytes are those of weights, read in the
    forward and in the backward pass, and of gradients, written once; activations could stay where they are made.

    Args:
        backbone: that is trained, adapters in place.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.model = backbone.model
        self.forward = 0.0
        self.tokens = 0

    def bytes(self) -> int:
        """That a step moves."""
        parameters = list(self.model.parameters())
        return sum((3 if p.requires_grad else 2) * p.numel() * p.element_size() for p in parameters)

    def add_tokens(self, tokens: int) -> None:
        """Through the layers of the text model."""
        self.tokens += tokens
        self.forward += 2 * tokens * sum(p.numel() for p in self.model.model.language_model.layers.parameters())

    def add_scores(self, pairs: int) -> None:
        """Pairs of tokens of which one sees the other: their scores, and the sums that these weigh."""
        config = self.model.config.text_config
        self.forward += 2 * 2 * pairs * config.hidden_size * config.num_hidden_layers

    def add_images(self, samples: Sequence[dict[str, Tensor]]) -> None:
        """Through the vision tower, as if a patch saw all of its image in every layer."""
        config = self.model.config.vision_config
        width = config.embed_dim if self.model.config.model_type == "qwen2_vl" else config.hidden_size
        visual = self.model.model.visual
        tower, merger = (sum(p.numel() for p in part.parameters()) for part in (visual, visual.merger))
        weights = tower - merger + merger / config.spatial_merge_size**2  # which has as many fewer rows
        for patches in (len(sample["pixel_values"]) for sample in samples if "pixel_values" in sample):
            self.forward += 2 * patches * weights + 2 * 2 * patches**2 * width * config.depth

    def add_head(self, tokens: int) -> None:
        """Tokens that are predicted."""
        config = self.model.config.text_config
        self.forward += 2 * tokens * config.hidden_size * config.vocab_size


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


def pairs_like_mmeb(count: int, longest: int, seed: int = 0) -> list[Pair]:
    """Pairs in MMEB's mix: an image and a question to an answer or a caption, and every third time a text to an image.

    Args:
        count: how many.
        longest: tokens the largest image takes; the smallest takes a sixth of it.
        seed: of everything.
    """
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    pairs = []
    for row in range(count):
        tokens = longest / 6 ** rng.random()
        ratio = rng.uniform(0.6, 1.6)
        size = [max(1, round((tokens * each) ** 0.5)) * 28 for each in (ratio, 1 / ratio)]
        image = Image.fromarray(noise.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        asked, told = (" ".join(rng.choices(WORDS, k=rng.randint(*span))) for span in ((3, 20), (1, 40)))
        shown = Side("Represent the given image with the question:", asked, image)
        pairs.append(
            Pair(*((shown, Side(text=f"{told} {row}")) if row % 3 else (Side("Find the image:", told), shown)))
        )
    return pairs


def matmul_rate(device: torch.device) -> float:
    """Measured operations a second of one large product: what the machine can do."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, device, 5)


def bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Measured bytes a second, read and written, of one large copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), device, 5)


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
