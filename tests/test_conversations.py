"""What is said to a model in which order, and what is kept of its replies; the model here is a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cocoa.conversations import Outcome, Prompts, Request, converse, load_prompts
from cocoa.dialogue_parsing import Dropped, Reply
from cocoa.errors import CocoaError
from cocoa.generation import Conversation
from cocoa.image_listing import Picture
from cocoa.pairs import Turn

PROMPTS = Prompts("ask {0}", "answer: {0}", "describe")
REQUEST = Request(PROMPTS, True, True, 3, 99, 0.7, 5)
LIST = "1. a?\n2. b?\n3. c?"
IMAGES = [Image.new("RGB", (28, 28), colour) for colour in ("red", "green", "blue")]
PICTURES = [Picture(f"/{i}.png", str(i)) for i in range(3)]


class Table:
    """An engine that looks replies up by image number and last message, and keeps what it was asked."""

    def __init__(self, replies: dict[tuple[int, str], Reply | str] | None = None) -> None:
        self.replies = {("ask 3"): LIST, "describe": "a picture"}
        self.special = replies or {}
        self.calls: list[tuple[list[tuple[int, tuple[str, ...]]], int, float, int]] = []

    def __call__(
        self, conversations: Sequence[Conversation], max_new_tokens: int, temperature: float = 0.0, seed: int = 0
    ) -> list[Reply]:
        asked = [(IMAGES.index(image), said) for image, said in conversations]
        self.calls.append((asked, max_new_tokens, temperature, seed))
        found = []
        for number, said in asked:
            reply = self.special.get((number, said[-1]), self.replies.get(said[-1], f"to {said[-1]}"))
            found.append(Reply(reply, True) if isinstance(reply, str) else reply)
        return found


def turns(*questions: str) -> list[Turn]:
    return [Turn(question, f"to answer: {question}") for question in questions]


def test_questions_are_sampled_and_answered_in_one_growing_conversation() -> None:
    engine = Table()
    found = converse(engine, PICTURES, IMAGES, REQUEST)
    assert found == [Outcome("a picture", turns("a?", "b?", "c?"))] * 3
    a, b = ("answer: a?", "to answer: a?"), ("answer: b?", "to answer: b?")
    said = [("ask 3",), a[:1], (*a, b[0]), (*a, *b, "answer: c?"), ("describe",)]
    assert engine.calls == [
        ([(i, one) for i in range(3)], 99, *((0.7, 5) if number == 0 else (0.0, 0))) for number, one in enumerate(said)
    ]


def test_a_dropped_answer_drops_its_turn_and_the_conversation_goes_on_without_it() -> None:
    engine = Table({(1, "answer: b?"): Reply("it is", False), (2, "answer: c?"): "c?"})
    found = converse(engine, PICTURES, IMAGES, REQUEST)
    assert [outcome.turns for outcome in found] == [turns("a?", "b?", "c?"), turns("a?", "c?"), turns("a?", "b?")]
    assert [outcome.dropped for outcome in found] == [
        [],
        [Dropped("answer", "cut off", "it is")],
        [Dropped("answer", "repeats the question", "c?")],
    ]
    (third,) = [asked for asked, *_ in engine.calls if asked[0][1][-1] == "answer: c?"]
    assert third[1] == (1, ("answer: a?", "to answer: a?", "answer: c?"))


def test_lists_of_unequal_length_and_none() -> None:
    engine = Table({(0, "ask 3"): f"{LIST}\n4. d?", (1, "ask 3"): "no", (2, "ask 3"): f"{LIST}\n4. d."})
    found = converse(engine, PICTURES, IMAGES, replace(REQUEST, captions=False))
    assert [outcome.turns for outcome in found] == [turns("a?", "b?", "c?", "d?"), [], turns("a?", "b?", "c?")]
    assert found[1] == Outcome("", [], [Dropped("questions", "not a numbered list", "no")])
    assert found[2].dropped == [Dropped("question", "no question mark at its end", "d.")]
    assert [[number for number, _ in asked] for asked, *_ in engine.calls] == [[0, 1, 2], *[[0, 2]] * 3, [0]]


def test_what_a_picture_has_is_kept_and_not_asked_for() -> None:
    own = [
        replace(PICTURES[0], caption="mine"),
        replace(PICTURES[1], turns=(Turn("what?", "that"),)),
        replace(PICTURES[2], caption="mine", turns=(Turn("what?", "that"),)),
    ]
    engine = Table({(1, "describe"): "two\nlines"})
    found = converse(engine, own, IMAGES, REQUEST)
    assert found[0] == Outcome("mine", turns("a?", "b?", "c?"))
    assert found[1] == Outcome("", [Turn("what?", "that")], [Dropped("caption", "line break", "two\nlines")])
    assert found[2] == Outcome("mine", [Turn("what?", "that")])
    assert [[number for number, _ in asked] for asked, *_ in engine.calls] == [*[[0]] * 4, [1]]


def test_nothing_is_asked_where_nothing_is_missing() -> None:
    engine = Table()
    own = [replace(picture, caption="mine") for picture in PICTURES]
    assert converse(engine, own, IMAGES, replace(REQUEST, dialogues=False)) == [Outcome("mine", [])] * 3
    assert not engine.calls


def test_prompts_that_ship(tmp_path: Path) -> None:
    mini = load_prompts("mini-qwen2.5-vl")
    assert mini == Prompts("ask {0} questions about the image.", "{0}", "describe the image.")
    general = load_prompts("Qwen/Qwen2.5-VL-7B-Instruct")
    assert general != mini and "{0}" in general.questions and "{0}" in general.answer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("questions: a\nanswer: '{0}'", "prompts.caption: missing"),
        ("questions: a\nanswer: '{0}'\ncaption: b\nanswers: c", "answers: unknown key; did you mean answer"),
        ("questions: a\nanswer: b\ncaption: c", r"prompts.answer: no \{0\} in it; write it where the question stands"),
        ("questions: a\nanswer: '{0}'\ncaption: ' '", "prompts.caption: empty"),
        ("questions: '<|im_end|>'\nanswer: '{0}'\ncaption: c", "prompts.questions: .*a control token"),
        ("questions: 3\nanswer: '{0}'\ncaption: c", "prompts.questions: 3 is not str"),
        ("- a", "a mapping of keys is needed"),
        ("a: [", "cannot be read .*; write the keys questions, answer and caption"),
    ],
)
def test_a_file_of_prompts_that_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(CocoaError, match=f"mine.yaml: .*{message}") as error:
        load_prompts("any", tmp_path / "mine.yaml")
    assert "\n" not in str(error.value)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("questions: ask {0} {1}\nanswer: 'so {0} {x}'\ncaption: say")
    mine = load_prompts("mini-qwen2-vl", tmp_path / "mine.yaml")
    assert mine == Prompts("ask {0} {1}", "so {0} {x}", "say")
    engine = Table({(0, "ask 3 {1}"): LIST})
    (found,) = converse(engine, PICTURES[:1], IMAGES[:1], replace(REQUEST, prompts=mine))
    assert [turn.question for turn in found.turns] == ["a?", "b?", "c?"]
    assert engine.calls[1][0] == [(0, ("so a? {x}",))]  # other braces are text
