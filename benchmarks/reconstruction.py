"""A training step of the EOS-bridge, ours against the reference path: seconds, peak memory, share of the arithmetic.

    python benchmarks/reconstruction.py [--shape middle] [--samples 8] [--longest 600] [--layout published]

Forward and backward pass of the same samples with the same weights, all of them trained; each path in a process of its
own, round after round; the losses are compared. The floor counts two operations for each multiply and add of the real
tokens: text model, tower, head at hidden tokens, and allowed scores; three times that for a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass

import reference
import torch
from shapes import SHAPES, bridge_samples, build, matmul_rate, median_seconds
from torch import Tensor

from cocoa.account import peak_bytes
from cocoa.backbone import Backbone
from cocoa.checkpoint import versions
from cocoa.corruption import IGNORE_INDEX
from cocoa.packing import by_length, pack
from cocoa.stages.reconstruction import Reconstructor

PATHS = ("ours", "reference")


@dataclass(frozen=True)
class Work:
    """What a batch has to have computed."""

    tokens: int
    flops: float
    """Of forward and backward pass."""


def work_of(backbone: Backbone, samples: list[dict[str, Tensor]], strict: bool) -> Work:
    """Counted from shapes: see the head of this file."""
    model, config = backbone.model, backbone.model.config.text_config
    sizes = [(int(sample["eos_position"]), len(sample["input_ids"])) for sample in samples]
    layers = sum(p.numel() for p in model.model.language_model.layers.parameters())
    tower = sum(p.numel() for p in model.model.visual.parameters())
    hidden = sum(int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples)
    patches = sum(len(sample["pixel_values"]) for sample in samples)
    pairs = sum(
        (a * (a + 1) + (a + 1 if strict else n) + (n - a - 1) * (n - a)) for a, n in sizes
    )  # A and B with EOS, and EOS itself
    tokens = sum(n for _, n in sizes)
    scores = 2 * 2 * pairs * config.hidden_size * config.num_hidden_layers
    vision = backbone.model.config.vision_config
    within = sum(len(sample["pixel_values"]) ** 2 for sample in samples)
    scores += 2 * 2 * within * vision.embed_dim * vision.depth
    products = 2 * (layers * tokens + tower * patches + config.hidden_size * config.vocab_size * hidden)
    return Work(tokens, 3 * (products + scores))


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One path: seconds a step, peak memory, loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    backbone = build(SHAPES[args.shape], device, dtype)
    samples = bridge_samples(backbone, args.samples, args.longest)
    if args.checkpointing:
        backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    before = peak_bytes(device)
    if args.path == "ours":
        model = Reconstructor(backbone).train()
        count = sum(int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples)

        def step() -> float:
            total = 0.0
            for part in by_length(samples, args.tokens_per_pass):
                row = pack([samples[place] for place in part], backbone, args.layout)
                moved = {name: value.to(device) for name, value in row.items()}
                loss = model(**moved | {"pixel_values": moved["pixel_values"].to(dtype)})["token"][0] / count
                loss.backward()
                total += loss.item()
            return total

    else:
        backbone.model.train()

        def step() -> float:
            loss = reference.bridge_loss(backbone, samples, args.layout)
            loss.backward()
            return loss.item()

    loss = step()
    seconds = median_seconds(step, device, args.repeats)
    work = work_of(backbone, samples, args.layout == "strict")
    rate = matmul_rate(device, dtype)
    return {
        "seconds": seconds,
        "memory": (peak_bytes(device) - before) / 2**20,
        "loss": loss,
        "tokens": work.tokens,
        "floor": work.flops / rate,
        "rate": rate / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="middle")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--longest", type=int, default=600)
    parser.add_argument("--layout", default="published")
    parser.add_argument("--tokens-per-pass", type=int, default=16_384)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--path", choices=PATHS, help="measure one, and print JSON")
    args = parser.parse_args()
    if args.path:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[dict[str, float]]] = {path: [] for path in PATHS}
    for _ in range(args.rounds):
        for path in PATHS:
            command = [sys.executable, __file__, *sys.argv[1:], "--path", path]
            found[path].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = {
        path: {key: statistics.median(each[key] for each in rows) for key in rows[0]} for path, rows in found.items()
    }
    ours, theirs = medians["ours"], medians["reference"]
    assert abs(ours["loss"] - theirs["loss"]) < 1e-3 * theirs["loss"], (ours["loss"], theirs["loss"])
    print(", ".join(f"{name} {value}" for name, value in versions().items()))
    print(f"{args.samples} samples, {ours['tokens']:.0f} tokens; one product: {ours['rate']:.0f} GFLOP/s")
    for path, each in medians.items():
        share = each["floor"] / each["seconds"]
        told = f"{each['seconds']:6.2f} s a step, {each['memory']:7.0f} MiB above the weights, {share:.0%} of that rate"
        print(f"{path:>9}: {told}")
    faster, memory = theirs["seconds"] / ours["seconds"], ours["memory"] / theirs["memory"]
    print(f"    ratio: {faster:.2f} x faster, {memory:.2f} x the memory")


if __name__ == "__main__":
    main()
