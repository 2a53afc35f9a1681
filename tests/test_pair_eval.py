"""A file of pairs as a data set: the scores of a plain loop, and nothing that is right among the wrong."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cocoa import pair_eval
from cocoa.data_check import check_data
from cocoa.embedding import load_embedder
from cocoa.errors import CocoaError
from cocoa.evaluation import evaluate
from cocoa.pair_eval import read_pair_eval
from cocoa.pairs import Side


@pytest.fixture
def pair_file(tmp_path):
    """`pair_file(*rows)`: `held-out.jsonl` of (query, target)."""

    def write(*rows):
        path = tmp_path / "held-out.jsonl"
        path.write_text("".join(json.dumps({"query": query, "target": target}) + "\n" for query, target in rows))
        return path

    return write


def compared(dataset):
    """(query, right candidate, the set of the others) of each row, by their texts."""
    text = [side.text for side in dataset.inputs]
    return [
        (text[query], text[ids[0]], {text[i] for i in ids[1:]})
        for query, ids in zip(dataset.queries, dataset.candidates, strict=True)
    ]


def test_a_query_is_compared_with_every_target_that_is_wrong_for_it(pair_file):
    path = pair_file(
        ({"text": "q"}, {"text": "a"}),
        ({"text": "q", "instruction": "find"}, {"text": "b"}),
        ({"text": "r"}, {"text": "a", "instruction": "of another row"}),
        ({"text": "s"}, {"text": "c"}),
        ({"text": "q"}, {"text": "a"}),
    )
    dataset = read_pair_eval(path)
    assert dataset.name == "held-out"
    assert compared(dataset) == [
        ("q", "a", {"c"}),
        ("q", "b", {"c"}),
        ("r", "a", {"b", "c"}),
        ("s", "c", {"a", "b"}),
    ]
    assert dataset.inputs[dataset.queries[1]] == Side("find", "q")
    assert [dataset.number(row) for row in range(4)] == [1, 2, 3, 4]
    assert len({tuple(sorted(ids)) for ids in dataset.candidates}) == 3  # a target is one candidate, whoever says it


def test_scores_are_those_of_a_plain_loop(pair_file, tiny_backbone_path, pictures, tmp_path):
    """Pictures and texts through a model; images in another folder than the file; the usual files beside."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        pixels = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
        rows.append(({"image": f"photos/{i}.png", "instruction": "find"}, {"text": f"cat {i % 5} table"}))
    rows += [({"text": f"cup {i % 4}"}, {"image": f"photos/{i}.png"}) for i in range(6)]
    path = pair_file(*rows)
    (tmp_path / "lists").mkdir()
    path = path.rename(tmp_path / "lists" / path.name)
    with pytest.raises(CocoaError, match="no such image file"):
        evaluate(tiny_backbone_path(), path, tmp_path / "none", batch_size=4)
    summary = evaluate(tiny_backbone_path(), path, tmp_path / "scores", batch_size=4, image_root=tmp_path)

    embedder = load_embedder(tiny_backbone_path())
    sides = [
        [Side(value.get("instruction", ""), value.get("text", ""), value.get("image")) for value in row] for row in rows
    ]
    for row in sides:
        for i, side in enumerate(row):
            if side.image:
                row[i] = Side(side.instruction, side.text, str(tmp_path / side.image))
    targets = list(dict.fromkeys(target for _, target in sides))
    vectors = dict(zip(targets, embedder.embed(targets), strict=True))
    hits, reciprocal = [], []
    for query, target in sides:
        vector = embedder.embed([query])[0]
        right = {other for asked, other in sides if (asked.text, asked.image) == (query.text, query.image)}
        wrong = torch.tensor([float(vector @ vectors[other]) for other in targets if other not in right])
        rank = 1 + int((wrong >= float(vector @ vectors[target])).sum())
        hits.append(rank == 1)
        reciprocal.append(1 / rank if rank <= 10 else 0)
    assert summary["datasets"] == {"held-out": pytest.approx(100 * np.mean(hits))}
    written = json.loads((tmp_path / "scores" / "held-out_score.json").read_text())
    assert (written["num_data"], written["mrr@10"]) == (18, pytest.approx(np.mean(reciprocal)))
    assert summary["data_hash"].keys() == {"held-out"}
    before = sorted(path.name for path in (tmp_path / "scores" / "embeddings").rglob("*"))
    assert evaluate(tiny_backbone_path(), path, tmp_path / "scores", batch_size=4, image_root=tmp_path) == summary
    assert before == sorted(path.name for path in (tmp_path / "scores" / "embeddings").rglob("*"))


