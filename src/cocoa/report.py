"""What runs made, on one self-contained page: scores, curves, what was rebuilt, where EOS looks, what is found.

Pictures are inside, nothing comes from the network, and no script runs; light and dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from cocoa.bootstrap import LEVEL
from cocoa.eos_attention import FULL, EosAttention
from cocoa.gallery import Gallery, Mistake
from cocoa.images import ImageRef, load_image
from cocoa.preview_html import data_uri, page_environment, write_page
from cocoa.rebuild import RebuiltImage, RebuiltText
from cocoa.report_curves import HEIGHT, WIDTH, stage_charts
from cocoa.report_scores import ScoreTable

TINY = 160
"""Pictures of up to so many pixels are shown pixel by pixel; larger ones are photographs."""
COLOURS = 6
"""In `data/report/report.css`."""
LONGEST = 256
"""Longest side of any other embedded picture, in pixels."""


class Missing(NamedTuple):
    """What the page could show and does not: why, and the command that makes it."""

    what: str
    why: str
    remedy: str


@dataclass(frozen=True)
class Report:
    """What the page shows; what is empty has no section.

    Attributes:
        title: heading of the page.
        scores: of all models, with their intervals.
        seconds: what took how long.
        equal: sentences on what was equal between the rivals.
        unequal: sentences on what was not.
        runs: by name, the checkpoint folders of its stages in order; their logs give the curves.
        images: pictures with rebuilt patches.
        images_of: the run that rebuilt them.
        texts: texts rebuilt through EOS alone.
        texts_elsewhere: the same texts, rebuilt from other rows' block A (`rebuild.swapped`): what is right there
            was guessed.
        texts_of: the run that rebuilt them.
        attention: where EOS looks, model by model.
        galleries: what the models found.
        mistakes: by meta-task, queries whose first hit is wrong.
        mistakes_of: the run that made them.
        notes: sentences under the title, on what the numbers can tell and what not.
        missing: what there is no section of.
    """

    title: str
    scores: ScoreTable | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    equal: Sequence[str] = ()
    unequal: Sequence[str] = ()
    runs: dict[str, Sequence[Path]] = field(default_factory=dict)
    images: Sequence[RebuiltImage] = ()
    images_of: str = ""
    texts: Sequence[RebuiltText] = ()
    texts_elsewhere: Sequence[RebuiltText] = ()
    texts_of: str = ""
    attention: Sequence[EosAttention] = ()
    galleries: Sequence[Gallery] = ()
    mistakes: dict[str, list[Mistake]] = field(default_factory=dict)
    mistakes_of: str = ""
    notes: Sequence[str] = ()
    missing: Sequence[Missing] = ()


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
    environment.filters |= {"shown": shown, "seconds": seconds, "colour": colour}
    return environment.get_template("report/page.html.jinja").render(
        report=report,
        stages=stage_charts(report.runs),
        colours=colours(report),
        width=WIDTH,
        height=HEIGHT,
        level=f"{LEVEL:.0%}".replace("%", " %"),
        full=f"{FULL:g}",
        rebuilt=token_count(report.texts),
        guessed=token_count(report.texts_elsewhere),
    )


def colours(report: Report) -> dict[str, int]:
    """A number for each model that gives its colour, 1 the first; trained runs before others, as in the curves."""
    names = dict.fromkeys([*report.runs, *(report.scores.models if report.scores else [])])
    return {name: number for number, name in enumerate(names, 1)}


def colour(number: int) -> str:
    """The class of a model's colour; there are six, and then they come again."""
    return f"run-{(number - 1) % COLOURS + 1}"


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
