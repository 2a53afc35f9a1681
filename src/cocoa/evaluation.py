"""Scoring a model on MMEB: what a model is read as, and its embedding of every distinct input, made once."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub.errors import HfHubHTTPError
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import load_file_path
from torch import Tensor

from cocoa.backbone import batch_vision_attention, load_backbone, locate
from cocoa.checkpoint import RECORD_NAME, as_sentence_transformer, read_record, versions
from cocoa.embedding import WORKERS, embed, embed_batches, equal_work, token_counts
from cocoa.embedding_cache import ContentKeys, EmbeddingCache, fingerprint, hash_folder
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.metrics import metrics, rank, summary
from cocoa.mmeb import EvalDataset, check_eval_images, read_eval
from cocoa.pairs import Side
from cocoa.scores import write_scores

logger = logging.getLogger(__name__)

DEFAULT_IMAGES = ImageBudget((4, 576))
"""Image budget for a backbone that carries no record of ours."""
CACHE_FOLDER = "embeddings"
"""In the output folder, embeddings by model and content."""
WRITE_EVERY = 10.0
"""Seconds of encoding that a run which is stopped may lose."""


@dataclass(frozen=True)
class Embedder:
    """A model and how it wants its images.

    Attributes:
        model: of sentence-transformers.
        images: the token budget of an image, and how it is resized.
        folder: where its files lie; None where it was not loaded from any.
        record: what its checkpoint says of how it was made; empty for one that is not ours.
    """

    model: SentenceTransformer
    images: ImageBudget
    folder: Path | None = None
    record: dict[str, Any] = field(default_factory=dict)

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
    device = PartialState().device
    if _model_file(model, "modules.json") is not None:
        path = _model_file(model, RECORD_NAME)
        record = read_record(path.parent) if path else {}
        image = record.get("image", {})
        budget = ImageBudget(tuple(image.get("tokens", DEFAULT_IMAGES.tokens)), image.get("resize", "aspect"))
        found = SentenceTransformer(str(model), device=str(device))
        batch_vision_attention(found.transformers_model)
        return Embedder(found, budget, _folder_of(model), record)
    backbone = load_backbone(model, dtype="auto", attention="causal")
    least, most = backbone.images.tokens
    backbone.set_image_budget(ImageBudget((least, min(most, DEFAULT_IMAGES.tokens[1]))))
    backbone.model.to(device)
    return Embedder(as_sentence_transformer(backbone), backbone.images, _folder_of(model))


def _model_file(model: str | Path, name: str) -> Path | None:
    """A file of a checkpoint folder or hub id, or None where it has no such file."""
    try:
        path = load_file_path(str(model), name)
    except HfHubHTTPError as error:
        reason = str(error).splitlines()[0]
        raise CocoaError(f"model {model}: cannot be read ({reason}); give a checkpoint folder or a hub id") from None
    return Path(path) if path else None


def _folder_of(model: str) -> Path | None:
    """The folder of a model whose files are on this machine by now."""
    path = _model_file(model, "config.json")
    return path.parent if path else None


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

    Writes the files of `cocoa.scores`. Each distinct input is encoded once, across data sets, and its embedding
    kept in `<output>/embeddings`: a run that was stopped, or that is asked for more data sets, encodes what is
    missing. Under `accelerate launch` the processes share the work; all of them return the summary.

    Args:
        model: checkpoint folder or hub id.
        data: folder with a folder for each data set.
        output: made where it does not exist.
        subsets: `all`, or names of data sets.
        batch_size: inputs encoded at once where they are the longest; of shorter ones more.
        image_root: what image paths are relative to; by default `data`, or a folder or archive of images in it.
        split: which files of each data set to read; tune on `validation` where there is one.

    Returns:
        The summary.

    Raises:
        CocoaError: a mistake in the data or the model's name, or an embedding that is not finite.
    """
    found = read_eval(data, subsets, split, image_root)
    check_eval_images(found, image_root or data)
    embedder = load_embedder(model)
    inputs = distinct_inputs(found)
    model_hash = hash_folder(embedder.folder) if embedder.folder else ""
    image = {"tokens": list(embedder.images.tokens), "resize": embedder.images.resize}
    device = PartialState().device.type
    cache = EmbeddingCache(Path(output) / CACHE_FOLDER / fingerprint(model_hash, image, versions(), device))
    keys = content_keys(inputs.sides)
    embeddings = encode_missing(inputs, keys, embedder, cache, batch_size)
    about = {
        "model": str(model),
        "model_hash": model_hash,
        "recipe": {key: value for key, value in embedder.record.items() if key not in ("image", "versions")},
        "data": str(data),
        "data_hash": {each.name: _data_hash(each, keys[at]) for each, at in zip(found, inputs.places, strict=True)},
        "split": split,
        "image": image,
        "versions": versions(),
        "facts": _facts(embedder),
    }
    scores = score(found, [embeddings[place] for place in inputs.places])
    if not PartialState().is_main_process:
        return summary(scores) | about
    return write_scores(Path(output), scores, about)


