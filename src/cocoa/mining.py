"""`cocoa mine`: hard negatives for pairs of one's own, chosen by sentence-transformers' `mine_hard_negatives`.

A hard negative is a target of another row that the model ranks high for a query. What might be right as well is left
alone: a target of equal text and image, one of another row with the same query, and (by the margin) one that
the model finds almost as near as the right one (of several right ones, the farthest). Equal are texts, and images by
what their files hold; an instruction is no content.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives, pairwise_cos_sim
from torch import Tensor

from cocoa.dialogue_files import as_records
from cocoa.embedding import Embedder, load_embedder
from cocoa.embedding_cache import content_key
from cocoa.errors import CocoaError
from cocoa.eval_inputs import inspect_images
from cocoa.files import check_writable, write_text
from cocoa.image_listing import path_in, root_of
from cocoa.pair_files import read_file
from cocoa.pairs import Pair, Side, check_images
from cocoa.processes import this_process

SCORES = 2**26
"""Scores that are in memory at once: 256 MB of float32."""
EXAMPLES = 3
"""Of the hardest negatives, to look at."""


@dataclass
class Mined:
    """What was found.

    Attributes:
        pairs: as they were read, each with its negatives: its own first, then those that were mined.
        dropped: how many rows have no target (dialogues) and are not among them.
        mined: how many negatives were mined, besides those that a row had already.
        without: how many rows have none at all.
        positive: mean cosine of queries and their own targets.
        negative: mean cosine of queries and mined negatives; NaN where there are none.
        examples: some of the hardest: query, target, negative.
        image_root: the folder of the images, where they do not lie below the written file's.
    """

    pairs: list[Pair]
    dropped: int = 0
    mined: int = 0
    without: int = 0
    positive: float = 0.0
    negative: float = 0.0
    examples: list[tuple[Side, Side, Side]] = field(default_factory=list)
    image_root: str | None = None


class _Embedded:
    """Embeddings of unit length that are there already, by name, with what `mine_hard_negatives` asks of a model."""

    def __init__(self, queries: dict[str, Tensor], documents: dict[str, Tensor]) -> None:
        self.queries, self.documents = queries, documents
        self.device = this_process().device

    def encode_query(self, names: Sequence[str], **_: Any) -> Any:
        return torch.stack([self.queries[name] for name in names]).numpy()

    def encode_document(self, names: Sequence[str], **_: Any) -> Any:
        return torch.stack([self.documents[name] for name in names]).numpy()

    def similarity(self, queries: Any, documents: Any) -> Tensor:
        return torch.as_tensor(queries, device=self.device) @ torch.as_tensor(documents, device=self.device).T

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
    range_max: int | None = None,
    max_score: float | None = None,
    image_root: str | Path | None = None,
) -> Mined:
    """Find hard negatives and write the pairs with them, as JSONL that `data.train` reads.

    Args:
        model: checkpoint folder or hub id; a better one finds harder negatives, and fewer that are wrong.
        path: a file of pairs, in any of the forms of `cocoa.pair_files`.
        output: a `.jsonl` file; image paths are relative to its folder where all images lie below it.
        negatives: mined for each query, at most.
        batch_size: inputs encoded at once where they are the longest.
        relative_margin: a negative's cosine is below the right target's by at least this share of it.
        range_min: leave out so many of the nearest.
        range_max: look at so many of the nearest; by default 10 for each negative, and as many as any query has
            right targets, behind `range_min`.
        max_score: leave out what is nearer than this cosine.
        image_root: what the file's image paths are relative to, and must not leave.

    Raises:
        CocoaError: a mistake in the file, an image that is missing or broken, too few targets, a model that does not
            embed such sides, or `output` cannot be written (which is seen before anything is embedded).
    """
    if this_process().num_processes > 1:
        raise CocoaError("mine: runs in one process; start it without a launcher")
    if output.suffix != ".jsonl":
        raise CocoaError(f"output {output}: give the name of a .jsonl file")
    check_writable(output, is_folder=False)
    if output.resolve() == path.resolve():
        raise CocoaError(f"output {output}: that is the file of pairs; choose another name")
    if negatives < 1 or range_min < 0 or not 0 <= relative_margin < 1:
        raise CocoaError("negatives must be 1 or more, range-min 0 or more, relative-margin from 0 to below 1")
    if range_max is not None and range_max < range_min + negatives:
        raise CocoaError(f"range-max {range_max}: must be range-min and negatives together, or more")
    if not path.is_file():
        raise CocoaError(f"{path}: no such file; name a file of pairs")
    read = read_file(path, image_root)
    pairs = [pair for pair in read.pairs if pair.target != Side()]
    check_images(pairs, read.roots)
    if len({pair.target.content_id() for pair in pairs}) < 2:
        raise CocoaError(f"{path}: fewer than two distinct targets, so there is no negative; add rows")
    embedder = load_embedder(model)
    for pair in pairs:
        for side in (pair.query, pair.target):
            if reason := embedder.refuses(side):
                raise CocoaError(f"model {model}: {path}, row {pair.row}: {reason}; choose another model")
    found = choose_negatives(pairs, embedder, negatives, batch_size, relative_margin, range_min, range_max, max_score)
    found.dropped = len(read) - len(pairs)
    found.image_root = write_pairs(output, found.pairs)
    return found


def choose_negatives(
    pairs: Sequence[Pair],
    embedder: Embedder,
    negatives: int,
    batch_size: int = 8,
    relative_margin: float = 0.05,
    range_min: int = 0,
    range_max: int | None = None,
    max_score: float | None = None,
) -> Mined:
    """The pairs with mined negatives behind their own; arguments as `mine`.

    Each distinct query (its instruction counts) and each distinct target is embedded once, a target with the
    instruction of the first row that has it.

    Raises:
        CocoaError: an image cannot be decoded, or an embedding is not finite.
    """
    digests = _image_digests(pairs)

    def name(side: Side) -> str:
        return content_key(side, digests.get(str(side.image))).hex()

    def content(side: Side) -> str:
        return name(replace(side, instruction=""))

    queries: dict[str, Side] = {}
    targets: dict[str, Side] = {}
    rights: dict[str, dict[str, None]] = defaultdict(dict)  # query's content -> its right targets
    for pair in pairs:
        queries.setdefault(name(pair.query), pair.query)
        targets.setdefault(content(pair.target), pair.target)
        rights[content(pair.query)][content(pair.target)] = None
    embeddings = embedder.embed([*queries.values(), *targets.values()], batch_size, progress=True)
    if not embeddings.isfinite().all():
        raise CocoaError("an embedding is not finite; the model is broken")
    model = _Embedded(
        dict(zip(queries, embeddings[: len(queries)], strict=True)),
        dict(zip(targets, embeddings[len(queries) :], strict=True)),
    )
    # Whatever is right for a query's content is right under each of its instructions.
    known = [(query, target) for query, side in queries.items() for target in rights[content(side)]]
    mined = mine_hard_negatives(
        Dataset.from_dict({"query": [query for query, _ in known], "target": [target for _, target in known]}),
        model,
        num_negatives=negatives,
        range_min=range_min,
        range_max=range_max,
        relative_margin=relative_margin,
        max_score=max_score,
        output_format="labeled-list",
        output_scores=True,
        faiss_batch_size=max(1, SCORES // len(targets)),  # of the search without FAISS too
        verbose=False,
    )
    near = {row["query"]: list(zip(row["target"][1:], row["scores"][1:], strict=True)) for row in mined}
    result = Mined([])
    hardest: list[tuple[float, tuple[Side, Side, Side]]] = []
    scores: list[float] = []
    for pair in pairs:
        own = {content(side) for side in pair.negatives}
        new = [(targets[other], score) for other, score in near.get(name(pair.query), []) if other not in own]
        result.pairs.append(replace(pair, negatives=(*pair.negatives, *(side for side, _ in new))))
        result.without += not result.pairs[-1].negatives
        scores += [score for _, score in new]
        hardest += [(score, (pair.query, pair.target, side)) for side, score in new[:1]]
    result.mined = len(scores)
    result.positive = fmean(
        float(model.queries[name(pair.query)] @ model.documents[content(pair.target)]) for pair in pairs
    )
    result.negative = fmean(scores) if scores else float("nan")
    result.examples = [example for _, example in sorted(hardest, key=lambda item: -item[0])[:EXAMPLES]]
    return result


def _image_digests(pairs: Sequence[Pair]) -> dict[str, bytes]:
    """A hash of what each image file of the pairs holds."""
    rows = {side.image: pair for pair in reversed(pairs) for side in pair.sides if isinstance(side.image, str)}
    looked = inspect_images(rows)
    for path, inspected in looked.items():
        if inspected.fault:
            raise CocoaError(f"{path}: {inspected.fault} (data set {rows[path].dataset}, row {rows[path].row})")
    return {path: inspected.digest for path, inspected in looked.items()}


def write_pairs(path: Path, pairs: Sequence[Pair]) -> str | None:
    """Write pairs as JSONL in the first form of `cocoa.pair_files`, whole or not at all.

    Returns:
        What `data.image_root` has to be; None where the images lie below the file's folder.

    Raises:
        CocoaError: the file cannot be written.
    """
    images = (side.image for pair in pairs for side in pair.sides if isinstance(side.image, str))
    root = root_of(images, path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(_record(pair, path.parent, root), ensure_ascii=False) + "\n" for pair in pairs]
        write_text(path, "".join(lines))
    except OSError as error:
        raise CocoaError(f"output {path}: cannot be written ({error.strerror}); choose another place") from None
    return root


def _record(pair: Pair, folder: Path, root: str | None) -> dict[str, Any]:
    """A row of the file in that folder, in the first form of `cocoa.pair_files`; `root` as `root_of` says."""

    def values(side: Side) -> dict[str, str]:
        image = path_in(side.image, folder, root) if isinstance(side.image, str) else ""
        found = {"instruction": side.instruction, "text": side.text, "image": image}
        return {key: value for key, value in found.items() if value}

    row: dict[str, Any] = {"query": values(pair.query), "target": values(pair.target)}
    if pair.dialogue:
        row["dialogue"] = as_records(pair.dialogue)
    return row | ({"negatives": [values(side) for side in pair.negatives]} if pair.negatives else {})
