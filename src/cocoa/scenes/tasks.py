"""What each data set of the world asks: one function a task, from randomness to an example.

An example's hard candidates are near misses: one attribute or one place differs, or it is another object of the
same picture. No scene of a training row, wrong or right, is one of an evaluation row (but a crop of one object may be
of either), and no row shows or tells of a held-out combination, but those of the `-Novel` sets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from cocoa.scenes.language import (
    HELD_OUT_STYLES,
    STYLES,
    TELLS,
    answers,
    ask,
    caption,
    instruction_of_change,
    phrase,
    reference,
    relative_reference,
)
from cocoa.scenes.world import (
    ATTRIBUTES,
    CELLS,
    COLOURS,
    NOVEL,
    SHAPES,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    change_one,
    redraw,
    sample_scene,
)

FEW, MANY = (2, 3), (4, 5)
"""Objects in a scene of the training pairs, and in a crowded one; scenes of questions have one less."""
HARD = 2
"""Hard candidates of an example, at most; a question has one more, a reference those of each attribute and object."""


@dataclass(frozen=True, slots=True)
class Item:
    """One side of an example: its content text, and a scene's picture or one object's crop of it."""

    text: str = ""
    scene: Scene | None = None
    thing: Thing | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A query with its target.

    Attributes:
        query: without the instruction.
        target: the right answer.
        hard: near misses.
        meaning: what is right here. Another example's target might be right as well where one of the two meanings
            holds the other (a caption may tell of two objects of three), and is no candidate then; neither is
            an answer that is in it.
    """

    query: Item
    target: Item
    hard: tuple[Item, ...]
    meaning: frozenset[Hashable]


Task = Callable[[random.Random, str], Example]
"""From a source of randomness and a split of the world to an example."""


def _familiar(scene: Scene) -> bool:
    return not any(thing.novel for thing in scene.things)


def _novel(scene: Scene) -> bool:
    return any(thing.novel for thing in scene.things)


RESPECTS = (*ATTRIBUTES, "cell")


def _variations(
    rng: random.Random, scene: Scene, split: str, respects: Sequence[str], accept: Callable[[Scene], bool]
) -> list[Scene]:
    """The scene with one object changed or moved, once in each respect where that can be; `HARD` of them at most.

    They are scenes of the training split for a training row, and of another split for others.
    """

    def fits(changed: Scene) -> bool:
        return (changed.split() == "train") == (split == "train") and accept(changed)

    changed = (change_one(rng, scene, respect, accept=fits) for respect in rng.sample(respects, len(respects)))
    return [other for other in changed if other is not None][:HARD]


# ---------------------------------------------------------------------------------------------- classification

LABEL = ("texture", "colour", "shape")


def largest_object(rng: random.Random, split: str, novel: bool = False) -> Example:
    """A large object among small ones; the label names its texture, colour and shape."""
    while True:
        scene = sample_scene(rng, FEW)
        index = rng.randrange(len(scene.things))
        things = tuple(replace(t, size="large" if i == index else "small") for i, t in enumerate(scene.things))
        scene, label = replace(scene, things=things), phrase(things[index], LABEL)
        if scene.split() == split and (things[index].novel if novel else _familiar(scene)):
            return Example(Item(scene=redraw(rng, scene)), Item(label), (), frozenset({label}))


def labels(novel: bool = False) -> list[str]:
    """All labels, those of held-out combinations only if asked for."""
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS if novel or (shape, colour) not in NOVEL]
    return [f"{texture} {colour} {shape}" for shape, colour in kinds for texture in TEXTURES]


# ---------------------------------------------------------------------------------------------------- questions

ASKED = (*ATTRIBUTES, "cell")
"""Kinds of questions."""


def question(rng: random.Random, split: str, counts: tuple[int, ...] = (1, 2)) -> Example:
    """A question on an object that is named by one attribute and asked for another one, or for its place."""
    while True:
        scene = sample_scene(rng, counts, split, _familiar)
        asked = ask(rng, scene, rng.choice(ASKED))
        if asked is None or asked.thing is None:
            continue
        thing = asked.thing
        wrong = list(next(kind for kind in (*ATTRIBUTES.values(), CELLS) if asked.answer in kind))
        rng.shuffle(wrong)  # the first one is a training row's negative
        hard = tuple(Item(text) for text in wrong if text != asked.answer)[: HARD + 1]
        true = frozenset({phrase(thing), *thing.facts[:4], CELLS[thing.cell]})  # `star` may pass for a whole phrase
        return Example(Item(asked.text, scene), Item(asked.answer), hard, true)


