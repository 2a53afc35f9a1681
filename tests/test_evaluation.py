"""Scoring: each input encoded once, what is written, and what a model is read as."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from toy import MadeUp, states_of

from cocoa import checkpoint, embedding, embedding_cache, evaluation
from cocoa.backbone import load_backbone
from cocoa.checkpoint import save_checkpoint
from cocoa.embedding import load_embedder
from cocoa.embedding_cache import EmbeddingCache, content_key, hash_folder
from cocoa.errors import CocoaError
from cocoa.evaluation import evaluate
from cocoa.images import inspect_image
from cocoa.inputs import ImageBudget, chat_messages
from cocoa.metrics import metrics
from cocoa.mmeb_eval import read_eval
from cocoa.pairs import Side
from cocoa.scores import read_ranks


def write_texts(folder, datasets):
    """An MMEB-eval folder of texts: data set -> rows of (query, candidates)."""
    for name, rows in datasets.items():
        (folder / name).mkdir(parents=True)
        queries, candidates = zip(*rows, strict=True)
        columns = {"qry_text": queries, "qry_img_path": [""] * len(rows), "tgt_text": candidates}
        columns["tgt_img_path"] = [[""] * len(texts) for texts in candidates]
        pq.write_table(pa.table(columns), folder / name / "test-00000-of-00001.parquet")
    return folder


class Planted(torch.nn.Module):
    """A model that puts each text at a planted angle, and keeps what it was asked for."""

    def __init__(self, angles):
        super().__init__()
        self.angles = angles
        self.asked = []
        self.max_seq_length = None

    def tokenizer(self, texts, **_):
        return {"input_ids": [[0] * len(text) for text in texts]}

    def get_embedding_dimension(self):
        return 2

    def encode(self, messages, **_):
        texts = [message[-1]["content"][-1]["text"] for message in messages]
        self.asked += texts
        return torch.tensor([[np.cos(self.angles[text]), np.sin(self.angles[text])] for text in texts])


def plant(monkeypatch, angles):
    model = Planted(angles)
    monkeypatch.setattr(evaluation, "load_embedder", lambda name, *_: MadeUp(model, ImageBudget()))
    return model


def test_a_run_encodes_each_distinct_input_once_and_writes_its_files(tmp_path, monkeypatch):
    near = {"cat": 0.0, "a cat": 0.1, "dog": 1.5, "a dog": 1.4, "owl": 3.0, "an owl": 1.5}
    data = write_texts(
        tmp_path / "data",
        {
            "one": [("cat", ["a cat", "a dog"]), ("dog", ["a dog", "a cat"])],
            "two": [("owl", ["an owl", "a dog", "a cat", "cat"]), ("cat", ["a cat", "an owl", "a dog"])],
        },
    )
    model = plant(monkeypatch, near)
    output = tmp_path / "new" / "scores"
    result = evaluate("planted", data, output)
    assert sorted(model.asked) == sorted(near)
    assert result["datasets"] == {"one": 100, "two": 100}

    files = {path.name: json.loads(path.read_text()) for path in output.glob("*.json")}
    assert files.keys() == {"one_score.json", "two_score.json", "summary.json", "leaderboard.json"}
    assert (output / "table.md").exists()
    assert files["summary.json"] == json.loads(json.dumps(result))
    assert files["summary.json"]["model"] == "planted"
    assert (files["two_score.json"]["hit@1"], files["two_score.json"]["num_data"]) == (1.0, 2)

    near["an owl"] = float("nan")
    with pytest.raises(CocoaError, match="data set two, row 0: an embedding is not finite"):
        evaluate("planted", data, tmp_path / "scores")
    assert evaluate("planted", data, tmp_path / "scores", ["one"])["datasets"] == {"one": 100}


def test_embeddings_are_scored_cut_to_fewer_numbers_too(tmp_path, monkeypatch):
    """Of a vector (cos, sin) the first number alone tells 0.2 from 3.0, and not 0.2 from 1.4."""
    data = write_texts(tmp_path / "data", {"one": [("cat", ["a cat", "a dog"]), ("cat", ["a cat", "an owl"])]})
    model = plant(monkeypatch, {"cat": 0.2, "a cat": 0.3, "a dog": 1.4, "an owl": 3.0})
    result = evaluate("planted", data, tmp_path / "scores", truncate_dims=[1])
    assert result["datasets"] == {"one": 100}
    assert {dim: cut["datasets"] for dim, cut in result["truncated"].items()} == {"1": {"one": 50}}
    assert len(model.asked) == 4  # once each
    table = (tmp_path / "scores" / "table.md").read_text()
    assert "| numbers of an embedding | one |" in table and "| all 2 | 100.0 |" in table and "| 1 | 50.0 |" in table
    with pytest.raises(CocoaError, match="truncate-dim 3: must be from 1 to 2"):
        evaluate("planted", data, tmp_path / "other", truncate_dims=[3])


def test_ranks_are_left_of_every_row_that_is_scored(tmp_path, monkeypatch):
    """Every metric comes from them exactly; a bad row is not there, and the others keep their numbers."""
    angles = {"a": 0.0, "b": 0.5, "c": 1.0, "near c": 1.2}
    rows = [("b", ["a", "c", "near c"]), ("", ["a", "b"]), ("c", ["a", "b", "near c"]), ("a", ["b", "c"])]
    data = write_texts(tmp_path / "data", {"one": rows, "two": rows[3:]})
    plant(monkeypatch, angles)
    evaluate("planted", data, tmp_path / "scores", on_bad_row="skip")
    table = pq.read_table(tmp_path / "scores" / "ranks.parquet").to_pylist()
    assert [tuple(row.values()) for row in table] == [("one", 0, 2), ("one", 2, 3), ("one", 3, 1), ("two", 0, 1)]
    ranks = read_ranks(tmp_path / "scores")
    assert list(ranks) == ["one", "two"]
    for name, own in ranks.items():
        found = json.loads((tmp_path / "scores" / f"{name}_score.json").read_text())
        expected = metrics(torch.from_numpy(own))
        assert {key: found[key] for key in expected if key != "num_data"} == {
            key: value for key, value in expected.items() if key != "num_data"
        }
    assert (found["num_data"], len(own)) == (1, 1)
    assert read_ranks(tmp_path / "data") == {}


def test_a_run_that_goes_on_encodes_what_is_missing_and_gives_the_same(tmp_path, monkeypatch):
    angles = {f"text {i}": i / 10 for i in range(40)}
    texts = list(angles)
    rows = [(text, [texts[i - 1], *texts[i % 7 :: 7]]) for i, text in enumerate(texts)]
    data = write_texts(tmp_path / "data", {"one": rows[:10], "two": rows[10:]})
    model = plant(monkeypatch, angles)
    whole = evaluate("planted", data, tmp_path / "whole", batch_size=1)
    model.asked.clear()
    assert evaluate("planted", data, tmp_path / "whole", batch_size=1) == whole
    assert not model.asked

    encode, calls = model.encode, []

    def stop(messages, **options):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(len(messages))
        return encode(messages, **options)

    monkeypatch.setattr(evaluation, "WRITE_EVERY", -1.0)
    monkeypatch.setattr(model, "encode", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate("planted", data, tmp_path / "stopped", batch_size=1)
    assert sum(calls) == len(model.asked) > 0
    monkeypatch.setattr(model, "encode", encode)
    again = evaluate("planted", data, tmp_path / "stopped", batch_size=1)
    assert sorted(model.asked) == sorted(texts)
    assert again == whole


def test_what_is_known_stays_as_it_is(tmp_path):
    """Of another batch an embedding may differ in its last bits."""
    first = EmbeddingCache(tmp_path)
    first.write([b"a" * 16, b"b" * 16], torch.tensor([[1.0], [2.0]]))
    first.write([b"b" * 16, b"c" * 16], torch.tensor([[2.1], [3.0]]))
    again = EmbeddingCache(tmp_path)
    again.read()
    assert {key[:1]: row.item() for key, row in again.rows.items()} == {b"a": 1, b"b": 2, b"c": 3}


def test_an_output_that_cannot_be_written_is_seen_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "read_data", lambda *args: pytest.fail("read the data"))
    (tmp_path / "file").write_text("")
    with pytest.raises(CocoaError, match=r"output .*file: cannot be written; choose another place"):
        evaluate("planted", tmp_path, tmp_path / "file")


def test_a_full_disk_is_named(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedding_cache, "save_file", full)
    plant(monkeypatch, {"q": 0.0, "a": 0.1, "b": 0.2})
    data = write_texts(tmp_path / "data", {"one": [("q", ["a", "b"])]})
    with pytest.raises(CocoaError, match=r"\.safetensors: cannot be written \(No space left on device\)"):
        evaluate("planted", data, tmp_path / "scores")


def test_another_model_image_or_data_shares_nothing(tmp_path, monkeypatch, pictures):
    """Embeddings are kept by content: a changed picture under the same path is another input."""
    model = plant(monkeypatch, {"a": 0.0, "b": 1.0})
    data = write_texts(tmp_path / "data", {"mine": [("a", ["a", "b"])]})
    first = evaluate("planted", data, tmp_path / "scores")
    monkeypatch.setattr(evaluation, "load_embedder", lambda name, *_: MadeUp(model, ImageBudget((4, 16))))
    model.asked.clear()
    second = evaluate("planted", data, tmp_path / "scores")
    assert sorted(model.asked) == ["a", "b"]
    assert first["data_hash"] == second["data_hash"]
    path = str(tmp_path / "0.png")
    keys = []
    for picture in (pictures[0], pictures[0], pictures[1]):
        picture.save(path)
        keys.append(content_key(Side(image=path), inspect_image(path).digest))
    assert keys[0] == keys[1] != keys[2]
    assert len({content_key(side) for side in (Side("x", "y"), Side("", "x y"), Side("x"), Side(text="x"))}) == 4


def test_outer_whitespace_tells_inputs_apart():
    """In the reference's plain form it shifts the last token."""
    assert content_key(Side(text="a cup\n")) != content_key(Side(text="a cup"))


