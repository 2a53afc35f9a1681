"""`cocoa report`: which files of which folders give a section, what is missing and what makes it, and the command."""

import json
import shutil

import pytest
import torch
from test_compare import HIT, MISS, A, evaluation, record, trained
from test_report import Page
from typer.testing import CliRunner

from cocoa import report_runs
from cocoa.account import FACTS
from cocoa.cli import app
from cocoa.errors import CocoaError
from cocoa.evaluation import evaluate
from cocoa.files import write_json
from cocoa.pipeline import train
from cocoa.recipe import load_recipe
from cocoa.report_runs import local_folder, read_sources, report_of, stage_checkpoints
from cocoa.scenes.write import write_scenes

LOG = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
RECIPE = """
backbone: mini-qwen2-vl
output_dir: {folder}/run
dtype: float32
data: {{train: {folder}/scenes/MMEB-train, max_rows_per_subset: 8}}
image: {{train_tokens: [1, 16], eval_tokens: [1, 16]}}
stages:
  - joint_reconstruction: {{batch_size: 16, max_steps: 1, report_to: none}}
  - eos_bridge: {{batch_size: 16, max_steps: 1, report_to: none, layout: strict}}
  - contrastive: {{batch_size: 16, max_steps: 1, report_to: none}}
"""


def made_by(folder):
    """What evaluations repeat of a run's last checkpoint."""
    whole = json.loads((folder / "final" / "cocoa.json").read_text())
    return {key: value for key, value in whole.items() if key not in ("image", "versions")}


def run_folder(folder, **facts):
    """A training run's folder without weights: records and logs."""
    trained(folder, **facts)
    (folder / "final" / "training_log.json").write_text(json.dumps(LOG))
    for name in ("10-contrastive", "2-eos_bridge"):
        (folder / name).mkdir()
        write_json(folder / name / "cocoa.json", record(name.partition("-")[2]))
        (folder / name / "training_log.json").write_text(json.dumps(LOG))
    return folder


# ------------------------------------------------------------------------------------------------- which files


def test_stages_stand_in_the_order_they_ran(tmp_path):
    folders = stage_checkpoints(run_folder(tmp_path / "run"))
    assert [path.name for path in folders] == ["2-eos_bridge", "10-contrastive", "final"]


def test_an_evaluation_is_joined_with_the_run_whose_checkpoint_it_is_of(tmp_path):
    run = run_folder(tmp_path / "run")
    other = evaluation(tmp_path / "backbone", A, "mini-qwen2-vl")
    own = evaluation(tmp_path / "elsewhere", A, str(run / "final"), made_by(run))
    for order in ([other, run, own], [own, other, run]):
        found = {source.run.name: source for source in read_sources(order)}
        assert found.keys() == {"mini-qwen2-vl", "run"}
        assert found["run"].evaluation == own and len(found["run"].stages) == 3
        assert found["mini-qwen2-vl"].stages == [] and found["run"].run.hits["GQA"] == 25
    shutil.copytree(own, run / "scores")
    assert [source.run.name for source in read_sources([run, run / "scores"])] == ["run"]
    assert [source.evaluation for source in read_sources([own, run])] == [own]
    (beside,) = read_sources([run])
    assert beside.evaluation == run / "scores" and beside.run.hits["GQA"] == 25


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [run_folder(tmp_path / place / "run") for place in "ab"]
    assert [source.run.name for source in read_sources(runs)] == [f"run ({run})" for run in runs]


def test_a_backbone_is_looked_for_on_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert local_folder("mini-qwen2-vl").name == "mini-qwen2-vl" and str(local_folder(str(tmp_path))) == str(tmp_path)
    assert local_folder("Qwen/Qwen2-VL-2B-Instruct") is None and local_folder("runs/gone/away/final") is None
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")  # what `cocoa preview` fetches
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0" * 40)
    assert local_folder("a/b") is None
    (snapshot / "model.safetensors").write_bytes(b"")
    assert local_folder("a/b") == snapshot


# --------------------------------------------------------------------------------------------- what is missing


