"""The commands that make a checkpoint known; `cocoa.cli` puts them beside the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

console = Console()
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint folder, such as OUTPUT_DIR/final.")]


def card(
    model: Model,
    *,
    scores: Annotated[Path | None, typer.Option(metavar="DIR", help="--output of evaluate, of this model.")] = None,
) -> None:
    """Write a checkpoint's model card (README.md) anew, with its scores beside published ones."""
    from cocoa.card import write_card

    console.print(f"card: [bold]{escape(str(write_card(model, scores)))}[/bold]", soft_wrap=True)


def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="owner/name on the hub.")],
    *,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the files; send nothing.")] = False,
) -> None:
    """Upload a checkpoint to the hub, without paths of this machine. Log in before: hf auth login."""
    from cocoa import publish

    files = publish.push(model, repo_id, private, dry_run)
    table = Table(title=escape(f"{repo_id}: {'would be sent' if dry_run else 'sent'}"))
    table.add_column("file")
    table.add_column("bytes", justify="right")
    table.add_column("")  # says what is changed
    for file in files:
        table.add_row(escape(file.name), f"{file.size:,}", "changed for the hub" if file.changed else "")
    console.print(table)
    if dry_run:
        size = sum(file.size for file in files)
        console.print(f"nothing was sent: {len(files)} files, {size / 1e6:,.1f} MB; without --dry-run they are")
