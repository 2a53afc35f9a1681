"""Scoring a model on MMEB: every distinct input embedded once, kept by content, shared among the processes."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cocoa.bad_rows import BadRows
from cocoa.checkpoint import training_part, versions
from cocoa.embedding import Embedder, load_embedder, truncated
from cocoa.embedding_cache import EmbeddingCache, fingerprint, hash_folder
from cocoa.errors import CocoaError
from cocoa.eval_inputs import Inputs, distinct_inputs, with_images_present, with_images_readable
from cocoa.files import check_writable, writing
from cocoa.metrics import metrics, rank, summary
from cocoa.mmeb_eval import EvalDataset, read_eval
from cocoa.pair_eval import read_pair_eval
from cocoa.processes import this_process
from cocoa.scores import SUMMARY_NAME, write_ranks, write_scores

logger = logging.getLogger(__name__)

CACHE_FOLDER = "embeddings"
"""In the output folder, embeddings by model and content."""
WRITE_EVERY = 10.0
"""Seconds of encoding that a run which is stopped may lose."""


def evaluate(
    model: str | Path,
    data: str | Path,
    output: str | Path,
    subsets: str | Sequence[str] = "all",
    batch_size: int = 8,
    image_root: str | Path | None = None,
    split: str = "test",
    max_length: int | None = None,
    prompt_style: str = "cocoa",
    on_bad_row: str = "error",
    truncate_dims: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Score a model on a folder in MMEB-eval's layout.

    Writes the files of `cocoa.scores`. Each distinct input is encoded once, across data sets, and its embedding
    kept in `<output>/embeddings`: a run that was stopped, or that is asked for more data sets, encodes what is
    missing (and what shares a batch with it). Under `accelerate launch` the processes share the work.

    Args:
        model: checkpoint folder or hub id; any model of sentence-transformers.
        data: folder with a folder for each data set; or a file of pairs (see `cocoa.pair_eval`).
        output: made where it does not exist.
        subsets: `all`, or names of data sets.
        batch_size: inputs encoded at once where they are the longest; of shorter ones more.
        image_root: what image paths are relative to; by default `data`, or a folder or archive of images in it.
        split: which files of each data set to read; tune on `validation` where there is one.
        max_length: tokens of an input; see `cocoa.embedding.load_embedder`.
        prompt_style: `reference` for checkpoints that were trained in VLM2Vec's plain form.
        on_bad_row: `error` at the first row that cannot be used, before anything is encoded; or `skip` them all,
            counted in each score file (`num_data` less `num_pred`) and listed in the summary.
        truncate_dims: lengths to which embeddings are cut and scored as well, for the summary and the table; by
            default those that the model's contrastive stage was trained with (`matryoshka_dims`).

    Returns:
        The summary; of other processes than the main one nothing.

    Raises:
        CocoaError: a mistake in the data or the model's name, an embedding that is not finite, or `output` cannot be
            written.

    Example:
        >>> import cocoa, json, pathlib
        >>> words = ("one", "two", "three")
        >>> rows = [{"query": {"text": f"{word} stars"}, "target": {"text": f"stars: {word}"}} for word in words]
        >>> _ = pathlib.Path("held-out.json").write_text(json.dumps(rows))
        >>> summary = cocoa.evaluate("mini-qwen2-vl", "held-out.json", "scores")
        >>> list(summary["datasets"])
        ['held-out']
    """
    check_writable(Path(output), is_folder=True)
    bad = BadRows(on_bad_row)
    found = read_data(data, subsets, split, image_root, bad, prompt_style)
    embedder = load_embedder(model, max_length, prompt_style)
    if truncate_dims is None:
        truncate_dims = embedder.record.get("options", {}).get("matryoshka_dims", ())
    for dim in truncate_dims:
        embedder.check_dim(dim)
    found, digests = with_images_readable(found, bad)
    found, inputs = distinct_inputs(found, digests)
    _check_modalities(embedder, inputs, model)
    logger.info("scoring %s on them", model)
    model_hash = hash_folder(embedder.folder) if embedder.folder else ""
    image = {"tokens": list(embedder.images.tokens), "resize": embedder.images.resize}
    settings = {"prompt_style": prompt_style, "max_length": embedder.max_length}
    device = this_process().device.type
    cache = EmbeddingCache(Path(output) / CACHE_FOLDER / fingerprint(model_hash, image, settings, versions(), device))
    embeddings = encode_missing(inputs, embedder, cache, batch_size)
    about: dict[str, Any] = {
        "model": str(model),
        "model_hash": model_hash,
        "recipe": training_part(embedder.record),
        "data": str(data),
        "image_root": str(image_root) if image_root else None,
        "data_hash": {
            dataset.name: data_hash(dataset, [inputs.keys[i] for i in place])
            for dataset, place in zip(found, inputs.places, strict=True)
        },
        "split": split,
        "image": image,
        **settings,
        "shortened": embedder.shortened(inputs.sides),
        "bad_rows": [asdict(row) for row in bad.found],
        "versions": versions(),
        "facts": _facts(embedder),
        "embeddings": f"{CACHE_FOLDER}/{cache.folder.name}",
    }
    if not this_process().is_main_process:
        return {}
    ranks = rank_all(found, (embeddings[place] for place in inputs.places))
    scores = {name: metrics(own) for name, own in ranks.items()}
    about["truncated"] = {}
    for dim in sorted({*truncate_dims}, reverse=True):
        cut = truncated(embeddings, dim)
        about["truncated"][str(dim)] = summary(score(found, (cut[place] for place in inputs.places)))
    for name, count in bad.left_out().items():
        scores[name]["num_data"] += count
    numbers = {each.name: [each.number(row) for row in range(len(each.queries))] for each in found}
    with writing(Path(output) / SUMMARY_NAME):
        write_ranks(Path(output), ranks, numbers)
        return write_scores(Path(output), scores, about)


