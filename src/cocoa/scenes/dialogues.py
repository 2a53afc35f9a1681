"""Conversations about a scene whose answers are true: what a multimodal LLM would be taught with."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cocoa.pairs import Turn
from cocoa.scenes.language import ATTRIBUTE_KINDS, HELD_OUT_STYLES, STYLES, TEMPLATES, Question, ask, caption
from cocoa.scenes.world import Scene

REQUESTS = {
    "plain": "describe the image.",
    "full": "describe the image in full.",
    "relation": "describe how the objects stand.",
    "listing": "list the objects.",
    "count": "count and name the objects.",
    "place first": "describe the image place by place.",
}
"""What a user says to get a caption, by its style."""
ASK_QUESTIONS = "ask {0} questions about the image."
ALL_KINDS = tuple(TEMPLATES)
TRAINING_KINDS = (*ATTRIBUTE_KINDS, "cell", "object", "count")
"""Without those that the sets out of distribution rest on: objects by where they are from another, and denied ones."""
QUESTION_PREFIX = "Represent the given image with the following question:"


def questions(rng: random.Random, scene: Scene, number: int, kinds: Sequence[str] = ALL_KINDS) -> list[Question]:
    """Distinct questions on a scene in either wording, of random kinds (one named twice comes twice as often)."""
    found: dict[str, Question] = {}
    while len(found) < number:
        question = ask(rng, scene, rng.choice(kinds), rng.randrange(2))
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


def dialogue(rng: random.Random, scene: Scene, number: int) -> list[Turn]:
    """A conversation on an image: mostly a caption first, sometimes a list of questions; then `number` answers."""
    asked = questions(rng, scene, number)
    if rng.random() < 0.15:
        listed = "\n".join(f"{i}. {question.text}" for i, question in enumerate(asked, 1))
        first = Turn(ASK_QUESTIONS.format(number), listed)
    else:
        style = rng.choice(STYLES + HELD_OUT_STYLES)
        first = Turn(REQUESTS[style], caption(scene, style))
    turns = [Turn(question.text, question.answer) for question in asked]
    if rng.random() < 0.5:
        return [first, *turns]
    prefixed = Turn(f"{QUESTION_PREFIX} {turns[0].question}", turns[0].answer)
    return [prefixed, *turns[1:], first] if rng.random() < 0.5 else [*turns, first]


def training_dialogue(rng: random.Random, scene: Scene, number: int) -> list[Turn]:
    """A conversation for training pairs: a caption before or after `number` questions.

    As the training pairs, and other than `dialogue`, it says nothing of the kinds that only the sets out of
    distribution have.
    """
    style = rng.choice(STYLES)
    described = Turn(REQUESTS[style], caption(scene, style))
    turns = [Turn(question.text, question.answer) for question in questions(rng, scene, number, TRAINING_KINDS)]
    return [described, *turns] if rng.random() < 0.5 else [*turns, described]
