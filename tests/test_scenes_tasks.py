"""The data sets' examples: one right answer, near misses that are wrong, and nothing that training must not show."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest
from scene_reader import (
    PLACE_NAMES,
    VALUES,
    asked_thing,
    changed,
    differences,
    facts,
    is_true,
    read_caption,
    read_question,
    referred,
    right_answer,
    words_of,
)

from cocoa.catalogue import datasets
from cocoa.scenes.language import TELLS
from cocoa.scenes.tasks import TASKS, Example, Item, all_answers, labels
from cocoa.scenes.world import NOVEL, Scene, Thing
from cocoa.scenes.write import sample_examples, sample_queries

IND = [name for name, entry in datasets("scenes").items() if not entry.ood]
SPLITS = ("train", "validation", "test")


@cache
def examples(name: str, split: str, number: int = 90) -> list[Example]:
    return [TASKS[name](random.Random(f"tests/{i}"), split) for i in range(number)]


@cache
def rows(name: str) -> list[tuple[Example, list[Item]]]:
    """The test split as `cocoa scenes` makes it by default."""
    return sample_queries(name, "test", 0, 200)


def pictured(item: Item) -> list[Scene]:
    """The scene of an item that is a whole picture."""
    return [item.scene] if item.scene is not None and item.thing is None else []


def shown_kinds(items: list[Item]) -> set[tuple[str, str]]:
    """(shape, colour) that items show, or tell of: `red star` or `star red`."""
    kinds: set[tuple[str, str]] = set()
    for item in items:
        things = [item.thing] if item.thing else item.scene.things if item.scene else []
        kinds |= {(thing.shape, thing.colour) for thing in things}
        words = re.findall(r"\w+|[,;]", item.text)
        pairs = {*pairwise(words), *pairwise(reversed(words))}
        kinds |= {(one, two) for one, two in pairs if one in VALUES["shape"] and two in VALUES["colour"]}
    return kinds


def everything(example: Example) -> list[Item]:
    return [example.query, example.target, *example.hard]


# ----------------------------------------------------------------------------------------- the sets as a whole


def test_the_sets_are_those_of_the_table() -> None:
    table = datasets("scenes")
    assert list(TASKS) == list(table)
    sets = Counter((entry.meta_task, entry.ood) for entry in table.values())
    for task in ("Classification", "VQA", "Retrieval", "Grounding"):
        assert sets[task, False] and sets[task, True], task
    assert len(table) * 200 >= 2000  # test queries by default


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_of_the_split(name: str, split: str) -> None:
    for example in examples(name, split):
        for item in (example.query, example.target):
            assert item.scene is None or item.scene.split() == split
        for scene in (scene for item in example.hard for scene in pictured(item)):
            assert (scene.split() == "train") == (split == "train")


@pytest.mark.parametrize("name", IND)
def test_training_shows_nothing_of_what_is_held_out(name: str) -> None:
    for example in examples(name, "train", 400):
        items = everything(example)
        assert not shown_kinds(items) & NOVEL
        counts = (1, 2) if name == "SceneQuestions" else (2, 3)
        assert all(len(item.scene.things) in counts for item in items if item.scene is not None)
        if name in ("Scenes_i2t", "Scenes_t2i"):
            texts = [item.text for item in items if item.text]
            assert "place first" not in {read_caption(text)[0] for text in texts}


@pytest.mark.parametrize("name", [name for name in TASKS if not name.endswith("-Novel")])
def test_only_the_novel_sets_show_held_out_combinations(name: str) -> None:
    for example in examples(name, "test"):
        assert not shown_kinds(everything(example)) & NOVEL


def test_what_is_out_of_distribution() -> None:
    for example in examples("SceneObjects-Novel", "test"):
        _, colour, shape = example.target.text.split()
        assert (shape, colour) in NOVEL
    for name in ("Scenes_t2i-Novel", "SceneChanges-Novel"):
        for example in examples(name, "test"):
            for scene in (scene for item in everything(example) for scene in pictured(item)):
                assert scene.kinds & NOVEL
    crowds = {"Scenes_i2t-Crowded": {4, 5}, "SceneQuestions-Crowded": {3}, "SceneGrounding-Crowded": {4, 5}}
    for name, crowd in crowds.items():
        assert {len(e.query.scene.things) for e in examples(name, "test") if e.query.scene} == crowd
    assert {read_caption(example.target.text)[0] for example in examples("Scenes_i2t-Crowded", "test")} == {
        "place first"
    }
    places = ("left of", "right of", "above", "below")
    by_place = {
        (name, split): sum(any(where in e.query.text for where in places) for e in examples(name, split))
        for name, split in (("SceneGrounding", "train"), ("SceneGrounding-Crowded", "test"))
    }
    assert by_place["SceneGrounding", "train"] == 0 and 30 < by_place["SceneGrounding-Crowded", "test"] < 60  # of 90


@pytest.mark.parametrize("name", TASKS)
def test_examples_come_from_randomness_alone(name: str) -> None:
    one, two, three = (TASKS[name](random.Random(seed), "train") for seed in (0, 0, 1))
    assert one == two != three


@pytest.mark.parametrize("name", TASKS)
def test_examples_are_found_quickly_in_the_rarest_split(name: str) -> None:
    """Scenes are drawn until one fits: every draw must end, and on average soon."""
    started = time.process_time()
    for i in range(40):
        TASKS[name](random.Random(f"hang/{i}"), "validation")
    assert (time.process_time() - started) / 40 < 0.15


@pytest.mark.parametrize("name", TASKS)
def test_fewer_examples_are_the_first_of_more(name: str) -> None:
    few, more = sample_examples(name, "train", 0, 10), sample_examples(name, "train", 0, 25)
    assert more[:10] == few
    assert sample_examples(name, "train", 1, 10) != few
    asked = {(e.query.text, facts(e.query.scene) if e.query.scene else e.meaning) for e in more}
    assert len(asked) == 25


# ------------------------------------------------------------------------------------------------- the examples


@pytest.mark.parametrize("name", ["SceneObjects", "SceneObjects-Novel"])
def test_the_label_names_the_one_large_object(name: str) -> None:
    for example in examples(name, "test"):
        assert example.query.scene is not None
        (large,) = [thing for thing in example.query.scene.things if thing.size == "large"]
        assert example.target.text == f"{large.texture} {large.colour} {large.shape}"


@pytest.mark.parametrize("name", ["SceneQuestions", "SceneQuestions-Crowded"])
@pytest.mark.parametrize("split", SPLITS)
def test_questions_have_near_misses_of_the_same_sort(name: str, split: str) -> None:
    kinds: Counter[str] = Counter()
    first: dict[str, set[str]] = {}
    for example in examples(name, split):
        scene, text = example.query.scene, example.query.text
        assert scene is not None and right_answer(text, scene) == example.target.text
        kind = read_question(text)[0]
        kinds[kind] += 1
        wrong = [item.text for item in example.hard]
        assert len(set(wrong)) == len(wrong) and example.target.text not in wrong
        values = VALUES[kind] if kind in VALUES else list(PLACE_NAMES.values())
        assert set(wrong) < set(values) and len(wrong) == min(3, len(values) - 1)
        first.setdefault(kind, set()).add(wrong[0])
    assert set(kinds) == {"colour", "shape", "texture", "size", "cell"}
    assert any(len(words) > 2 for words in first.values()), "the first near miss is always the same"


@pytest.mark.parametrize("name", ["Scenes_i2t", "Scenes_i2t-Crowded", "Scenes_t2i", "Scenes_t2i-Novel"])
@pytest.mark.parametrize("split", SPLITS)
def test_wrong_captions_and_pictures_differ_in_one_respect(name: str, split: str) -> None:
    styles: Counter[str] = Counter()
    for example in examples(name, split):
        text = example.query.text or example.target.text
        scene = example.target.scene or example.query.scene
        assert scene is not None and is_true(text, scene)
        style = read_caption(text)[0]
        styles[style] += 1
        assert 1 <= len(example.hard) <= 2 <= len(TELLS[style])
        for item in example.hard:
            if item.scene is not None:
                assert differences(item.scene, scene) == 1
                assert not is_true(text, item.scene)
            else:
                assert not is_true(item.text, scene)
                assert read_caption(item.text)[0] == style
    assert sum(len(example.hard) for example in examples(name, split)) > 1.8 * 90
    assert len(styles) == (1 if "Crowded" in name else 5)


@pytest.mark.parametrize("name", ["SceneChanges", "SceneChanges-Novel"])
@pytest.mark.parametrize("split", SPLITS)
def test_changes_lead_to_the_target(name: str, split: str) -> None:
    respects: Counter[int] = Counter()
    for example in examples(name, split):
        scene, right = example.query.scene, example.target.scene
        assert scene is not None and right is not None
        assert changed(example.query.text, scene) == facts(right), example.query.text
        assert differences(scene, right) == 1
        (old,), (new,) = facts(scene) - facts(right), facts(right) - facts(scene)
        respects[next(i for i in range(5) if old[i] != new[i])] += 1
        for item in example.hard:
            assert item.scene is not None and differences(scene, item.scene) == 1
            assert facts(item.scene) != facts(right)
        assert 1 <= len(example.hard) <= 2
    assert min(respects[i] for i in range(5)) > 6  # of 90


@pytest.mark.parametrize("name", ["SceneGrounding", "SceneGrounding-Crowded"])
@pytest.mark.parametrize("split", SPLITS)
def test_references_lead_to_the_crop(name: str, split: str) -> None:
    for example in examples(name, split):
        scene, thing = example.query.scene, example.target.thing
        assert scene is not None and referred(example.query.text, scene) == [thing]
        assert example.target.scene is scene
        others: list[Thing] = []
        near: list[Thing] = []
        for item in example.hard:
            assert item.scene is not None and item.thing is not None and item.thing in item.scene.things
            (others if item.scene is scene else near).append(item.thing)
        assert {t.cell for t in others} == {t.cell for t in scene.things} - {thing.cell if thing else None}
        assert thing is not None and len(near) >= 3
        for other in near:
            assert sum(a != b for a, b in zip(thing.facts, other.facts, strict=True)) == 1 and other.cell == thing.cell


# ------------------------------------------------------------------------------------------------ the candidates


@pytest.mark.parametrize("name", TASKS)
def test_the_right_candidate_is_first_among_200_to_1000(name: str) -> None:
    assert len(rows(name)) == 200
    for example, candidates in rows(name):
        assert candidates[0] == example.target
        assert candidates[1 : 1 + len(example.hard)] == list(example.hard)
        assert 200 <= len(candidates) <= 1000
        assert len(set(candidates)) == len(candidates)


def test_labels_are_all_there_and_one_is_right() -> None:
    assert len(labels()) == len(set(labels())) == 56 * 4
    assert len(labels(novel=True)) == len(set(labels(novel=True))) == 64 * 4
    assert not shown_kinds([Item(label) for label in labels()]) & NOVEL
    for name in ("SceneObjects", "SceneObjects-Novel"):
        for example, candidates in rows(name):
            texts = [item.text for item in candidates]
            assert len(set(texts)) == len(texts)
            assert sorted(texts) == sorted(labels(novel=name != "SceneObjects"))
            assert example.query.scene is not None
            true = [text for text in texts if f"large {text}" in {words_of(t) for t in example.query.scene.things}]
            assert true == texts[:1]


def test_no_other_answer_is_right() -> None:
    """Nor is what may pass for one: a word of the whole phrase, or the whole phrase for a word."""
    assert len(set(all_answers())) == len(all_answers()) == 36 + 448
    for name in ("SceneQuestions", "SceneQuestions-Crowded"):
        for example, candidates in rows(name):
            assert example.query.scene is not None
            thing = asked_thing(example.query.text, example.query.scene)
            texts = [item.text for item in candidates]
            assert texts[0] == right_answer(example.query.text, example.query.scene)
            true = {words_of(thing), *words_of(thing).split(), PLACE_NAMES[thing.cell]}
            assert not true & set(texts[1:])
            assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", ["Scenes_i2t", "Scenes_i2t-Crowded"])
def test_no_other_caption_is_true_of_the_picture(name: str) -> None:
    for example, candidates in rows(name):
        assert example.query.scene is not None
        assert [item for item in candidates if is_true(item.text, example.query.scene)] == candidates[:1]


@pytest.mark.parametrize("name", ["Scenes_t2i", "Scenes_t2i-Novel"])
def test_the_caption_is_true_of_no_other_picture(name: str) -> None:
    for example, candidates in rows(name):
        scenes = [scene for item in candidates for scene in pictured(item)]
        assert len(scenes) == len(candidates)
        assert [scene for scene in scenes if is_true(example.query.text, scene)] == scenes[:1]


@pytest.mark.parametrize("name", ["SceneChanges", "SceneChanges-Novel"])
def test_the_change_leads_to_no_other_picture(name: str) -> None:
    for example, candidates in rows(name):
        assert example.query.scene is not None
        wanted = changed(example.query.text, example.query.scene)
        scenes = [scene for item in candidates for scene in pictured(item)]
        assert [facts(scene) == wanted for scene in scenes] == [True] + [False] * (len(candidates) - 1)


@pytest.mark.parametrize("name", ["SceneGrounding", "SceneGrounding-Crowded"])
def test_no_other_crop_shows_the_object(name: str) -> None:
    """A crop of another picture may fit the words, but looks unlike what they name in this one."""
    for example, candidates in rows(name):
        assert example.query.scene is not None
        (thing,) = referred(example.query.text, example.query.scene)
        shown = [words_of(item.thing) for item in candidates if item.thing is not None]
        assert [words == words_of(thing) for words in shown] == [True] + [False] * (len(candidates) - 1)


@pytest.mark.parametrize("name", TASKS)
def test_no_evaluation_row_shows_a_training_scene(name: str) -> None:
    for example, candidates in rows(name):
        for item in (example.query, *candidates):
            assert all(scene.split() != "train" for scene in pictured(item))