def test_a_model_is_known_by_its_files_wherever_they_lie(tiny_backbone, tmp_path):
    save_checkpoint(tiny_backbone(), tmp_path / "one", {"stage": "a"})
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "cocoa.json").write_text("{}")
    (tmp_path / "two" / "README.md").write_text("of another day")
    assert hash_folder(tmp_path / "one") == hash_folder(tmp_path / "two")
    (tmp_path / "two" / "chat_template.jinja").write_text("another template")
    assert hash_folder(tmp_path / "one") != hash_folder(tmp_path / "two")


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path):
    """Its folder fills as files are asked for."""
    folder = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    assert hash_folder(folder) == "0123abc"


def test_a_run_scores_the_split_that_is_asked_for(tmp_path, monkeypatch):
    folder = write_texts(tmp_path, {"mine": [("x", ["x", "y"])]})
    (folder / "mine" / "test-00000-of-00001.parquet").rename(folder / "mine" / "validation-00000-of-00001.parquet")
    plant(monkeypatch, {"x": 0.0, "y": 1.5})
    found = evaluate("model", folder, tmp_path / "scores", split="validation")
    assert (found["datasets"], found["split"]) == ({"mine": 100.0}, "validation")
    with pytest.raises(CocoaError, match="no split 'test'"):
        evaluate("model", folder, tmp_path / "scores")


