"""`cocoa dialogues`: its result is read as data, a stopped run ends as one that was not, others' folders are kept."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from launching import launch
from scene_reader import is_true, right_answer
from toy import pictures as toy_pictures

import cocoa.cli
import cocoa.dialogues as dialogues
from cocoa.catalogue import stage_rows
from cocoa.conversations import load_prompts
from cocoa.dialogue_parsing import Reply
from cocoa.dialogues import Settings, write_dialogues
from cocoa.errors import CocoaError
from cocoa.generation import Conversation, Engine, load_engine
from cocoa.pair_files import read_file
from cocoa.pairs import Turn
from cocoa.scenes.world import Scene, picture, sample_scene
from cocoa.sources import DataConfig, load_pairs

MINI = "mini-qwen2-vl"
SCENES = 20


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Scene]]:
    """A folder of scene pictures, and what is on each by its name. Read only."""
    folder, rng = tmp_path_factory.mktemp("scenes"), random.Random("dialogues")
    drawn = {f"{i:02}.png": sample_scene(rng, (2, 3, 4), "test") for i in range(SCENES)}
    for name, scene in drawn.items():
        picture(scene).save(folder / name)
    return folder, drawn


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(MINI)


class Counting:
    """An engine that counts what another is asked, and may fail."""

    def __init__(self, engine: Engine, until: int = 10**9) -> None:
        self.engine, self.left, self.asked = engine, until, 0

    def __call__(self, conversations: Sequence[Conversation], *args: Any) -> list[Reply]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.asked += len(conversations)
        return self.engine(conversations, *args)


def settings(source: Path, **options: Any) -> Settings:
    return Settings(MINI, str(source), load_prompts(MINI), **{"write": "both", "max_new_tokens": 96, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "summary.json"
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "dialogues.parquet").to_pylist()


@pytest.fixture(scope="module")
def whole(scenes: tuple[Path, dict[str, Scene]], engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run. Read only."""
    output = tmp_path_factory.mktemp("whole")
    write_dialogues(settings(scenes[0]), output, engine)
    return output


# ------------------------------------------------------------------------------------------------ what is written


def test_the_result_is_read_as_training_data(whole: Path, scenes: tuple[Path, dict[str, Scene]]) -> None:
    table = pq.read_table(whole / "dialogues.parquet")
    turn = pa.struct([("question", pa.string()), ("answer", pa.string())])
    assert table.schema == pa.schema(
        [("image_path", pa.string()), ("caption", pa.string()), ("dialogue", pa.list_(turn))]
    )
    pairs = load_pairs(DataConfig(train=str(whole / "dialogues.parquet")), seed=0)
    spoken = stage_rows(pairs.pairs, "compression")
    told = stage_rows(pairs.pairs, "joint_reconstruction")
    assert len(told) == SCENES
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["images"]["kept"] == SCENES  # with a caption, if not with a dialogue
    assert summary["dialogues"]["kept"] + sum(summary["dialogues"]["dropped"].values()) == SCENES
    assert summary["dialogues"]["kept"] == len(spoken) and summary["turns"]["kept"] == sum(len(r.turns) for r in spoken)
    assert len(spoken) == sum(row["dialogue"] is not None for row in rows(whole))
    for row in spoken:
        assert isinstance(row.side.image, str) and Path(row.side.image).parent == scenes[0]
        assert 1 <= len(row.turns) <= 5 and all(turn.question.endswith("?") for turn in row.turns)


@pytest.mark.parametrize("write", ["dialogues", "captions", "both"])
def test_what_was_asked_for_is_written(
    scenes: tuple[Path, dict[str, Scene]], engine: Engine, tmp_path: Path, write: str
) -> None:
    counting = Counting(engine)
    summary = write_dialogues(settings(scenes[0], write=write), tmp_path, counting)
    found = rows(tmp_path)
    assert len(found) == summary["images"]["kept"] > 0.8 * SCENES
    assert any(row["caption"] for row in found) == (write != "dialogues")
    assert any(row["dialogue"] for row in found) == (write != "captions")
    if write == "captions":
        assert counting.asked == SCENES
    assert summary["turns"]["kept"] == sum(len(row["dialogue"] or ()) for row in found)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


