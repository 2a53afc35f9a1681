"""A training step of the EOS-bridge, ours against the reference path: seconds, peak memory, share of the arithmetic.

    python benchmarks/reconstruction.py [--shape middle] [--samples 8] [--longest 600] [--layout published]

Forward and backward pass of the same samples with the same weights, all of them trained.
"""

from __future__ import annotations

import argparse

import reference
import rounds
import torch
from shapes import SHAPES, Operations, bridge_samples, build, matmul_rate, median_seconds

from cocoa.account import peak_bytes
from cocoa.corruption import IGNORE_INDEX
from cocoa.packing import by_length, pack
from cocoa.stages.reconstruction import Reconstructor


def measure(args: argparse.Namespace) -> rounds.Measured:
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
    sizes = [(int(sample["eos_position"]), len(sample["input_ids"])) for sample in samples]
    work = Operations(backbone)
    work.add_tokens(sum(n for _, n in sizes))
    # A and B with EOS, and EOS itself
    work.add_scores(
        sum(a * (a + 1) + (a + 1 if args.layout == "strict" else n) + (n - a - 1) * (n - a) for a, n in sizes)
    )
    work.add_images(samples)
    work.add_head(sum(int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples))
    rate = matmul_rate(device, dtype)
    return {
        "seconds": seconds,
        "memory": (peak_bytes(device) - before) / 2**20,
        "loss": loss,
        "tokens": work.tokens,
        "floor": 3 * work.forward / rate,
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
    rounds.run(parser, measure)


if __name__ == "__main__":
    main()