@dataclass(frozen=True)
class Inputs:
    """Every distinct input of several data sets.

    Attributes:
        sides: the inputs, by (instruction and text as rendered, image).
        places: for each data set, which of them each of its own inputs is: (inputs,).
        origins: a data set and row that each stands in.
    """

    sides: list[Side]
    places: list[np.ndarray]
    origins: list[tuple[str, int]]


def distinct_inputs(found: Sequence[EvalDataset]) -> Inputs:
    """What is to be encoded for these data sets, each input once."""
    numbers: dict[tuple[str, Any], int] = {}
    inputs = Inputs([], [], [])
    for dataset in found:
        for side, row in zip(dataset.inputs, dataset.first_rows(), strict=True):
            if numbers.setdefault((side.prompt(), side.image), len(numbers)) == len(inputs.sides):
                inputs.sides.append(side)
                inputs.origins.append((dataset.name, row))
        inputs.places.append(np.array([numbers[side.prompt(), side.image] for side in dataset.inputs]))
    logger.info("%d data sets, %d distinct inputs", len(found), len(inputs.sides))
    return inputs


def encode(found: Sequence[EvalDataset], embedder: Embedder, batch_size: int = 8) -> list[Tensor]:
    """Embeddings (inputs, D) of each data set's inputs; what several data sets share is encoded once."""
    inputs = distinct_inputs(found)
    embeddings = embedder.embed(inputs.sides, batch_size)
    return [embeddings[place] for place in inputs.places]


def content_keys(sides: Sequence[Side]) -> np.ndarray:
    """The key of each input's content, image files included: (sides,) of bytes."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return np.array(list(pool.map(ContentKeys(), sides)), dtype=object)


def encode_missing(
    inputs: Inputs, keys: np.ndarray, embedder: Embedder, cache: EmbeddingCache, batch_size: int = 8
) -> Tensor:
    """Embeddings (inputs, D), from the cache where they are in it; the processes share what is not.

    Batches are the same whatever is in the cache and however many processes there are, and one that is not there
    whole is encoded whole: so are the embeddings, to the last bit.

    Raises:
        CocoaError: an embedding is not finite; the message names data set and row.
    """
    state = PartialState()
    cache.read()
    batches = equal_work(token_counts(embedder.model, embedder.images, inputs.sides), batch_size)
    missing = [batch for batch in batches if any(keys[i] not in cache.rows for i in batch)]
    mine = missing[state.process_index :: state.num_processes]
    unwritten: list[tuple[list[int], Tensor]] = []
    written = time.monotonic()

    def write() -> None:
        if unwritten:
            cache.write([keys[i] for batch, _ in unwritten for i in batch], torch.cat([rows for _, rows in unwritten]))
            unwritten.clear()

    for batch, rows in embed_batches(embedder.model, embedder.images, inputs.sides, mine, state.is_main_process):
        for i in (~rows.isfinite().all(1)).nonzero().flatten().tolist():
            name, row = inputs.origins[batch[i]]
            raise CocoaError(f"data set {name}, row {row}: an embedding is not finite; the model is broken")
        unwritten.append((batch, rows))
        if time.monotonic() - written > WRITE_EVERY:
            write()
            written = time.monotonic()
    write()
    state.wait_for_everyone()
    if state.num_processes > 1:
        cache.read()
    return torch.stack([cache.rows[key] for key in keys])


def score(found: Sequence[EvalDataset], embeddings: Sequence[Tensor]) -> dict[str, dict[str, float]]:
    """The metrics of each data set from the (inputs, D) embeddings of each."""
    return {each.name: metrics(rank(each, rows)) for each, rows in zip(found, embeddings, strict=True)}


def _data_hash(dataset: EvalDataset, keys: np.ndarray) -> str:
    """A hash of who is compared with whom, by content: texts, pixels and order."""
    digest = hashlib.blake2b(digest_size=16)
    for query, candidates in zip(dataset.queries, dataset.candidates, strict=True):
        digest.update(b"".join(keys[[query, *candidates]]) + b"\0")
    return digest.hexdigest()


def _facts(embedder: Embedder) -> dict[str, Any]:
    """What the leaderboard asks about a model."""
    model = embedder.model
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "backbone": embedder.record.get("source"),
        "billions": round(parameters / 1e9, 2),
        "dimension": model.get_embedding_dimension(),
        "max_length": model.max_seq_length,
    }
