"""Scores: ranks with ties and duplicates, metrics by hand, averages over data sets, and what a model is read as."""

import json
from math import log2

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer

from cocoa import evaluation
from cocoa.backbone import load_backbone
from cocoa.catalogue import datasets as mmeb_datasets
from cocoa.checkpoint import save_checkpoint
from cocoa.errors import CocoaError
from cocoa.evaluation import Embedder, evaluate, load_embedder, metrics, rank, summary
from cocoa.inputs import ImageBudget, chat_messages
from cocoa.mmeb import EvalDataset, read_eval
from cocoa.pairs import Side

KINDS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")


# ---------------------------------------------------------------------------------------------------- ranks


def planted(*lists):
    """A data set and embeddings whose row i compares its query with candidates at the cosines of list i."""
    vectors, queries, candidates = [], [], []
    for cosines in lists:
        queries.append(len(vectors))
        candidates.append(np.arange(len(vectors) + 1, len(vectors) + 1 + len(cosines)))
        vectors += [(1.0, 0.0), *((cosine, (1 - cosine**2) ** 0.5) for cosine in cosines)]
    sides = [Side(text=str(i)) for i in range(len(vectors))]
    return EvalDataset("toy", sides, np.array(queries), candidates), torch.tensor(vectors)


def test_the_rank_is_that_of_the_first_candidate_in_lists_of_any_length():
    dataset, embeddings = planted([0.5, 0.9, 0.1], [0.5, 0.1], [0.1, 0.2, 0.3, 0.4, 0.0], [0.7])
    assert rank(dataset, embeddings).tolist() == [2, 1, 4, 1]


def test_a_tie_counts_against_the_model():
    dataset, embeddings = planted([0.5, 0.5, 0.1], [0.9, 0.9, 0.9], [0.5, 0.4, 0.4])
    assert rank(dataset, embeddings).tolist() == [2, 3, 1]


@pytest.mark.parametrize("candidates", [2, 3, 5, 7, 200, 365, 1000])
def test_a_collapsed_model_scores_nothing(candidates):
    """Whatever the pool's size: a matrix product may round equal candidates differently by their place."""
    vector = torch.nn.functional.normalize(torch.randn(1536, generator=torch.Generator().manual_seed(0)), dim=0)
    embeddings = vector.repeat(candidates + 1, 1)
    sides = [Side(text=str(i)) for i in range(candidates + 1)]
    ranks = rank(EvalDataset("toy", sides, np.array([0]), [np.arange(1, candidates + 1)]), embeddings)
    assert ranks.tolist() == [candidates]
    assert metrics(ranks)["hit@1"] == 0


def test_exact_duplicates_of_the_right_candidate_leave_the_list():
    dataset, embeddings = planted([0.5, 0.9, 0.1])
    right, better, worse = dataset.candidates[0].tolist()
    for ids, expected in (([right, worse, right], 1), ([right, right, better, worse], 2)):
        again = EvalDataset("toy", dataset.inputs, dataset.queries, [np.array(ids)])
        assert rank(again, embeddings).tolist() == [expected]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["query", "right candidate", "other candidate"])
def test_an_embedding_that_is_not_finite_is_named(value, place):
    dataset, embeddings = planted([0.5, 0.4], [0.5, 0.4])
    embeddings[3 + ("query", "right candidate", "other candidate").index(place), 1] = value
    with pytest.raises(CocoaError, match="data set toy, row 1: an embedding is not finite"):
        rank(dataset, embeddings)


# -------------------------------------------------------------------------------------------------- metrics


def test_metrics_by_hand():
    """Four queries, their right candidates at ranks 1, 2, 6 and 11."""
    found = metrics(torch.tensor([1, 2, 6, 11]))
    expected = {
        "hit": (1 / 4, 2 / 4, 3 / 4),
        "recall": (1 / 4, 2 / 4, 3 / 4),
        "precision": (1 / 4, 2 / 4 / 5, 3 / 4 / 10),
        "f1": (1 / 4, 2 * (1 / 3) / 4, 3 * (2 / 11) / 4),  # 2 P R / (P + R) with P = 1 / k and R = 1
        "mrr": (1 / 4, (1 + 1 / 2) / 4, (1 + 1 / 2 + 1 / 6) / 4),
        "map": (1 / 4, (1 + 1 / 2) / 4, (1 + 1 / 2 + 1 / 6) / 4),
        "ndcg_linear": (1 / 4, (1 + 1 / log2(3)) / 4, (1 + 1 / log2(3) + 1 / log2(7)) / 4),
        "ndcg_exponential": (1 / 4, (1 + 1 / log2(3)) / 4, (1 + 1 / log2(3) + 1 / log2(7)) / 4),
    }
    for name, values in expected.items():
        for k, value in zip((1, 5, 10), values, strict=True):
            assert found[f"{name}@{k}"] == pytest.approx(value), f"{name}@{k}"
    assert (found["num_pred"], found["num_data"]) == (4, 4)
    assert set(found) == {f"{kind}@{k}" for kind in KINDS for k in (1, 5, 10)} | {"num_pred", "num_data"}


