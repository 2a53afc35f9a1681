"""The commands that put a corpus into a store and search it; `cocoa.cli` puts them beside the others."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cocoa.cli_data import (
    BatchSize,
    IdColumn,
    ImageColumn,
    ImageRoot,
    MaxBadShare,
    MaxLength,
    Model,
    OnBadRow,
    RowInstruction,
    Source,
    TextColumn,
    loading,
)
from cocoa.errors import CocoaError

console = Console()
Store = Annotated[Path, typer.Option(help="Folder of the store.")]
Instruction = Annotated[str, typer.Option(help="Of the query, as the model was trained with.")]


def index(
    model: Model,
    source: Source,
    *,
    db: Store,
    instruction: RowInstruction = "",
    batch_size: BatchSize = 8,
    precision: Annotated[str, typer.Option(help="Of the vectors: float32 or float16.")] = "float32",
    max_length: MaxLength = None,
    text_column: TextColumn = "text",
    image_column: ImageColumn = "image",
    id_column: IdColumn = "id",
    image_root: ImageRoot = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: MaxBadShare = 0.1,
) -> None:
    """Put a corpus into a local store for search. Again, it embeds what is new or has changed; what is gone leaves."""
    with search_extra():
        from cocoa.search_index import BLOCK, update_index
    from cocoa.corpus import Columns
    from cocoa.corpus_embedding import EmbedSettings

    columns = Columns(id_column, text_column, image_column)
    how = (instruction, BLOCK, precision, max_length, image_root, batch_size, on_bad_row, max_bad_share)
    report = update_index(EmbedSettings(model, source, columns, *how), db)
    for name, reason in report.bad[:20]:
        console.print(f"left out: {escape(reason if name in reason else f'{name}: {reason}')}", soft_wrap=True)
    if len(report.bad) > 20:
        console.print(f"left out: {len(report.bad) - 20} more")
    console.print(
        f"done: {report.added:,} added, {report.changed:,} changed, {report.removed:,} removed, "
        f"{report.unchanged:,} unchanged in [bold]{escape(str(db))}[/bold]",
        soft_wrap=True,
    )


def search(
    text: Annotated[list[str] | None, typer.Argument(metavar="TEXT", help="What to look for.")] = None,
    *,
    db: Store,
    image: Annotated[
        Path | None, typer.Option(metavar="FILE", help="An image to look for, alone or with TEXT.")
    ] = None,
    instruction: Instruction = "",
    where: Annotated[str, typer.Option(metavar="SQL", help='A condition on columns: "width > 500".')] = "",
    top_k: Annotated[int, typer.Option(help="Rows to show, at most.")] = 10,
    as_json: Annotated[
        bool, typer.Option("--json", help="An array of all that is known of each, for programs.")
    ] = False,
) -> None:
    """Search a store by text, image or both: the nearest rows by cosine, every one compared."""
    with search_extra():
        from cocoa import search as searching
    from cocoa.pairs import Side

    query = Side(instruction, " ".join(text or []), os.path.abspath(image) if image else None)
    hits = searching.open_search(db).find(query, top_k, where)
    if as_json:
        typer.echo(json.dumps(searching.as_json(hits), ensure_ascii=False, indent=2))
        return
    texts = any(hit.text for hit in hits)
    table = Table()
    table.add_column("", justify="right")
    table.add_column("score", justify="right")
    for title in ("id", "text")[: 1 + texts]:
        table.add_column(title, overflow="fold")
    for rank, hit in enumerate(hits, 1):
        table.add_row(f"{rank}", f"{hit.score:.3f}", escape(hit.id), *[escape(hit.text)] * texts)
    console.print(table)


def app(
    *,
    db: Store,
    instruction: Instruction = "",
    host: Annotated[str, typer.Option(help="Address to listen on; by default this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on.")] = 7860,
) -> None:
    """Search a store in the browser: type a text, drop an image."""
    with search_extra():
        from cocoa import app as page
        from cocoa.search import open_search

    page.serve(
        open_search(db).loaded(), host, port, instruction, lambda url: console.print(f"open {url} (Ctrl-C ends it)")
    )


@contextmanager
def search_extra() -> Iterator[None]:
    """Say what to install where a library is missing that only search needs."""
    try:
        with loading():
            yield
    except ModuleNotFoundError as error:
        if error.name not in ("lancedb", "gradio"):
            raise
        raise CocoaError(f"{error.name} is not installed; pip install lancedb gradio") from None