def test_what_the_mini_backbone_says_is_true(whole: Path, scenes: tuple[Path, dict[str, Scene]]) -> None:
    """Its answers to its own questions, where these ask for one thing on the scene; and its captions."""
    right = asked = 0
    for row in rows(whole):
        scene = scenes[1][Path(row["image_path"]).name]
        assert is_true(row["caption"], scene)
        for turn in row["dialogue"] or ():
            try:
                answer = right_answer(turn["question"], scene)
            except (AssertionError, ValueError):  # of no object there, of several, or it gives itself away
                continue
            asked += 1
            right += turn["answer"] == answer
    assert asked > 2 * SCENES and right / asked > 0.9


# ---------------------------------------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("calls", [7, *(pytest.param(each, marks=pytest.mark.slow) for each in (1, 13))])
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    whole: Path, scenes: tuple[Path, dict[str, Scene]], engine: Engine, tmp_path: Path, calls: int
) -> None:
    counting = Counting(engine, calls)
    with pytest.raises(KeyboardInterrupt):
        write_dialogues(settings(scenes[0]), tmp_path, counting)
    assert not (tmp_path / "dialogues.parquet").exists()
    there = len(list((tmp_path / "shards").glob("*.parquet")))
    assert there == calls // 6  # questions, four answers and captions are six calls a batch
    again = Counting(engine)
    summary = write_dialogues(settings(scenes[0]), tmp_path, again)
    assert files(tmp_path) == files(whole)
    before = json.loads((whole / "summary.json").read_text())
    assert summary | {"seconds": 0} == before | {"seconds": 0}
    answers = sum(len(row["dialogue"] or ()) for row in rows(whole))  # none of them was dropped
    assert not [reason for reason in summary["turns"]["dropped"] if "answer" in reason]
    assert (again.asked == 2 * SCENES + answers) == (not there)


@pytest.mark.slow
def test_a_kill_while_a_shard_is_written_leaves_none(
    scenes: tuple[Path, dict[str, Scene]], engine: Engine, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"PAR1")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", write_half)
        with pytest.raises(KeyboardInterrupt):
            write_dialogues(settings(scenes[0]), tmp_path, engine)
    assert not list((tmp_path / "shards").iterdir())
    write_dialogues(settings(scenes[0]), tmp_path, engine)
    assert {name: data for name, data in files(tmp_path).items() if not name.endswith(".tmp")} == files(whole)


