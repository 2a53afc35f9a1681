"""What `cocoa evaluate` costs beside the bare `SentenceTransformer.encode` of the same distinct inputs.

Writes generated data in MMEB-eval's layout (photograph-sized JPEG files of many shapes, texts from a word to a page),
and in one run measures, round after round:

    plain     SentenceTransformer.encode(inputs, batch_size=32), which sorts by the length of texts, images opened as it
              goes to them
    bare      SentenceTransformer.encode of our batches, one after the other, images opened before each
    embed     Embedder.embed: our batches, tokens and pixels made ahead in threads
    evaluate  the whole command, from parquet to score files, without what an earlier run has kept

    python benchmarks/evaluation.py [--rows 500] [--rounds 3] [--model mini-qwen2-vl]
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from cocoa.checkpoint import versions
from cocoa.embedding import Embedder, load_embedder
from cocoa.eval_inputs import distinct_inputs
from cocoa.evaluation import evaluate
from cocoa.mmeb_eval import read_eval

WORDS = ("red", "car", "in", "the", "rain", "beside", "two", "people", "under", "one", "neon", "sign", "at", "night")


def text(chance: random.Random, least: int, most: int) -> str:
    return " ".join(chance.choices(WORDS, k=round(least * (most / least) ** chance.random())))


def write(folder: Path, rows: int) -> None:
    """Three data sets: labels of photographs, captions, and questions whose answers are long texts."""
    chance = random.Random(0)
    noise = np.random.default_rng(0)
    for name, least, most in (("labels", 1, 3), ("captions", 8, 40), ("passages", 5, 300)):
        (folder / "images" / name).mkdir(parents=True)
        texts = [f"{i} {text(chance, least, most)}" for i in range(rows)]
        paths = [f"{name}/{i}.jpg" for i in range(rows)]
        for path in paths:
            width, height = (round(120 * 5 ** chance.random()) for _ in range(2))
            coarse = Image.fromarray(noise.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
            coarse.resize((width, height)).save(folder / "images" / path)
        queries = [f"<|image_1|>\nWhat is it? {text(chance, 1, 20)}" for _ in range(rows)]
        candidates = [[texts[i], *texts[:i], *texts[i + 1 :]] for i in range(rows)]
        columns = {"qry_text": queries, "qry_img_path": paths, "tgt_text": candidates}
        columns["tgt_img_path"] = [[""] * rows] * rows
        (folder / name).mkdir()
        pq.write_table(pa.table(columns), folder / name / "test-00000-of-00001.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500, help="queries, and candidates, of each of three data sets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="mini-qwen2-vl")
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "data"
        write(data, options.rows)
        measure(data, Path(temporary) / "scores", load_embedder(options.model), options)


def measure(data: Path, output: Path, embedder: Embedder, options: argparse.Namespace) -> None:
    _, inputs = distinct_inputs(read_eval(data))
    order = random.Random(0).sample(range(len(inputs.sides)), len(inputs.sides))
    sides = [inputs.sides[i] for i in order]
    batches = embedder.batches(sides, options.batch_size)
    counts = embedder.token_counts(sides)

    def encode(items: list[Any], size: int) -> torch.Tensor:
        return embedder.model.encode(items, batch_size=size, convert_to_tensor=True, show_progress_bar=False)

    def plain() -> None:
        for start in range(0, len(sides), 320):  # a user would not open all of them at once either
            encode([embedder.render(side) for side in sides[start : start + 320]], 32)

    def bare() -> None:
        for batch in batches:
            encode([embedder.render(sides[i]) for i in batch], len(batch))

    def whole() -> None:
        shutil.rmtree(output, ignore_errors=True)
        evaluate(options.model, data, output, batch_size=options.batch_size)

    ways: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "bare": bare,
        "embed": lambda: embedder.embed(sides, options.batch_size),
        "evaluate": whole,
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds + 1):  # the first round is not counted
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(times[1:]) for name, times in found.items()}
    padded = sum(len(batch) * max(counts[i] for i in batch) for batch in batches)
    tokens = f"{min(counts)} to {max(counts)} tokens"
    print(f"{len(sides)} distinct inputs of {tokens}, {sum(counts) / padded:.0%} of what we compute is real")
    for name, taken in seconds.items():
        print(f"{name:10}{taken:8.1f} s")
    print(f"evaluate / bare:  {seconds['evaluate'] / seconds['bare']:.2f}")
    print(f"plain / evaluate: {seconds['plain'] / seconds['evaluate']:.2f}")
    print(f"{torch.get_num_threads()} threads, {embedder.model.device}, {options.model}")
    print(versions())


if __name__ == "__main__":
    main()
