"""A store of `cocoa index` as it lies on the disk: one table of LanceDB, and what its rows have in common."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb

from cocoa.errors import CocoaError
from cocoa.search_metadata import reason

TABLE, FACTS_NAME = "rows", "index.json"
KEPT = ("model_hash", "image", "max_length", "precision", "source", "image_root", "columns")
"""What all rows of a store have in common."""


def open_table(db: Path) -> Any | None:
    """The table of a store, which follows what others write; None where nothing has been stored yet.

    Raises:
        CocoaError: it cannot be read.
    """
    if not any((db / f"{TABLE}.lance" / "_versions").glob("*.manifest")):  # nor where a run died at its first block
        return None
    try:
        return lancedb.connect(db, read_consistency_interval=timedelta(0)).open_table(TABLE)
    except (ValueError, RuntimeError, OSError) as error:
        raise CocoaError(f"{db}: cannot be read ({reason(error)}); remove it, and index again") from None


def read_facts(db: Path) -> dict[str, Any]:
    """What a store was made with: see `cocoa.corpus_embedding.about`.

    Raises:
        CocoaError: the folder is no store.
    """
    try:
        facts = json.loads((db / FACTS_NAME).read_text(encoding="utf-8"))
        return {key: facts[key] for key in ("model", *KEPT)}
    except (OSError, ValueError, KeyError, TypeError):
        raise CocoaError(f"{db}: no store of `cocoa index`; make one, or name another --db") from None
