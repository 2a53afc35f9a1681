"""The command line: parse, call one function, print.

A user's mistake ends in one line and exit status 2; a traceback is a bug of ours.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

import cocoa
from cocoa.cli_data import (
    BatchSize,
    MaxLength,
    Model,
    dialogues,
    embed,
    is_main_process,
    loading,
    mine,
    named_subsets,
    scenes,
    validate,
)
from cocoa.cli_publish import card, push
from cocoa.cli_search import app as search_page
from cocoa.cli_search import index, search
from cocoa.errors import CocoaError
from cocoa.parsing import no_such_recipe
from cocoa.wording import count

app = typer.Typer(
    name="cocoa",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()


def print_version(wanted: bool) -> None:
    """Print the version, and end."""
    if wanted:
        typer.echo(cocoa.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a multimodal LLM into an embedding model (CoCoA, arXiv 2603.01471)."""


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe; see recipes/ for examples.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, dotted: stages.contrastive.max_steps=100"),
]


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    *,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on in a folder that another recipe's run has begun.")
    ] = False,
) -> None:
    """Run a recipe's stages in order; the result is OUTPUT_DIR/final. A stopped run goes on where it was."""
    see_recipe(recipe)
    with loading():
        from cocoa.pipeline import train as run
        from cocoa.processes import leave
        from cocoa.recipe import load_recipe

    asked: SystemExit | KeyboardInterrupt | None = None
    try:
        final = run(load_recipe(recipe, overrides or []), accept_changes)
    except (SystemExit, KeyboardInterrupt) as stop:
        asked = stop.with_traceback(None)  # which holds the trainer
    leave()
    if asked is not None:
        raise asked
    if is_main_process():
        console.print(f"done: [bold]{escape(str(final))}[/bold]", soft_wrap=True)


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    *,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="The page; else OUTPUT_DIR/preview.html.")
    ] = None,
    tflops: Annotated[float, typer.Option(help="TFLOP/s that a device is assumed to reach.")] = 400.0,
    devices: Annotated[int, typer.Option(help="Devices that the run would have.")] = 1,
    split: Annotated[bool, typer.Option("--split", help="The model is split over the devices (FSDP2).")] = False,
) -> None:
    """See what a recipe would train on and its cost: rows, lengths, steps, samples. Loads no weights."""
    see_recipe(recipe)
    with loading():
        from cocoa.preview import preview as run
        from cocoa.preview_html import write_html
        from cocoa.preview_render import show
        from cocoa.recipe import load_recipe

    logging.getLogger("cocoa").setLevel(logging.WARNING)  # the preview says it all itself
    loaded = load_recipe(recipe, overrides or [])
    with Console(stderr=True).status("reading rows and images"):
        found = run(loaded, tflops, devices, split)
    path = html or loaded.output_dir / "preview.html"
    write_html(found, path)
    show(console, found)
    console.print(f"\nthe same with pictures: [bold]{escape(str(path))}[/bold]", soft_wrap=True)


@app.command()
def evaluate(
    model: Model,
    more_subsets: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    *,
    data: Annotated[Path, typer.Option(help="Folder in MMEB-eval's layout, or a file of pairs.")],
    output: Annotated[Path, typer.Option(help="Where score files are written.")],
    subsets: Annotated[list[str] | None, typer.Option(metavar="A B ...", help="Data sets to score; else all.")] = None,
    batch_size: BatchSize = 8,
    image_root: Annotated[Path | None, typer.Option(help="Folder or archive that image paths are relative to.")] = None,
    split: Annotated[str, typer.Option(help="Which files of each data set to read.")] = "test",
    max_length: MaxLength = None,
    prompt_style: Annotated[str, typer.Option(help="cocoa; or reference: VLM2Vec's plain form.")] = "cocoa",
    on_bad_row: Annotated[str, typer.Option(help="error; or skip: leave rows out that cannot be used.")] = "error",
    truncate_dim: Annotated[
        list[int] | None, typer.Option(help="Score embeddings cut to so many numbers too; may be given again.")
    ] = None,
) -> None:
    """Score a model: hit@1 of each data set, and the averages. A stopped run encodes only what is missing."""
    with loading():
        from cocoa.compare_table import score_table
        from cocoa.evaluation import evaluate as run
        from cocoa.processes import leave
        from cocoa.scores import short_name

    wanted = named_subsets("evaluate", subsets, more_subsets)
    how = (wanted, batch_size, image_root, split, max_length, prompt_style, on_bad_row, truncate_dim)
    result = run(model, data, output, *how)
    leave()
    if is_main_process():
        shorter = {f"{dim} numbers": part for dim, part in result["truncated"].items()}
        console.print(score_table({short_name(model): result} | shorter))
        if left_out := sum(row["left_out"] for row in result["bad_rows"]):
            console.print(f"{count(left_out, 'row')} could not be used; table.md and summary.json name them")
        console.print(f"score files: {escape(str(output))} (table.md is for reading)", soft_wrap=True)