def test_a_finished_run_asks_nothing_and_loads_no_model(
    whole: Path, scenes: tuple[Path, dict[str, Scene]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(whole)
    monkeypatch.setattr(dialogues, "load_engine", lambda model: 1 / 0)
    write_dialogues(settings(scenes[0]), whole)
    assert files(whole) == before


def test_more_images_ask_only_for_their_batches(
    scenes: tuple[Path, dict[str, Scene]], engine: Engine, tmp_path: Path
) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for i, image in enumerate(toy_pictures(9)):
        image.save(source / f"{i}.png")
    chosen = settings(source, write="captions", batch_size=4)
    write_dialogues(chosen, tmp_path / "out", engine)
    toy_pictures(1, seed=1)[0].save(source / "9.png")
    counting = Counting(engine)
    write_dialogues(chosen, tmp_path / "out", counting)
    assert counting.asked == 2  # the last batch, which holds one more
    write_dialogues(chosen, tmp_path / "new", engine)
    assert rows(tmp_path / "new") == rows(tmp_path / "out")


# ------------------------------------------------------------------------------------------------ others' folders


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "another seed (0)"),
        ({"write": "captions"}, "another write ('both')"),
        ({"questions": 5}, "another questions (4)"),
        ({"batch_size": 4}, "another batch_size (8)"),
        ({"image_tokens": 64}, "another image_tokens (1024)"),
        ({"temperature": 0.0}, "another temperature (0.7)"),
        ({"max_new_tokens": 97}, "another max_new_tokens (96)"),
        ({"model": "mini-qwen2.5-vl"}, "another model ('mini-qwen2-vl')"),
        ({"prompts": load_prompts("any")}, "other prompts"),
        ({"source": "."}, "another source"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(
    whole: Path, scenes: tuple[Path, dict[str, Scene]], options: dict[str, Any], named: str
) -> None:
    before = files(whole)
    with pytest.raises(CocoaError) as error:
        values = {"model": MINI, "source": str(scenes[0]), "prompts": load_prompts(MINI), "write": "both"}
        write_dialogues(Settings(**{**values, "max_new_tokens": 96, **options}), whole)
    assert f"{whole}: made with {named}" in str(error.value) and str(error.value).endswith("choose another --output")
    assert files(whole) == before


def test_a_folder_of_something_else_is_refused_and_kept(scenes: tuple[Path, dict[str, Scene]], tmp_path: Path) -> None:
    for name in ("a/dialogues.parquet", "b/shards/mine.parquet"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    for name in ("a", "b"):
        with pytest.raises(CocoaError, match=f"{name}: holds dialogues.parquet or shards of something else; choose"):
            write_dialogues(settings(scenes[0]), tmp_path / name)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "a" / "settings.json").write_text("[]")
    for name in ("file", "a"):
        with pytest.raises(CocoaError, match=f"{name}: cannot be used .*; choose another --output"):
            write_dialogues(settings(scenes[0]), tmp_path / name)


def test_a_run_that_wrote_nothing_claims_nothing(
    scenes: tuple[Path, dict[str, Scene]], engine: Engine, tmp_path: Path
) -> None:
    with pytest.raises(CocoaError, match="none: no such file or folder"):
        write_dialogues(settings(tmp_path / "none"), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        write_dialogues(settings(scenes[0]), tmp_path / "out", Counting(engine, 0))
    assert write_dialogues(settings(scenes[0], write="captions"), tmp_path / "out", engine)["images"]["kept"]


# ----------------------------------------------------------------------------------- odd images, odd model outputs


def silent(answers: Callable[[str], str]) -> Engine:
    def reply(conversations: Sequence[Conversation], *args: Any) -> list[Reply]:
        return [Reply(answers(conversation.said[-1]), True) for conversation in conversations]

    return reply


def test_broken_images_duplicates_and_captions_that_exist(engine: Engine, tmp_path: Path) -> None:
    source, output = tmp_path / "out" / "pictures", tmp_path / "out"
    source.mkdir(parents=True)
    for i, image in enumerate(toy_pictures(3)):
        image.save(source / f"{i}.png")
    (source / "copy.png").write_bytes((source / "2.png").read_bytes())
    (source / "broken.png").write_bytes((source / "0.png").read_bytes()[:60])
    listed = [{"image_path": f"pictures/{name}.png"} for name in ("0", "1", "2", "copy", "broken", "none")]
    listed[1]["caption"] = "what  was there, even if it\nis of two lines"
    (output / "list.jsonl").write_text("\n".join(map(json.dumps, listed)))
    summary = write_dialogues(settings(output / "list.jsonl", write="captions"), output, silent(lambda said: "a thing"))
    assert rows(output) == [
        {"image_path": "pictures/0.png", "caption": "a thing", "dialogue": None},
        {"image_path": "pictures/1.png", "caption": listed[1]["caption"], "dialogue": None},
        {"image_path": "pictures/2.png", "caption": "a thing", "dialogue": None},
    ]
    assert summary["images"] == {"found": 6, "unreadable": 2, "duplicates": 1, "kept": 3, "dropped": {}}
    assert summary["captions"] == {"found": 1, "kept": 3, "dropped": {}}
    assert [name.split(", ")[1] for name in summary["unreadable"]] == ["line 5", "line 6"]
    found = read_file(output / "dialogues.parquet").pairs
    assert [Path(str(pair.query.image)).name for pair in found] == ["0.png", "1.png", "2.png"]
    assert found[0].query.image == str(source / "0.png")


def test_images_in_parquet_files_go_with_the_result(tmp_path: Path) -> None:
    contents = []
    for image in toy_pictures(2):
        image.save(tmp_path / "a.png")
        contents.append({"bytes": (tmp_path / "a.png").read_bytes(), "path": None})
    pq.write_table(pa.table({"image": contents}), tmp_path / "t.parquet")
    write_dialogues(settings(tmp_path / "t.parquet", write="captions"), tmp_path / "out", silent(lambda said: "x"))
    (tmp_path / "out").rename(tmp_path / "moved")
    for pair, content in zip(read_file(tmp_path / "moved" / "dialogues.parquet").pairs, contents, strict=True):
        assert Path(str(pair.query.image)).read_bytes() == content["bytes"]


def test_images_in_a_folder_below_the_result_go_with_it_too(tmp_path: Path) -> None:
    (tmp_path / "out" / "mine" / "deep").mkdir(parents=True)
    for i, image in enumerate(toy_pictures(2)):
        image.save(tmp_path / "out" / "mine" / "deep" / f"{i}.png")
    write_dialogues(settings(tmp_path / "out" / "mine", write="captions"), tmp_path / "out", silent(lambda said: "x"))
    assert [row["image_path"] for row in rows(tmp_path / "out")] == ["mine/deep/0.png", "mine/deep/1.png"]


def test_what_is_dropped_is_counted_by_its_reason(tmp_path: Path) -> None:
    source = tmp_path / "images"
    source.mkdir()
    for i, image in enumerate(toy_pictures(4)):
        image.save(source / f"{i}.png")
    calls = iter(range(100))

    def engine(conversations: Sequence[Conversation], *args: Any) -> list[Reply]:
        said = conversations[0].said
        if next(calls) == 0:
            listed = "1. a?\n2. b?\n3. c?"
            texts = [listed, f"{listed}\n4. <|im_end|>?", f"{listed}\n4. d", listed]
            return [Reply(text, i < 3) for i, text in enumerate(texts)]
        return [Reply("" if i == 0 or said[-1] == "b?" else "yes", True) for i in range(len(conversations))]

    summary = write_dialogues(settings(source, write="dialogues"), tmp_path / "out", engine)
    assert summary["images"]["dropped"] == {"no turn left": 1, "questions: control token": 1, "questions: cut off": 1}
    assert summary["turns"] == {
        "kept": 2,
        "dropped": {"answer: empty": 4, "question: no question mark at its end": 1},
    }
    assert summary["dialogues"] == {"found": 0, "kept": 1, "dropped": summary["images"]["dropped"]}
    (row,) = rows(tmp_path / "out")
    assert row["image_path"] == str(source / "2.png")
    assert [Turn(**turn) for turn in row["dialogue"]] == [Turn("a?", "yes"), Turn("c?", "yes")]
    text = (tmp_path / "out" / "dialogues.parquet").read_bytes()
    assert b"<|" not in text
    (shard,) = (tmp_path / "out" / "shards").iterdir()  # it is looked up there
    kept = {each["text"] for row in pq.read_table(shard).to_pylist() for each in row["dropped"]}
    assert "1. a?\n2. b?\n3. c?\n4. <|im_end|>?" in kept


def test_nothing_usable_is_an_error_that_says_why(scenes: tuple[Path, dict[str, Scene]], tmp_path: Path) -> None:
    with pytest.raises(
        CocoaError, match=rf"questions: not a numbered list \({SCENES}\); see shards, try other --prompts"
    ):
        write_dialogues(settings(scenes[0], write="dialogues"), tmp_path, silent(lambda said: "no"))
    assert not (tmp_path / "dialogues.parquet").exists()
    assert json.loads((tmp_path / "summary.json").read_text())["images"]["kept"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"write": "all"}, "write 'all': choose dialogues, captions, both"),
        ({"questions": 0}, "questions 0: must be 1 or more"),
        ({"batch_size": 0}, "batch-size 0: must be 1 or more"),
        ({"max_new_tokens": -1}, "max-new-tokens -1: must be 1 or more"),
        ({"temperature": -0.1}, r"temperature -0.1: must be 0 \(greedy\) or more"),
        ({"image_tokens": 3}, r"image tokens \[1, 3\]: too tight"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CocoaError, match=message):
        settings(Path("x"), **options)


# ------------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_two_processes_write_what_one_writes(
    whole: Path, scenes: tuple[Path, dict[str, Scene]], tmp_path: Path
) -> None:
    more = ["--write", "both", "--max-new-tokens", "96", "--output", tmp_path / "two"]
    printed = launch(2, Path(cocoa.cli.__file__), "dialogues", MINI, scenes[0], *more)
    assert printed.count("done:") == 1
    assert files(tmp_path / "two") == files(whole)
