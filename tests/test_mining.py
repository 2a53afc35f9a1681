"""`cocoa mine`: the negatives of a plain loop, none that is right, and a file that is read back as it was."""

import json
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cocoa import mining
from cocoa.errors import CocoaError
from cocoa.mining import choose_negatives, mine, write_pairs
from cocoa.pair_files import read_file
from cocoa.pairs import Pair, Side, Turn, check_images


class Planted:
    """Stands for an `Embedder`: random vectors of unit length by text, image file's content and instruction."""

    def __init__(self):
        self.asked = []

    def vector(self, side):
        image = Path(side.image).read_bytes() if side.image else b""
        seed = zlib.crc32(f"{side.instruction}/{side.text}/".encode() + image)
        values = torch.from_numpy(np.random.default_rng(seed).normal(size=6))
        return torch.nn.functional.normalize(values.float(), dim=0)

    def refuses(self, side):
        return ""

    def embed(self, sides, batch_size=8, progress=False):
        self.asked += sides
        return torch.stack([self.vector(side) for side in sides])


def plain_loop(pairs, embedder, negatives, margin, range_min=0, max_score=2.0):
    """For each pair the texts of its negatives, written down one by one."""
    targets = {pair.target.text: pair.target for pair in pairs}
    chosen = []
    for pair in pairs:
        query = embedder.vector(pair.query)
        right = {other.target.text for other in pairs if other.query.text == pair.query.text}
        least = min(float(query @ embedder.vector(targets[text])) for text in right)
        limit = min(least - margin * abs(least), max_score)
        scores = {text: float(query @ embedder.vector(side)) for text, side in targets.items() if text not in right}
        ranked = sorted((text for text in scores if scores[text] <= limit), key=lambda text: -scores[text])
        chosen.append(ranked[range_min : range_min + negatives])
    return chosen


@pytest.mark.parametrize(
    ("negatives", "margin", "range_min", "max_score"), [(1, 0.0, 0, 2.0), (3, 0.05, 0, 2.0), (2, 0.3, 2, 0.4)]
)
def test_the_negatives_are_those_of_a_plain_loop(negatives, margin, range_min, max_score):
    """Queries with several right targets, targets of several queries, and two instructions of one query."""
    rng = np.random.default_rng(0)
    pairs = [
        Pair(Side(says, f"query {rng.integers(40)}"), Side("", f"target {rng.integers(50)}"), (), "x", i)
        for i, says in enumerate(("find", "seek") * 40)
    ]
    embedder = Planted()
    found = choose_negatives(
        pairs, embedder, negatives, relative_margin=margin, range_min=range_min, range_max=200, max_score=max_score
    )
    expected = plain_loop(pairs, embedder, negatives, margin, range_min, max_score)
    assert [[side.text for side in pair.negatives] for pair in found.pairs] == expected
    assert 0 < found.mined == sum(map(len, expected))
    assert found.without == sum(not names for names in expected) < len(pairs)
    assert [(pair.query, pair.target, pair.row) for pair in found.pairs] == [(p.query, p.target, p.row) for p in pairs]
    cosines = [float(embedder.vector(p.query) @ embedder.vector(p.target)) for p in pairs]
    assert found.positive == pytest.approx(np.mean(cosines), abs=1e-6)
    near = [float(embedder.vector(p.query) @ embedder.vector(side)) for p in found.pairs for side in p.negatives]
    assert found.negative == pytest.approx(np.mean(near), abs=1e-6)
    assert len(found.examples) == 3
    query, _, negative = found.examples[0]
    assert float(embedder.vector(query) @ embedder.vector(negative)) == pytest.approx(max(near), abs=1e-6)


def test_every_distinct_side_is_embedded_once():
    sides = [Side("find", "a"), Side("seek", "a"), Side("find", "b")]
    pairs = [Pair(side, Side("", text), (), "x", i) for i, side in enumerate(sides * 2) for text in ("p", "q", "r")]
    embedder = Planted()
    choose_negatives([*pairs, Pair(Side("", "c"), Side("", "s"))], embedder, 1)
    assert len(embedder.asked) == len(set(embedder.asked)) == 4 + 4


