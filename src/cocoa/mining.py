"""`cocoa mine`: hard negatives for pairs of one's own, chosen by sentence-transformers' `mine_hard_negatives`.

A hard negative is a target of another row that the model ranks high for a query. What might be right as well is left
alone: a target of equal text and image, one of another row with the same query, and (by the margin) one that
the model finds almost as near as the right one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives, pairwise_cos_sim
from torch import Tensor

from cocoa.embedding import Embedder, load_embedder
from cocoa.errors import CocoaError
from cocoa.image_listing import relative_path
from cocoa.pairs import Pair, Side, check_images
from cocoa.sources import read_file


@dataclass
class Mined:
    """What was found.

    Attributes:
        pairs: as they were read, each with its negatives: its own first, then those that were mined.
        mined: how many negatives were mined.
        without: how many rows have none at all.
        positive: mean cosine of queries and their own targets.
        negative: mean cosine of queries and mined negatives; NaN where there are none.
        examples: some of the hardest: query, target, negative.
    """

    pairs: list[Pair]
    mined: int = 0
    without: int = 0
    positive: float = 0.0
    negative: float = 0.0
    examples: list[tuple[Side, Side, Side]] = field(default_factory=list)


class _Embedded:
    """Embeddings that are there already, by name, with what `mine_hard_negatives` asks of a model."""

    device = torch.device("cpu")

    def __init__(self, queries: dict[str, Tensor], documents: dict[str, Tensor]) -> None:
        self.queries, self.documents = queries, documents

    def encode_query(self, names: Sequence[str], **_: Any) -> Any:
        return torch.stack([self.queries[name] for name in names]).numpy()

    def encode_document(self, names: Sequence[str], **_: Any) -> Any:
        return torch.stack([self.documents[name] for name in names]).numpy()

    def similarity(self, queries: Any, documents: Any) -> Tensor:
        return torch.as_tensor(queries) @ torch.as_tensor(documents).T  # of unit length

    def similarity_pairwise(self, queries: Any, documents: Any) -> Tensor:
        return pairwise_cos_sim(queries, documents)


def mine(
    model: str | Path,
    path: Path,
    output: Path,
    negatives: int = 2,
    batch_size: int = 8,
    relative_margin: float = 0.05,
    range_min: int = 0,
    max_score: float | None = None,
    image_root: str | Path | None = None,
) -> Mined:
    """Find hard negatives and write the pairs with them, as JSONL that `data.train` reads.

    Args:
        model: checkpoint folder or hub id; a better one finds harder negatives, and fewer that are wrong.
        path: a file of pairs, in any of the forms of `cocoa.sources`.
        output: a `.jsonl` file; image paths are relative to its folder where the images lie below it.
        negatives: mined for each query, at most.
        batch_size: inputs encoded at once where they are the longest.
        relative_margin: a negative's cosine is below the right target's by at least this share of it.
        range_min: leave out so many of the nearest.
        max_score: leave out what is nearer than this cosine.
        image_root: what the file's image paths are relative to.

    Raises:
        CocoaError: a mistake in the file, a missing image, too few targets, or `output` cannot be written.
    """
    if output.suffix != ".jsonl":
        raise CocoaError(f"output {output}: give the name of a .jsonl file")
    if negatives < 1 or range_min < 0 or not 0 <= relative_margin < 1:
        raise CocoaError("negatives must be 1 or more, range-min 0 or more, relative-margin from 0 to below 1")
    pairs = [pair for pair in read_file(path, image_root).pairs if pair.target != Side()]
    check_images(pairs)
    if len({pair.target.content_id() for pair in pairs}) < 2:
        raise CocoaError(f"{path}: fewer than two distinct targets, so there is no negative; add rows")
    found = choose_negatives(pairs, load_embedder(model), negatives, batch_size, relative_margin, range_min, max_score)
    write_pairs(output, found.pairs)
    return found


def choose_negatives(
    pairs: Sequence[Pair],
    embedder: Embedder,
    negatives: int,
    batch_size: int = 8,
    relative_margin: float = 0.05,
    range_min: int = 0,
    max_score: float | None = None,
) -> Mined:
    """The pairs with mined negatives behind their own; arguments as `mine`. Each distinct side is embedded once."""
    queries = {str(pair.query.content_id()): pair.query for pair in pairs}
    targets = {str(pair.target.content_id()): pair.target for pair in pairs}
    sides = [*queries.values(), *targets.values()]
    embeddings = embedder.embed(sides, batch_size, progress=True)
    embedded = list(zip([*queries, *targets], embeddings, strict=True))
    model = _Embedded(dict(embedded[: len(queries)]), dict(embedded[len(queries) :]))
    anchors = [str(pair.query.content_id()) for pair in pairs]
    positives = [str(pair.target.content_id()) for pair in pairs]
    mined = mine_hard_negatives(
        Dataset.from_dict({"query": anchors, "target": positives}),
        model,
        num_negatives=negatives,
        range_min=range_min,
        relative_margin=relative_margin,
        max_score=max_score,
        output_format="labeled-list",
        output_scores=True,
        verbose=False,
    )
    found = {(row["query"], row["target"][0]): (row["target"][1:], row["scores"][1:]) for row in mined}
    nearest: list[tuple[float, tuple[Side, Side, Side]]] = []
    result = Mined([])
    scores: list[float] = []
    for pair, anchor, positive in zip(pairs, anchors, positives, strict=True):
        names, near = found.get((anchor, positive), ([], []))
        new = [targets[name] for name in names]
        own = {side.content_id() for side in pair.negatives}
        kept = (*pair.negatives, *(side for side in new if side.content_id() not in own))
        result.pairs.append(Pair(pair.query, pair.target, kept, pair.dataset, pair.row))
        result.mined += len(kept) - len(pair.negatives)
        result.without += not kept
        scores += near
        nearest += [(score, (pair.query, pair.target, side)) for score, side in zip(near, new, strict=True)]
    right = torch.stack([model.queries[a] @ model.documents[p] for a, p in zip(anchors, positives, strict=True)])
    result.positive = right.mean().item()
    result.negative = sum(scores) / len(scores) if scores else float("nan")
    result.examples = [example for _, example in sorted(nearest, key=lambda item: -item[0])[:3]]
    return result


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSONL in the first form of `cocoa.sources`, whole or not at all.

    Raises:
        CocoaError: the file cannot be written.
    """

    def record(side: Side) -> dict[str, str]:
        image = relative_path(side.image, path.parent) if isinstance(side.image, str) else ""
        values = {"instruction": side.instruction, "text": side.text, "image": image}
        return {key: value for key, value in values.items() if value}

    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for pair in pairs:
                row: dict[str, Any] = {"query": record(pair.query), "target": record(pair.target)}
                if pair.negatives:
                    row["negatives"] = [record(side) for side in pair.negatives]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(partial, path)
    except OSError as error:
        raise CocoaError(f"output {path}: cannot be written ({error.strerror}); choose another place") from None
