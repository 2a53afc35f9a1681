"""What a step takes at the real shapes, by ours and by the reference path: counted, not measured.

    python benchmarks/counted.py [--shapes qwen2-vl-2b ...] [--samples 16] [--longest 1300] [--pairs 64]

With LoRA in all layers, the tower's too, in bfloat16; samples as in the measured benchmarks. TFLOP are those of forward
and backward pass, and of what is computed again: layers under gradient checkpointing, the head by our path, all inputs
by sentence-transformers' cached loss. The ratio is what a step is faster by if both paths reach the same share of the
device's rate. GB are those of activations and logits (`cocoa.estimate`). Not counted: masks, and moving logits.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from contrastive import LONGEST, MINI_BATCH, encoded_pairs
from reconstruction import bridge_scores, hidden_tokens
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shapes import SHAPES, Floor, add_lora, bridge_samples, build, pairs_like_mmeb

from cocoa.backbone import Backbone
from cocoa.estimate import Stack, stage_memory
from cocoa.preview_cost import vision_shape
from cocoa.reconstruction import LOGITS_AT_ONCE

Samples = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Path:
    """How a path computes a step.

    Attributes:
        tokens: through the text model, padding with them.
        scores: pairs of tokens that the attention computes.
        times: that layers are computed, the backward pass as one.
        kept: tokens and patches whose activations are in memory at a time.
        predicted: tokens through the head, and how often.
        logits: in memory at a time.
    """

    tokens: int
    scores: int
    times: int
    kept: tuple[int, int]
    predicted: tuple[int, int] = (0, 0)
    logits: int = 0

    def operations(self, backbone: Backbone, samples: Samples) -> float:
        """Of a step of these samples."""
        layers, head = Floor(backbone), Floor(backbone)
        layers.add_tokens(self.tokens)
        layers.add_scores(self.scores)
        layers.add_images(samples)
        head.add_head(self.predicted[0])
        return self.times * layers.forward + self.predicted[1] * head.forward

    def memory(self, backbone: Backbone, checkpointing: bool) -> int:
        """Bytes of activations and logits."""
        text, (tokens, patches) = backbone.model.config.text_config, self.kept
        sizes = ("text", text.num_hidden_layers, text.hidden_size, text.intermediate_size)
        stacks = [
            Stack(*shape, trained=0, frozen=0, tokens=0, longest=longest)
            for shape, longest in ((sizes, tokens), (vision_shape(backbone.model.config), patches))
        ]
        taken = stage_memory(
            stacks,
            frozen=0,
            trained=0,
            frozen_bytes=2,
            element_bytes=2,
            tuning="lora",
            rows_at_once=1,
            logits=self.logits,
        )
        return taken.total(checkpointing)


def patches_of(samples: Samples) -> int:
    """That the vision tower takes."""
    return sum(len(sample.get("pixel_values", ())) for sample in samples)


def reconstruction(backbone: Backbone, samples: Samples, checkpointing: bool) -> tuple[Path, Path]:
    """The EOS-bridge, published layout: ours packed in one pass, the reference's padded to the longest sample."""
    lengths, patches = [len(sample["input_ids"]) for sample in samples], patches_of(samples)
    hidden = hidden_tokens(samples)
    tokens, padded = sum(lengths), len(lengths) * max(lengths)
    vocabulary, times = backbone.model.config.text_config.vocab_size, 2 + checkpointing
    logits = min(hidden * vocabulary, LOGITS_AT_ONCE)
    ours = Path(tokens, bridge_scores(samples, "published"), times, (tokens, patches), (hidden, 3), logits)
    scores = padded * max(lengths)
    return ours, Path(padded, scores, times, (padded, patches), (padded, 2), padded * vocabulary)


def contrastive(backbone: Backbone, pairs: Samples, checkpointing: bool) -> tuple[Path, Path]:
    """Ours with all activations kept; the reference's columns padded to their longest input, in mini-batches, twice."""
    columns = [[row[name] for row in pairs] for name in ("query", "target")]
    lengths = [[len(side["input_ids"]) for side in column] for column in columns]
    tokens, patches = sum(map(sum, lengths)), sum(map(patches_of, columns))
    scores, times = sum(n * n for column in lengths for n in column), 2 + checkpointing
    longest = [max(column) for column in lengths]
    padded = [len(pairs) * most for most in longest]
    parts = [column[start : start + MINI_BATCH] for column in columns for start in range(0, len(pairs), MINI_BATCH)]
    at_once = (min(MINI_BATCH, len(pairs)) * max(longest), max(map(patches_of, parts)))
    ours = Path(tokens, scores, times, (tokens, patches))
    scores = sum(n * most for n, most in zip(padded, longest, strict=True))
    return ours, Path(sum(padded), scores, times + 1, at_once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[name for name in SHAPES if "qwen" in name])
    parser.add_argument("--samples", type=int, default=16, help="of a reconstruction step")
    parser.add_argument("--longest", type=int, default=1300, help="tokens of a sample of it")
    parser.add_argument("--pairs", type=int, default=64, help="of a contrastive step")
    options = parser.parse_args()
    columns = ("TFLOP", "reference", "fewer", "GB", "reference", "less")
    table = Table("backbone", "step", "checkpointing", *columns)
    for name in track(options.shapes, "counting"):
        backbone = build(SHAPES[name], torch.device("meta"))
        add_lora(backbone)
        samples = bridge_samples(backbone, options.samples, options.longest)
        pairs = encoded_pairs(backbone, pairs_like_mmeb(options.pairs, LONGEST), LONGEST)
        sides = [row[side] for row in pairs for side in ("query", "target")]
        for checkpointing in (False, True):
            steps = {
                "reconstruction": (reconstruction(backbone, samples, checkpointing), samples),
                "contrastive": (contrastive(backbone, pairs, checkpointing), sides),
            }
            for step, (paths, seen) in steps.items():
                ours, theirs = (path.operations(backbone, seen) / 1e12 for path in paths)
                own, other = (path.memory(backbone, checkpointing) / 1e9 for path in paths)
                cells = [
                    *(f"{each:,.0f}" if each >= 10 else f"{each:.2f}" for each in (ours, theirs)),
                    f"{theirs / ours:.2f} x",
                ]
                cells += [f"{own:.1f}", f"{other:.1f}", f"{own / other:.2f} x"]
                table.add_row(name, step, "yes" if checkpointing else "no", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