def all_answers() -> list[str]:
    """Everything that a question may be answered with: attributes, places, numbers, and all familiar objects."""
    return [*answers(), *(f"{size} {label}" for size in SIZES for label in labels())]


# ---------------------------------------------------------------------------------------------------- retrieval


def captioned(
    rng: random.Random,
    split: str,
    counts: tuple[int, ...] = FEW,
    styles: tuple[str, ...] = STYLES,
    accept: Callable[[Scene], bool] = _familiar,
    to_image: bool = False,
) -> Example:
    """Image to caption, or caption to image; wrong ones are of the scene with one object changed."""
    scene, style = sample_scene(rng, counts, split, accept), rng.choice(styles)
    text = caption(scene, style)
    wrong = _variations(rng, scene, split, TELLS[style], lambda other: accept(other) and caption(other, style) != text)
    if to_image:
        return Example(Item(text), Item(scene=scene), tuple(Item(scene=other) for other in wrong), scene.kinds)
    return Example(Item(scene=scene), Item(text), tuple(Item(caption(other, style)) for other in wrong), scene.kinds)


def change(rng: random.Random, split: str, accept: Callable[[Scene], bool] = _familiar) -> Example:
    """A picture and what is to change; wrong ones have changes in other respects."""
    while True:
        scene, respect = sample_scene(rng, FEW, split, accept), rng.choice(RESPECTS)
        right = change_one(rng, scene, respect, accept=accept)
        if right is None or right.split() != split:
            continue
        told = instruction_of_change(scene, right, rng)
        if told is not None:
            wrong = _variations(rng, scene, split, [other for other in RESPECTS if other != respect], accept)
            hard = tuple(Item(scene=other) for other in wrong)
            return Example(Item(told, scene), Item(scene=right), hard, frozenset(t.facts for t in right.things))


# ---------------------------------------------------------------------------------------------------- grounding


def ground(rng: random.Random, split: str, counts: tuple[int, ...] = FEW, relative: float = 0.0) -> Example:
    """A reference to an object of a picture, and its crop; wrong are the other objects, and it with a change.

    A share of the references, `relative`, says where the object is from another.
    """
    while True:
        scene = sample_scene(rng, counts, split, _familiar)
        thing = rng.choice(scene.things)
        name = (relative_reference if rng.random() < relative else reference)(rng, scene, thing)
        if name is None:
            continue
        wrong = [Item(scene=scene, thing=other) for other in scene.things if other is not thing]
        for attribute in ATTRIBUTES:
            changed = change_one(rng, scene, attribute, scene.things.index(thing), _familiar)
            if changed is not None:
                wrong.append(Item(scene=changed, thing=next(t for t in changed.things if t.cell == thing.cell)))
        return Example(Item(name, scene), Item(scene=scene, thing=thing), tuple(wrong), frozenset({thing.facts[:4]}))


TASKS: dict[str, Task] = {
    "SceneObjects": largest_object,
    "SceneObjects-Novel": partial(largest_object, novel=True),
    "SceneQuestions": question,
    "SceneQuestions-Crowded": partial(question, counts=(3,)),
    "Scenes_i2t": captioned,
    "Scenes_t2i": partial(captioned, to_image=True),
    "SceneChanges": change,
    "Scenes_i2t-Crowded": partial(captioned, counts=MANY, styles=HELD_OUT_STYLES),
    "Scenes_t2i-Novel": partial(captioned, accept=_novel, to_image=True),
    "SceneChanges-Novel": partial(change, accept=_novel),
    "SceneGrounding": ground,
    "SceneGrounding-Crowded": partial(ground, counts=MANY, relative=0.5),
}
"""By data set; the names stand in `data/scenes.yaml`."""
