"""What can be said of a scene: captions in several styles, bound questions with answers, changes, references.

Every sentence is true of its scene, and names objects so that they are told apart by it. All is lower case.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cocoa.scenes.world import CELLS, COLOURS, SHAPES, SIZES, TEXTURES, Scene, Thing

STYLES = ("plain", "full", "relation", "listing", "count")
"""Caption styles of the training pairs."""
HELD_OUT_STYLES = ("place first",)
KIND = ("colour", "shape")
TELLS: dict[str, tuple[str, ...]] = {
    "plain": KIND,
    "full": ("size", "texture", *KIND, "cell"),
    "relation": (*KIND, "cell"),
    "listing": ("size", "texture", *KIND),
    "count": ("texture", *KIND),
    "place first": (*KIND, "cell"),
}
"""What a caption of each style says of the objects. One that does not tell of cells is true in any order."""
NUMBERS = ("no", "one", "two", "three", "four", "five")


def phrase(thing: Thing, attributes: Sequence[str] = ("size", "texture", "colour", "shape")) -> str:
    """The object by some of its attributes, in the order of English: `large striped red star`."""
    words = [str(getattr(thing, name)) for name in ("size", "texture", "colour") if name in attributes]
    return " ".join([*words, thing.shape if "shape" in attributes else "object"])


def relation(one: Thing, other: Thing) -> str:
    """Where one object is, seen from another: left or right of it in its row, else above or below it."""
    (row, column), (other_row, other_column) = divmod(one.cell, 3), divmod(other.cell, 3)
    if row == other_row:
        return "left of" if column < other_column else "right of"
    return "above" if row < other_row else "below"


def caption(scene: Scene, style: str) -> str:
    """The scene in one sentence. Every style tells of every object at least its colour and shape."""
    things = scene.things
    if style == "plain":
        return _join([_a(phrase(t, KIND)) for t in things])
    if style == "full":
        return _join([f"a {phrase(t)} in the {CELLS[t.cell]}" for t in things])
    if style == "relation":
        first, *rest = things
        if not rest:
            return f"{_a(phrase(first, KIND))} in the {CELLS[first.cell]}"
        parts = [f"{_a(phrase(first, KIND))} {relation(first, rest[0])} {_a(phrase(rest[0], KIND))}"]
        for before, thing in pairwise(rest):
            parts.append(f"{_a(phrase(thing, KIND))} {relation(thing, before)} the {phrase(before, KIND)}")
        return _join(parts)
    if style == "listing":
        return " ; ".join(f"{t.shape} {t.colour} {t.texture} {t.size}" for t in things)
    if style == "count":
        noun = "object" if len(things) == 1 else "objects"
        named = ", ".join(f"one {phrase(t, ('texture', 'colour', 'shape'))}" for t in things)
        return f"{NUMBERS[len(things)]} {noun}: {named}"
    if style == "place first":
        return _join([f"in the {CELLS[t.cell]} sits {_a(phrase(t, KIND))}" for t in things])
    raise ValueError(f"style {style!r}: choose one of {STYLES + HELD_OUT_STYLES}")


def _a(words: str) -> str:
    return f"an {words}" if words.startswith("orange") else f"a {words}"


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


# -------------------------------------------------------------------------------------------------- references


def reference(rng: random.Random, scene: Scene, thing: Thing, hide: Sequence[str] = ()) -> str | None:
    """Words that fit this object and no other of the scene, without the attributes in `hide`; None if there are none.

    Of the shortest such descriptions one is drawn.
    """
    for size in (1, 2, 3):
        fitting = []
        for named in _SETS[size]:
            if set(named) & set(hide):
                continue
            same = [t for t in scene.things if all(getattr(t, name) == getattr(thing, name) for name in named)]
            if len(same) == 1:
                fitting.append(named)
        if fitting:
            return phrase(thing, rng.choice(fitting))
    return None


_SETS: dict[int, list[tuple[str, ...]]] = {
    1: [("shape",), ("colour",), ("texture",)],
    2: [("colour", "shape"), ("texture", "shape"), ("size", "shape"), ("size", "colour"), ("texture", "colour")],
    3: [("texture", "colour", "shape"), ("size", "texture", "shape"), ("size", "texture", "colour")],
}


def relative_reference(rng: random.Random, scene: Scene, thing: Thing) -> str | None:
    """Words that fit only this object by where it is from another: `object left of the star`."""
    others = [t for t in scene.things if t is not thing]
    rng.shuffle(others)
    for other in others:
        where = relation(thing, other)
        if sum(relation(t, other) == where for t in scene.things if t is not other) == 1:
            name = reference(rng, scene, other)
            if name is not None:
                return f"object {where} the {name}"
    return None


# --------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True, slots=True)
class Question:
    """A question on a scene with its answer; `kind` is the answer's class, `thing` whom it is about."""

    kind: str
    text: str
    answer: str
    thing: Thing | None = None


