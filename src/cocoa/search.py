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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cocoa.errors import CocoaError, ImageError
from cocoa.images import load_image
from cocoa.pairs import Side
from cocoa.search_metadata import OWN, reason
from cocoa.search_store import open_table, read_facts

if TYPE_CHECKING:
    from cocoa.embedding import Embedder


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
    """A store and the model that it was made with, which is loaded when it is first needed.

    Attributes:
        db: folder of the store.
        table: of its rows.
        facts: what they have in common, see `cocoa.search_store.read_facts`.
    """

    db: Path
    table: Any
    facts: Mapping[str, Any]

    @cached_property
    def embedder(self) -> Embedder:
        """The model.

        Raises:
            CocoaError: it has changed since the store was made, or cannot be loaded.
        """
        from cocoa.embedding import load_embedder  # takes as long as the libraries do
        from cocoa.embedding_cache import hash_folder

        name, known = self.facts["model"], self.facts["model_hash"]
        embedder = load_embedder(name, self.facts["max_length"])
        found = hash_folder(embedder.folder) if embedder.folder else ""
        if found != known:
            raise CocoaError(
                f"{self.db}: made with the model {name} of hash {known[:8]}, which is another one now "
                f"(hash {found[:8]}); put it back, or index into another --db"
            )
        return embedder

    def loaded(self) -> Searcher:
        """The same, once the model is there."""
        _ = self.embedder
        return self

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
        try:
            if query.image is not None:
                load_image(query.image)
        except ImageError as error:
            raise CocoaError(f"{error.fault}; give another image to search for") from None
        if where.strip():
            self._rows(self.table.search().select(["id"]).limit(1), where)  # before a model is loaded for it
        if fault := self.embedder.refuses(query):
            raise CocoaError(f"{fault}; search by what it embeds")
        vector = self.embedder.embed([query])[0].numpy()
        columns = [name for name in self.table.schema.names if name not in ("row_hash", "vector")]
        search = self.table.search(vector, vector_column_name="vector").distance_type("dot").bypass_vector_index()
        search = search.select([*columns, "_distance"]).limit(top_k)
        return [_hit(row) for row in self._rows(search, where)]

    @staticmethod
    def _rows(search: Any, where: str) -> list[dict[str, Any]]:
        """What a search finds of the rows that meet a condition, if there is one."""
        if not where.strip():
            return search.to_arrow().to_pylist()
        try:
            return search.where(where, prefilter=True).to_arrow().to_pylist()
        except (ValueError, RuntimeError) as error:
            raise CocoaError(f"where {where!r}: {reason(error)}; write a condition of SQL") from None


def open_search(db: str | Path) -> Searcher:
    """Open a store.

    Raises:
        CocoaError: there is no store, or nothing in it.
    """
    db = Path(os.path.abspath(db))
    facts = read_facts(db)
    table = open_table(db)
    if table is None:
        raise CocoaError(f"{db}: nothing is stored yet; run `cocoa index` again")
    return Searcher(db, table, facts)


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