for _command in (validate, scenes, dialogues, mine, embed, card, push, index, search):
    app.command()(_command)
app.command("app")(search_page)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="--output of evaluate, or output_dir of train.")],
    *,
    datasets: Annotated[bool, typer.Option("--datasets", help="Show every data set too.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE.md", help="The table as markdown too.")] = None,
    json_output: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="All numbers.")] = None,
    resamples: Annotated[int, typer.Option(min=1, help="Of the queries, for the intervals.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
) -> None:
    """Set runs beside the first of them: scores with intervals of the difference, seconds, tokens, memory."""
    from cocoa import compare as comparison
    from cocoa import compare_table

    found = comparison.compare(runs, resamples, seed)
    compare_table.show(console, found, datasets)
    compare_table.write(found, datasets, output, json_output)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="output_dir of train, or --output of evaluate.")],
    *,
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="The page.")],
    data: Annotated[Path | None, typer.Option(help="Evaluation data; else where the scores say it was.")] = None,
    image_root: Annotated[Path | None, typer.Option(help="What its image paths are relative to.")] = None,
    datasets: Annotated[int, typer.Option(min=1, help="Data sets of a meta-task that are looked into.")] = 3,
    checkpoints: Annotated[
        bool | None,
        typer.Option(
            "--checkpoints/--no-checkpoints", help="Load them, to rebuild and look; else if small, or on a GPU."
        ),
    ] = None,
) -> None:
    """One page on runs: scores, curves, what was rebuilt, where EOS looks, what is found and what is not."""
    with loading():
        from cocoa.files import check_writable
        from cocoa.report import write_report
        from cocoa.report_runs import report_of

    check_writable(output, is_folder=False)
    found = report_of(runs, data, image_root, datasets, checkpoints)
    write_report(output, found)
    for missing in found.missing:
        console.print(escape(f"without {missing.what}: {missing.why} ({missing.remedy})"), soft_wrap=True)
    console.print(f"done: [bold]{escape(str(output))}[/bold]", soft_wrap=True)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/demo"),
    backbone: Annotated[str, typer.Option(help="mini-qwen2-vl or mini-qwen2.5-vl.")] = "mini-qwen2-vl",
    seed: Annotated[int, typer.Option(help="Of order, masks and choice of rows.")] = 42,
) -> None:
    """CoCoA against contrastive learning alone, in minutes, on a small backbone and synthetic scenes."""
    with loading():
        from cocoa import demo as demonstration

    found = demonstration.run(output, backbone, seed, say=lambda line: console.print(line, soft_wrap=True))
    table = Table(title=f"hit@1 (%) of {backbone} on test scenes, {demonstration.PAIRS_A_SET} pairs a data set")
    table.add_column("")
    for title in demonstration.MODELS.values():
        table.add_column(title, justify="right")
    for group in found.models["cocoa"]:
        values = [f"{found.models[name][group]:.1f}" for name in demonstration.MODELS]
        table.add_row(group, *values, style="bold" if group == "Overall" else None)
    console.print(table)
    console.print(f"[bold]{found.verdict}[/bold]", soft_wrap=True)
    for what, lines in (("equal", demonstration.EQUAL), ("not equal", demonstration.UNEQUAL)):
        for line in lines:
            console.print(f"{what}: {line}", soft_wrap=True)
    console.print(
        f"{found.seconds['total']:.0f} seconds. Look at [bold]{escape(str(output / 'report.html'))}[/bold]; "
        f"what comes next: docs/tour.md. Its recipe, to change and train anew: {escape(str(output / 'recipe.yaml'))}",
        soft_wrap=True,
    )


def see_recipe(path: Path) -> None:
    """See that a recipe is there, before the libraries are loaded that read it; what else is wrong, those tell."""
    try:
        path.stat()
    except FileNotFoundError:
        raise no_such_recipe(path) from None
    except (OSError, ValueError):
        return


def main() -> None:
    """Entry point of the `cocoa` command."""
    level = logging.INFO if is_main_process() else logging.ERROR
    handler: logging.Handler = logging.StreamHandler()
    if sys.stderr.isatty():
        handler = RichHandler(console=Console(stderr=True), show_path=False, show_level=False)
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, which nothing has done yet
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # on a GPU: every pass has another size
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else waiting threads take the cores that others' work needs
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("cocoa").setLevel(level)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries' next major versions
    try:
        app(standalone_mode=True)
    except CocoaError as error:
        sys.stderr.write(f"cocoa: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