TEMPLATES = {
    "colour": ("what colour is the {0}?", "which colour does the {0} have?"),
    "shape": ("what shape is the {0}?", "which shape does the {0} have?"),
    "texture": ("what texture has the {0}?", "which pattern does the {0} have?"),
    "size": ("what size is the {0}?", "how big is the {0}?"),
    "cell": ("where is the {0}?", "in which place is the {0}?"),
    "object": ("what is in the {0}?", "name the object at the {0}."),
    "neighbour": ("what is {0}?", "name the object {0}."),
    "count": ("how many objects are there?", "how many things can be seen?"),
    "presence": ("is there {0}?", "can {0} be seen?"),
}
"""By kind: the wording of the data sets, and another one that only conversations have."""
ATTRIBUTE_KINDS = ("colour", "shape", "texture", "size")


def ask(rng: random.Random, scene: Scene, kind: str, wording: int = 0) -> Question | None:
    """A question of a kind; None where this scene has none whose answer is unique."""
    template, thing = TEMPLATES[kind][wording], rng.choice(scene.things)
    if kind in ATTRIBUTE_KINDS:
        name = reference(rng, scene, thing, hide=(kind,))
        return Question(kind, template.format(name), getattr(thing, kind), thing) if name else None
    if kind == "cell":
        name = reference(rng, scene, thing)
        return Question(kind, template.format(name), CELLS[thing.cell], thing) if name else None
    if kind == "object":
        return Question(kind, template.format(CELLS[thing.cell]), phrase(thing), thing)
    if kind == "neighbour":
        place = relative_reference(rng, scene, thing)
        where = place.removeprefix("object ") if place else ""
        return Question(kind, template.format(where), phrase(thing), thing) if place else None
    if kind == "count":
        return Question(kind, template, NUMBERS[len(scene.things)])
    if rng.random() < 0.5:
        return Question(kind, template.format(_a(phrase(thing, KIND))), "yes", thing)
    other = rng.choice(scene.things)
    mixed = replace(thing, colour=other.colour) if other is not thing else replace(thing, colour=rng.choice(COLOURS))
    if (mixed.shape, mixed.colour) in scene.kinds:
        return None
    return Question(kind, template.format(_a(phrase(mixed, KIND))), "no", thing)


STATEMENTS = {"shape": "the {0} is a {1}", "cell": "the {0} is in the {1}"}


def statement(rng: random.Random, scene: Scene) -> str | None:
    """One fact that binds: `the star is red`; None where the object drawn has no name of its own.

    Every other object goes by its shape where it can, and every other fact is a place: both are the slowest to learn.
    """
    kind, thing = rng.choice((*ATTRIBUTE_KINDS, *["cell"] * 4)), rng.choice(scene.things)
    name = reference(rng, scene, thing, hide=(kind,))
    alone = sum(other.shape == thing.shape for other in scene.things) == 1
    if kind != "shape" and alone and rng.random() < 0.5:
        name = thing.shape
    told = CELLS[thing.cell] if kind == "cell" else getattr(thing, kind)
    return STATEMENTS.get(kind, "the {0} is {1}").format(name, told) if name else None


def answers() -> tuple[str, ...]:
    """All answers of one or two words: attributes, places and numbers."""
    return (*COLOURS, *SHAPES, *TEXTURES, *SIZES, *CELLS, *NUMBERS[1:])


def instruction_of_change(scene: Scene, changed: Scene, rng: random.Random) -> str | None:
    """What turns the first scene into the second, one object of which differs in one respect."""
    stays = {t.facts for t in scene.things} & {t.facts for t in changed.things}
    before, after = (next(t for t in s.things if t.facts not in stays) for s in (scene, changed))
    name = reference(rng, scene, before)
    if name is None:
        return None
    if before.cell != after.cell:
        return f"move the {name} to the {CELLS[after.cell]}"
    attribute = next(a for a in ATTRIBUTE_KINDS if getattr(before, a) != getattr(after, a))
    value = getattr(after, attribute)
    return f"turn the {name} into a {value}" if attribute == "shape" else f"make the {name} {value}"
