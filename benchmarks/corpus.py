"""What a large corpus costs: `cocoa embed` measured here, and a billion images counted for the real backbones.

    python benchmarks/corpus.py [--images 1000] [--tflops 400] [--tokens 64 256]

Measured: photograph-sized JPEG files in parquet, embedded by `mini-qwen2-vl` in one process; the same files only read,
decoded and turned into what a model takes, in one thread; and bytes a row of what is written. Counted: operations of a
billion images of so many tokens each (two for each parameter and token, attention scores left out), device-hours at the
throughput that `--tflops` says, cores that prepare for one device at the rate measured here, and terabytes of float16
embeddings.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, build

from cocoa.backbone import load_backbone
from cocoa.checkpoint import versions
from cocoa.corpus import Columns, list_parts, read_part
from cocoa.corpus_embedding import EmbedSettings, embed_corpus
from cocoa.corpus_files import FOLDER
from cocoa.embedding import embedder_of
from cocoa.estimate import hours
from cocoa.inputs import MAX_LENGTH, ImageBudget

MARKERS = 8
"""Tokens of an input beside its image: markers and EOS."""


def write(folder: Path, images: int) -> None:
    """Ten parquet files of JPEG images of 400 to 900 px a side."""
    chance = np.random.default_rng(0)
    records = []
    for _ in range(images):
        width, height = chance.integers(400, 900, 2)
        small = Image.fromarray(chance.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
        file = io.BytesIO()
        small.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        records.append({"image": file.getvalue()})
    for number in range(10):
        pq.write_table(pa.Table.from_pylist(records[number::10]), folder / f"{number}.parquet")


def preparing_rate(folder: Path, images: int, tokens: int) -> float:
    """Images a second that one thread reads, decodes and turns into pixels of so many tokens."""
    embedder = embedder_of(load_backbone("mini-qwen2-vl", ImageBudget((4, tokens))), MAX_LENGTH)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    for part in list_parts(folder, images, folder / "out"):
        for block in read_part(part, Columns(), 8):
            embedder.prepare([embedder.render(row.side) for row in block])
    torch.set_num_threads(threads)
    return images / (time.perf_counter() - began)


def operations_of(name: str, tokens: int) -> float:
    """Of an image of so many tokens, in a real backbone without its vocabulary."""
    model = build(SHAPES[name], torch.device("meta")).model.model
    parts = (model.language_model.layers, model.visual, model.visual.merger)
    text, tower, merger = (sum(p.numel() for p in part.parameters()) for part in parts)
    return 2.0 * (text * (tokens + MARKERS) + (tower - merger) * 4 * tokens + merger * tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--tflops", type=float, default=400.0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256])
    args = parser.parse_args()
    console = Console(width=120)
    console.print(f"{versions()}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write(folder, args.images)
        prepared = {tokens: preparing_rate(folder, args.images, tokens) for tokens in args.tokens}
        settings = EmbedSettings("mini-qwen2-vl", folder, precision="float16", batch_size=32)
        summary = embed_corpus(settings, folder / "out")
        size = sum(path.stat().st_size for path in (folder / "out" / FOLDER).iterdir()) / args.images
    embedded = args.images / summary["seconds"]
    rates = ", ".join(f"{rate:.0f} images/s of {tokens} tokens" for tokens, rate in prepared.items())
    console.print(
        f"read, decoded and prepared in one thread: {rates}; embedded by mini-qwen2-vl, loading it counted: "
        f"{embedded:.0f} images/s, {size:.0f} bytes each"
    )
    table = Table("a billion images", "tokens", "device-hours", "images/s of a device", "cores that prepare", "TB")
    for name in [name for name in SHAPES if name.startswith("qwen")]:
        for tokens in args.tokens:
            operations = operations_of(name, tokens)
            rate = args.tflops * 1e12 / operations
            size = 1e9 * SHAPES[name].width * 2 / 1e12
            cells = (hours(1e9 * operations, args.tflops), rate, rate / prepared[tokens], size)
            table.add_row(name, str(tokens), *[f"{cell:,.0f}" if cell >= 10 else f"{cell:.1f}" for cell in cells])
    console.print(table)


if __name__ == "__main__":
    main()