# ------------------------------------------------------------------------------------------------- averages


def test_averages_are_plain_means_over_data_sets_not_over_groups():
    """VLM2Vec-V2.0-2B's own scores, each data set at its group's mean: 64.92 overall, where groups would give 66.52."""
    groups = {"Classification": 62.93, "VQA": 56.42, "Retrieval": 69.60, "Grounding": 77.12}
    scores = {entry.name: {"hit@1": groups[entry.meta_task] / 100} for entry in mmeb_datasets().values()}
    averages = summary(scores)["averages"]
    assert averages["All"]["hit@1"] == pytest.approx(64.92, abs=0.005)
    for group, value in groups.items():
        assert averages[group]["hit@1"] == pytest.approx(value)
    sizes = {group: average["datasets"] for group, average in averages.items()}
    assert sizes == {"Classification": 10, "VQA": 10, "Retrieval": 12, "Grounding": 4, "IND": 20, "OOD": 16, "All": 36}
    assert not any(average["missing"] for average in averages.values())


def test_in_and_out_of_distribution_make_up_the_whole():
    """Its IND 68.82 over 20 data sets and OOD 60.05 over 16 are its 64.92 over 36."""
    scores = {entry.name: {"hit@1": 0.6005 if entry.ood else 0.6882} for entry in mmeb_datasets().values()}
    averages = summary(scores)["averages"]
    assert (averages["IND"]["hit@1"], averages["OOD"]["hit@1"]) == (pytest.approx(68.82), pytest.approx(60.05))
    assert averages["All"]["hit@1"] == pytest.approx(64.92, abs=0.005)


def test_what_is_missing_is_named_and_own_data_sets_stand_alone():
    scores = {name: {"hit@1": hit} for name, hit in (("GQA", 0.2), ("ChartQA", 0.6), ("MSCOCO", 0.1), ("mine", 0.9))}
    found = summary(scores)
    assert found["datasets"] == {name: pytest.approx(100 * score["hit@1"]) for name, score in scores.items()}
    averages = found["averages"]
    assert averages["VQA"]["hit@1"] == pytest.approx(40) and averages["VQA"]["datasets"] == 2
    assert averages["VQA"]["of"] == 10 and len(averages["VQA"]["missing"]) == 8
    assert "DocVQA" in averages["VQA"]["missing"] and "GQA" not in averages["VQA"]["missing"]
    assert averages["All"]["hit@1"] == pytest.approx(30)
    assert averages["OOD"]["hit@1"] == pytest.approx(20)
    assert averages["Retrieval"]["hit@1"] is None and len(averages["Retrieval"]["missing"]) == 12


def test_scenes_are_averaged_over_their_own_table():
    table = mmeb_datasets("scenes")
    scores = {entry.name: {"hit@1": 0.2 if entry.ood else 0.6} for entry in table.values()}
    averages = summary(scores)["averages"]
    assert averages["All"]["hit@1"] == pytest.approx(40) and averages["All"]["of"] == len(table)
    assert (averages["IND"]["hit@1"], averages["OOD"]["hit@1"]) == (pytest.approx(60), pytest.approx(20))
    assert not averages["Grounding"]["missing"]


# ----------------------------------------------------------------------------------------------- whole runs


def write_texts(folder, datasets):
    """An MMEB-eval folder of texts: data set -> rows of (query, candidates)."""
    for name, rows in datasets.items():
        (folder / name).mkdir(parents=True)
        queries, candidates = zip(*rows, strict=True)
        columns = {"qry_text": queries, "qry_img_path": [""] * len(rows), "tgt_text": candidates}
        columns["tgt_img_path"] = [[""] * len(texts) for texts in candidates]
        pq.write_table(pa.table(columns), folder / name / "test-00000-of-00001.parquet")
    return folder


class Planted:
    """A model that puts each text at a planted angle, and keeps what it was asked for."""

    def __init__(self, angles):
        self.angles = angles
        self.asked = []

    def encode(self, messages, **kwargs):
        texts = [message[-1]["content"][-1]["text"] for message in messages]
        self.asked += texts
        return torch.tensor([[np.cos(self.angles[text]), np.sin(self.angles[text])] for text in texts])