def missing(report):
    return {one.what: (one.why, one.remedy) for one in report.missing}


def test_a_run_without_scores_has_its_curves_and_says_how_to_score_it(tmp_path):
    run = run_folder(tmp_path / "run", seconds=60.0)
    report = report_of([run])
    assert report.scores is None and list(report.runs) == ["run"] and report.seconds == {"run: contrastive": 60.0}
    why, remedy = missing(report)["scores"]
    assert why == "run was not scored"
    assert remedy == f"cocoa evaluate {run / 'final'} --data MMEB_EVAL --output {run / 'scores'}"
    assert any("--data" in remedy for _, remedy in missing(report).values())


def test_data_that_is_gone_is_named(tmp_path):
    folder = evaluation(tmp_path / "a", A)
    summary = json.loads((folder / "summary.json").read_text()) | {"data": str(tmp_path / "gone")}
    (folder / "summary.json").write_text(json.dumps(summary))
    report = report_of([folder])
    assert report.scores.models == ["a/final"] and not report.galleries
    assert any(f"not in {tmp_path / 'gone'} (any more)" in why for why, _ in missing(report).values())
    with pytest.raises(CocoaError, match="gone"):  # what is asked for by name is no small matter
        report_of([folder], data=tmp_path / "gone")


def test_large_checkpoints_are_loaded_on_a_cpu_only_where_asked(tmp_path, monkeypatch):
    run = run_folder(tmp_path / "run")
    (run / "final" / "model.safetensors").write_bytes(b"x" * 100)
    sources = read_sources([run])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for most, asked, loaded, said in (
        (100, None, True, None),
        (99, None, False, "no GPU"),
        (99, True, True, None),
        (100, False, False, "no checkpoint was to be loaded"),
    ):
        monkeypatch.setattr(report_runs, "MOST_BYTES", most)
        notes = []
        assert report_runs._may_load(sources, asked, notes) == loaded
        assert (said is None) == (not notes) and (
            not notes or (said in notes[0].why and "--checkpoints" in notes[0][2])
        )


def test_the_command_writes_what_there_is_and_says_what_is_not(tmp_path):
    page = tmp_path / "new" / "page.html"
    folder = evaluation(tmp_path / "a", {"mine": [HIT, MISS]})
    done = CliRunner().invoke(app, ["report", str(folder), "--output", str(page)])
    assert done.exit_code == 0 and f"done: {page}" in done.output
    assert "there is no evaluation data (cocoa report ... --data MMEB_EVAL)" in done.output
    root = Page(page.read_text(encoding="utf-8")).root
    assert [section.attributes["id"] for section in root.all("section")] == ["scores", "missing"]
    assert "a/final" in root.by_id("scores").text and "50.0" in root.by_id("scores").text
    with pytest.raises(CocoaError, match=r"nowhere: neither summary\.json nor final/cocoa\.json"):
        report_of([tmp_path / "nowhere"])


# ------------------------------------------------------------------------------------------------ a real small run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes, a run of one step a stage with its scores, and those of the untouched backbone."""
    folder = tmp_path_factory.mktemp("world")
    write_scenes(folder / "scenes", 0, 120, 6, splits=("test",))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    final = train(load_recipe(folder / "recipe.yaml"))
    sets = ["SceneQuestions", "Scenes_i2t", "SceneChanges"]
    evaluate(final, folder / "scenes" / "MMEB-eval", folder / "run" / "scores", sets, 32)
    evaluate("mini-qwen2-vl", folder / "scenes" / "MMEB-eval", folder / "untouched", sets, 32)
    return folder


@pytest.mark.slow
def test_one_command_after_train_and_evaluate_gives_every_section(world, tmp_path):
    page = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(world / "untouched"), str(world / "run"), "--output", str(page)])
    assert done.exit_code == 0, done.output
    assert "without" not in done.output
    root = Page(page.read_text(encoding="utf-8")).root
    order = ["scores", "training", "curves", "images", "texts", "attention", "galleries", "mistakes"]
    assert [section.attributes["id"] for section in root.all("section")] == order
    headings = [heading.text for heading in root.by_id("attention").all(name="card")[0].all("h5")]
    assert headings == ["before training", "run 1: joint_reconstruction", "run 2: eos_bridge", "run 3: contrastive"]
    assert page.stat().st_size < 5e6


