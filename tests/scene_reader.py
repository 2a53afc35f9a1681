"""An independent reading of what is said of scenes: words to a truth value, an answer or a change.

It shares nothing with `cocoa.scenes.language` but the sentences; what words mean is written out once more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from cocoa.scenes.world import Scene, Thing

VALUES = {
    "size": ["small", "large"],
    "texture": ["solid", "striped", "dotted", "checked"],
    "colour": ["red", "orange", "yellow", "green", "blue", "purple", "pink", "black"],
    "shape": ["circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart"],
}
ATTRIBUTE_OF = {value: attribute for attribute, values in VALUES.items() for value in values}
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
PLACE_NAMES = {3 * i + j: f"{row} {column}" for i, row in enumerate(ROWS) for j, column in enumerate(COLUMNS)} | {
    4: "centre"
}
PLACES = {name: cell for cell, name in PLACE_NAMES.items()}
NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
WHERE = "(left of|right of|above|below)"


@cache
def read_phrase(words: str) -> dict[str, str]:
    """`large red object` -> {size: large, colour: red}; every word known, in the order of English."""
    *named, noun = words.split()
    if noun != "object":
        named.append(noun)
    read = {ATTRIBUTE_OF[word]: word for word in named}
    assert list(read) == [attribute for attribute in VALUES if attribute in read], words
    assert len(read) == len(named), words
    assert ("shape" in read) == (noun != "object"), words
    return read


def with_article(words: str) -> str:
    """The phrase without its article, which must be the right one."""
    article, rest = words.split(" ", 1)
    assert article == ("an" if rest[0] in "aeiou" else "a"), words
    return rest


def fitting(words: str, scene: Scene) -> list[Thing]:
    """The objects that a phrase fits."""
    return [t for t in scene.things if all(getattr(t, a) == value for a, value in read_phrase(words).items())]


def stands(one: Thing, where: str, other: Thing) -> bool:
    """In the same row left or right; else above or below by rows alone."""
    (row, column), (other_row, other_column) = (one.cell // 3, one.cell % 3), (other.cell // 3, other.cell % 3)
    return {
        "left of": row == other_row and column < other_column,
        "right of": row == other_row and column > other_column,
        "above": row < other_row,
        "below": row > other_row,
    }[where]


def the(words: str, scene: Scene) -> Thing:
    """The object that a definite phrase names; it must fit that one alone."""
    (thing,) = fitting(words, scene)
    return thing


def words_of(thing: Thing) -> str:
    return f"{thing.size} {thing.texture} {thing.colour} {thing.shape}"


# ---------------------------------------------------------------------------------------------------- captions

Claim = tuple[str, str, str]
"""(phrase, what is said of it: a place, a relation or nothing, the other object's phrase)"""


@cache
def read_caption(text: str) -> tuple[str, int | None, tuple[Claim, ...]]:
    """Style, number of objects where it is told, and the claims."""
    assert text == text.lower().strip() and "  " not in text
    if match := re.fullmatch(r"(\w+) (objects?): (.+)", text):
        number, parts = NUMBERS[match[1]], match[3].split(", ")
        assert (match[2] == "object") == (number == 1)
        assert all(part.startswith("one ") for part in parts)
        return "count", number, tuple((part.removeprefix("one "), "", "") for part in parts)
    if text.split()[0] in VALUES["shape"]:
        items = [item.split() for item in text.split(" ; ")]
        return "listing", None, tuple((f"{size} {tex} {col} {shape}", "", "") for shape, col, tex, size in items)
    *before, last = re.split(r" and (?=an? |in the )", text)
    assert len(before) < 2
    parts = [*re.split(r", (?=an? |in the )", before[0]), last] if before else [last]
    claims: list[Claim] = []
    styles = set()
    for i, part in enumerate(parts):
        if match := re.fullmatch(r"in the (.+) sits (.+)", part):
            styles.add("place first")
            claims.append((with_article(match[2]), match[1], ""))
        elif match := re.fullmatch(f"(.+) {WHERE} (.+)", part):
            styles.add("relation")
            other = with_article(match[3]) if i == 0 else match[3].removeprefix("the ")
            claims.append((with_article(match[1]), match[2], other))
        elif match := re.fullmatch("(.+) in the (.+)", part):
            styles.add("full" if len(match[1].split()) == 5 else "relation")
            claims.append((with_article(match[1]), match[2], ""))
        else:
            styles.add("plain")
            claims.append((with_article(part), "", ""))
    (style,) = styles
    return style, None, tuple(claims)


def is_true(text: str, scene: Scene) -> bool:
    """Whether every claim of a caption holds of the scene; it may be silent about some objects."""
    _, number, claims = read_caption(text)
    if number not in (None, len(scene.things)):
        return False
    for words, where, other in claims:
        things = fitting(words, scene)
        if other:
            holds = any(stands(one, where, two) for one in things for two in fitting(other, scene))
        else:
            holds = any(not where or thing.cell == PLACES[where] for thing in things)
        if not holds:
            return False
    return True


# --------------------------------------------------------------------------------------- references, questions


def referred(text: str, scene: Scene) -> list[Thing]:
    """All objects that a reference fits: `red object`, or `object left of the star` (one star only)."""
    if match := re.fullmatch(f"object {WHERE} the (.+)", text):
        other = the(match[2], scene)
        return [thing for thing in scene.things if thing is not other and stands(thing, match[1], other)]
    return fitting(text, scene)


QUESTIONS = {
    "colour": (r"what colour is the (.+)\?", r"which colour does the (.+) have\?"),
    "shape": (r"what shape is the (.+)\?", r"which shape does the (.+) have\?"),
    "texture": (r"what texture has the (.+)\?", r"which pattern does the (.+) have\?"),
    "size": (r"what size is the (.+)\?", r"how big is the (.+)\?"),
    "cell": (r"where is the (.+)\?", r"in which place is the (.+)\?"),
    "object": (r"what is in the (.+)\?", r"name the object at the (.+)\."),
    "neighbour": (rf"what is ({WHERE} .+)\?", rf"name the object ({WHERE} .+)\."),
    "count": (r"how many objects are there\?", r"how many things can be seen\?"),
    "presence": (r"is there (.+)\?", r"can (.+) be seen\?"),
}


def read_question(text: str) -> tuple[str, int, str]:
    """The kind, which wording, and what is asked about."""
    assert text == text.lower().strip()
    found = [
        (kind, wording, (*match.groups(), "")[0])
        for kind, wordings in QUESTIONS.items()
        for wording, pattern in enumerate(wordings)
        if (match := re.fullmatch(pattern, text))
    ]
    (only,) = found
    return only


def asked_thing(text: str, scene: Scene) -> Thing:
    """The one object that a question is about."""
    kind, _, about = read_question(text)
    if kind == "object":
        things = [thing for thing in scene.things if thing.cell == PLACES[about]]
    else:
        things = referred(f"object {about}" if kind == "neighbour" else about, scene)
    (thing,) = things
    return thing


def right_answer(text: str, scene: Scene) -> str:
    """The answer to a question, which must have exactly one."""
    kind, _, about = read_question(text)
    if kind == "count":
        return next(word for word, number in NUMBERS.items() if number == len(scene.things))
    if kind == "presence":
        return "yes" if fitting(with_article(about), scene) else "no"
    thing = asked_thing(text, scene)
    if kind == "cell":
        return PLACE_NAMES[thing.cell]
    if kind in ("object", "neighbour"):
        return words_of(thing)
    assert kind not in read_phrase(about), text  # it would give the answer away
    return str(getattr(thing, kind))


# ----------------------------------------------------------------------------------------------------- changes

Facts = frozenset[tuple[str, str, str, str, int]]


def facts(things: Scene | Iterable[Thing]) -> Facts:
    """What a scene is, without its noise."""
    things = things.things if isinstance(things, Scene) else things
    return frozenset((t.size, t.texture, t.colour, t.shape, t.cell) for t in things)


def changed(text: str, scene: Scene) -> Facts:
    """The scene after an instruction was followed."""
    assert text == text.lower().strip()
    if match := re.fullmatch("move the (.+) to the (.+)", text):
        attribute, value = "cell", match[2]
    elif match := re.fullmatch("turn the (.+) into (.+)", text):
        attribute, value = "shape", with_article(match[2])
    else:
        match = re.fullmatch(r"make the (.+) (\w+)", text)
        assert match, text
        attribute, value = ATTRIBUTE_OF[match[2]], match[2]
        assert attribute != "shape"
    thing = the(match[1], scene)
    new: dict[str, object] = {name: getattr(thing, name) for name in ("size", "texture", "colour", "shape", "cell")}
    assert new[attribute] != (PLACES[value] if attribute == "cell" else value), "nothing changes"
    new[attribute] = PLACES[value] if attribute == "cell" else value
    assert attribute != "cell" or new["cell"] not in {t.cell for t in scene.things}
    return (facts(scene) - facts([thing])) | {tuple(new.values())}  # type: ignore[arg-type]


def differences(one: Scene, other: Scene) -> int:
    """In how many respects two scenes differ that have as many objects: attributes and cells, at the best matching."""
    left, right = sorted(facts(one) - facts(other)), sorted(facts(other) - facts(one))
    if len(left) != len(right) or len(left) > 1:
        return 99 if len(left) != len(right) else len(left) * 2
    return sum(a != b for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True))
