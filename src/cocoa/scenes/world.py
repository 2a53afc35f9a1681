"""The world: scenes of one to five objects on a 3 x 3 grid, and how they look.

A cell is 28 x 28 px, one merged token of the Qwen2-VL family. What a scene *is* (`Thing`s and their cells)
decides whether it belongs to training, validation or test; how it looks besides that (background, shade,
offset within the cell) is noise.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
TEXTURES = ("solid", "striped", "dotted", "checked")
SIZES = ("small", "large")
CELLS = (
    *("top left", "top centre", "top right", "middle left", "centre", "middle right"),
    *("bottom left", "bottom centre", "bottom right"),
)
ATTRIBUTES = {"shape": SHAPES, "colour": COLOURS, "texture": TEXTURES, "size": SIZES}

CELL = 28
"""Side of a cell in pixels."""
RGB = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (240, 212, 0),
    "green": (44, 150, 60),
    "blue": (35, 95, 200),
    "purple": (125, 55, 160),
    "pink": (250, 130, 190),
    "black": (35, 35, 40),
}
BACKGROUNDS = ((255, 255, 255), (236, 240, 244), (250, 244, 230), (228, 238, 228), (240, 232, 242), (222, 226, 232))

NOVEL = frozenset((shape, COLOURS[(3 * i + 1) % 8]) for i, shape in enumerate(SHAPES))
"""(shape, colour) combinations that no training pair shows: one of each shape and of each colour."""


@dataclass(frozen=True, slots=True)
class Thing:
    """An object: its attributes, its cell (0-8, by rows), and noise that no text tells of."""

    shape: str
    colour: str
    texture: str
    size: str
    cell: int
    offset: tuple[int, int] = (0, 0)
    shade: float = 1.0

    @property
    def facts(self) -> tuple[str, str, str, str, int]:
        """All of it but the noise."""
        return self.size, self.texture, self.colour, self.shape, self.cell

    @property
    def novel(self) -> bool:
        """Whether its shape and colour are a held-out combination."""
        return (self.shape, self.colour) in NOVEL

    def having(self, attribute: str, value: Any) -> Thing:
        """The object with another value of an attribute, or in another `cell`."""
        return replace(self, **{attribute: value})


@dataclass(frozen=True, slots=True)
class Scene:
    """Objects in distinct cells, in reading order, no two alike in both shape and colour, on a background."""

    things: tuple[Thing, ...]
    background: int = 0

    def split(self) -> str:
        """`train`, `validation` (1 in 10) or `test` (1 in 5), decided by what the scene is, not by how it looks."""
        facts = [thing.facts for thing in self.things]
        number = hashlib.blake2b(repr(facts).encode(), digest_size=2).digest()[0] % 10
        return ("validation", "test", "test")[number] if number < 3 else "train"

    @property
    def kinds(self) -> frozenset[tuple[str, str]]:
        """The (shape, colour) of its objects."""
        return frozenset((t.shape, t.colour) for t in self.things)


def sample_scene(
    rng: random.Random,
    counts: tuple[int, ...],
    split: str | None = None,
    accept: Callable[[Scene], bool] = lambda scene: True,
) -> Scene:
    """A random scene.

    Args:
        rng: the source of randomness.
        counts: how many objects it may have.
        split: one of `Scene.split`; None takes any.
        accept: what else must hold; scenes are drawn until it does.
    """
    while True:
        things: list[Thing] = []
        cells = sorted(rng.sample(range(9), rng.choice(counts)))
        for cell in cells:
            thing = sample_thing(rng, cell)
            while any((t.shape, t.colour) == (thing.shape, thing.colour) for t in things):
                thing = sample_thing(rng, cell)
            things.append(thing)
        scene = Scene(tuple(things))
        if split in (None, scene.split()) and accept(scene):
            return redraw(rng, scene)


def sample_thing(rng: random.Random, cell: int) -> Thing:
    """A random object in a cell, without noise."""
    attributes: dict[str, Any] = {name: rng.choice(values) for name, values in ATTRIBUTES.items()}
    return Thing(**attributes, cell=cell)


def _place(rng: random.Random, thing: Thing) -> Thing:
    """The object with fresh noise: an offset that keeps it inside its cell, and a shade."""
    room = 1 if thing.size == "large" else 3
    offset = (rng.randint(-room, room), rng.randint(-room, room))
    return replace(thing, offset=offset, shade=round(rng.uniform(0.85, 1.15), 3))


def change_one(
    rng: random.Random,
    scene: Scene,
    attribute: str,
    index: int | None = None,
    accept: Callable[[Scene], bool] = lambda scene: True,
) -> Scene | None:
    """The scene with one attribute (or the `cell`) of one object changed, and fresh noise everywhere.

    Args:
        rng: the source of randomness.
        scene: stays as it is.
        attribute: what changes.
        index: which object; None takes any.
        accept: what else must hold of the changed scene.

    Returns:
        One of all such scenes, at random; None if there is none.
    """
    taken = {thing.cell for thing in scene.things}
    values = [c for c in range(9) if c not in taken] if attribute == "cell" else list(ATTRIBUTES[attribute])
    options = [(i, v) for i in (range(len(scene.things)) if index is None else [index]) for v in values]
    for i, value in rng.sample(options, len(options)):
        thing, others = scene.things[i], scene.things[:i] + scene.things[i + 1 :]
        new = thing.having(attribute, value)
        if new == thing or (new.shape, new.colour) in {(t.shape, t.colour) for t in others}:
            continue
        changed = Scene(tuple(sorted((*others, new), key=lambda t: t.cell)), scene.background)
        if accept(changed):
            return redraw(rng, changed)
    return None


def redraw(rng: random.Random, scene: Scene) -> Scene:
    """The same scene with fresh noise."""
    return Scene(tuple(_place(rng, t) for t in scene.things), rng.randrange(len(BACKGROUNDS)))


# --------------------------------------------------------------------------------------------------- pictures


def draw(scene: Scene) -> np.ndarray:
    """The scene's pixels (84, 84, 3), uint8."""
    picture = np.empty((3 * CELL, 3 * CELL, 3), np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        tile = picture[_place_of(thing)]
        covered, ink = _stencil(thing.shape, thing.texture, thing.size, thing.offset)
        colour = np.clip(np.array(RGB[thing.colour], np.float32) * thing.shade, 0, 255)
        paper = 0.25 * colour + 0.75 * 255
        tile += covered * (ink * colour + (1 - ink) * paper - tile)
    return picture.round().astype(np.uint8)


def picture(scene: Scene) -> Image.Image:
    """The scene as an image."""
    return Image.fromarray(draw(scene))


def crop(scene: Scene, thing: Thing) -> Image.Image:
    """The cell of one of the scene's objects."""
    return Image.fromarray(draw(scene)[_place_of(thing)])


def _place_of(thing: Thing) -> tuple[slice, slice]:
    """The rows and columns of pixels of an object's cell."""
    row, column = divmod(thing.cell, 3)
    return slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)