def test_nothing_that_is_right_becomes_a_negative(tmp_path):
    """The same picture under two names, the same text with outer whitespace, the targets of an equal query."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "d"):
        Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "copy of a.png").write_bytes((tmp_path / "a.png").read_bytes())
    rows = [
        ({"text": "one"}, {"image": "a.png"}),
        ({"text": "one", "instruction": "seek"}, {"image": "b.png"}),
        ({"text": "two"}, {"image": "copy of a.png"}),
        ({"image": "a.png"}, {"image": "c.png", "text": "c"}),
        ({"image": "copy of a.png"}, {"image": "d.png"}),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"query": query, "target": target}) + "\n" for query, target in rows))
    found = choose_negatives(read_file(path).pairs, Planted(), 9, relative_margin=0.0, range_max=99)
    wrong = [{side.image.rpartition("/")[2] for side in pair.negatives} for pair in found.pairs]
    for right, names in zip(("a b", "a b", "a", "c d", "c d"), wrong, strict=True):
        assert not names & ({f"{name}.png" for name in right.split()} | ({"copy of a.png"} if "a" in right else set()))
    assert any(wrong)


def test_own_negatives_stay_in_front_and_are_not_mined_again():
    pairs = [Pair(Side("", f"query {i}"), Side("", f"target {i}"), (), "x", i) for i in range(30)]
    first = choose_negatives(pairs, Planted(), 2)
    own = [replace(pair, negatives=(Side("", "mine"), *pair.negatives[:1])) for pair in first.pairs]
    second = choose_negatives(own, Planted(), 2)
    for one, two in zip(first.pairs, second.pairs, strict=True):
        assert two.negatives == (Side("", "mine"), *one.negatives)
    assert second.mined == first.mined - sum(bool(pair.negatives) for pair in first.pairs)
    assert second.without == 0


def test_rows_without_a_negative_keep_none():
    """Of two targets each is either right or, by the margin, too near."""
    pairs = [Pair(Side("", "q"), Side("", "a")), Pair(Side("", "q"), Side("", "b"))]
    found = choose_negatives(pairs, Planted(), 2)
    assert (found.mined, found.without, found.examples) == (0, 2, []) and np.isnan(found.negative)
    assert found.pairs == pairs


def test_a_file_is_read_back_as_it_was_written(tmp_path):
    """All images below its folder by relative paths, else by absolute ones; special characters as they are."""
    inside, outside = tmp_path / "data" / "photos", tmp_path / "elsewhere"
    for folder in (inside, outside):
        folder.mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(folder / "é.png")
    pairs = [
        Pair(Side("find", "größer\n2", str(inside / "é.png")), Side("", "x"), (Side("say", "y"),), "mined", 1),
        Pair(Side("", "z"), Side("", "", str(outside / "é.png")), (), "mined", 2),
        Pair(Side("", "", str(inside / "é.png")), Side("", "w"), (), "mined", 3, (Turn("What is it?", "An accent."),)),
    ]
    assert write_pairs(tmp_path / "data" / "mined.jsonl", pairs) == str(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "data" / "mined.jsonl").read_text().splitlines()]
    assert lines[0]["query"] == {"instruction": "find", "text": "größer\n2", "image": str(inside / "é.png")}
    assert lines[1] == {"query": {"text": "z"}, "target": {"image": str(outside / "é.png")}}
    found = read_file(tmp_path / "data" / "mined.jsonl", tmp_path)
    assert found.pairs == pairs
    check_images(found.pairs, found.roots)
    assert write_pairs(tmp_path / "data" / "mined.jsonl", pairs[:1]) is None
    assert '"photos/é.png"' in (tmp_path / "data" / "mined.jsonl").read_text()
    assert read_file(tmp_path / "data" / "mined.jsonl").pairs == pairs[:1]
    assert [path.name for path in (tmp_path / "data").glob("mined*")] == ["mined.jsonl"]


@pytest.fixture
def pair_file(tmp_path):
    """`pair_file(*rows)`: a file of (query text, target) pairs."""

    def write(*rows):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps({"query": {"text": q}, "target": t}) + "\n" for q, t in rows))
        return path

    return write


ROWS = [("a red cup", {"text": "cup"}), ("the cat", {"text": "cat"}), ("a rocket", {"text": "launch pad"})]


def test_a_mined_file_is_what_training_reads(pair_file, tiny_backbone_path, tmp_path):
    path = pair_file(*ROWS, ("only a conversation", {"text": "is left out"}))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    rows[3] = {"image_path": "a.png", "dialogue": [{"question": "what?", "answer": "this"}]}
    path.write_text("\n".join(map(json.dumps, rows)))
    found = mine(tiny_backbone_path(), path, tmp_path / "new" / "mined.jsonl", relative_margin=0.0)
    assert (len(found.pairs), found.dropped) == (3, 1)
    again = read_file(tmp_path / "new" / "mined.jsonl").pairs
    assert [(p.query, p.target, p.negatives) for p in again] == [(p.query, p.target, p.negatives) for p in found.pairs]


@pytest.mark.parametrize(
    ("rows", "output", "options", "message"),
    [
        (ROWS[:1], "mined.jsonl", {}, r"pairs.jsonl: fewer than two distinct targets, so there is no negative"),
        ([*ROWS[:1], ("b", ROWS[0][1])], "mined.jsonl", {}, "fewer than two distinct targets"),
        ([*ROWS, ("b", {"image": "none.png"})], "mined.jsonl", {}, r"none.png: no such image file \(.* row 4\)"),
        ([*ROWS, ("b", {"image": "pairs.jsonl"})], "mined.jsonl", {}, r"pairs.jsonl: not an image .* row 4\)"),
        (ROWS, "mined.csv", {}, "output .*mined.csv: give the name of a .jsonl file"),
        (ROWS, "pairs.jsonl", {}, "that is the file of pairs; choose another name"),
        (ROWS, "pairs.jsonl/mined.jsonl", {}, "output .*mined.jsonl: cannot be written; choose another place"),
        (ROWS, "mined.jsonl", {"negatives": 0}, "negatives must be 1 or more"),
        (ROWS, "mined.jsonl", {"relative_margin": 1.0}, "relative-margin from 0 to below 1"),
        (ROWS, "mined.jsonl", {"range_min": 3, "range_max": 4}, "range-max 4: must be range-min and negatives"),
    ],
)
def test_a_mistake_is_told_before_anything_is_embedded(
    pair_file, tmp_path, monkeypatch, rows, output, options, message
):
    embedder = Planted()
    monkeypatch.setattr(mining, "load_embedder", lambda model: embedder)
    with pytest.raises(CocoaError, match=message) as caught:
        mine("planted", pair_file(*rows), tmp_path / output, **options)
    assert "\n" not in str(caught.value) and not embedder.asked
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"}


def test_a_model_of_texts_refuses_images(pair_file, tiny_text_model_path, pictures, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    path = pair_file(*ROWS, ("b", {"image": "a.png"}))
    with pytest.raises(CocoaError, match=r"pairs.jsonl, row 4: the model does not embed image .*choose another model"):
        mine(tiny_text_model_path, path, tmp_path / "mined.jsonl")
    with pytest.raises(CocoaError, match="no such file; name a file of pairs"):
        mine(tiny_text_model_path, tmp_path / "none.jsonl", tmp_path / "mined.jsonl")


def test_neither_a_broken_model_nor_several_processes_write_a_file(pair_file, tmp_path, monkeypatch):
    embedder = Planted()
    monkeypatch.setattr(mining, "load_embedder", lambda model: embedder)
    monkeypatch.setattr(embedder, "embed", lambda sides, *_, **__: torch.full((len(sides), 6), float("nan")))
    with pytest.raises(CocoaError, match="an embedding is not finite"):
        mine("planted", pair_file(*ROWS), tmp_path / "mined.jsonl")
    monkeypatch.setattr(mining, "this_process", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(CocoaError, match="mine: runs in one process"):
        mine("planted", pair_file(*ROWS), tmp_path / "mined.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"}
