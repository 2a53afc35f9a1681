"""`cocoa demo`, shortened: what it writes, what was equal between the rivals, and that it goes on where it was."""

import html
import json
import re

import pytest
import yaml
from sentence_transformers import SentenceTransformer

from cocoa import demo
from cocoa.backbone import EMBEDDED
from cocoa.demo import EQUAL, MODELS, write_recipes

GROUPS = ["Classification", "VQA", "Retrieval", "Grounding", "IND", "OOD", "Overall"]


def shorten(monkeypatch):
    """A demo of a few steps on a few pairs, scored on a few queries."""
    text = demo._template()
    small = {"max_rows_per_subset": 16, "validation_rows": 2, "batch_size": 16, "max_steps": 2}
    for key, number in small.items():
        text, found = re.subn(rf"\b{key}: \d+", f"{key}: {number}", text)
        assert found
    monkeypatch.setattr(demo, "_template", lambda: text)
    monkeypatch.setattr(demo, "PAIRS", 120)
    monkeypatch.setattr(demo, "QUERIES", 4)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", EMBEDDED)
def test_a_short_demo_writes_what_the_issue_says_and_goes_on_where_it_was(backbone, tmp_path, monkeypatch):
    shorten(monkeypatch)
    said = []
    found = demo.run(tmp_path, backbone, say=said.append)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["models"]) == ["backbone", "contrastive", "cocoa"]
    for scores in results["models"].values():
        assert list(scores) == GROUPS and all(0 <= value <= 100 for value in scores.values())
        assert scores["Overall"] == pytest.approx((scores["IND"] + scores["OOD"]) / 2)  # six sets each
    assert {"scenes", "contrastive alone: contrastive", "CoCoA: joint_reconstruction"} <= set(results["seconds"])
    assert results["seconds"]["total"] >= results["seconds"]["scores"] > 0
    for name in ("cocoa", "contrastive"):
        SentenceTransformer(str(tmp_path / name / "final"))
    report = html.unescape((tmp_path / "report.html").read_text())
    assert all(title in report for title in MODELS.values()) and all(line in report for line in EQUAL)
    assert len(said) == 5 and all("docs/" in line or "report.html" in line for line in said)

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("cocoa.pipeline.run_stage", refuse)
    again = demo.run(tmp_path, backbone, say=lambda _: None)
    assert again.models == found.models


def test_the_rivals_differ_in_pre_training_alone(tmp_path):
    recipes = write_recipes(tmp_path, "mini-qwen2-vl", 3)
    cocoa, rival = recipes["cocoa"], recipes["contrastive"]
    assert [stage.name for stage in cocoa.stages] == ["joint_reconstruction", "eos_bridge", "contrastive"]
    assert rival.stages == cocoa.stages[2:]
    assert (rival.seed, rival.dtype, rival.image, rival.lora) == (cocoa.seed, cocoa.dtype, cocoa.image, cocoa.lora)
    assert rival.output_dir != cocoa.output_dir
    assert {stage.data.max_rows_per_subset for stage in cocoa.stages} == {demo.PAIRS_A_SET}


def test_its_recipe_repeats_it(tmp_path):
    write_recipes(tmp_path, "mini-qwen2.5-vl", 3)
    content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert content["backbone"] == "mini-qwen2.5-vl" and content["seed"] == 3
    assert content["data"]["train"] == str(tmp_path / "scenes" / "MMEB-train")
    assert "[" not in str([value for value in content.values() if isinstance(value, str)]).strip("[]")
