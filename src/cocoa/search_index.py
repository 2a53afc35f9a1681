"""`cocoa index`: a corpus in a store of LanceDB: vectors, thumbnails and what else the rows say.

The store is one table in a local folder, with a row's hash beside its vector: what has not changed since is not
embedded again, what is gone leaves. Blocks of rows are stored one after the other, each whole or not at all, so that
a run which was stopped goes on. A store is of one model and one source; `index.json` in it names them.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lancedb
import pyarrow as pa
from PIL import Image
from torch import Tensor

from cocoa.corpus import Part, Row, list_parts, read_part
from cocoa.corpus_embedding import EmbedSettings, about, bad_row, check_share, embed_rows
from cocoa.embedding import load_embedder
from cocoa.embedding_cache import content_key
from cocoa.errors import CocoaError
from cocoa.files import write_json
from cocoa.image_files import split_archive
from cocoa.images import ImageRef, Size, image_size, load_image, read_image_bytes
from cocoa.output_folder import owned
from cocoa.processes import WORKERS, counting
from cocoa.search_metadata import as_stored, check_column, kind_of, merged, reason, stored_kinds
from cocoa.search_store import FACTS_NAME, KEPT, TABLE, open_table, read_facts

logger = logging.getLogger(__name__)

BLOCK = 256
"""Rows that are stored at once, and at most lost when a run is stopped."""
THUMBNAIL = 256
"""Longest side of a stored picture, in pixels."""
OLD_VERSIONS = timedelta(minutes=5)
"""How long a table's earlier versions are kept for whoever is reading them."""


@dataclass
class IndexReport:
    """What became of a corpus' rows: how many are new, changed, unchanged and gone; ids of bad ones with the reason."""

    added: int = 0
    changed: int = 0
    unchanged: int = 0
    removed: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)


def update_index(settings: EmbedSettings, db: Path) -> IndexReport:
    """Bring a store to what its corpus is now; it is made where there is none.

    Args:
        settings: of the model and the corpus; `part_size` rows are stored at once.
        db: folder of the store.

    Raises:
        CocoaError: a mistake in model or source, a row that cannot be embedded, a store of another model or source, or
            one that another process is writing.
    """
    db = Path(os.path.abspath(db))
    parts = list_parts(settings.source, sys.maxsize, db)  # a file is a part, read from its beginning to its end
    embedder = load_embedder(settings.model, settings.max_length)
    facts = about(settings, embedder)
    facts["model"] = os.path.abspath(settings.model) if Path(settings.model).exists() else settings.model
    report = IndexReport()
    with owned(db, True, "--db"):
        _claim(facts, db)
        table = open_table(db)
        stored = _stored_hashes(table)
        total = sum(part.stop - part.start for part in parts)
        hashes, found_kinds = _survey(parts, settings, report, total)
        kinds = stored_kinds(table, found_kinds, db)
        gone = [name for name in stored if name not in hashes]
        _delete(table, gone)
        report.removed = len(gone)
        met = {name for name, _ in report.bad}
        new = {name for name, digest in hashes.items() if stored.get(name) != digest}
        report.unchanged = len(hashes) - len(new)
        logger.info("%d rows, of which %d are new or changed; %d gone", len(hashes), len(new), report.removed)
        with counting("rows", len(new), True) as count:
            for part, block in _blocks(parts, settings):
                rows = [row for row in block if (row.id not in met if row.fault else row.id in new)]
                found = list(zip(rows, embed_rows(embedder, rows, settings.batch_size, count), strict=True))
                done = [(row, each) for row, each in found if isinstance(each, Tensor)]
                bad = [(row, each) for row, each in found if isinstance(each, str)]
                _judge(bad, part, settings, report, total)
                spoilt = [row.id for row, _ in bad if not row.fault and row.id in stored]  # since it was stored
                _delete(table, spoilt)
                report.removed += len(spoilt)
                report.changed += sum(row.id in stored for row, _ in done)
                report.added += sum(row.id not in stored for row, _ in done)
                if done:
                    table = _store(done, hashes, kinds, settings.precision, table, db)
        if table is not None:
            table.optimize(cleanup_older_than=OLD_VERSIONS)
    return report


def thumbnail(image: ImageRef) -> tuple[bytes, Size]:
    """A small JPEG of an image, upright, and the size of the image itself."""
    small = load_image(image, _shown)
    width, height = image_size(image)  # as the header says, before any rotation
    if small.width != small.height and (width > height) != (small.width > small.height):
        width, height = height, width
    content = io.BytesIO()
    small.resize(_shown(small.size), Image.Resampling.LANCZOS).save(content, "JPEG", quality=85)
    return content.getvalue(), (width, height)


