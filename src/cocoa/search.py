"""`cocoa search`: what a store of `cocoa index` holds that is nearest to a text, an image, or both.

    from cocoa.pairs import Side
    from cocoa.search import open_search

    for hit in open_search("photos.db").find(Side(text="a red cup"), top_k=5, where="width > 500"):
        ...

The search is exact: every vector is compared, by cosine.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocoa.embedding import Embedder, load_embedder
from cocoa.embedding_cache import hash_folder
from cocoa.errors import CocoaError
from cocoa.pairs import Side
from cocoa.search_index import open_table, read_facts
from cocoa.search_metadata import OWN, reason


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        id: of the row.
        score: cosine of its vector and the query's.
        text: the row's own; empty where it has none.
        instruction: with which it was embedded.
        metadata: its other columns, and of an image path, size in bytes, width and height.
        thumbnail: a small JPEG of its image; None where it has none.
    """

    id: str
    score: float
    text: str
    instruction: str
    metadata: dict[str, Any]
    thumbnail: bytes | None


@dataclass(frozen=True)
class Searcher:
    """A store and the model that it was made with."""

    db: Path
    table: Any
    embedder: Embedder

    def find(self, query: Side, top_k: int = 10, where: str = "") -> list[Hit]:
        """The nearest rows, the best first.

        Args:
            query: instruction, text and image, any of them absent; a text or an image has to be there.
            top_k: rows at most.
            where: a condition on the columns, in SQL: `width > 500 AND licence = 'CC0'`.

        Raises:
            CocoaError: a query that the model cannot embed, an image that cannot be read, or a condition that is none.
        """
        if top_k < 1:
            raise CocoaError(f"top-k {top_k}: must be 1 or more")
        if not query.text.strip() and query.image is None:
            raise CocoaError("nothing to search for; give a text, an image, or both")
        if fault := self.embedder.refuses(query):
            raise CocoaError(f"{fault}; search by what it embeds")
        vector = self.embedder.embed([query])[0].numpy()
        columns = [name for name in self.table.schema.names if name not in ("row_hash", "vector")]
        search = self.table.search(vector, vector_column_name="vector").distance_type("dot").bypass_vector_index()
        search = search.select([*columns, "_distance"]).limit(top_k)
        if not where.strip():
            return [_hit(row) for row in search.to_arrow().to_pylist()]
        try:
            return [_hit(row) for row in search.where(where, prefilter=True).to_arrow().to_pylist()]
        except (ValueError, RuntimeError) as error:
            raise CocoaError(f"where {where!r}: {reason(error)}; write a condition of SQL") from None


def open_search(db: str | Path) -> Searcher:
    """Open a store, and load its model.

    Raises:
        CocoaError: there is no store, nothing in it, or its model has changed or cannot be loaded.
    """
    db = Path(os.path.abspath(db))
    facts = read_facts(db)
    table = open_table(db)
    if table is None:
        raise CocoaError(f"{db}: nothing is stored yet; run `cocoa index` again")
    embedder = load_embedder(facts["model"], facts["max_length"])
    found = hash_folder(embedder.folder) if embedder.folder else ""
    if found != facts["model_hash"]:
        raise CocoaError(
            f"{db}: made with the model {facts['model']} of hash {facts['model_hash'][:8]}, which is another one now "
            f"(hash {found[:8]}); put it back, or index into another --db"
        )
    return Searcher(db, table, embedder)


def as_json(hits: list[Hit]) -> list[dict[str, Any]]:
    """Hits as JSON has them: dates and times as text, numbers that are none as null."""
    return [
        {
            "rank": rank,
            "score": round(hit.score, 6),
            "id": hit.id,
            "text": hit.text,
            "instruction": hit.instruction,
            "metadata": {name: _plain(value) for name, value in hit.metadata.items()},
        }
        for rank, hit in enumerate(hits, 1)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else value.isoformat()


def _hit(row: dict[str, Any]) -> Hit:
    other = {name: value for name, value in row.items() if name not in (*OWN, "_distance")}
    return Hit(row["id"], 1 - row["_distance"], row["text"], row["instruction"], other, row["thumbnail"])
