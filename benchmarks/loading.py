"""What a data loader's worker makes of photographs: rows a second of one core, and the bytes it hands on.

    python benchmarks/loading.py [--tokens 256] [--images 60]

Ours against the reference: the file decoded whole, and the processor's float32 pixels of two frames. Photograph-like
JPEG files of three sizes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cocoa.backbone import Backbone, load_backbone
from cocoa.checkpoint import versions
from cocoa.inputs import ImageBudget, chat_messages
from cocoa.pairs import Side

SIZES = ((500, 375), (1024, 768), (3000, 2250))
ROUNDS = 3


def write(folder: Path, size: tuple[int, int], count: int) -> list[Side]:
    """JPEG files of smooth noise, as large as a photograph's."""
    noise, sides = np.random.default_rng(0), []
    for number in range(count):
        coarse = noise.integers(0, 256, (size[1] // 16 + 1, size[0] // 16 + 1, 3), dtype=np.uint8)
        path = folder / f"{number}-{size[0]}.jpg"
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        sides.append(Side("Represent the given image.", image=str(path)))
    return sides


def reference(backbone: Backbone, side: Side) -> dict[str, torch.Tensor]:
    """As a collator of the published codes makes its row."""
    messages = chat_messages(side, backbone.images, backbone.patch_size)
    return backbone.processor.apply_chat_template([messages], tokenize=True, return_dict=True, return_tensors="pt")


def measure(encode: Callable[[Side], dict[str, torch.Tensor]], sides: list[Side]) -> tuple[float, float]:
    """Rows a second, and megabytes of a row."""
    start = time.perf_counter()
    encoded = [encode(side) for side in sides]
    seconds = time.perf_counter() - start
    total = sum(tensor.nbytes for row in encoded for tensor in row.values())
    return len(sides) / seconds, total / len(sides) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--images", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backbone = load_backbone("mini-qwen2-vl", ImageBudget((4, options.tokens)))
    ways = {"ours": backbone.encode_side, "reference": lambda side: reference(backbone, side)}
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    with tempfile.TemporaryDirectory() as temporary:
        for size in SIZES:
            sides = write(Path(temporary), size, options.images)
            rounds = [{name: measure(way, sides) for name, way in ways.items()} for _ in range(ROUNDS + 1)][1:]
            rates = {name: float(np.median([each[name][0] for each in rounds])) for name in ways}
            told = ", ".join(f"{name} {rates[name]:5.1f} rows/s of {rounds[0][name][1]:.2f} MB" for name in ways)
            print(f"{size[0]} x {size[1]}: {told}; {rates['ours'] / rates['reference']:.2f} x")


if __name__ == "__main__":
    main()