def read_data(
    data: str | Path,
    subsets: str | Sequence[str],
    split: str,
    image_root: str | Path | None,
    bad: BadRows,
    prompt_style: str = "cocoa",
) -> list[EvalDataset]:
    """The data sets of a folder in MMEB-eval's layout, or that of a file of pairs, with their image files there.

    Raises:
        CocoaError: see `read_eval`, `read_pair_eval` and `with_images_present`.
    """
    if not Path(data).is_file():
        found = read_eval(data, subsets, split, image_root, bad, prompt_style)
        return with_images_present(found, image_root or data, bad)
    if prompt_style != "cocoa" or subsets != "all":
        raise CocoaError(f"{data}: a file is one data set in our own form; leave --subsets and --prompt-style out")
    found = [read_pair_eval(data, image_root, bad)]
    return with_images_present(found, image_root or Path(data).parent, bad)


def _check_modalities(embedder: Embedder, inputs: Inputs, model: str | Path) -> None:
    """See that the model can embed every input, before it embeds the first."""
    for side, (name, row) in zip(inputs.sides, inputs.origins, strict=True):
        if reason := embedder.refuses(side):
            raise CocoaError(f"model {model}: data set {name}, row {row}: {reason}; leave the data set out (--subsets)")


def encode_missing(inputs: Inputs, embedder: Embedder, cache: EmbeddingCache, batch_size: int = 8) -> Tensor:
    """Embeddings (inputs, D), from the cache where they are in it; the processes share what is not.

    Batches are the same however many processes there are and wherever an earlier run was stopped, and one that is not
    there whole is encoded whole: so are the embeddings, to the last bit. What a run on other data sets has encoded
    stays as it is, so that its scores do too.

    Raises:
        CocoaError: an embedding is not finite; the message names data set and row.
    """
    state, keys = this_process(), inputs.keys
    cache.read()
    state.wait_for_everyone()  # before anyone writes: all must see the same embeddings missing
    batches = embedder.batches(inputs.sides, batch_size)
    missing = [batch for batch in batches if any(keys[i] not in cache.rows for i in batch)]
    mine = missing[state.process_index :: state.num_processes]
    unwritten: list[tuple[list[int], Tensor]] = []
    written = time.monotonic()

    def write() -> None:
        if unwritten:
            cache.write([keys[i] for batch, _ in unwritten for i in batch], torch.cat([rows for _, rows in unwritten]))
            unwritten.clear()

    for batch, rows in embedder.embed_batches(inputs.sides, mine, state.is_main_process):
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
    absent = sum(key not in cache.rows for key in keys)
    if absent:
        raise CocoaError(f"{cache.folder}: {absent} embeddings are missing; do all processes write to the same disk?")
    return torch.stack([cache.rows[key] for key in keys])


def score(found: Sequence[EvalDataset], embeddings: Iterable[Tensor]) -> dict[str, dict[str, float]]:
    """The metrics of each data set from the (inputs, D) embeddings of each."""
    return {name: metrics(ranks) for name, ranks in rank_all(found, embeddings).items()}


def rank_all(found: Sequence[EvalDataset], embeddings: Iterable[Tensor]) -> dict[str, Tensor]:
    """The ranks (queries,) of each data set from the (inputs, D) embeddings of each."""
    return {each.name: rank(each, rows) for each, rows in zip(found, embeddings, strict=True)}


def data_hash(dataset: EvalDataset, keys: Sequence[bytes]) -> str:
    """A hash of who is compared with whom, by content: texts, pixels and order."""
    packed = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)  # (inputs, bytes of a key)
    digest = hashlib.blake2b(digest_size=16)
    for query, candidates in zip(dataset.queries, dataset.candidates, strict=True):
        digest.update(packed[query].tobytes() + packed[candidates].tobytes() + b"\0")
    return digest.hexdigest()


def _facts(embedder: Embedder) -> dict[str, Any]:
    """What the leaderboard asks about a model."""
    model = embedder.model
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "backbone": embedder.record.get("source"),
        "billions": round(parameters / 1e9, 2),
        "dimension": model.get_embedding_dimension(),
        "max_length": embedder.max_length if embedder.form != "items" else model.max_seq_length,
    }
