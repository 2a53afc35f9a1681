"""What a run made, on one self-contained page: scores, loss curves, what was rebuilt, what is found.

Pictures are inside, nothing comes from the network, and no script runs; light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cocoa.gallery import Gallery
from cocoa.images import ImageRef, load_image
from cocoa.preview_html import data_uri, page_environment, write_page
from cocoa.rebuild import RebuiltImage, RebuiltText
from cocoa.report_curves import HEIGHT, WIDTH, stage_charts

GROUPS = ("Classification", "VQA", "Retrieval", "Grounding", "IND", "OOD", "Overall")
"""Rows of the score table."""
RIVALS = ("contrastive", "cocoa")
"""The two models whose difference the table shows, where both are in it."""
TINY = 160
"""Pictures of up to so many pixels are shown pixel by pixel; larger ones are photographs."""
LONGEST = 256
"""Longest side of any other embedded picture, in pixels."""


@dataclass(frozen=True)
class Report:
    """What the page shows; what is empty has no section.

    Attributes:
        title: heading of the page.
        models: by model (`backbone`, `contrastive`, `cocoa`) its hit@1 in percent by `GROUPS`.
        seconds: what took how long.
        equal: sentences on what was equal between the rivals.
        unequal: sentences on what was not.
        runs: by name, the checkpoint folders of its stages in order; their logs give the curves.
        images: pictures with rebuilt patches.
        texts: texts rebuilt through EOS alone.
        texts_elsewhere: the same texts, rebuilt from other rows' block A (`rebuild.swapped`): what is right there
            was guessed.
        galleries: what the models found.
        notes: sentences under the title, on what the numbers can tell and what not.
    """

    title: str
    models: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    equal: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)
    runs: dict[str, Sequence[Path]] = field(default_factory=dict)
    images: Sequence[RebuiltImage] = ()
    texts: Sequence[RebuiltText] = ()
    texts_elsewhere: Sequence[RebuiltText] = ()
    galleries: Sequence[Gallery] = ()
    notes: Sequence[str] = ()


class Row(NamedTuple):
    """A line of the score table.

    Attributes:
        group: what was averaged.
        scores: by model; None where it has none.
        best: the highest score as it is shown, to one decimal.
        gain: CoCoA over contrastive alone, in points; None where one is missing.
    """

    group: str
    scores: dict[str, float | None]
    best: float | None
    gain: float | None


class Shown(NamedTuple):
    """A picture for the page: its data URI, and whether its pixels are to stay visible."""

    uri: str
    tiny: bool


def write_report(path: Path, report: Report) -> None:
    """Write the page to a file, making its folder.

    Raises:
        CocoaError: a stage's log or a picture is missing, or the file cannot be written.
    """
    write_page(to_html(report), path)


def to_html(report: Report) -> str:
    """The page as HTML; whatever comes from the data is escaped."""
    environment = page_environment()
    environment.filters |= {"shown": shown, "seconds": seconds}
    return environment.get_template("report.html.jinja").render(
        report=report,
        rows=score_rows(report.models),
        stages=stage_charts(report.runs),
        width=WIDTH,
        height=HEIGHT,
        rebuilt=token_count(report.texts),
        guessed=token_count(report.texts_elsewhere),
    )


def score_rows(models: dict[str, dict[str, float]]) -> list[Row]:
    """The lines of the score table: `GROUPS`, without those that no model has."""
    rows = []
    for group in GROUPS:
        scores = {model: values.get(group) for model, values in models.items()}
        there = [round(score, 1) for score in scores.values() if score is not None]
        if not there:
            continue
        one, other = (scores.get(name) for name in RIVALS)
        gain = None if one is None or other is None else other - one
        rows.append(Row(group, scores, max(there) if len(models) > 1 else None, gain))
    return rows


def token_count(texts: Sequence[RebuiltText]) -> str:
    """How many tokens of all texts are right: `12 of 40 tokens right (30 %)`; empty without texts."""
    right, tokens = sum(text.tokens_right for text in texts), sum(text.tokens for text in texts)
    return f"{right:,} of {tokens:,} tokens right ({100 * right / tokens:.0f} %)" if texts else ""


def shown(image: ImageRef) -> Shown:
    """A picture as it is embedded: a tiny one whole and without loss, any other as a small JPEG."""
    loaded = load_image(image)
    tiny = max(loaded.size) <= TINY
    return Shown(data_uri(loaded, "PNG" if tiny else "JPEG", LONGEST), tiny)


def seconds(number: float) -> str:
    """A time for people: `8.3 s`, `42 s`, `4 min 5 s`."""
    if number < 10:
        return f"{number:.1f} s"
    minutes, rest = divmod(round(number), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
