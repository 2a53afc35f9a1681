"""`cocoa embed`: the embeddings of a corpus, in one parquet file for each of its parts.

A file is there whole or not at all, and its name stands for the rows it was made of: a run that was stopped, or whose
corpus has grown, embeds what is missing. Its metadata says which model made it; no other model's is added.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from cocoa.bad_rows import POLICIES
from cocoa.batching import prepared
from cocoa.corpus import Columns, Part, Row, list_parts, read_part
from cocoa.corpus_files import FOLDER, SETTINGS_NAME, Embedded, bad_rows_of, claim, summarise, write_part
from cocoa.embedding import Embedder, load_embedder
from cocoa.embedding_cache import hash_folder
from cocoa.errors import CocoaError, ImageError
from cocoa.output_folder import owned
from cocoa.processes import counting, this_process, wait_for_files

logger = logging.getLogger(__name__)

BLOCK = 1024
"""Rows in memory at a time, which are sorted by length."""
PRECISIONS = ("float32", "float16")


@dataclass(frozen=True)
class EmbedSettings:
    """What is embedded, and how.

    Attributes:
        model: checkpoint folder or hub id; any model of sentence-transformers.
        source: see `cocoa.corpus.list_parts`.
        columns: of the source's files.
        instruction: for rows that have none of their own.
        part_size: rows of a file that is written, at most.
        precision: of the numbers in it, `float32` or `float16`.
        max_length: tokens of an input; by default what the model was trained with.
        image_root: what image paths are relative to, and must not leave; by default the source file's folder.
        batch_size: inputs embedded at once where they are the longest; of shorter ones more.
        on_bad_row: a row that cannot be embedded is an `error`, or left out (`skip`).
        max_bad_share: share of the corpus' rows that a process may leave out.
        truncate_dim: length that embeddings are cut to; None leaves them whole.
    """

    model: str
    source: Path
    columns: Columns = field(default_factory=Columns)
    instruction: str = ""
    part_size: int = 10_000
    precision: str = "float32"
    max_length: int | None = None
    image_root: Path | None = None
    batch_size: int = 8
    on_bad_row: str = "error"
    max_bad_share: float = 0.1
    truncate_dim: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise CocoaError(f"precision {self.precision!r}: choose {' or '.join(PRECISIONS)}")
        if self.on_bad_row not in POLICIES:
            raise CocoaError(f"on-bad-row {self.on_bad_row!r}: choose {' or '.join(POLICIES)}")
        for key in ("part_size", "batch_size"):
            if getattr(self, key) < 1:
                raise CocoaError(f"{key.replace('_', '-')} {getattr(self, key)}: must be 1 or more")
        if not 0 < self.max_bad_share <= 1:
            raise CocoaError(f"max-bad-share {self.max_bad_share}: must be above 0 and at most 1")

    def instructed(self, row: Row) -> Row:
        """A row as it is embedded: with the run's instruction, where it has none of its own."""
        return replace(row, side=replace(row.side, instruction=row.side.instruction or self.instruction))


def embed_corpus(settings: EmbedSettings, output: Path) -> dict[str, Any]:
    """Write `output/embeddings/*.parquet` (columns `id` and `embedding`, unit vectors) and `output/summary.json`.

    Under `accelerate launch` the processes share the parts.

    Args:
        settings: of the run.
        output: made where it does not exist; on a disk that all processes share.

    Returns:
        The summary; of other processes than the main one nothing.

    Raises:
        CocoaError: a mistake in model or source, a row that cannot be embedded, an `output` of another model or other
            settings or that another run is writing, or a disk that is full.
    """
    started, state = time.monotonic(), this_process()
    output = Path(os.path.abspath(output))
    parts = list_parts(settings.source, settings.part_size, output)
    embedder = load_embedder(settings.model, settings.max_length).cut_to(settings.truncate_dim)
    facts = about(settings, embedder)
    with owned(output, state.is_main_process, "--output"):
        return _embed_parts(settings, output, parts, embedder, facts, started)


def _embed_parts(
    settings: EmbedSettings,
    output: Path,
    parts: Sequence[Part],
    embedder: Embedder,
    facts: dict[str, Any],
    started: float,
) -> dict[str, Any]:
    """Embed the parts that are missing from an output folder that is this run's."""
    state = this_process()
    if state.is_main_process:
        claim(facts, output)
    state.wait_for_everyone()
    if not (output / SETTINGS_NAME).is_file():
        raise CocoaError(f"{output}: not the same folder for all processes; choose one on a disk that they share")
    paths = {part.name: output / FOLDER / part.name for part in parts}
    there = {path for path in paths.values() if path.exists()}
    missing = [part for part in parts if paths[part.name] not in there]
    bad = 0
    if settings.on_bad_row == "skip":  # earlier runs may have left some out
        bad = sum(len(bad_rows_of(pq.read_metadata(path))) for path in there)
    rows = sum(part.stop - part.start for part in parts)
    logger.info("%d rows in %d parts, %d parts to embed", rows, len(parts), len(missing))
    state.wait_for_everyone()  # before anyone writes: all must see the same parts missing
    mine = missing[state.process_index :: state.num_processes]
    left = sum(part.stop - part.start for part in mine)
    with counting("rows", left, state.is_main_process) as count:
        for part in mine:
            found = embed_part(embedder, part, settings, count)
            bad += len(found.bad)
            if found.bad:
                check_share(settings, part.path, bad, rows, found.bad[-1][1])
            write_part(paths[part.name], found, facts)
    if not state.is_main_process:
        return {}
    wait_for_files(paths[part.name] for part in missing)
    return summarise(output, parts, facts, time.monotonic() - started)


