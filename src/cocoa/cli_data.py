"""The commands that make, check and extend data; `cocoa.cli` puts them beside the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cocoa.errors import CocoaError
from cocoa.wording import count

console = Console()
SHOWN = 20
"""Bad rows of a data set that are printed."""


# What several commands ask for.
Model = Annotated[str, typer.Argument(help="Checkpoint folder or hub id.")]
Source = Annotated[Path, typer.Argument(help="Folder of images or of parquet files; or a file of rows.")]
RowInstruction = Annotated[str, typer.Option(help="For rows that have none of their own.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Inputs encoded at once; of short ones more.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of an input; else as the model was trained.")]
TextColumn = Annotated[str, typer.Option(help="Where a row's text is.")]
ImageColumn = Annotated[str, typer.Option(help="Where its image is: a path, or a file's content.")]
IdColumn = Annotated[str, typer.Option(help="What it is called; else file and row.")]
ImageRoot = Annotated[Path | None, typer.Option(help="Folder that image paths are relative to.")]
OnBadRow = Annotated[str, typer.Option(help="error; or skip: leave rows out that cannot be embedded.")]
MaxBadShare = Annotated[float, typer.Option(help="Share of the rows that may be left out.")]


def validate(
    data: Annotated[Path, typer.Argument(metavar="DIR|FILE", help="MMEB-train, MMEB-eval, or a file of pairs.")],
    more_subsets: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    *,
    subsets: Annotated[list[str] | None, typer.Option(metavar="A B ...", help="Data sets to read; else all.")] = None,
    split: Annotated[str | None, typer.Option(help="Which files of each data set; else original, test.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder or archive that image paths are relative to.")] = None,
) -> None:
    """Read every row and decode every image of a folder, without a model. Exit status 2 if something is wrong."""
    from cocoa.data_check import check_data

    reports = check_data(data, named_subsets("validate", subsets, more_subsets), split, image_root)
    table = Table(title=escape(str(data)))
    table.add_column("data set")
    table.add_column("split")
    for title in ("rows", "images", "bad rows"):
        table.add_column(title, justify="right")
    for report in reports:
        counts = ["-"] * 3 if report.error else [f"{n:,}" for n in (report.rows, report.images, len(report.bad))]
        table.add_row(
            escape(report.name), escape(report.split), *counts, style="red" if report.error or report.bad else None
        )
    console.print(table)
    for report in reports:
        if report.error:
            console.print(escape(report.error), soft_wrap=True)
        for bad in report.bad[:SHOWN]:
            console.print(escape(f"data set {bad.dataset}, row {bad.row}: {bad.reason}"), soft_wrap=True)
        if len(report.bad) > SHOWN:
            console.print(escape(f"data set {report.name}: {len(report.bad) - SHOWN} more"))
        for reason, rows in report.left_out.items():
            console.print(escape(f"data set {report.name}: {count(rows, 'row')} left out: {reason}"))
    if any(report.error or report.bad for report in reports):
        raise CocoaError(
            f"{data}: not all of it can be used; see above (images lie in the data's folder, or in --image-root DIR)"
        )


def scenes(
    output: Annotated[Path, typer.Option(help="Where MMEB-train and MMEB-eval are written.")],
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    pairs: Annotated[int, typer.Option(help="Training pairs over all data sets.")] = 20000,
    queries: Annotated[int, typer.Option(help="Queries of each data set in MMEB-eval.")] = 200,
) -> None:
    """Write the embedded world: pictures of a few objects, as data sets in MMEB's layouts."""
    from cocoa.scenes.write import write_scenes

    write_scenes(output, seed, pairs, queries, progress=console.is_terminal)
    console.print(
        f"done: [bold]{escape(str(output))}[/bold] (MMEB-train, MMEB-eval, dialogues.parquet)", soft_wrap=True
    )


def dialogues(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a multimodal LLM, or mini-qwen2-vl.")],
    source: Annotated[Path, typer.Argument(help="Folder of images or parquet files; or a file that lists images.")],
    *,
    output: Annotated[Path, typer.Option(help="Where dialogues.parquet and summary.json are written.")],
    write: Annotated[str, typer.Option(help="dialogues, captions (of images without one), or both.")] = "dialogues",
    questions: Annotated[int, typer.Option(help="Asked for an image.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Images that are asked about at once.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Of a reply; a longer one is dropped.")] = 256,
    image_tokens: Annotated[int, typer.Option(help="Larger images are shrunk to as many, 28 x 28 px each.")] = 1024,
    temperature: Annotated[float, typer.Option(help="Of the questions; answers and captions are greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of the questions.")] = 0,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Other prompts: questions, answer, caption.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder that image paths of a file are relative to.")] = None,
) -> None:
    """Let a multimodal LLM write CoMa's conversations, or captions, over images. A stopped run goes on."""
    from cocoa.conversations import load_prompts
    from cocoa.dialogues import FILE_NAME, SUMMARY_NAME, Settings, write_dialogues
    from cocoa.processes import leave

    said = load_prompts(model, prompts)
    root = str(image_root) if image_root else None
    options = (write, questions, batch_size, max_new_tokens, image_tokens, temperature, seed, root)
    summary = write_dialogues(Settings(model, str(source), said, *options), output)
    leave()
    if is_main_process():
        images, spoken, turns, captions = (summary[key] for key in ("images", "dialogues", "turns", "captions"))
        console.print(
            f"{images['kept']} of {images['found']} images: {spoken['kept']} dialogues of {turns['kept']} turns, "
            f"{captions['kept']} captions; "
            f"what was left out and why: {escape(str(output / SUMMARY_NAME))}",
            soft_wrap=True,
        )
        done(output / FILE_NAME, summary["image_root"])


