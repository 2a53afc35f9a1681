"""A training step of the EOS-bridge, ours against the reference path: seconds, peak memory, share of the arithmetic.

    python benchmarks/reconstruction.py [--shape middle] [--samples 8] [--longest 600] [--layout published]

Forward and backward pass of the same samples with the same weights, all of them trained; what a data loader's workers
make of the samples is made before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import reference
import rounds
import torch
from shapes import Floor, bridge_samples, build_for, prepared
from torch import Tensor

from cocoa.account import peak_bytes
from cocoa.architectures import quicken_tower
from cocoa.corruption import IGNORE_INDEX
from cocoa.packing import by_length, pack
from cocoa.stages.reconstruction import Reconstructor


def measure(args: argparse.Namespace) -> rounds.Measured:
    """One path: seconds a step, peak memory, loss."""
    backbone = build_for(args)
    device = backbone.model.device
    samples = bridge_samples(backbone, args.samples, args.longest)
    before = peak_bytes(device)
    if args.path == "ours":
        quicken_tower(backbone.model)
        model = prepared(Reconstructor(backbone), device)
        count = hidden_tokens(samples)
        parts = by_length(samples, args.tokens_per_pass)
        rows = [pack([samples[place] for place in part], backbone, args.layout) for part in parts]

        def step() -> float:
            losses = []
            for row in rows:
                moved = {name: value.to(device) for name, value in row.items()}
                loss = model(**moved)["token"][0] / count
                loss.backward()
                losses.append(loss.detach())
            return torch.stack(losses).sum().item()

    else:
        backbone.model.train()
        batch = reference.collate(backbone, samples)

        def step() -> float:
            loss = reference.bridge_loss(backbone, batch, args.layout)
            loss.backward()
            return loss.item()

    work = Floor(backbone)
    work.add_tokens(sum(len(sample["input_ids"]) for sample in samples))
    work.add_scores(bridge_scores(samples, args.layout))
    work.add_images(samples)
    work.add_head(hidden_tokens(samples))
    return rounds.measured(step, work, backbone, before, args)


def hidden_tokens(samples: Sequence[dict[str, Tensor]]) -> int:
    """That are predicted."""
    return sum(int((sample["labels"] != IGNORE_INDEX).sum()) for sample in samples)


def bridge_scores(samples: Sequence[dict[str, Tensor]], layout: str) -> int:
    """Pairs of tokens of which one sees the other: A and B with EOS, and EOS itself."""
    sizes = [(int(sample["eos_position"]), len(sample["input_ids"])) for sample in samples]
    return sum(a * (a + 1) + (a + 1 if layout == "strict" else n) + (n - a - 1) * (n - a) for a, n in sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--longest", type=int, default=600)
    parser.add_argument("--layout", default="published")
    rounds.run(parser, measure)


if __name__ == "__main__":
    main()