def check_share(settings: EmbedSettings, path: Path, bad: int, rows: int, last: str) -> None:
    """See that no more rows are left out than `max_bad_share` allows.

    Args:
        settings: of the run.
        path: of the file, or folder, that is being read.
        bad: rows that could not be embedded so far.
        rows: of the corpus.
        last: why the last of them could not be.

    Raises:
        CocoaError: they are too many.
    """
    if bad > settings.max_bad_share * rows:
        raise CocoaError(
            f"{path}: {bad} rows could not be embedded, more than max-bad-share {settings.max_bad_share:g} of {rows} "
            f"allows; the last: {last}; repair them, or allow more: --max-bad-share {math.ceil(10 * bad / rows) / 10:g}"
        )


def bad_row(part: Part, row: Row, reason: str) -> CocoaError:
    """What is raised where a row cannot be embedded, and none is to be left out."""
    where = "" if part.images else f"{part.path}, row {row.id}: "  # an image of a folder is named by its path
    return CocoaError(f"{where}{reason}; repair or remove it, or leave such out: --on-bad-row skip")


def embed_part(
    embedder: Embedder, part: Part, settings: EmbedSettings, count: Callable[[int], None] = lambda rows: None
) -> Embedded:
    """The embeddings of one part of a corpus: all that a worker of another scheduler (Ray, Spark) needs.

    Args:
        embedder: of the model.
        part: of `cocoa.corpus.list_parts`.
        settings: of the run.
        count: told how many more rows are done.

    Raises:
        CocoaError: a row cannot be embedded, and bad rows are errors; an embedding that is not finite.
    """
    ids: list[str] = []
    bad: list[tuple[str, str]] = []
    embeddings: list[Tensor] = []
    for block in read_part(part, settings.columns, BLOCK, settings.image_root):
        rows = [settings.instructed(row) for row in block]
        for row, embedded in zip(rows, embed_rows(embedder, rows, settings.batch_size, count), strict=True):
            if isinstance(embedded, Tensor):
                ids.append(row.id)
                embeddings.append(embedded)
            elif settings.on_bad_row == "error":
                raise bad_row(part, row, embedded)
            else:
                bad.append((row.id, embedded))
    dimension = embedder.truncate_dim or embedder.model.get_embedding_dimension()
    if not embeddings and dimension is None:
        raise CocoaError(f"{part.path}: no row can be embedded; the first: {bad[0][1]}")
    return Embedded(ids, torch.stack(embeddings) if embeddings else torch.empty(0, dimension), bad)


def embed_rows(
    embedder: Embedder, rows: Sequence[Row], batch_size: int, count: Callable[[int], None]
) -> list[Tensor | str]:
    """The embedding (D,) of each row, or why it has none.

    Args:
        embedder: of the model.
        rows: as they are embedded, with their instruction.
        batch_size: inputs embedded at once where they are the longest; of shorter ones more.
        count: told how many more rows are done.

    Raises:
        CocoaError: an embedding that is not finite.
    """
    found: dict[int, Tensor | str] = {
        i: fault for i, row in enumerate(rows) if (fault := row.fault or embedder.refuses(row.side))
    }
    count(len(found))
    sound = [i for i in range(len(rows)) if i not in found]
    batches = embedder.batches([rows[i].side for i in sound], batch_size)

    def prepare(batch: list[int]) -> tuple[list[int], Any, dict[int, str]]:
        """The rows that can be embedded, what the model takes of them, and why the others cannot."""
        items: dict[int, Any] = {}
        faults: dict[int, str] = {}
        for i in batch:
            try:
                items[i] = embedder.render(rows[i].side)
            except CocoaError as error:
                faults[i] = _fault(error)
        return list(items), embedder.prepare(list(items.values())) if items else None, faults

    for batch, (good, inputs, faults) in prepared([[sound[place] for place in batch] for batch in batches], prepare):
        found |= faults
        if good:
            embedded = embedder.encode(inputs)
            for place in (~embedded.isfinite().all(1)).nonzero().flatten().tolist():
                raise CocoaError(f"row {rows[good[place]].id}: an embedding is not finite; the model is broken")
            found |= dict(zip(good, embedded, strict=True))
        count(len(batch))
    return [found[i] for i in range(len(rows))]


def _fault(error: CocoaError) -> str:
    return error.fault if isinstance(error, ImageError) else str(error)


def about(settings: EmbedSettings, embedder: Embedder) -> dict[str, Any]:
    """What the embeddings depend on besides the rows."""
    return {
        "model": settings.model,
        "model_hash": hash_folder(embedder.folder) if embedder.folder else "",
        "image": {"tokens": list(embedder.images.tokens), "resize": embedder.images.resize},
        "max_length": embedder.max_length,
        "instruction": settings.instruction,
        "precision": settings.precision,
        "truncate_dim": embedder.truncate_dim,
        "source": os.path.abspath(settings.source),
        "image_root": settings.image_root and os.path.abspath(settings.image_root),
        "columns": asdict(settings.columns),
        "part_size": settings.part_size,
    }