def mine(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id that looks for them.")],
    pairs: Annotated[Path, typer.Argument(metavar="FILE", help="A file of pairs.")],
    *,
    output: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="The pairs with their negatives.")],
    negatives: Annotated[int, typer.Option(help="Mined for each query, at most.")] = 2,
    batch_size: BatchSize = 8,
    relative_margin: Annotated[float, typer.Option(help="How far below the right target's cosine, as a share.")] = 0.05,
    range_min: Annotated[int, typer.Option(help="Leave out so many of the nearest.")] = 0,
    range_max: Annotated[int | None, typer.Option(help="Look at so many of the nearest; else 10 a negative.")] = None,
    max_score: Annotated[float | None, typer.Option(help="Leave out what is nearer than this cosine.")] = None,
    image_root: ImageRoot = None,
) -> None:
    """Find hard negatives for pairs: other rows' targets that the model ranks high. For data.hard_negatives."""
    with loading():
        from cocoa.mining import mine as run

    limits = (relative_margin, range_min, range_max, max_score)
    found = run(model, pairs, output, negatives, batch_size, *limits, image_root)
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("rows", f"{len(found.pairs):,}")
    if found.dropped:
        table.add_row("rows left out, which have no target", f"{found.dropped:,}")
    table.add_row("negatives mined", f"{found.mined:,}")
    table.add_row("rows without any negative", f"{found.without:,}")
    table.add_row("mean cosine of query and target", f"{found.positive:.3f}")
    table.add_row("mean cosine of query and mined negative", f"{found.negative:.3f}" if found.mined else "-")
    console.print(table)
    for number, sides in enumerate(found.examples, 1):
        console.print(f"nearest negative, example {number}; a person should call it wrong:")
        for what, side in zip(("query", "target", "negative"), sides, strict=True):
            said = " ".join(part for part in (side.prompt(), str(side.image or "")) if part)
            console.print(f"  {what}: {escape(said)}", soft_wrap=True)
    done(output, found.image_root)


def done(path: Path, image_root: str | None) -> None:
    """Say where a file of training data is, and what a recipe needs beside it where its images lie elsewhere."""
    root = f", with data.image_root={image_root}, where its images are" if image_root else ""
    console.print(f"done: [bold]{escape(str(path))}[/bold]{escape(root)}", soft_wrap=True)


def embed(
    model: Model,
    source: Source,
    *,
    output: Annotated[Path, typer.Option(help="Where the parquet files and summary.json are written.")],
    instruction: RowInstruction = "",
    batch_size: BatchSize = 8,
    part_size: Annotated[int, typer.Option(help="Rows of a file that is written, at most.")] = 10_000,
    precision: Annotated[str, typer.Option(help="Of the numbers in it: float32 or float16.")] = "float32",
    max_length: MaxLength = None,
    text_column: TextColumn = "text",
    image_column: ImageColumn = "image",
    id_column: IdColumn = "id",
    image_root: ImageRoot = None,
    on_bad_row: OnBadRow = "error",
    max_bad_share: MaxBadShare = 0.1,
    truncate_dim: Annotated[int | None, typer.Option(help="Cut embeddings to so many numbers (Matryoshka).")] = None,
) -> None:
    """Embed a corpus into parquet files. A stopped run goes on; a corpus that has grown is embedded where it is new."""
    with loading():
        from cocoa.corpus import Columns
        from cocoa.corpus_embedding import EmbedSettings, embed_corpus
        from cocoa.corpus_files import FOLDER, SUMMARY_NAME
        from cocoa.processes import leave

    columns = Columns(id_column, text_column, image_column)
    how = (instruction, part_size, precision, max_length, image_root, batch_size, on_bad_row, max_bad_share)
    summary = embed_corpus(EmbedSettings(model, source, columns, *how, truncate_dim), output)
    leave()
    if is_main_process():
        if summary["bad_rows"]:
            where = escape(str(output / SUMMARY_NAME))
            console.print(f"{count(len(summary['bad_rows']), 'row')} left out; {where} says why", soft_wrap=True)
        console.print(
            f"done: {summary['rows']:,} embeddings in [bold]{escape(str(output / FOLDER))}[/bold]", soft_wrap=True
        )


@contextmanager
def loading() -> Iterator[None]:
    """Say on a terminal what it waits for while libraries are imported."""
    with Console(stderr=True).status("loading libraries") if is_main_process() else nullcontext():
        yield


def named_subsets(command: str, named: list[str] | None, more: list[str] | None) -> list[str] | str:
    """What `--subsets A B` asks for, which leaves B among the arguments."""
    if more and not named:
        raise CocoaError(f"{command}: unexpected argument {more[0]!r}; name data sets after --subsets")
    return [*(named or []), *(more or [])] or "all"


def is_main_process() -> bool:
    """Whether this process, of those that a launcher started, is the one that prints."""
    return int(os.environ.get("RANK", 0)) == 0
