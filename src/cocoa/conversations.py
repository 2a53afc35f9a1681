"""What a model is told about images, and what is kept of its replies: questions, answers one by one, captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from cocoa.architectures import EMBEDDED
from cocoa.dialogue_parsing import Dropped, Reply, answer_fault, bounds, caption_fault, parse_questions
from cocoa.errors import CocoaError
from cocoa.generation import Conversation, Engine
from cocoa.image_listing import Listing, Picture
from cocoa.pairs import Turn
from cocoa.parsing import build
from cocoa.yaml_text import read_yaml

NUMBER = QUESTION = "{0}"
"""Where a prompt has the number of questions, and where the question."""


@dataclass(frozen=True)
class Prompts:
    """What is said to the model.

    Attributes:
        questions: asks for a numbered list of questions; `{0}` is how many.
        answer: asks one of them; `{0}` is the question.
        caption: asks for a caption.
    """

    questions: str
    answer: str
    caption: str

    def __post_init__(self) -> None:
        for key, text in asdict(self).items():
            if not text.strip() or "<|" in text:
                raise CocoaError(f"prompts.{key}: empty, or a control token in it; write plain text")
        if QUESTION not in self.answer:
            raise CocoaError(f"prompts.answer: no {QUESTION} in it; write it where the question stands")


def load_prompts(model: str, path: Path | None = None) -> Prompts:
    """The prompts in a file; else those of `data/dialogues.yaml` that are for this model.

    Raises:
        CocoaError: the file cannot be read, or a key is missing or unknown.
    """
    if path is None:
        sets = yaml.safe_load(resources.files("cocoa").joinpath("data/dialogues.yaml").read_text(encoding="utf-8"))
        return Prompts(**sets["scenes" if model in EMBEDDED else "general"])
    try:
        values = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CocoaError(f"{path}: cannot be read ({error}); write the keys questions, answer and caption") from None
    try:
        return build(Prompts, values, "prompts")
    except CocoaError as error:
        raise CocoaError(f"{path}: {error}") from None


@dataclass
class Outcome:
    """What there is of a picture in the end: its own caption and conversation where it had them, else the model's."""

    caption: str
    turns: list[Turn]
    dropped: list[Dropped] = field(default_factory=list)


@dataclass(frozen=True)
class Request:
    """What is wanted of a batch of pictures.

    Attributes:
        prompts: how the model is asked.
        dialogues: conversations, of pictures that have none.
        captions: captions, of pictures that have none.
        questions: asked for a picture.
        max_new_tokens: of a reply.
        temperature: of the questions.
        seed: of the questions.
    """

    prompts: Prompts
    dialogues: bool
    captions: bool
    questions: int
    max_new_tokens: int
    temperature: float
    seed: int


def converse(
    engine: Engine, pictures: Sequence[Picture], images: Sequence[Image.Image], request: Request
) -> list[Outcome]:
    """Ask about a batch of pictures; all of them at once, turn by turn.

    Questions are sampled, answers and captions greedy. An answer that is dropped takes its question with it, and the
    conversation goes on without both.

    Args:
        engine: what is asked.
        pictures: with what they have already, which is kept.
        images: theirs, in memory.
        request: what is wanted.
    """
    outcomes = [Outcome(picture.caption, list(picture.turns)) for picture in pictures]
    if request.dialogues:
        _write_turns(engine, outcomes, images, request)
    if request.captions:
        chosen = [i for i, outcome in enumerate(outcomes) if not outcome.caption]
        asked = [Conversation(images[i], (request.prompts.caption,)) for i in chosen]
        for i, reply in zip(chosen, _ask(engine, asked, request.max_new_tokens), strict=True):
            if fault := caption_fault(reply):
                outcomes[i].dropped.append(Dropped("caption", fault, reply.text))
            else:
                outcomes[i].caption = reply.text
    return outcomes


def _write_turns(engine: Engine, outcomes: list[Outcome], images: Sequence[Image.Image], request: Request) -> None:
    """Fill in conversations where there are none."""
    prompts, limit = request.prompts, request.max_new_tokens
    chosen = [i for i, outcome in enumerate(outcomes) if not outcome.turns]
    first = prompts.questions.replace(NUMBER, str(request.questions))
    asked = [Conversation(images[i], (first,)) for i in chosen]
    questions: dict[int, list[str]] = {}
    for i, reply in zip(chosen, _ask(engine, asked, limit, request.temperature, request.seed), strict=True):
        questions[i], dropped = parse_questions(reply, *bounds(request.questions))
        outcomes[i].dropped += dropped
    for turn in range(max(map(len, questions.values()), default=0)):
        now = {i: found[turn] for i, found in questions.items() if turn < len(found)}
        asked = []
        for i, question in now.items():
            before = [text for said in outcomes[i].turns for text in (_asked(prompts, said.question), said.answer)]
            asked.append(Conversation(images[i], (*before, _asked(prompts, question))))
        for (i, question), reply in zip(now.items(), _ask(engine, asked, limit), strict=True):
            if fault := answer_fault(reply, question):
                outcomes[i].dropped.append(Dropped("answer", fault, reply.text))
            else:
                outcomes[i].turns.append(Turn(question, reply.text))


def _asked(prompts: Prompts, question: str) -> str:
    return prompts.answer.replace(QUESTION, question)


def _ask(
    engine: Engine, conversations: list[Conversation], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
) -> list[Reply]:
    return engine(conversations, max_new_tokens, temperature, seed) if conversations else []


def reason_to_drop(outcome: Outcome, write: str) -> str:
    """Why a picture is not in the result; empty if it is: it has what was to be written, with `both` one of the two."""
    has = {"dialogues": bool(outcome.turns), "captions": bool(outcome.caption)}
    if has.get(write, any(has.values())):
        return ""
    reasons = {dropped.what: dropped.reason for dropped in outcome.dropped}
    if write == "captions":
        return f"caption: {reasons['caption']}"
    return f"questions: {reasons['questions']}" if "questions" in reasons else "no turn left"


def counts(listing: Listing, outcomes: Sequence[Outcome], write: str) -> dict[str, Any]:
    """How many images, dialogues, turns and captions there are, and how many were dropped, by reason.

    Args:
        listing: what the source holds.
        outcomes: of its pictures.
        write: what was to be written.
    """
    reasons = [reason_to_drop(outcome, write) for outcome in outcomes]
    unspoken = [reason_to_drop(outcome, "dialogues") for outcome in outcomes if write != "captions"]
    kept = [outcome for outcome, reason in zip(outcomes, reasons, strict=True) if not reason]
    dropped = [text for outcome in outcomes for text in outcome.dropped]
    return {
        "images": {
            "found": len(listing.pictures) + listing.duplicates + len(listing.unreadable),
            "unreadable": len(listing.unreadable),
            "duplicates": listing.duplicates,
            "kept": len(kept),
            "dropped": Counter(reason for reason in reasons if reason),
        },
        "dialogues": {
            "found": sum(bool(picture.turns) for picture in listing.pictures),
            "kept": sum(bool(outcome.turns) for outcome in kept),
            "dropped": Counter(reason for reason in unspoken if reason),
        },
        "turns": {
            "kept": sum(len(outcome.turns) for outcome in kept),
            "dropped": Counter(
                f"{text.what}: {text.reason}" for text in dropped if text.what in ("question", "answer")
            ),
        },
        "captions": {
            "found": sum(bool(picture.caption) for picture in listing.pictures),
            "kept": sum(bool(outcome.caption) for outcome in kept),
            "dropped": Counter(text.reason for text in dropped if text.what == "caption"),
        },
    }
