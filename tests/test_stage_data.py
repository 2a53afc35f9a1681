"""A validation file of one's own: what stands in it is not trained on, and nothing else is held out."""

import json

import pytest
from PIL import Image

from cocoa.errors import CocoaError
from cocoa.recipe import parse_recipe
from cocoa.stage_data import stage_data


@pytest.fixture
def data(tmp_path):
    """`train.jsonl` of twenty pairs over one picture each, in a folder; `held/validation.jsonl`, which shares two."""
    for i in range(20):
        Image.new("RGB", (56, 56), (10 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "held").mkdir()
    rows = [{"query": {"image": f"{i}.png", "instruction": "find"}, "target": {"text": f"cat {i}"}} for i in range(20)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [
        {"query": {"image": "3.png"}, "target": {"text": "cat 3"}},  # the same by another path, other instruction
        {"query": {"image": "./4.png"}, "target": {"text": " cat 4 "}},
        {"query": {"image": "5.png"}, "target": {"text": "another text"}},
        {"query": {"text": "cat 6"}, "target": {"image": "6.png"}},
        {"image_path": "7.png", "dialogue": [{"question": "what?", "answer": "a cat"}]},
    ]
    (tmp_path / "held" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return tmp_path


def read(backbone, data, stage="contrastive", **options):
    """The stage's data with `data:` options."""
    recipe = parse_recipe(
        {
            "backbone": "mini-qwen2-vl",
            "output_dir": str(data / "out"),
            "data": {"train": str(data / "train.jsonl"), **options},
            "stages": [{stage: {"batch_size": 2}}],
        }
    )
    args = recipe.arguments(recipe.stages[0], data / "out")
    return stage_data(recipe.stages[0], backbone, args)


@pytest.mark.parametrize("validation_rows", [0, 200])
def test_training_rows_that_are_validated_on_are_left_out(tiny_backbone, data, validation_rows):
    path = str(data / "held" / "validation.jsonl")
    found = read(tiny_backbone(), data, validation=path, image_root=str(data), validation_rows=validation_rows)
    assert [pair.row for pair in found.pairs] == [i for i in range(1, 21) if i not in (4, 5)]
    assert found.left_out == {"train": {"stands in the validation file": 2}}
    assert [(pair.dataset, pair.row) for pair in found.validation] == [("validation", i) for i in (1, 2, 3, 4)]
    assert len(read(tiny_backbone(), data, validation_rows=200).validation) == 4  # without it, a fifth is held out


def test_a_stage_that_is_not_validated_leaves_them_out_too(tiny_backbone, data):
    path = str(data / "held" / "validation.jsonl")
    found = read(tiny_backbone(), data, "joint_reconstruction", validation=path, image_root=str(data))
    assert [row.row for row in found.rows] == [i for i in range(1, 21) if i not in (4, 5)]


def test_a_sample_is_taken_of_what_is_left(tiny_backbone, data):
    path = str(data / "held" / "validation.jsonl")
    found = read(tiny_backbone(), data, validation=path, image_root=str(data), max_rows_per_subset=18)
    assert len(found.pairs) == 18


def test_image_paths_may_count_from_one_root(tiny_backbone, data):
    rows = [{"query": {"image": f"{i}.png"}, "target": {"text": f"cat {i}"}} for i in range(3)]
    path = data / "held" / "rooted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read(tiny_backbone(), data, validation=str(path), image_root=str(data))
    assert len(found.validation) == 3 and len(found.pairs) == 17


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "data.validation: .*none.jsonl: no such file; name a file of pairs"),
        ("", "data.validation: .*none.jsonl: no pair in it"),
        ('{"query": {"text": "a"}, "target": {"image": "none.png"}}', r"none.png: no such image file \(data set none"),
        ('{"query": {"text": "a"}, "answer": 1}', "none.jsonl, line 1: unknown key 'answer'"),
    ],
)
def test_a_mistake_in_it_is_told(tiny_backbone, data, text, message):
    path = data / "none.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CocoaError, match=message):
        read(tiny_backbone(), data, validation=str(path))


@pytest.mark.parametrize("stage", ["contrastive", "eos_bridge"])
@pytest.mark.parametrize("path", ["../secret.png", "{outside}", "link.png", "linked/secret.png"])
def test_no_image_path_of_a_file_leaves_its_root(tiny_backbone, data, tmp_path_factory, stage, path):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    for place in (outside, data.parent / "secret.png"):
        Image.new("RGB", (56, 56)).save(place)
    (data / "link.png").symlink_to(outside)
    (data / "linked").symlink_to(outside.parent)
    image = path.replace("{outside}", str(outside))
    rows = [{"query": {"image": name}, "target": {"text": "cat"}} for name in (str(data / "1.png"), image)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CocoaError, match=r"outside of the data folder .* \(data set train, row 2\)"):
        read(tiny_backbone(), data, stage, validation_rows=0)
    found = read(tiny_backbone(), data, stage, validation_rows=0, on_bad_row="skip", max_bad_share=0.5)
    assert [row.row for row in found.rows or found.pairs] == [1]
    if path == "{outside}":
        assert read(tiny_backbone(), data, stage, validation_rows=0, image_root="/").datasets() == {"train": 2}


@pytest.mark.parametrize(
    ("line", "said"),
    [("{", "line 2: not JSON"), ('{"query": 1}', "line 2, query: not an object"), ("[]", "line 2: not a JSON object")],
)
def test_broken_rows_of_a_file_are_an_error_or_left_out(tiny_backbone, data, line, said):
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join([lines[0], line, *lines[2:]]))
    backbone = tiny_backbone()
    with pytest.raises(CocoaError, match=said):
        read(backbone, data, validation_rows=0)
    with pytest.raises(CocoaError, match=f"1 of 20 rows are broken, more than data.max_bad_share 0.01 .*{said}"):
        read(backbone, data, validation_rows=0, on_bad_row="skip")
    found = read(backbone, data, validation_rows=0, on_bad_row="skip", max_bad_share=0.05)
    assert [pair.row for pair in found.pairs] == [i for i in range(1, 21) if i != 2]
    assert found.left_out["train"]["not of a form that is read"] == 1


@pytest.mark.parametrize("stage", ["contrastive", "eos_bridge"])
def test_rows_without_their_image_are_an_error_or_left_out(tiny_backbone, data, stage):
    for i in (3, 11):
        (data / f"{i}.png").unlink()
    backbone = tiny_backbone()
    with pytest.raises(CocoaError, match=r"3\.png: no such image file .*row 4\); 2 files are missing"):
        read(backbone, data, stage, validation_rows=0)
    with pytest.raises(CocoaError, match=r"2 of 20 rows lack an image, more than data.max_bad_share 0.05 .*3\.png"):
        read(backbone, data, stage, validation_rows=0, on_bad_row="skip", max_bad_share=0.05)
    found = read(backbone, data, stage, validation_rows=0, on_bad_row="skip", max_bad_share=0.1)
    kept = [row.row for row in found.rows or found.pairs]
    assert kept == [i for i in range(1, 21) if i not in (4, 12)]
    assert found.left_out["train"]["an image: no such image file"] == 2
