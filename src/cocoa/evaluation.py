"""hit@1 over each query's own candidates: the metric of MMEB, and the score files that other tools read.

Ties count against the model (the reference's `argmax` with the right answer first gives a collapsed model
100 %), exact duplicates of the right candidate leave the list, and a NaN is an error. Every average is the
plain mean over data sets.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import load_file_path
from torch import Tensor

from cocoa.backbone import batch_vision_attention, load_backbone, locate
from cocoa.catalogue import TABLES, find_dataset
from cocoa.catalogue import datasets as table_datasets
from cocoa.checkpoint import RECORD_NAME, as_sentence_transformer, embed, read_record, versions, write_json
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.mmeb import EvalDataset, check_eval_images, read_eval
from cocoa.pairs import Side

logger = logging.getLogger(__name__)

CUTOFFS = (1, 5, 10)
DEFAULT_IMAGES = ImageBudget((4, 576))
"""Image budget for a backbone that carries no record of ours."""


@dataclass(frozen=True)
class Embedder:
    """A model and how it wants its images."""

    model: SentenceTransformer
    images: ImageBudget

    def embed(self, sides: Sequence[Side], batch_size: int = 8) -> Tensor:
        """Embeddings (len(sides), D), float32, on the CPU."""
        return embed(self.model, self.images, sides, batch_size, progress=True)


def load_embedder(model: str | Path) -> Embedder:
    """A checkpoint by its sentence-transformers files; an untouched backbone causal, last token, our template.

    Raises:
        CocoaError: neither can be loaded.
    """
    model = locate(str(model))
    if Path(model).is_file():
        raise CocoaError(f"model {model}: a file; give the checkpoint's folder or a hub id")
    if _model_file(model, "modules.json") is not None:
        record = _model_file(model, RECORD_NAME)
        image = read_record(record.parent).get("image", {}) if record else {}
        budget = ImageBudget(tuple(image.get("tokens", DEFAULT_IMAGES.tokens)), image.get("resize", "aspect"))
        found = SentenceTransformer(str(model))
        batch_vision_attention(found.transformers_model)
        return Embedder(found, budget)
    backbone = load_backbone(model, dtype="auto", attention="causal")
    least, most = backbone.images.tokens
    backbone.set_image_budget(ImageBudget((least, min(most, DEFAULT_IMAGES.tokens[1]))))
    if torch.cuda.is_available():
        backbone.model.to("cuda")
    return Embedder(as_sentence_transformer(backbone), backbone.images)


def _model_file(model: str | Path, name: str) -> Path | None:
    """A file of a checkpoint folder or hub id, or None where it has no such file."""
    try:
        path = load_file_path(str(model), name)
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        raise CocoaError(f"model {model}: cannot be read ({reason}); give a checkpoint folder or a hub id") from None
    return Path(path) if path else None


def evaluate(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    subsets: str | Sequence[str] = "all",
    batch_size: int = 8,
    image_root: str | Path | None = None,
    split: str = "test",
) -> dict[str, Any]:
    """Score a model on a folder in MMEB-eval's layout.

    Writes `<output>/<dataset>_score.json` and `<output>/summary.json`. Each distinct input is encoded once,
    across data sets.

    Args:
        model: checkpoint folder or hub id.
        data: folder with a folder for each data set.
        output: made where it does not exist.
        subsets: `all`, or names of data sets.
        batch_size: inputs encoded at once.
        image_root: what image paths are relative to; by default `data`, or `images` or `eval_images` in it.
        split: which files of each data set to read; tune on `validation` where there is one.

    Returns:
        The summary.

    Raises:
        CocoaError: a mistake in the data or the model's name, or an embedding that is not finite.
    """
    found = read_eval(data, subsets, split, image_root)
    check_eval_images(found)
    embedder = load_embedder(model)
    about = {
        "model": str(model),
        "data": str(data),
        "split": split,
        "image": {"tokens": list(embedder.images.tokens), "resize": embedder.images.resize},
        "versions": versions(),
    }
    return score(found, encode(found, embedder, batch_size), Path(output), about)


def encode(found: Sequence[EvalDataset], embedder: Embedder, batch_size: int = 8) -> list[Tensor]:
    """Embeddings (inputs, D) of each data set's inputs; what several data sets share is encoded once."""
    numbers: dict[tuple[str, Any], int] = {}
    sides: list[Side] = []
    places: list[np.ndarray] = []
    for dataset in found:
        for side in dataset.inputs:
            if numbers.setdefault((side.prompt(), side.image), len(sides)) == len(sides):
                sides.append(side)
        places.append(np.array([numbers[side.prompt(), side.image] for side in dataset.inputs]))
    logger.info("%d data sets, %d distinct inputs", len(found), len(sides))
    embeddings = embedder.embed(sides, batch_size)
    return [embeddings[place] for place in places]


