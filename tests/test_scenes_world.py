"""Scenes: what they are, which split they belong to, how they look, and what may change in them."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scene_reader import PLACES, VALUES, differences, facts

from cocoa.scenes.world import (
    ATTRIBUTES,
    BACKGROUNDS,
    CELLS,
    COLOURS,
    NOVEL,
    SHAPES,
    Scene,
    Thing,
    change_one,
    crop,
    draw,
    picture,
    redraw,
    sample_scene,
)

PLAIN = Thing("circle", "red", "solid", "large", 4)


def test_the_vocabulary() -> None:
    assert {name: list(values) for name, values in ATTRIBUTES.items()} == {
        name: VALUES[name] for name in ("shape", "colour", "texture", "size")
    }
    assert {name: cell for cell, name in enumerate(CELLS)} == PLACES


def test_one_combination_of_each_shape_and_of_each_colour_is_held_out() -> None:
    assert Counter(shape for shape, _ in NOVEL) == dict.fromkeys(SHAPES, 1)
    assert Counter(colour for _, colour in NOVEL) == dict.fromkeys(COLOURS, 1)
    assert replace(PLAIN, shape="circle", colour="orange").novel
    assert not PLAIN.novel


def test_objects_stand_in_reading_order_and_no_two_are_of_one_kind() -> None:
    rng = random.Random(0)
    counts: Counter[int] = Counter()
    for _ in range(400):
        scene = sample_scene(rng, (1, 2, 3, 4, 5))
        cells = [thing.cell for thing in scene.things]
        assert cells == sorted(set(cells)) and set(cells) <= set(range(9))
        assert len(scene.kinds) == len(scene.things)
        counts[len(cells)] += 1
    assert min(counts[n] for n in range(1, 6)) > 40 and len(counts) == 5


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_scenes_are_drawn_as_asked(split: str) -> None:
    rng = random.Random(1)
    for _ in range(60):
        scene = sample_scene(rng, (3,), split, lambda s: s.things[0].colour == "red")
        assert scene.split() == split
        assert len(scene.things) == 3 and scene.things[0].colour == "red"


def test_the_split_is_of_what_a_scene_is_not_of_how_it_looks() -> None:
    rng = random.Random(2)
    splits: Counter[str] = Counter()
    for _ in range(2000):
        scene = sample_scene(rng, (2, 3))
        again = redraw(rng, scene)
        assert again.split() == scene.split() and facts(again) == facts(scene)
        splits[scene.split()] += 1
    assert splits["train"] / 2000 == pytest.approx(0.7, abs=0.04)
    assert splits["validation"] / 2000 == pytest.approx(0.1, abs=0.03)
    assert splits["test"] / 2000 == pytest.approx(0.2, abs=0.03)


def test_the_split_of_a_scene_never_changes() -> None:
    """The shipped backbones were trained on the training split as it is here."""
    letters = ""
    for number in range(40):
        one = Thing(SHAPES[number % 8], COLOURS[number // 8], "solid", "small", number % 4)
        other = Thing(SHAPES[number // 5], COLOURS[7 - number % 3], "dotted", "large", 4 + number % 5)
        letters += Scene((one, other)).split()[1] + Scene((other,)).split()[1]  # (r)ain, v(a)lidation, t(e)st
    assert letters == "aeerrrrrrrrrrrerrereererrrearraererrearerrrerrrrrrerrrrerreeareerrerreerarrerrrr"


def test_the_same_seed_draws_the_same_scene() -> None:
    one, two = (sample_scene(random.Random(5), (2, 3)) for _ in range(2))
    assert one == two != sample_scene(random.Random(6), (2, 3))


# ------------------------------------------------------------------------------------------------------- looks


def test_sizes_of_pictures_and_crops() -> None:
    rng = random.Random(0)
    for _ in range(20):
        scene = sample_scene(rng, (1, 2, 3, 4, 5))
        whole = np.asarray(picture(scene))
        assert whole.shape == (84, 84, 3) and whole.dtype == np.uint8
        for thing in scene.things:
            part, (row, column) = crop(scene, thing), divmod(thing.cell, 3)
            assert part.size == (28, 28) and part.mode == "RGB"
            assert np.array_equal(np.asarray(part), whole[28 * row : 28 * row + 28, 28 * column : 28 * column + 28])


def test_an_object_is_seen_in_its_cell_alone() -> None:
    rng = random.Random(1)
    for _ in range(60):
        scene = sample_scene(rng, (1, 2, 3, 4, 5))
        inked = (draw(scene) != np.array(BACKGROUNDS[scene.background])).any(-1)
        shares = inked.reshape(3, 28, 3, 28).mean((1, 3)).reshape(9)
        occupied = {thing.cell for thing in scene.things}
        assert {cell for cell in range(9) if shares[cell] > 0} == occupied
        assert min(shares[cell] for cell in occupied) > 0.05


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_pictures_differ_wherever_an_attribute_does(attribute: str) -> None:
    for base in (PLAIN, replace(PLAIN, shape="star", texture="dotted", size="small", colour="black")):
        looks = [draw(Scene((base.having(attribute, value),))).astype(int) for value in ATTRIBUTES[attribute]]
        for one, other in combinations(looks, 2):
            assert (np.abs(one - other).max(-1) > 40).sum() > 12  # pixels that are plainly unlike


def test_colours_are_told_apart_in_every_shade() -> None:
    shades = {
        colour: np.array([draw(Scene((replace(PLAIN, colour=colour, shade=s),)))[42, 42] for s in (0.85, 1, 1.15)], int)
        for colour in COLOURS
    }
    for one, other in combinations(COLOURS, 2):
        apart = np.abs(shades[one][:, None] - shades[other][None]).max(-1)
        assert apart.min() > 30, (one, other)


def test_noise_is_seen() -> None:
    rng = random.Random(0)
    scene = sample_scene(rng, (3,))
    assert len({draw(redraw(rng, scene)).tobytes() for _ in range(8)}) == 8


# ------------------------------------------------------------------------------------------------------ changes


@pytest.mark.parametrize("attribute", [*ATTRIBUTES, "cell"])
def test_a_change_is_of_one_object_in_one_respect(attribute: str) -> None:
    rng = random.Random(0)
    for _ in range(150):
        scene = sample_scene(rng, (1, 2, 3, 4, 5))
        other = change_one(rng, scene, attribute)
        assert other is not None and differences(scene, other) == 1
        (old,), (new,) = facts(scene) - facts(other), facts(other) - facts(scene)
        names = ("size", "texture", "colour", "shape", "cell")
        assert [name for name, a, b in zip(names, old, new, strict=True) if a != b] == [attribute]
        assert len(other.kinds) == len(other.things)
        assert [t.cell for t in other.things] == sorted({t.cell for t in other.things})


def test_a_change_of_a_given_object_that_is_accepted() -> None:
    rng = random.Random(0)
    for _ in range(100):
        scene = sample_scene(rng, (2, 3))
        other = change_one(rng, scene, "colour", 1, lambda s: s.split() == "train")
        if other is not None:
            assert other.split() == "train"
            assert facts(scene) - facts(other) == facts([scene.things[1]])


def test_where_no_change_is_accepted_there_is_none() -> None:
    scene = sample_scene(random.Random(0), (2,))
    assert all(change_one(random.Random(1), scene, name, accept=lambda s: False) is None for name in ATTRIBUTES)


def test_every_change_may_come() -> None:
    rng, scene = random.Random(0), Scene((PLAIN, replace(PLAIN, colour="blue", cell=8)))
    found = Counter(facts(change_one(rng, scene, "colour") or scene) for _ in range(1500))
    assert len(found) == 2 * 6  # to six colours each: not its own, not the other one's
    assert min(found.values()) > 70