def test_broken_rows_are_an_error_or_left_out(pair_file, tiny_backbone_path, tmp_path):
    path = pair_file(*[({"text": f"q{i}"}, {"text": f"t{i}"}) for i in range(4)])
    path.write_text(path.read_text() + '{"query": {"text": "q"}}\n{\n')
    with pytest.raises(CocoaError, match="line 5, target: not an object"):
        evaluate(tiny_backbone_path(), path, tmp_path / "scores")
    summary = evaluate(tiny_backbone_path(), path, tmp_path / "scores", on_bad_row="skip")
    assert [row["row"] for row in summary["bad_rows"]] == [5, 6]
    written = json.loads((tmp_path / "scores" / "held-out_score.json").read_text())
    assert (written["num_data"], written["num_pred"]) == (6, 4)
    (report,) = check_data(path)
    assert (report.rows, [bad.row for bad in report.bad]) == (4, [5, 6])


def test_of_many_targets_a_query_gets_a_sample_that_stays(pair_file, monkeypatch):
    monkeypatch.setattr(pair_eval, "CANDIDATES", 10)
    rows = [({"text": f"q{i // 2}"}, {"text": f"t{i}"}) for i in range(60)]
    dataset = read_pair_eval(pair_file(*rows))
    found = compared(dataset)
    for i, (query, right, others) in enumerate(found):
        assert (query, right) == (f"q{i // 2}", f"t{i}")
        assert len(others) == 9 and not others & {f"t{i}", f"t{i ^ 1}"}
    assert len({frozenset(others) for _, _, others in found}) == 60
    assert set().union(*(others for _, _, others in found)) == {f"t{i}" for i in range(60)}
    assert compared(read_pair_eval(pair_file(*rows))) == found
    monkeypatch.setattr(pair_eval, "CANDIDATES", 59)  # 58 are wrong for each: all of them
    assert all(len(others) == 58 for _, _, others in compared(read_pair_eval(pair_file(*rows))))


def test_a_row_for_which_every_target_is_right_asks_nothing(pair_file):
    rows = [({"text": "q"}, {"text": "a"}), ({"text": "q"}, {"text": "b"})]
    assert [row[0] for row in compared(read_pair_eval(pair_file(*rows, ({"text": "r"}, {"text": "a"}))))] == ["r"]
    with pytest.raises(CocoaError, match=r"held-out.jsonl: no row has a target that is wrong for it, .*; add rows"):
        read_pair_eval(pair_file(*rows))


def test_rows_that_cannot_be_used_are_told(pair_file, tiny_backbone_path, tmp_path):
    rows = [({"text": "q"}, {"text": "a"}), ({"text": "r"}, {"image": "none.png"}), ({"text": "s"}, {"text": "c"})]
    path = pair_file(*rows)
    with pytest.raises(CocoaError, match=r"none.png: no such image file \(data set held-out, row 1\)"):
        evaluate(tiny_backbone_path(), path, tmp_path / "scores")
    summary = evaluate(tiny_backbone_path(), path, tmp_path / "scores", on_bad_row="skip")
    assert [(row["dataset"], row["left_out"]) for row in summary["bad_rows"] if row["left_out"]] == [("held-out", 1)]
    for options in ({"subsets": ["held-out"]}, {"prompt_style": "reference"}):
        with pytest.raises(CocoaError, match="a file is one data set in our own form; leave --subsets"):
            evaluate(tiny_backbone_path(), path, tmp_path / "scores", **options)
    path.write_text('{"query": {"text": "a"}}\n')
    with pytest.raises(CocoaError, match=r"held-out.jsonl, line 1, target: not an object"):
        evaluate(tiny_backbone_path(), path, tmp_path / "scores")