def test_the_photographs_are_scored_in_every_form(tiny_backbone_path, photo_data, tmp_path):
    result = evaluate(tiny_backbone_path(), photo_data / "MMEB-eval", tmp_path)
    names = [dataset.name for dataset in read_eval(photo_data / "MMEB-eval")]
    assert list(result["datasets"]) == names and len(names) == 8
    written = {f"{name}_score.json" for name in names} | {"summary.json", "leaderboard.json", "table.md", "embeddings"}
    written.add("ranks.parquet")
    assert {path.name for path in tmp_path.iterdir()} == written
    assert result["averages"]["OOD"]["datasets"] == 2  # EDIS, RefCOCO-Matching
    assert result["image"] == {"tokens": [4, 576], "resize": "aspect"}
    with pytest.raises(CocoaError, match=r"no data set 'Nothing'.*there are A-OKVQA"):
        evaluate(tiny_backbone_path(), photo_data / "MMEB-eval", tmp_path, ["Nothing"])


# ------------------------------------------------------------------------------------------ what is a model


def sides_of(pictures):
    return [
        Side("Find the caption:", "A red cup of coffee.", pictures[0]),
        Side(text="The cat looks at the astronaut."),
        Side("Represent the image.", "", pictures[2]),
    ]


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
def test_an_untouched_backbone_is_read_causal_by_its_last_token(tiny_backbone_path, pictures, model_type):
    folder = tiny_backbone_path(model_type)
    assert not (folder / "modules.json").exists()
    found = load_embedder(folder).embed(sides_of(pictures))
    by_attention = {}
    for attention in ("causal", "bidirectional"):
        backbone = load_backbone(folder, ImageBudget((4, 576)), attention=attention)
        rows = [states_of(backbone, side)[-1] for side in sides_of(pictures)]
        by_attention[attention] = torch.nn.functional.normalize(torch.stack(rows), dim=1)
    torch.testing.assert_close(found, by_attention["causal"], atol=5e-6, rtol=0)
    assert (found - by_attention["bidirectional"]).abs().max() > 1e-3


