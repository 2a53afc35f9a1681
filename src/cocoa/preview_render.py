"""A preview in the terminal: text alone, with colours where the terminal has them.

What it shares with the HTML (`cocoa.preview_html`): lines of numbers, and the bins of a histogram.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from cocoa.estimate import ASSUMPTIONS
from cocoa.preview import DatasetRows, Preview, Schedule, StagePreview
from cocoa.preview_samples import BLOCKS, Measured, Sample, Token, visible
from cocoa.wording import count, duration, percent, short, size

BARS = " ▁▂▃▄▅▆▇█"
BINS = 32
MOST_TOKENS = 400
"""Tokens of a sequence that the terminal shows."""
STYLES = {
    "control": "dim",
    "eos": "bold dark_orange",
    "image": "bold blue",
    "masked": "bold magenta",
    "answer": "magenta",
}
LEGENDS = {
    "masked": "‹word› stands for <|mask|>: hidden from the model, and what it must predict.",
    "answer": "What is coloured in a dialogue is predicted, each token from those before it.",
}
ESTIMATES = "Estimates, no measurements. What they rest on:"


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of whole numbers in bins of equal width, and where they lie."""

    bins: list[int]
    least: int
    median: float
    most: int

    @classmethod
    def of(cls, values: Sequence[int], most_bins: int = BINS) -> Histogram:
        """At most `most_bins` bins over the range of the values, of which there is one or more."""
        low, high = min(values), max(values)
        width = -(-(high - low + 1) // most_bins)
        bins = [0] * (-(-(high - low + 1) // width))
        for value in values:
            bins[(value - low) // width] += 1
        return cls(bins, low, median(values), high)

    def bars(self) -> str:
        """One character a bin; a bin that is not empty is always seen."""
        top = max(self.bins)
        return "".join(BARS[-(-number * (len(BARS) - 1) // top)] for number in self.bins)


def show(console: Console, preview: Preview) -> None:
    """Print a preview."""
    console.print(Text(headline(preview), style="dim"))
    for number, stage in enumerate(preview.stages, 1):
        console.print()
        console.print(Rule(Text(f"stage {number} of {len(preview.stages)}: {stage.name}", style="bold"), align="left"))
        console.print(_stage(stage), highlight=False)
    console.print()
    console.print(Text(ESTIMATES, style="bold"))
    for sentence in ASSUMPTIONS:
        console.print(Padding(Text(sentence, style="dim"), (0, 0, 0, 2)))


def headline(preview: Preview) -> str:
    """Backbone, seed, dtype and image budget in one line."""
    recipe = preview.recipe
    least, most = recipe.image.train_tokens
    return (
        f"backbone {recipe.backbone} (no weights loaded) · {recipe.dtype} · seed {recipe.seed} · "
        f"{least} to {most} tokens an image, {recipe.image.resize}"
    )


def _stage(stage: StagePreview) -> RenderableType:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="cyan", no_wrap=True)
    facts.add_column(overflow="fold")
    facts.add_row("steps", steps_line(stage.schedule))
    facts.add_row("an epoch", epoch_line(stage.schedule, stage.kept))
    facts.add_row("attention", stage.attention)
    facts.add_row("adapters", stage.adapted)
    facts.add_row("trained", trained_line(stage))
    facts.add_row("memory", memory_line(stage))
    facts.add_row("time", time_line(stage))
    facts.add_row("lengths", _lengths(stage.measured))
    facts.add_row("", measured_line(stage))
    parts: list[RenderableType] = [_rows(stage)]
    parts += [Text(), facts, Text()]
    kinds = {token.kind for row in stage.samples for part in row.parts for token in part.tokens}
    parts += [Text(legend, style="dim") for kind, legend in LEGENDS.items() if kind in kinds]
    for number, sample in enumerate(stage.samples, 1):
        parts += [Text(), _sample(number, sample)]
    return Group(*parts)


def _rows(stage: StagePreview) -> RenderableType:
    held = any(rows.validation for rows in stage.rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="cyan", show_footer=True)
    table.add_column("data set", "total", overflow="fold")
    table.add_column("rows kept", f"{stage.kept:,}", justify="right")
    if held:
        table.add_column("validation", f"{sum(rows.validation for rows in stage.rows):,}", justify="right")
    table.add_column("left out", f"{sum(rows.left_out_rows for rows in stage.rows):,}", overflow="fold")
    for rows in stage.rows:
        counts = [f"{rows.kept:,}"] + ([f"{rows.validation:,}"] if held else [])
        style = None if rows.kept else "yellow"
        table.add_row(Text(visible(rows.name)), *counts, Text(reasons(rows)), style=style)
    return table


def reasons(rows: DatasetRows) -> str:
    """Rows left out, with the reason of each number."""
    return "; ".join(f"{number:,} {visible(reason)}" for reason, number in rows.left_out.items())


def _lengths(measured: Measured) -> Table:
    table = Table.grid(padding=(0, 2))
    for sequence, kinds in measured.counts.items():
        for kind, values in kinds.items():
            shape = Histogram.of(values)
            label = kind if len(measured.counts) == 1 else f"{sequence}, {kind}"
            spread = f"{shape.least} … {shape.median:g} … {shape.most}"
            table.add_row(Text(label), Text(shape.bars(), style="green"), Text(spread))
    return table


def _sample(number: int, sample: Sample) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for part in sample.parts:
        several = len(sample.parts) > 1
        if several:
            note = f"; {part.note}" if part.note else ""
            length = f"{count(part.length(), 'token')}{note}"
            table.add_row(Text(part.name, style="bold cyan"), Text(length, style="dim"))
        if part.picture is not None:
            table.add_row("  image", part.picture.describe())
        if part.instruction:
            table.add_row("  instruction", Text(visible(part.instruction)))
        for block, tokens in part.blocks():
            label = BLOCKS.get(block, "tokens")
            table.add_row(f"  {label}", tokens_text(tokens))
    return Group(Text.assemble((f"{number}  ", "bold"), (visible(sample.row_id), "bold")), table)


def tokens_text(tokens: Sequence[Token]) -> Text:
    """Tokens as running text: control tokens as they are, masks as `‹target›`, an image in brackets."""
    text = Text()
    for token in tokens[:MOST_TOKENS]:
        if token.kind == "masked":
            word = token.target.lstrip(" ")
            text.append(" " * (len(token.target) - len(word)))
            text.append(f"‹{word or '␣'}›", STYLES["masked"])
        elif token.kind == "image":
            text.append(f"[{token.text}]", STYLES["image"])
        else:
            text.append(token.text, STYLES.get(token.kind))
    if len(tokens) > MOST_TOKENS:
        text.append(f" … and {len(tokens) - MOST_TOKENS:,} more tokens", "dim")
    return text


def steps_line(schedule: Schedule) -> str:
    """Steps, epochs, pairs and warm-up in one line."""
    return (
        f"{schedule.steps:,} of {schedule.batch_size:,} pairs each: {short(schedule.epochs)} epochs, "
        f"{schedule.pairs_seen:,} pairs seen; warm-up of {count(schedule.warmup_steps, 'step')} to a learning "
        f"rate of {schedule.learning_rate:g}"
    )


def epoch_line(schedule: Schedule, kept: int) -> str:
    """Rows that an epoch takes, and why it leaves some for the next."""
    if schedule.uniform:
        drawn = schedule.steps_per_epoch * schedule.batch_size
        steps = count(schedule.steps_per_epoch, "step")
        return f"{drawn:,} draws in {steps}, each data set as often as any other: rows of small ones come again"
    rest = []
    if schedule.sub_batch_rest:
        rest.append(f"{schedule.sub_batch_rest:,} that fill no run of sub_batch_size")
    if schedule.last_batch_rest:
        rest.append(f"{schedule.last_batch_rest:,} that fill no last batch")
    taken = schedule.steps_per_epoch * schedule.batch_size
    without = f", without {' and '.join(rest)}; each epoch leaves out others" if rest else ""
    return f"{taken:,} of {kept:,} rows in {count(schedule.steps_per_epoch, 'step')}{without}"


def trained_line(stage: StagePreview) -> str:
    """Trained parameters and where they are."""
    places = ", ".join(f"{place} {number:,}" for place, number in stage.trainable.items())
    share = percent(stage.trained, stage.parameters)
    return f"{stage.trained:,} of {stage.parameters:,} parameters ({share}): {places}"


def memory_line(stage: StagePreview) -> str:
    """Estimated memory as the recipe has it, its parts, and what gradient checkpointing would change."""
    memory, on = stage.estimate.memory, stage.estimate.checkpointing
    parts = ", ".join(f"{name} {size(number)}" for name, number in memory_parts(stage, on) if number)
    other = f"{'without' if on else 'with'} gradient checkpointing ≈ {size(memory.total(not on))}"
    at_once = f"{count(stage.estimate.rows_at_once, 'sequence')} of up to {stage.estimate.longest:,} tokens"
    return f"≈ {size(memory.total(on))} on each device for {at_once} at once ({parts}); {other}"


def memory_parts(stage: StagePreview, checkpointing: bool) -> list[tuple[str, int]]:
    """Parts of the estimated memory, in bytes."""
    memory = stage.estimate.memory
    activations = memory.checkpointed if checkpointing else memory.activations
    return [
        ("weights", memory.weights),
        ("gradients and AdamW", memory.states),
        ("activations", activations),
        ("logits", memory.logits),
    ]


def time_line(stage: StagePreview) -> str:
    """Estimated time, and of how much arithmetic."""
    estimate = stage.estimate
    return (
        f"{duration(estimate.hours)} on {count(estimate.devices, 'device')} at {estimate.tflops:g} TFLOP/s, "
        f"for {estimate.flops:.2g} operations"
    )


def measured_line(stage: StagePreview) -> str:
    """How many rows the lengths are of, and how many of them are cut."""
    measured = stage.measured
    which = "all rows" if measured.rows == stage.kept else f"a random {measured.rows:,} of {stage.kept:,} rows"
    cut = f"{measured.shortened:,} of them {'are' if measured.shortened > 1 else 'is'}"
    return (
        f"least … median … most tokens of {which}; the total counts control tokens too; "
        f"{cut if measured.shortened else 'no row is'} shortened by max_length {stage.max_length:,}"
    )
