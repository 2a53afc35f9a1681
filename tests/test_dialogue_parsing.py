"""What a model wrote: a table of texts by hand, each with what is read of it or why it is not used."""

from __future__ import annotations

import pytest

from cocoa.dialogue_parsing import Dropped, Reply, answer_fault, bounds, caption_fault, parse_questions

GOOD = "1. what is it?\n2. where is it?\n3. who is it?"
LONG = f"what {'very ' * 60}long thing is it?"


def reasons(text: str, least: int = 3, most: int = 5, finished: bool = True) -> list[tuple[str, str]]:
    found, dropped = parse_questions(Reply(text, finished), least, most)
    assert not found
    return [(each.what, each.reason) for each in dropped]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (GOOD, ["what is it?", "where is it?", "who is it?"]),
        (GOOD.replace(". ", ") "), ["what is it?", "where is it?", "who is it?"]),
        (f"\n {GOOD}\n\n4.  why?  \n", ["what is it?", "where is it?", "who is it?", "why?"]),
        (GOOD.replace("what is it?", "What does «1. FC» mean: 2. or 3.?"), None),
    ],
)
def test_a_numbered_list_is_read(text: str, found: list[str] | None) -> None:
    expected = found or ["What does «1. FC» mean: 2. or 3.?", "where is it?", "who is it?"]
    assert parse_questions(Reply(text, True), 3, 5) == (expected, [])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("...", "empty"),
        (f"Here are three questions:\n{GOOD}", "not a numbered list"),
        (f"{GOOD}\nI hope this helps!", "not a numbered list"),
        (GOOD.replace("2. ", ""), "not a numbered list"),
        (GOOD.replace("2. ", "3. "), "not a numbered list"),
        (GOOD.replace("1. ", "0. "), "not a numbered list"),
        (GOOD.replace("1. ", "- "), "not a numbered list"),
        (GOOD.replace("1. ", "1."), "not a numbered list"),
        (GOOD.replace("\n", " "), "fewer than 3 questions"),  # one line: one question
        ("1. what is it?\n2. where is it?", "fewer than 3 questions"),
        ("\n".join(f"{i}. is it {i}?" for i in range(1, 7)), "more than 5 questions"),
        (f"{GOOD}<|im_start|>", "control token"),
        (GOOD.replace("what", "what<|image_pad|>"), "control token"),
        ("I'm sorry, but I can't help with that.", "not a numbered list"),
    ],
)
def test_what_is_no_such_list_is_dropped_whole(text: str, reason: str) -> None:
    assert reasons(text) == [("questions", reason)]


def test_a_list_that_was_cut_off_is_dropped_whole() -> None:
    assert reasons(GOOD, finished=False) == [("questions", "cut off")]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("name it.", "no question mark at its end"),
        ("what is it? say so.", "no question mark at its end"),
        ("Where is it ?", "repeated question"),
        ("...?", "empty"),
        (LONG, "question too long"),
    ],
)
def test_a_malformed_question_is_dropped_alone(bad: str, reason: str) -> None:
    found, dropped = parse_questions(Reply(f"{GOOD}\n4. {bad}\n5. why?", True), 3, 5)
    assert found == ["what is it?", "where is it?", "who is it?", "why?"]
    assert dropped == [Dropped("question", reason, bad)]


def test_too_few_good_questions_are_none() -> None:
    assert reasons("1. what is it?\n2. name it.\n3. who is it?") == [
        ("question", "no question mark at its end"),
        ("questions", "fewer than 3 questions"),
    ]


def test_a_number_outside_of_the_bounds_is_the_bound() -> None:
    assert [bounds(asked) for asked in (1, 2, 3, 4, 5, 6, 8)] == [
        *((1, 5), (2, 5), (3, 5), (3, 5), (3, 5), (3, 6), (3, 8))
    ]
    assert parse_questions(Reply("1. what?", True), *bounds(1))[0] == ["what?"]
    eight = "\n".join(f"{i}. is it {i}?" for i in range(1, 9))
    assert len(parse_questions(Reply(eight, True), *bounds(8))[0]) == 8
    assert reasons(eight, *bounds(7)) == [("questions", "more than 7 questions")]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("red", ""),
        ("It is red.\nVery red.", ""),
        ("The cup is red.", ""),
        ("What colour?", ""),  # other words than the question's
        ("", "empty"),
        ("-", "empty"),
        ("red<|im_start|>user", "control token"),
        ("what colour is the cup?", "repeats the question"),
        ("What colour is the cup ? Red.", "repeats the question"),
    ],
)
def test_answers(text: str, fault: str) -> None:
    assert answer_fault(Reply(text, True), "What colour is the cup?") == fault
    assert answer_fault(Reply(text, False), "What colour is the cup?") == "cut off"


def test_an_answer_that_begins_as_the_question_in_part_of_a_word_is_one() -> None:
    assert answer_fault(Reply("isometric", True), "Is?") == ""


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("A red cup on a table.", ""),
        ("A red cup.\nA table.", "line break"),
        ("A red cup.\rA table.", "line break"),
        ("", "empty"),
        ("a <|image_pad|>", "control token"),
    ],
)
def test_captions(text: str, fault: str) -> None:
    assert caption_fault(Reply(text, True)) == fault
    assert caption_fault(Reply(text, False)) == "cut off"