def _shown(size: Size) -> Size:
    scale = min(1.0, THUMBNAIL / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _claim(facts: Mapping[str, Any], db: Path) -> None:
    """Mark a store as this model's and source's; one in which nothing is stored yet is free."""
    if open_table(db) is not None:
        known = read_facts(db)
        if known["model_hash"] != facts["model_hash"]:
            was, now = (f"{each['model']} (hash {each['model_hash'][:8]})" for each in (known, facts))
            raise CocoaError(f"{db}: made with the model {was}, not with {now}; choose another --db")
        for key in KEPT:
            if known[key] != facts[key]:
                raise CocoaError(f"{db}: made with another {key} ({known[key]!r}); choose another --db")
    write_json(db / FACTS_NAME, {key: facts[key] for key in ("model", *KEPT)})


def _stored_hashes(table: Any | None) -> dict[str, str]:
    if table is None:
        return {}
    rows = table.search().select(["id", "row_hash"]).limit(table.count_rows()).to_arrow()
    return dict(zip(rows["id"].to_pylist(), rows["row_hash"].to_pylist(), strict=True))


def _blocks(parts: Sequence[Part], settings: EmbedSettings) -> Iterator[tuple[Part, list[Row]]]:
    """All rows of a corpus with their instruction; one whose id is taken is bad."""
    seen: set[str] = set()
    for part in parts:
        for block in read_part(part, settings.columns, settings.part_size, settings.image_root, others=True):
            rows = []
            for row in block:
                fault = row.fault or ("its id is another row's too; give each its own" if row.id in seen else "")
                rows.append(replace(settings.instructed(row), fault=fault))
                seen.add(row.id)
            yield part, rows


def _survey(
    parts: Sequence[Part], settings: EmbedSettings, report: IndexReport, total: int
) -> tuple[dict[str, str], dict[str, pa.DataType | None]]:
    """The hash of each sound row by its id, and what each of the other columns holds; bad rows are judged.

    Nothing has been taken from the store by then: a corpus that cannot be reached just now costs no row of it.
    """
    hashes: dict[str, str] = {}
    kinds: dict[str, pa.DataType | None] = {
        "path": pa.string(),
        "size": pa.int64(),
        "width": pa.int64(),
        "height": pa.int64(),
    }
    named: set[str] = set()
    for part, block in _blocks(parts, settings):
        for row in block:
            if row.fault:
                _judge([(row, row.fault)], part, settings, report, total)
                continue
            hashes[row.id] = _row_hash(row)
            for name, value in row.other.items():
                if name not in named:
                    check_column(name, part.path)
                    named.add(name)
                    kinds[name] = None  # the source's own `width` takes the place of ours
                kinds[name] = merged(kinds[name], kind_of(value))
    return hashes, kinds


def _row_hash(row: Row) -> str:
    """Changes with what a row says, and with its image file as size and time tell."""
    image, state = row.side.image, b""
    if isinstance(image, str):
        found = os.stat(split_archive(image)[0] or image)
        state = repr((image, found.st_size, found.st_mtime_ns)).encode()
    digest = hashlib.blake2b(content_key(row.side, state), digest_size=16)
    digest.update(repr(sorted(row.other.items())).encode(errors="backslashreplace"))
    return digest.hexdigest()


def _judge(bad: Sequence[tuple[Row, str]], part: Part, settings: EmbedSettings, report: IndexReport, rows: int) -> None:
    """Take note of bad rows, or raise at what the settings do not allow."""
    if not bad:
        return
    if settings.on_bad_row == "error":
        raise bad_row(part, *bad[0])
    report.bad += [(row.id, reason) for row, reason in bad]
    check_share(settings, part.path, len(report.bad), rows, report.bad[-1][1])


def _delete(table: Any | None, names: Sequence[str]) -> None:
    for start in range(0, len(names), BLOCK):
        assert table is not None  # names are of stored rows
        quoted = ", ".join("'" + name.replace("'", "''") + "'" for name in names[start : start + BLOCK])
        table.delete(f"id IN ({quoted})")


def _store(
    done: Sequence[tuple[Row, Tensor]],
    hashes: Mapping[str, str],
    kinds: Mapping[str, pa.DataType],
    precision: str,
    table: Any | None,
    db: Path,
) -> Any:
    """Put rows with their embeddings into the table at once, in place of what is there of them.

    A row's hash is of what it was before it was embedded, so that the next run sees what was changed meanwhile.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        known = list(pool.map(_image_facts, [row.side.image for row, _ in done]))
    records = []
    for (row, embedding), (picture, facts) in zip(done, known, strict=True):
        other = facts | dict(row.other)
        own: dict[str, Any] = {
            "id": row.id,
            "text": row.side.text,
            "instruction": row.side.instruction,
            "row_hash": hashes[row.id],
        }
        own |= {"vector": embedding.numpy().astype(precision), "thumbnail": picture}
        records.append(own | {name: as_stored(other.get(name), kind) for name, kind in kinds.items()})
    vector = pa.list_(pa.float32() if precision == "float32" else pa.float16(), len(done[0][1]))
    texts = ("id", "text", "instruction", "row_hash")
    columns = dict.fromkeys(texts, pa.string()) | {"vector": vector, "thumbnail": pa.binary()} | dict(kinds)
    rows = pa.Table.from_pylist(records, pa.schema(list(columns.items())))
    try:
        if table is None:
            lancedb.connect(db).create_table(TABLE, rows)
            return open_table(db)
        table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(rows)
    except (ValueError, RuntimeError, OSError) as error:
        raise CocoaError(f"{db}: cannot be written ({reason(error)}); make room, and start the same again") from error
    return table


def _image_facts(image: ImageRef | None) -> tuple[bytes | None, dict[str, Any]]:
    """The thumbnail of an image, and what is known of its file."""
    if image is None:
        return None, {}
    assert not isinstance(image, Image.Image)  # rows of a corpus hold paths or bytes
    content = read_image_bytes(image) if isinstance(image, str) else image
    picture, (width, height) = thumbnail(content)
    path = image if isinstance(image, str) else None
    return picture, {"path": path, "size": len(content), "width": width, "height": height}