def test_a_run_encodes_each_distinct_input_once_and_writes_its_files(tmp_path, monkeypatch):
    near = {"cat": 0.0, "a cat": 0.1, "dog": 1.5, "a dog": 1.4, "owl": 3.0, "an owl": 1.5}
    data = write_texts(
        tmp_path / "data",
        {
            "one": [("cat", ["a cat", "a dog"]), ("dog", ["a dog", "a cat"])],
            "two": [("owl", ["an owl", "a dog", "a cat", "cat"]), ("cat", ["a cat", "an owl", "a dog"])],
        },
    )
    model = Planted(near)
    monkeypatch.setattr(evaluation, "load_embedder", lambda name: Embedder(model, ImageBudget()))
    result = evaluate("planted", data, tmp_path / "new" / "scores")
    assert sorted(model.asked) == sorted(near)
    assert result["datasets"] == {"one": 100, "two": 100}

    files = {path.name: json.loads(path.read_text()) for path in (tmp_path / "new" / "scores").iterdir()}
    assert files.keys() == {"one_score.json", "two_score.json", "summary.json"}
    assert files["summary.json"] == json.loads(json.dumps(result))
    assert files["summary.json"]["model"] == "planted"
    assert (files["two_score.json"]["hit@1"], files["two_score.json"]["num_data"]) == (1.0, 2)

    near["an owl"] = float("nan")
    with pytest.raises(CocoaError, match="data set two, row 0: an embedding is not finite"):
        evaluate("planted", data, tmp_path / "scores")
    assert evaluate("planted", data, tmp_path / "scores", ["one"])["datasets"] == {"one": 100}


def test_a_run_scores_the_split_that_is_asked_for(tmp_path, monkeypatch):
    folder = write_texts(tmp_path, {"mine": [("x", ["x", "y"])]})
    (folder / "mine" / "test-00000-of-00001.parquet").rename(folder / "mine" / "validation-00000-of-00001.parquet")
    vectors = {"x": [1.0, 0.0], "y": [0.0, 1.0]}

    def embed(self, sides, batch_size=8):
        return torch.tensor([vectors[side.text] for side in sides])

    monkeypatch.setattr(Embedder, "embed", embed)
    monkeypatch.setattr(evaluation, "load_embedder", lambda model: Embedder(None, ImageBudget()))
    found = evaluate("model", folder, tmp_path / "scores", split="validation")
    assert (found["datasets"], found["split"]) == ({"mine": 100.0}, "validation")
    with pytest.raises(CocoaError, match="no split 'test'"):
        evaluate("model", folder, tmp_path / "scores")


def test_the_photographs_are_scored_in_every_form(tiny_backbone_path, photo_data, tmp_path):
    result = evaluate(tiny_backbone_path(), photo_data / "MMEB-eval", tmp_path)
    names = [dataset.name for dataset in read_eval(photo_data / "MMEB-eval")]
    assert list(result["datasets"]) == names and len(names) == 8
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}_score.json" for name in names} | {"summary.json"}
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
        rows = []
        for side in sides_of(pictures):
            encoded = backbone.encode_side(side)
            ids = encoded.pop("input_ids")[None]
            positions = backbone.rope_positions(ids, torch.ones_like(ids), encoded.get("image_grid_thw"))
            with torch.no_grad():
                states = backbone.model.eval().model(input_ids=ids, position_ids=positions, **encoded)
            rows.append(torch.nn.functional.normalize(states.last_hidden_state[0, -1], dim=0))
        by_attention[attention] = torch.stack(rows)
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
        monkeypatch.setattr(evaluation, "load_file_path", lambda model, file: str(tmp_path / file))
        monkeypatch.setattr(evaluation, "SentenceTransformer", lambda model: SentenceTransformer(str(tmp_path)))
    embedder = load_embedder(name)
    found = embedder.embed(sides_of(pictures))
    squashed = plain(tmp_path, sides_of(pictures), resize=(112, 112))  # 16 tokens of 28 x 28 px
    torch.testing.assert_close(found, squashed, atol=5e-6, rtol=0)
    assert (found[0] - plain(tmp_path, sides_of(pictures))[0]).abs().max() > 1e-3
    assert chat_messages(sides_of(pictures)[0], embedder.images)[1]["content"][0]["image"].size == (112, 112)


def test_no_model_is_a_mistake_with_a_name(tmp_path):
    with pytest.raises(CocoaError, match="nowhere: cannot be read"):
        load_embedder(tmp_path / "nowhere")
