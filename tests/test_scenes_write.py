"""`write_scenes`: folders that the readers of MMEB read, the same bytes each time, and nothing of others' lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scene_reader import Facts, facts, is_true, read_caption, read_question, right_answer

import cocoa.scenes.write as writing
from cocoa.catalogue import TRAIN_COLUMNS, datasets, known_instructions, stage_rows
from cocoa.errors import CocoaError
from cocoa.eval_inputs import check_eval_images
from cocoa.mmeb import list_subsets, read_train
from cocoa.mmeb_eval import read_eval
from cocoa.pair_files import read_file
from cocoa.pairs import ContentPair, PairSet, Side, check_images
from cocoa.scenes.dialogues import REQUESTS
from cocoa.scenes.language import STYLES
from cocoa.scenes.tasks import Example, Item
from cocoa.scenes.world import NOVEL, Scene, crop, draw
from cocoa.scenes.write import TURNS, sample_examples, sample_queries, write_scenes

SEED, PAIRS, QUERIES = 3, 74, 2
TABLE = datasets("scenes")
TRAINED = [name for name, entry in TABLE.items() if not entry.ood]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    path = tmp_path_factory.mktemp("scenes")
    write_scenes(path, SEED, PAIRS, QUERIES)
    return path


@pytest.fixture(scope="module")
def pairs(folder: Path) -> PairSet:
    return read_train(folder / "MMEB-train")


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two data sets with few candidates, for tests of what happens to folders."""
    kept = {name: writing.TASKS[name] for name in ("Scenes_i2t", "SceneGrounding-Crowded")}
    monkeypatch.setattr(writing, "TASKS", kept)
    monkeypatch.setattr(writing, "SPARE", 2)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def trained_examples(name: str) -> list[Example]:
    rank = TRAINED.index(name)
    return sample_examples(name, "train", SEED, PAIRS // 6 + (rank < PAIRS % 6))


# ------------------------------------------------------------------------------------------- read like any data


def test_the_readers_find_every_row(folder: Path, pairs: PairSet) -> None:
    assert not pairs.left_out and len(pairs) == PAIRS
    assert Counter(pair.dataset for pair in pairs.pairs) == {
        name: 13 if i < 2 else 12 for i, name in enumerate(TRAINED)
    }
    check_images(pairs.pairs)
    assert list_subsets(folder / "MMEB-eval") == sorted(TABLE)
    for split in ("test", "validation"):
        found = read_eval(folder / "MMEB-eval", split=split)
        check_eval_images(found)
        assert all(len(dataset.queries) == QUERIES for dataset in found)


def check_side(side: Side, item: Item, instructions: tuple[str, ...]) -> None:
    assert side.text_is_content and side.text == item.text
    assert side.instruction == (instructions[0].removesuffix("{text}").strip() if instructions else "")
    assert (side.image is not None) == (item.scene is not None)
    if item.scene is not None:
        wanted = draw(item.scene) if item.thing is None else np.asarray(crop(item.scene, item.thing))
        assert isinstance(side.image, str)
        with Image.open(side.image) as image:
            assert image.size == ((84, 84) if item.thing is None else (28, 28))
            assert np.array_equal(np.asarray(image), wanted)


def test_training_rows_say_and_show_what_was_drawn(pairs: PairSet) -> None:
    for name in TRAINED:
        rows = [pair for pair in pairs.pairs if pair.dataset == name]
        for pair, example in zip(rows, trained_examples(name), strict=True):
            check_side(pair.query, example.query, TABLE[name].query)
            check_side(pair.target, example.target, TABLE[name].target)
            texts = [item.text for item in example.hard if item.scene is None]
            assert [negative.text for negative in pair.negatives] == texts[:1]
            assert all(negative == Side(text=negative.text) for negative in pair.negatives)
        assert bool(rows[0].negatives) == (name in ("SceneQuestions", "Scenes_i2t"))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluation_rows_say_and_show_what_was_drawn(folder: Path, split: str) -> None:
    for dataset in read_eval(folder / "MMEB-eval", split=split):
        entry = TABLE[dataset.name]
        rows = sample_queries(dataset.name, split, SEED, QUERIES)
        for query, found, (example, candidates) in zip(dataset.queries, dataset.candidates, rows, strict=True):
            check_side(dataset.inputs[query], example.query, entry.query)
            assert len(found) == len(candidates) and len(set(found.tolist())) == len(found)
            for index, item in zip(found, [example.target, *candidates[1:]], strict=True):
                check_side(dataset.inputs[index], item, entry.target)


def test_no_instruction_is_content(folder: Path, pairs: PairSet) -> None:
    prefixes = [text.removesuffix("{text}").strip(" .") for text in known_instructions()]
    sides = [side for pair in pairs.pairs for side in (pair.query, pair.target, *pair.negatives)]
    sides += [side for dataset in read_eval(folder / "MMEB-eval") for side in dataset.inputs]
    for side in sides:
        assert side.text_is_content and side.text == side.text.lower()
        assert not [prefix for prefix in prefixes if prefix in side.text]
        assert "<|" not in side.prompt()


def test_training_files_have_the_columns_of_mmeb(folder: Path) -> None:
    for name in TRAINED:
        (path,) = (folder / "MMEB-train" / name).glob("*.parquet")
        assert path.name == "original-00000-of-00001.parquet"
        assert pq.read_schema(path).names == [*TRAIN_COLUMNS, "neg_text", "neg_image_path"]


# --------------------------------------------------------------------------------------------- what feeds stages


def scene_of(row: ContentPair) -> Scene:
    example = trained_examples(row.dataset)[row.row]
    scene = example.query.scene or example.target.scene
    assert scene is not None
    return scene


def test_joint_reconstruction_takes_an_image_with_its_own_text(pairs: PairSet) -> None:
    rows = stage_rows(pairs.pairs, "joint_reconstruction")
    assert {row.dataset for row in rows} == {"SceneQuestions", "Scenes_i2t", "Scenes_t2i"}
    assert set(rows.left_out) == {"SceneObjects", "SceneChanges", "SceneGrounding"}
    for row in rows:
        assert row.side == Side(image=row.side.image)
        if row.dataset == "SceneQuestions":
            question, end, answer = row.text.partition("?")
            assert right_answer(question + end, scene_of(row)) == answer.strip()
        else:
            assert is_true(row.text, scene_of(row))


def test_the_bridge_goes_from_an_image_to_a_text_it_has_not_seen(pairs: PairSet) -> None:
    rows = stage_rows(pairs.pairs, "eos_bridge")
    assert {row.dataset for row in rows} == set(TRAINED) - {"SceneChanges"}
    assert set(rows.left_out) == {"SceneChanges"}
    for row in rows:
        assert row.side.image and row.side.instruction
        assert row.text not in row.side.prompt()
        if row.dataset == "SceneGrounding":  # a crop shows all that its name says
            thing = trained_examples(row.dataset)[row.row].target.thing
            assert thing is not None and row.side.text == ""
            assert set(row.text.split()) <= {thing.size, thing.texture, thing.colour, thing.shape, "object"}
            continue
        scene = scene_of(row)
        if row.dataset == "SceneQuestions":
            assert right_answer(row.side.text, scene) == row.text
        elif row.dataset == "SceneObjects":
            assert f"large {row.text}" in {f"{t.size} {t.texture} {t.colour} {t.shape}" for t in scene.things}
        else:
            assert row.side.text == "" and is_true(row.text, scene)


# ------------------------------------------------------------------------------------------------ conversations


def test_each_training_picture_has_a_caption_and_a_conversation_that_are_true(folder: Path) -> None:
    drawn: dict[bytes, Scene] = {}
    for example in (example for name in TRAINED for example in trained_examples(name)):
        for scene in (item.scene for item in (example.query, example.target) if item.scene is not None):
            drawn[draw(scene).tobytes()] = scene
    told = read_file(folder / "dialogues.parquet")
    check_images(told.pairs)
    rows = stage_rows(told.pairs, "compression")
    assert len(rows) == len(told) == len(drawn) and not rows.left_out
    requests, first = {REQUESTS[style]: style for style in STYLES}, 0
    for pair in told.pairs:
        with Image.open(str(pair.query.image)) as image:
            scene = drawn.pop(np.asarray(image).tobytes())
        assert is_true(pair.target.text, scene) and read_caption(pair.target.text)[0] in STYLES
        (described,) = [turn for turn in pair.dialogue if turn.question in requests]
        assert is_true(described.answer, scene) and read_caption(described.answer)[0] == requests[described.question]
        asked = [turn for turn in pair.dialogue if turn != described]
        assert len(asked) == len({turn.question for turn in asked}) == TURNS
        assert all(right_answer(turn.question, scene) == turn.answer for turn in asked)
        first += described == pair.dialogue[0]
    assert 0 < first < len(told)


def test_conversations_say_nothing_that_training_pairs_hold_out(folder: Path) -> None:
    told = read_file(folder / "dialogues.parquet").pairs
    texts = [text for pair in told for text in (pair.target.text, *(part for turn in pair.dialogue for part in turn))]
    assert not [text for text in texts for shape, colour in NOVEL if f"{colour} {shape}" in text]
    requests = set(REQUESTS.values())
    asked = [turn.question for pair in told for turn in pair.dialogue if turn.question not in requests]
    kinds = {read_question(question)[0] for question in asked}
    assert kinds == {"colour", "shape", "texture", "size", "cell", "object", "count"}


# ------------------------------------------------------------------------------------------------ splits apart


def test_no_scene_is_written_into_two_splits(folder: Path) -> None:
    """By the pixels of the files, looked up among the scenes drawn; the noise of equal scenes differs."""
    drawn: dict[bytes, Facts] = {}
    items: list[Item] = []
    for name in TABLE:
        examples = trained_examples(name) if name in TRAINED else []
        items += [item for example in examples for item in (example.query, example.target)]
        for split in ("validation", "test"):
            for example, candidates in sample_queries(name, split, SEED, QUERIES):
                items += [example.query, *candidates]
    for scene in {item.scene for item in items if item.scene is not None and item.thing is None}:
        drawn[draw(scene).tobytes()] = facts(scene)

    def written(*patterns: str) -> set[Facts]:
        found = set()
        for path in (path for pattern in patterns for path in folder.glob(pattern)):
            with Image.open(path) as image:
                if image.size == (84, 84):
                    found.add(drawn[np.asarray(image).tobytes()])
        return found

    train = written("MMEB-train/images/*/*.png")
    right = {split: set[Facts]() for split in ("validation", "test")}
    for split, scenes in right.items():
        for name in TABLE:
            for example in sample_examples(name, split, SEED, QUERIES):
                shown = [i.scene for i in (example.query, example.target) if i.scene is not None]
                scenes |= {facts(scene) for scene in shown}
    assert len(train) > 60
    assert not train & written("MMEB-eval/images/*/test/*.png", "MMEB-eval/images/*/validation/*.png")
    assert not right["test"] & right["validation"]


# ------------------------------------------------------------------------------------- the same bytes, or others


def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    random.seed(1)  # the module's own generator is not used
    write_scenes(tmp_path, SEED, PAIRS, QUERIES)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.usefixtures("fast")
def test_another_seed_gives_other_bytes(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_scenes(tmp_path / str(seed), seed, 8, 2)
    one, two = contents(tmp_path / "0"), contents(tmp_path / "1")
    same = [name for name in one.keys() & two.keys() if one[name] == two[name]]
    assert not same


def test_fewer_pairs_are_the_first_of_more(folder: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path, SEED, PAIRS - 25, 2)
    few, more = read_train(tmp_path / "MMEB-train"), read_train(folder / "MMEB-train")
    assert len(few) == PAIRS - 25

    def rows(found: PairSet, root: Path) -> dict[str, str]:
        return {pair.row_id: repr(pair).replace(str(root), "") for pair in found.pairs}

    assert rows(few, tmp_path).items() <= rows(more, folder).items()
    images = {name: data for name, data in contents(tmp_path / "MMEB-train").items() if name.endswith(".png")}
    assert images.items() <= contents(folder / "MMEB-train").items()


def test_each_data_set_grows_with_the_pairs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, int] = {}
    monkeypatch.setattr(
        writing, "sample_examples", lambda name, split, seed, number: asked.update({name: number}) or []
    )
    monkeypatch.setattr(writing, "sample_queries", lambda *args: [])
    monkeypatch.setattr(writing, "_write_table", lambda *args: None)
    before = dict.fromkeys(TRAINED, 0)
    for number in range(6, 30):
        write_scenes(tmp_path / str(number), pairs=number)
        assert sum(asked.values()) == number
        assert all(asked[name] >= before[name] for name in TRAINED)
        before = dict(asked)


# ----------------------------------------------------------------------------------------------- what is there


@pytest.fixture
def write(fast: None, tmp_path: Path) -> Callable[..., Path]:
    def call(pairs: int = 4, queries: int = 2) -> Path:
        write_scenes(tmp_path / "out", 0, pairs, queries)
        return tmp_path / "out"

    return call


def times(root: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in root.rglob("*")}


def test_what_is_there_is_kept(write: Callable[..., Path]) -> None:
    before = times(write())
    assert times(write()) == before


def test_a_split_is_the_same_without_the_other(write: Callable[..., Path], tmp_path: Path) -> None:
    both = contents(write())
    write_scenes(tmp_path / "one", 0, 4, 2, splits=("test",))
    one = contents(tmp_path / "one")
    apart = {name for name in both if "validation" in name}
    assert apart and {name: both[name] for name in both.keys() - apart - {"scenes.json"}} == {
        name: content for name, content in one.items() if name != "scenes.json"
    }
    write_scenes(tmp_path / "one", 0, 4, 2)  # another set of splits is other data
    assert contents(tmp_path / "one") == both


def test_other_numbers_replace_what_is_there(write: Callable[..., Path], tmp_path: Path) -> None:
    write(5, 2)
    out = write(3, 2)
    write_scenes(tmp_path / "fresh", 0, 3, 2)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_folder_that_was_removed_is_written_again(write: Callable[..., Path]) -> None:
    out = write()
    before = contents(out)
    (out / "dialogues.parquet").unlink()
    assert contents(write()) == before
    (out / "MMEB-eval").rename(out / "gone")
    assert contents(write() / "MMEB-eval") == contents(out / "gone")
    assert contents(out).keys() >= before.keys()


@pytest.mark.parametrize("where", ["_write_train", "_write_eval", "_write_dialogues"])
def test_a_run_that_was_killed_is_done_again(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before = contents(write())
    with monkeypatch.context() as patch:
        patch.setattr(writing, where, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(6)
    assert contents(write()) == before


def foreign_folder(out: Path) -> None:
    (out / "MMEB-train" / "CIRR").mkdir(parents=True)
    (out / "MMEB-train" / "CIRR" / "original-00000-of-00001.parquet").write_text("mine")


def foreign_mark(out: Path) -> None:
    out.mkdir()
    (out / "scenes.json").write_text('["my scenes"]')


def foreign_both(out: Path) -> None:
    foreign_folder(out)
    (out / "scenes.json").write_text('{"camera": 1}')


def broken_mark(out: Path) -> None:
    foreign_folder(out)
    (out / "scenes.json").write_text("not json")


def a_file(out: Path) -> None:
    out.write_text("mine")


def foreign_dialogues(out: Path) -> None:
    out.mkdir()
    (out / "dialogues.parquet").write_text("mine")


@pytest.mark.parametrize("make", [foreign_dialogues, foreign_folder, foreign_mark, foreign_both, broken_mark, a_file])
def test_what_others_wrote_is_refused_and_kept(
    write: Callable[..., Path], tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(CocoaError, match="not written by `cocoa scenes`; remove it, or choose another folder"):
        write()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["MMEB-train/mine", "MMEB-eval/images/mine"])
def test_a_data_set_of_ones_own_beside_ours_is_not_lost(write: Callable[..., Path], name: str) -> None:
    out = write()
    (out / name).mkdir()
    (out / name / "a.txt").write_text("mine")
    before = contents(out)
    write()  # the same numbers: nothing is to be written
    with pytest.raises(CocoaError, match=f"{name}: not written by"):
        write(5)
    assert contents(out) == before


@pytest.mark.parametrize(("pairs", "queries"), [(0, 2), (4, 1), (-1, 2)])
def test_numbers_out_of_range(write: Callable[..., Path], tmp_path: Path, pairs: int, queries: int) -> None:
    with pytest.raises(CocoaError, match=f"not {pairs} and {queries}"):
        write(pairs, queries)
    assert not (tmp_path / "out").exists()
