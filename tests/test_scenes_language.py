"""What is said of scenes is true, names one object, and is good English; an independent reader checks it."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from scene_reader import (
    PLACE_NAMES,
    VALUES,
    changed,
    facts,
    is_true,
    read_caption,
    read_question,
    referred,
    right_answer,
    words_of,
)

from cocoa.scenes.dialogues import ASK_QUESTIONS, QUESTION_PREFIX, REQUESTS, Turn, dialogue
from cocoa.scenes.language import (
    HELD_OUT_STYLES,
    STYLES,
    TELLS,
    TEMPLATES,
    answers,
    ask,
    caption,
    instruction_of_change,
    phrase,
    reference,
    relation,
    relative_reference,
)
from cocoa.scenes.world import ATTRIBUTES, Scene, Thing, change_one, sample_scene

ALL_STYLES = STYLES + HELD_OUT_STYLES
RESPECTS = (*ATTRIBUTES, "cell")


def scenes(
    number: int, counts: tuple[int, ...] = (1, 2, 3, 4, 5), seed: int = 0
) -> Iterator[tuple[random.Random, Scene]]:
    for i in range(number):
        rng = random.Random(f"{seed}/{i}")
        yield rng, sample_scene(rng, counts)


# ---------------------------------------------------------------------------------------------------- captions

THREE = Scene(
    (
        Thing("star", "orange", "striped", "large", 0),
        Thing("ring", "blue", "solid", "small", 2),
        Thing("heart", "black", "checked", "small", 7),
    )
)


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("plain", "an orange star, a blue ring and a black heart"),
        (
            "full",
            "a large striped orange star in the top left, a small solid blue ring in the top right "
            "and a small checked black heart in the bottom centre",
        ),
        ("relation", "an orange star left of a blue ring and a black heart below the blue ring"),
        ("listing", "star orange striped large ; ring blue solid small ; heart black checked small"),
        ("count", "three objects: one striped orange star, one solid blue ring, one checked black heart"),
        (
            "place first",
            "in the top left sits an orange star, in the top right sits a blue ring "
            "and in the bottom centre sits a black heart",
        ),
    ],
)
def test_captions_word_for_word(style: str, text: str) -> None:
    assert caption(THREE, style) == text


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("plain", "an orange star"),
        ("full", "a large striped orange star in the top left"),
        ("relation", "an orange star in the top left"),
        ("listing", "star orange striped large"),
        ("count", "one object: one striped orange star"),
        ("place first", "in the top left sits an orange star"),
    ],
)
def test_captions_of_one_object(style: str, text: str) -> None:
    assert caption(Scene(THREE.things[:1]), style) == text


@pytest.mark.parametrize("style", ALL_STYLES)
def test_captions_are_true_and_tell_of_every_object(style: str) -> None:
    for _, scene in scenes(250):
        text = caption(scene, style)
        read, _, claims = read_caption(text)
        assert read == style or (len(scene.things), style) == (1, "relation")
        assert is_true(text, scene), text
        told = {word for claim in claims for phrase in (claim[0], claim[2]) for word in phrase.split()}
        assert told >= {word for thing in scene.things for word in (thing.colour, thing.shape)}
        if style not in ("relation",):
            assert len(claims) == len(scene.things)


@pytest.mark.parametrize("style", ALL_STYLES)
def test_what_a_style_tells_of(style: str) -> None:
    """A change in what it tells of makes the caption false (or is in no relation), one in the rest keeps it true."""
    silent = set()
    for rng, scene in scenes(120, (2, 3, 4, 5)):
        text = caption(scene, style)
        for respect in RESPECTS:
            other = change_one(rng, scene, respect)
            assert other is not None
            if respect not in TELLS[style]:
                silent.add(respect)
                assert is_true(text, other)
            else:
                assert is_true(text, other) == (caption(other, style) == text)
                assert not is_true(text, other) or (style, respect) == ("relation", "cell")
    assert silent == set(RESPECTS) - set(TELLS[style])


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(ValueError, match="'poem': choose one of"):
        caption(THREE, "poem")


def test_the_reader_knows_what_is_false() -> None:
    """The checker of these tests must be able to say no."""
    assert not is_true("an orange star left of a black heart", THREE)
    assert not is_true("an orange ring and a blue star", THREE)
    assert not is_true("two objects: one striped orange star, one solid blue ring", THREE)
    assert not is_true("in the top right sits an orange star", THREE)
    assert is_true("an orange star and a black heart", THREE)  # true, though not of all
    with pytest.raises(AssertionError):
        read_caption("a orange star")


# -------------------------------------------------------------------------------------------------- references


def test_a_relation_is_read_the_same_from_both_sides() -> None:
    back = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    things = [Thing("star", "red", "solid", "small", cell) for cell in range(9)]
    for one in things:
        for other in things:
            if one is not other:
                assert relation(other, one) == back[relation(one, other)]
    assert relation(things[0], things[2]) == "left of"
    assert relation(things[2], things[3]) == "above"


def test_references_fit_one_object_and_are_as_short_as_can_be() -> None:
    lengths = set()
    for rng, scene in scenes(400):
        for thing in scene.things:
            name = reference(rng, scene, thing)
            assert name is not None  # colour and shape always tell it
            assert referred(name, scene) == [thing], name
            lengths.add(len(name.replace("object", "").split()))
            for attribute in ATTRIBUTES:
                hidden = reference(rng, scene, thing, hide=(attribute,))
                if hidden is not None:
                    assert referred(hidden, scene) == [thing]
                    assert not set(hidden.split()) & set(VALUES[attribute])
    assert lengths == {1, 2}


def test_there_may_be_no_reference() -> None:
    twins = Scene((Thing("star", "red", "solid", "small", 0), Thing("star", "blue", "solid", "small", 1)))
    assert reference(random.Random(0), twins, twins.things[0], hide=("colour",)) is None
    assert reference(random.Random(0), twins, twins.things[0]) == "red object"


def test_relative_references_fit_one_object() -> None:
    found = 0
    for rng, scene in scenes(300):
        for thing in scene.things:
            name = relative_reference(rng, scene, thing)
            if name is not None:
                found += 1
                assert name.startswith("object ") and referred(name, scene) == [thing], name
    assert found > 400
    assert relative_reference(random.Random(0), Scene(THREE.things[:1]), THREE.things[0]) is None


# --------------------------------------------------------------------------------------------------- questions


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("wording", [0, 1])
def test_answers_are_right_and_the_only_ones(kind: str, wording: int) -> None:
    given = set()
    for rng, scene in scenes(250):
        question = ask(rng, scene, kind, wording)
        if question is None:
            continue
        assert question.kind == kind and read_question(question.text)[:2] == (kind, wording)
        assert question.answer == right_answer(question.text, scene), question
        assert question.thing is None or question.thing in scene.things
        given.add(question.answer)
    if kind in VALUES:
        assert given == set(VALUES[kind])
    if kind == "cell":
        assert given == set(PLACE_NAMES.values())
    if kind == "presence":
        assert given == {"yes", "no"}
    if kind not in ("object", "neighbour", "presence"):
        assert given <= set(answers())


def test_presence_is_as_often_affirmed_as_denied() -> None:
    found = [question.answer for rng, scene in scenes(1000) if (question := ask(rng, scene, "presence"))]
    assert 0.4 < found.count("yes") / len(found) < 0.7


def test_an_answer_is_listed_once() -> None:
    assert len(set(answers())) == len(answers()) == 8 + 8 + 4 + 2 + 9 + 5


# ----------------------------------------------------------------------------------------------------- changes


@pytest.mark.parametrize("respect", RESPECTS)
def test_an_instruction_followed_gives_the_changed_scene(respect: str) -> None:
    for rng, scene in scenes(250):
        other = change_one(rng, scene, respect)
        assert other is not None
        told = instruction_of_change(scene, other, rng)
        assert told is not None
        assert changed(told, scene) == facts(other), told


def test_instructions_word_for_word() -> None:
    scene = Scene(THREE.things[:1])
    wanted = {
        "shape": "turn the (star|orange object|striped object) into a cross",
        "colour": "make the (star|orange object|striped object) red",
        "texture": "make the (star|orange object|striped object) dotted",
        "size": "make the (star|orange object|striped object) small",
        "cell": "move the (star|orange object|striped object) to the centre",
    }
    values: dict[str, object] = {"shape": "cross", "colour": "red", "texture": "dotted", "size": "small", "cell": 4}
    for respect, pattern in wanted.items():
        other = Scene((scene.things[0].having(respect, values[respect]),))
        told = instruction_of_change(scene, other, random.Random(0)) or ""
        start, end = pattern.split("(")[0], pattern.split(")")[1]
        assert told.startswith(start) and told.endswith(end)


# --------------------------------------------------------------------------------------------------- dialogues


def check_turn(turn: Turn, scene: Scene) -> None:
    styles = {request: style for style, request in REQUESTS.items()}
    question = turn.question.removeprefix(f"{QUESTION_PREFIX} ")
    if question in styles:
        assert turn.answer == caption(scene, styles[question])
        assert is_true(turn.answer, scene)
    elif question.startswith("ask "):
        lines = turn.answer.split("\n")
        assert question == ASK_QUESTIONS.format(len(lines))
        for i, line in enumerate(lines, 1):
            number, text = line.split(". ", 1)
            assert number == str(i)
            right_answer(text, scene)
    else:
        assert turn.answer == right_answer(question, scene)


def test_everything_said_in_a_conversation_is_true() -> None:
    said = set()
    for rng, scene in scenes(400):
        turns = dialogue(rng, scene, 4)
        assert len(turns) == 5
        for turn in turns:
            check_turn(turn, scene)
            said.add(turn.question.removeprefix(f"{QUESTION_PREFIX} "))
            assert turn.question.removeprefix(QUESTION_PREFIX).islower() and turn.answer == turn.answer.lower()
    assert said >= {*REQUESTS.values(), ASK_QUESTIONS.format(4)}
    assert set(REQUESTS) == set(ALL_STYLES)


def test_a_conversation_about_one_object_ends() -> None:
    for rng, scene in scenes(100, (1,)):
        assert len(dialogue(rng, scene, 6)) == 7


def test_a_phrase_is_in_the_order_of_english() -> None:
    assert phrase(THREE.things[0]) == words_of(THREE.things[0]) == "large striped orange star"
    assert phrase(THREE.things[0], ("colour",)) == "orange object"