def plain(folder, sides, resize=None):
    """Embeddings from sentence-transformers alone."""
    model = SentenceTransformer(str(folder), device="cpu")
    rows = []
    for side in sides:
        image = side.image.resize(resize, Image.Resampling.BICUBIC) if resize and side.image else side.image
        item = {key: value for key, value in (("image", image), ("text", side.text)) if value}
        rows.append(model.encode([item], prompt=side.instruction or None, convert_to_tensor=True)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("attention", ["bidirectional", "causal"])
def test_a_checkpoint_gives_what_plain_sentence_transformers_gives(tiny_backbone, pictures, tmp_path, attention):
    save_checkpoint(tiny_backbone(attention=attention), tmp_path, {})
    embedder = load_embedder(tmp_path)
    assert embedder.images == ImageBudget((4, 16))
    torch.testing.assert_close(
        embedder.embed(sides_of(pictures)), plain(tmp_path, sides_of(pictures)), atol=5e-6, rtol=0
    )


@pytest.mark.parametrize("from_hub", [False, True])
def test_images_are_squashed_where_the_checkpoint_says_so(tiny_backbone, pictures, tmp_path, monkeypatch, from_hub):
    """`resize: square` stands in `cocoa.json`, which no library reads; also in that of a checkpoint on the hub."""
    backbone = tiny_backbone()
    backbone.set_image_budget(ImageBudget((4, 16), "square"))
    save_checkpoint(backbone, tmp_path, {})
    name = tmp_path
    if from_hub:
        name = "someone/cocoa"
        monkeypatch.setattr(checkpoint, "load_file_path", lambda model, file: str(tmp_path / file))
        monkeypatch.setattr(embedding, "SentenceTransformer", lambda model, **_: SentenceTransformer(str(tmp_path)))
    embedder = load_embedder(name)
    found = embedder.embed(sides_of(pictures))
    squashed = plain(tmp_path, sides_of(pictures), resize=(112, 112))  # 16 tokens of 28 x 28 px
    torch.testing.assert_close(found, squashed, atol=5e-6, rtol=0)
    assert (found[0] - plain(tmp_path, sides_of(pictures))[0]).abs().max() > 1e-3
    assert chat_messages(sides_of(pictures)[0], embedder.images)[1]["content"][0]["image"].size == (112, 112)


def test_no_model_is_a_mistake_with_a_name(tmp_path):
    with pytest.raises(CocoaError, match="nowhere: cannot be read"):
        load_embedder(tmp_path / "nowhere")
