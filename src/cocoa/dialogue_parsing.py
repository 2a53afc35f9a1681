"""What a model wrote, read strictly: text that is not of the form asked for is dropped with its reason, never mended.

Pure functions on texts. That a text is no refusal and that it is true are not judged here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

QUESTIONS = (3, 5)
"""Least and most questions on an image in CoMa."""
QUESTION_LENGTH = 300
"""Characters of a question, at most."""

CUT_OFF, CONTROL_TOKEN, EMPTY = "cut off", "control token", "empty"
NO_LIST = "not a numbered list"
NO_MARK, REPEATED, TOO_LONG = "no question mark at its end", "repeated question", "question too long"
ECHO = "repeats the question"
LINE_BREAK = "line break"

_NUMBERED = re.compile(r"(\d+)[.)]\s+(\S.*)")


class Reply(NamedTuple):
    """What a model wrote: the text without what ends a turn, and whether the model itself ended it."""

    text: str
    finished: bool


class Dropped(NamedTuple):
    """A text that is not used.

    Attributes:
        what: `questions` (all that were asked on an image), `question`, `answer` or `caption`.
        reason: why.
        text: as the model wrote it.
    """

    what: str
    reason: str
    text: str


def bounds(asked: int) -> tuple[int, int]:
    """Least and most questions that a list may hold: CoMa's 3 and 5, or what was asked for where that is outside."""
    least, most = QUESTIONS
    return min(least, asked), max(most, asked)


def parse_questions(reply: Reply, least: int, most: int) -> tuple[list[str], list[Dropped]]:
    """The questions of a numbered list, one a line, counted from 1; empty lines between them do not matter.

    A single question that is malformed is dropped alone. The whole list is dropped where it is no such list, where
    it holds more than `most` questions, or where fewer than `least` are left.

    Returns:
        The questions, and what was dropped; where `what` is `questions`, there are none.
    """

    def nothing(reason: str) -> tuple[list[str], list[Dropped]]:
        return [], [*dropped, Dropped("questions", reason, reply.text)]

    dropped: list[Dropped] = []
    if fault := fault_of(reply):
        return nothing(fault)
    lines = [_NUMBERED.fullmatch(line.strip()) for line in reply.text.splitlines() if line.strip()]
    if any(line is None or int(line[1]) != number for number, line in enumerate(lines, 1)):
        return nothing(NO_LIST)
    if len(lines) > most:
        return nothing(f"more than {most} questions")
    kept: dict[str, str] = {}
    for question in (line[2] for line in lines if line is not None):
        if not _words(question):
            dropped.append(Dropped("question", EMPTY, question))
        elif not question.endswith("?"):
            dropped.append(Dropped("question", NO_MARK, question))
        elif len(question) > QUESTION_LENGTH:
            dropped.append(Dropped("question", TOO_LONG, question))
        elif _words(question) in kept:
            dropped.append(Dropped("question", REPEATED, question))
        else:
            kept[_words(question)] = question
    if len(kept) < least:
        return nothing(f"fewer than {least} questions")
    return list(kept.values()), dropped


def answer_fault(reply: Reply, question: str) -> str:
    """Why a text is no answer to the question; empty if it is one."""
    if fault := fault_of(reply):
        return fault
    return ECHO if f"{_words(reply.text)} ".startswith(f"{_words(question)} ") else ""


def caption_fault(reply: Reply) -> str:
    """Why a text is no caption; empty if it is one."""
    return fault_of(reply) or (LINE_BREAK if len(reply.text.splitlines()) > 1 else "")


def fault_of(reply: Reply) -> str:
    """What is wrong with any text: cut off by the limit of new tokens, a control token in it, or nothing to read."""
    if not reply.finished:
        return CUT_OFF
    if "<|" in reply.text:
        return CONTROL_TOKEN
    return "" if _words(reply.text) else EMPTY


def _words(text: str) -> str:
    """The words of a text, without case and punctuation; equal for texts that say the same in the same words."""
    return " ".join(re.findall(r"\w+", text.casefold()))
