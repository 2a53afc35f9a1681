"""What `cocoa embed` writes: a parquet file for each part of a corpus, and a summary of all of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from cocoa.checkpoint import versions
from cocoa.corpus import Part
from cocoa.files import claim_folder, write_json, writing
from cocoa.parquet import write_table

logger = logging.getLogger(__name__)

FOLDER, SETTINGS_NAME, SUMMARY_NAME = "embeddings", "settings.json", "summary.json"
METADATA = b"cocoa"
"""Key in a file's metadata: JSON of the model, its hash, and the rows left out with the reasons."""


@dataclass(frozen=True)
class Embedded:
    """Rows of a part: ids and embeddings (N, D) in its order, and the ids of others with why they were left out."""

    ids: list[str]
    embeddings: Tensor
    bad: list[tuple[str, str]]


def claim(facts: dict[str, Any], output: Path) -> None:
    """Mark the folder as this run's, see `claim_folder`; the model may lie elsewhere than it did.

    Args:
        facts: what `about` says of the run.
        output: of the run.
    """
    written = any((output / FOLDER).glob("*.parquet"))
    claim_folder(output, SETTINGS_NAME, {key: facts[key] for key in facts if key != "model"}, FOLDER if written else "")


def write_part(path: Path, found: Embedded, facts: dict[str, Any]) -> None:
    """Write the embeddings of a part, whole or not at all.

    Args:
        path: of the parquet file; its folder is made where it does not exist.
        found: what it holds.
        facts: what `about` says of the run.
    """
    vectors = found.embeddings.numpy().astype(facts["precision"])
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(vectors)), vectors.shape[1])
    table = pa.table({"id": pa.array(found.ids, pa.string()), "embedding": column})
    said = {"model": facts["model"], "model_hash": facts["model_hash"], "bad_rows": found.bad}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        write_table(path, table.replace_schema_metadata({METADATA: json.dumps(said)}))


def bad_rows_of(metadata: pq.FileMetaData) -> list[tuple[str, str]]:
    """The rows that were left out of a part's file, by id, and why."""
    return [(name, reason) for name, reason in json.loads(metadata.metadata[METADATA])["bad_rows"]]


def summarise(output: Path, parts: Sequence[Part], facts: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Drop the files of rows that are no longer there, count the others, and write what is known of the run."""
    wanted = {part.name for part in parts}
    rows, bad = 0, list[dict[str, str]]()
    for path in sorted((output / FOLDER).glob("*.parquet")):
        if path.name not in wanted:
            logger.info("%s: its rows have changed since; removed", path)
            path.unlink()
            continue
        metadata = pq.read_metadata(path)
        rows += metadata.num_rows
        bad += [{"id": name, "reason": reason} for name, reason in bad_rows_of(metadata)]
    summary = {
        **facts,
        "rows": rows,
        "parts": len(wanted),
        "bad_rows": bad,
        "seconds": round(seconds, 1),
        "versions": versions(),
    }
    write_json(output / SUMMARY_NAME, summary)
    return summary