def score(
    found: Sequence[EvalDataset], embeddings: Sequence[Tensor], output: Path, about: dict[str, Any]
) -> dict[str, Any]:
    """The scores' `summary`, with what it is about; written into `output` with each data set's score file.

    Args:
        found: the data sets.
        embeddings: (inputs, D) of each.
        output: made where it does not exist.
        about: what else the summary says.
    """
    output.mkdir(parents=True, exist_ok=True)
    scores = {}
    for dataset, embedded in zip(found, embeddings, strict=True):
        scores[dataset.name] = metrics(rank(dataset, embedded))
        write_json(output / f"{dataset.name}_score.json", scores[dataset.name])
    result = summary(scores) | about
    write_json(output / "summary.json", result)
    return result


def rank(dataset: EvalDataset, embeddings: Tensor) -> Tensor:
    """The rank of each query's right candidate, 1 the best: (queries,).

    Args:
        dataset: who is compared with whom; the right candidate stands first.
        embeddings: (inputs, D), normalised.

    Raises:
        CocoaError: an embedding is not finite; the message names data set and row.
    """
    broken = ~embeddings.isfinite().all(1)  # (inputs,)
    ranks = []
    for row, (query, candidates) in enumerate(zip(dataset.queries, dataset.candidates, strict=True)):
        ids = torch.from_numpy(candidates)
        if broken[query] or broken[ids].any():
            raise CocoaError(f"data set {dataset.name}, row {row}: an embedding is not finite; the model is broken")
        # (candidates,); row by row, since a matrix product rounds equal candidates differently by their place
        scores = (embeddings[ids] * embeddings[query]).sum(1)
        others = ids != ids[0]  # exact duplicates of the right one leave the list
        ranks.append(1 + int((others & (scores >= scores[0])).sum()))
    return torch.tensor(ranks)


def metrics(ranks: Tensor) -> dict[str, float]:
    """The metrics of a score file from the ranks (queries,) of the one right candidate, as fractions."""
    ranks = ranks.double()
    found: dict[str, Tensor] = {}
    for k in CUTOFFS:
        hit = (ranks <= k).double()
        gain = hit / torch.log2(ranks + 1)
        precision, recall = hit / k, hit
        found |= {
            f"hit@{k}": hit,
            f"ndcg_linear@{k}": gain,
            f"ndcg_exponential@{k}": gain,
            f"precision@{k}": precision,
            f"recall@{k}": recall,
            f"f1@{k}": hit * 2 / (k + 1),
            f"map@{k}": hit / ranks,
            f"mrr@{k}": hit / ranks,
        }
    means = {name: values.mean().item() for name, values in found.items()}
    return means | {"num_pred": len(ranks), "num_data": len(ranks)}


def summary(scores: dict[str, dict[str, float]]) -> dict[str, Any]:
    """hit@1 of every data set and the averages over its table (MMEB's, else scenes'), each with what is missing.

    An average is the plain mean over data sets, in percent; data sets that are in no table stand alone.
    """
    hits = {name: 100 * score["hit@1"] for name, score in scores.items()}
    known = {entry.name: value for name, value in hits.items() if (entry := find_dataset(name)) is not None}
    groups: dict[str, list[str]] = {}
    table = next((table for table in TABLES if known.keys() & table_datasets(table).keys()), TABLES[0])
    for entry in table_datasets(table).values():
        for group in (entry.meta_task, "OOD" if entry.ood else "IND", "All"):
            groups.setdefault(group, []).append(entry.name)
    averages = {}
    for group in ("Classification", "VQA", "Retrieval", "Grounding", "IND", "OOD", "All"):
        there = [known[name] for name in groups[group] if name in known]
        averages[group] = {
            "hit@1": _mean(there),
            "datasets": len(there),
            "of": len(groups[group]),
            "missing": [name for name in groups[group] if name not in known],
        }
    return {"datasets": hits, "averages": averages}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None
