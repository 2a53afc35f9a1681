"""`cocoa demo`, shortened: what it writes, what was equal between the rivals, and that it goes on where it was."""

import csv
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sentence_transformers import SentenceTransformer

from cocoa import demo
from cocoa.architectures import EMBEDDED
from cocoa.compare import Score
from cocoa.demo import EQUAL, MODELS, verdict, write_recipes
from cocoa.errors import CocoaError

ROOT = Path(__file__).parents[1]
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


def test_a_folder_of_any_name(tmp_path):
    for name in ("my #1 run", "a: b", 'it\'s "mine"', "[DATA]", "\U0001f642"):
        (tmp_path / name).mkdir()
        for rival, recipe in write_recipes(tmp_path / name, "mini-qwen2-vl", 3).items():
            assert recipe.output_dir == tmp_path / name / rival
            assert recipe.stages[0].data.train == str(tmp_path / name / "scenes" / "MMEB-train")


def test_an_output_that_cannot_be_written_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CocoaError, match=r"output .*file: cannot be written"):
        demo.run(tmp_path / "file")


def test_its_recipe_repeats_it(tmp_path):
    write_recipes(tmp_path, "mini-qwen2.5-vl", 3)
    content = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert content["backbone"] == "mini-qwen2.5-vl" and content["seed"] == 3
    assert content["data"]["train"] == str(tmp_path / "scenes" / "MMEB-train")
    assert "[" not in str([value for value in content.values() if isinstance(value, str)]).strip("[]")


@pytest.mark.parametrize(("cocoa", "said"), [(50.0, r"wins .*\+10\.0 points overall"), (39.0, r"does not win .*-1\.0")])
def test_the_verdict_is_what_the_scores_say(cocoa, said):
    rival = dict.fromkeys(GROUPS, 40.0)
    sentence = verdict({"backbone": rival, "contrastive": rival, "cocoa": rival | {"VQA": 35.5, "Overall": cocoa}})
    assert re.search(said, sentence) and "VQA -4.5" in sentence and "Retrieval +0.0" in sentence


def test_a_gain_whose_interval_holds_nought_is_no_win():
    models = {"contrastive": dict.fromkeys(GROUPS, 40.0), "cocoa": dict.fromkeys(GROUPS, 42.0)}
    assert "not told apart: +2.0 points overall [-0.3, +4.4]" in verdict(models, Score(42.0, 2.0, -0.3, 4.4))
    assert "CoCoA wins over contrastive alone: +2.0 points overall [+0.3, +3.4]" in verdict(
        models, Score(42.0, 2.0, 0.3, 3.4)
    )


@pytest.mark.parametrize("model", ["contrastive", "cocoa"])
def test_the_learning_rates_are_those_that_the_study_found_best(model):
    with (ROOT / "studies" / "demo_tuning.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model and row["backbone"] == EMBEDDED[0]]
    assert len(rows) == 3  # as many runs for either
    best = float(max(rows, key=lambda row: float(row["All"]))["learning_rate"])
    for stage in yaml.safe_load(demo._template().replace("[", "").replace("]", ""))["stages"]:
        ((name, options),) = stage.items()
        if (name == "contrastive") == (model == "contrastive"):
            assert float(options["learning_rate"]) == best, name


@pytest.mark.slow
def test_the_table_of_seeds_has_mean_and_range(tmp_path):
    for seed, score in ((1, 40.0), (2, 50.0)):
        (tmp_path / str(seed)).mkdir()
        results = {"backbone": "mini-qwen2-vl", "versions": {}, "seed": seed}
        results["models"] = {name: {"VQA": score, "Overall": 30.0} for name in MODELS}
        (tmp_path / str(seed) / "results.json").write_text(json.dumps(results))
    command = [sys.executable, str(ROOT / "studies" / "demo_seeds.py")]
    done = subprocess.run([*command, str(tmp_path / "1"), str(tmp_path / "2")], capture_output=True, text=True)
    assert "| CoCoA | 45.0 (40.0-50.0) | 30.0 (30.0-30.0) |" in done.stdout.splitlines()
    again = subprocess.run([*command, str(tmp_path / "1"), str(tmp_path / "1")], capture_output=True, text=True)
    assert again.returncode != 0 and "same seed" in again.stderr