@pytest.mark.slow
def test_galleries_and_failures_are_those_of_the_kept_embeddings(world, monkeypatch):
    monkeypatch.setattr("cocoa.embedding.SentenceTransformer", None)  # no model is loaded for them
    report = report_of([world / "untouched", world / "run"], checkpoints=False)
    names = {"SceneQuestions", "SceneChanges"}  # one of each meta-task, pictures before texts
    assert {one.dataset for one in report.galleries} == names
    assert all(list(one.models) == ["mini-qwen2-vl", "run"] for one in report.galleries)
    assert report.mistakes_of == "run" and not report.images and not report.attention
    ranks = read_sources([world / "run"])[0].run.ranks
    for one in report.galleries:
        assert [found.rank for found in one.models["run"]] == ranks[one.dataset][:2].tolist()
    for task, found in report.mistakes.items():
        margins = [one.margin for one in found]
        assert margins == sorted(margins, reverse=True) and all(one.found.rank > 1 for one in found), task


@pytest.mark.slow
def test_other_data_has_no_embeddings_and_a_run_says_so(world, tmp_path):
    write_scenes(tmp_path / "scenes", 1, 12, 6, splits=("test",))
    report = report_of([world / "run"], data=tmp_path / "scenes" / "MMEB-eval", checkpoints=False)
    assert not report.galleries and not report.mistakes
    assert any("no embeddings of the data" in why for why, _ in missing(report).values())
    for name in ("SceneQuestions", "Scenes_i2t", "SceneChanges"):
        shutil.rmtree(tmp_path / "scenes" / "MMEB-eval" / name)
    report = report_of([world / "run"], data=tmp_path / "scenes" / "MMEB-eval")
    assert report.attention and report.texts and not report.galleries  # of data sets that were not scored


def test_a_stage_that_a_run_has_twice_is_timed_twice(tmp_path):
    first = {key: value for key, value in record("contrastive", 40.0).items() if key in FACTS}
    run = run_folder(tmp_path / "run", history=[first], seconds=60.0)
    assert report_of([run]).seconds == {"run: contrastive": 40.0, "run: contrastive (2)": 60.0}


@pytest.mark.slow
def test_what_cannot_be_rebuilt_is_named_and_the_rest_is_shown(world, monkeypatch):
    def refuse(*_):
        raise CocoaError("block A leaves no room")

    monkeypatch.setattr(report_runs, "rebuild_images", refuse)
    monkeypatch.setattr(report_runs, "eos_attention", refuse)
    report = report_of([world / "run"])
    why = {each.what: each.why for each in report.missing}
    assert why["rebuilt pictures"] == why["where EOS looks"] == "block A leaves no room"
    assert report.texts and not report.images and not report.attention


@pytest.mark.slow
def test_texts_that_see_the_picture_are_not_rebuilt_through_eos(world, monkeypatch):
    monkeypatch.setattr(report_runs, "rebuild_texts", lambda *_: pytest.fail("rebuilt"))
    monkeypatch.setattr(report_runs, "eos_attention", lambda *_: [])
    read = report_runs.read_record
    monkeypatch.setattr(report_runs, "read_record", lambda folder: read(folder) | {"options": {"layout": "full"}})
    report = report_of([world / "run"])
    (missing,) = [each for each in report.missing if each.what == "rebuilt captions"]
    assert "cut nothing (layout: full)" in missing.why


@pytest.mark.slow
def test_texts_are_rebuilt_in_the_layout_of_their_stage(world, monkeypatch):
    seen = []

    def spy(folder, rows, layout):
        seen.append((folder.name, layout))
        return []

    monkeypatch.setattr(report_runs, "rebuild_texts", spy)
    monkeypatch.setattr(report_runs, "eos_attention", lambda *_: [])
    report_of([world / "run"])
    assert seen == [("2-eos_bridge", "strict")]  # both the rows and those with other pictures
