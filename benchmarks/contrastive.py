"""A step of the contrastive stage, ours against sentence-transformers' cached loss: seconds, memory, share of the work.

    python benchmarks/contrastive.py [--shape middle] [--pairs 32] [--longest 256] [--mini-batch-size 32]

Forward and backward pass of the same pairs with the same weights, all of them trained, the tower too; encoding the
images is not in it. The floor counts one forward and one backward pass: what GradCache embeds again is overhead.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import rounds
import torch
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
from shapes import Floor, build_for, pairs_like_mmeb, prepared

from cocoa.account import peak_bytes
from cocoa.architectures import quicken_tower
from cocoa.backbone import Backbone
from cocoa.checkpoint import as_sentence_transformer
from cocoa.contrastive_loss import cached_loss, info_nce
from cocoa.inputs import ImageBudget
from cocoa.packing import PackedEmbedder
from cocoa.pairs import Pair
from cocoa.stages.contrastive import ContrastiveArguments, PairDataset, collate

TEMPERATURE = 0.02
LONGEST = 256
"""Tokens of the largest image, by default."""
MINI_BATCH = 32
"""Inputs that sentence-transformers' cached loss embeds at a time, by default."""


def measure(args: argparse.Namespace) -> rounds.Measured:
    """One path."""
    backbone = build_for(args)
    device = backbone.model.device
    pairs = pairs_like_mmeb(args.pairs, args.longest)
    encoded = encoded_pairs(backbone, pairs, args.longest)
    before = peak_bytes(device)
    if args.path == "ours":
        quicken_tower(backbone.model)
        model = prepared(PackedEmbedder(backbone), device)
        batch = collate(encoded, backbone, args.tokens_per_pass)
        ids, places = batch["ids"].to(device), batch["places"].to(device)

        def step() -> float:
            passes = [{name: value.to(device) for name, value in row.items()} for row in batch["passes"]]
            loss_of = lambda vectors: info_nce(vectors[places], ids, TEMPERATURE)  # noqa: E731
            loss = cached_loss(model, passes, loss_of, args.passes_kept)
            loss.backward()
            return loss.item()

    else:
        theirs = prepared(as_sentence_transformer(backbone), device)
        cached = CachedMultipleNegativesRankingLoss(theirs, scale=1 / TEMPERATURE, mini_batch_size=args.mini_batch_size)
        columns = [
            [backbone.messages(side) for side in column]
            for column in ([p.query for p in pairs], [p.target for p in pairs])
        ]
        features = [theirs.preprocess(column) for column in columns]

        def step() -> float:
            moved = [{k: v.to(device) if torch.is_tensor(v) else v for k, v in each.items()} for each in features]
            loss = cached(moved, None)
            loss.backward()
            return loss.item()

    work = Floor(backbone)
    for row in encoded:
        for side in (row["query"], row["target"]):
            work.add_tokens(len(side["input_ids"]))
            work.add_scores(len(side["input_ids"]) ** 2)
            work.add_images([side])
    return rounds.measured(step, work, backbone, before, args)


def encoded_pairs(backbone: Backbone, pairs: Sequence[Pair], longest: int) -> list[dict[str, Any]]:
    """Pairs as the stage takes them, their images of at most so many tokens."""
    backbone.set_image_budget(ImageBudget((4, longest)))
    on_gpu = backbone.model.device.type == "cuda"
    dataset = PairDataset(
        pairs, backbone, ContrastiveArguments(output_dir="unused", batch_size=len(pairs), use_cpu=not on_gpu)
    )
    return [dataset[row] for row in range(len(pairs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--longest", type=int, default=LONGEST)
    parser.add_argument("--passes-kept", type=int, default=1, help="of ours")
    parser.add_argument("--mini-batch-size", type=int, default=MINI_BATCH, help="of the reference")
    rounds.run(parser, measure)


if __name__ == "__main__":
    main()