@cache
def _stencil(shape: str, texture: str, size: str, offset: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where a cell is covered, and where the cover has the object's colour: two (28, 28, 1) arrays in 0..1."""
    fine, radius = 8, (12.5 if size == "large" else 8.5)
    centre = [(CELL / 2 + shift) * fine for shift in offset]
    mask = Image.new("L", (CELL * fine, CELL * fine), 0)
    brush = ImageDraw.Draw(mask)
    for outline, value in _outlines(shape):
        brush.polygon([(centre[0] + x * radius * fine, centre[1] + y * radius * fine) for x, y in outline], fill=value)
    covered = np.asarray(mask.resize((CELL, CELL), Image.Resampling.BOX), np.float32) / 255
    y, x = np.mgrid[:CELL, :CELL] - np.array(offset[::-1]).reshape(2, 1, 1)
    ink = {
        "solid": np.ones_like(x),
        "striped": (x + y) // 2 % 2,
        "dotted": 1 - (x % 4 < 2) * (y % 4 < 2),
        "checked": (x // 3 + y // 3) % 2,
    }[texture]
    return covered[..., None], ink.astype(np.float32)[..., None]


def _outlines(shape: str) -> list[tuple[np.ndarray, int]]:
    """Polygons (points in the unit circle, fill value) that make up a shape."""

    def circle(radius: float, corners: int = 64, start: float = 0.0) -> np.ndarray:
        angle = start + np.linspace(0, 2 * np.pi, corners, endpoint=False)
        return radius * np.stack([np.sin(angle), -np.cos(angle)], 1)

    if shape == "star":
        points = circle(1.0, 10)
        points[1::2] *= 0.45
        return [(points, 255)]
    if shape == "cross":
        bar = np.array([(-0.95, -0.32), (0.95, -0.32), (0.95, 0.32), (-0.95, 0.32)])
        return [(bar, 255), (bar[:, ::-1], 255)]
    if shape == "ring":
        return [(circle(1.0), 255), (circle(0.55), 0)]
    if shape == "heart":
        t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        return [(np.stack([x, y + 2], 1) / 16, 255)]
    return [
        {
            "circle": (circle(0.95), 255),
            "square": (circle(1.15, 4, np.pi / 4), 255),
            "triangle": (circle(1.1, 3) + np.array([0, 0.2]), 255),
            "diamond": (circle(1.1, 4) * np.array([0.7, 1.0]), 255),
        }[shape]
    ]
