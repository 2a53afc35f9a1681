"""What a run's folder says of itself, and that trackers get what its stages log."""

import json
import subprocess

import pytest
import torch
from short_run import short_recipe
from toy import arguments, content_rows

from cocoa import pipeline, run_folder, trackers
from cocoa.errors import CocoaError
from cocoa.pipeline import train
from cocoa.recipe import load_recipe, parse_recipe
from cocoa.run_folder import ENVIRONMENT_NAME, LOGS, METRICS_NAME, README_NAME, RECIPE_NAME, as_mapping, git_state
from cocoa.stages.eos_bridge import EosBridgeArguments, EosBridgeTrainer
from cocoa.stages.metrics_file import MetricsFile, read_metrics


def recipe_of(backbone, data, output, stages=slice(1, 2), **options):
    content = short_recipe(backbone, data, output)
    content["stages"] = content["stages"][stages]
    for stage in content["stages"]:
        next(iter(stage.values())).update(options)
    return parse_recipe(content)


def test_a_run_explains_itself(tiny_backbone_path, photo_data, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/cocoa", "train", "my recipe.yaml", "seed=5"])
    recipe = recipe_of(tiny_backbone_path(), photo_data, tmp_path / "run")
    final = train(recipe)
    folder = recipe.output_dir
    page = (folder / README_NAME).read_text()
    assert "cocoa train 'my recipe.yaml' seed=5\n" in page
    assert f"cocoa train {folder / RECIPE_NAME}\n" in page
    for path in (final, folder / RECIPE_NAME, folder / ENVIRONMENT_NAME, folder / METRICS_NAME):
        assert f"`{path.name}" in page and path.exists()
    (session,) = json.loads((folder / ENVIRONMENT_NAME).read_text())
    assert session["versions"]["torch"] == torch.__version__ and session["processes"] == 1
    assert set(session) == {
        *("started", "command", "folder", "python", "platform", "versions", "processes", "gpus", "cuda", "git"),
    }
    lines = read_metrics(folder / METRICS_NAME)
    log = json.loads((final / "training_log.json").read_text())
    assert [{key: line[key] for key in line if key not in ("stage", "time")} for line in lines] == log
    assert {line["stage"] for line in lines} == {"1-eos_bridge"} and len(lines) == 3

    again = load_recipe(folder / RECIPE_NAME)
    assert again == recipe and again.settings(1) == recipe.settings(1)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert train(again) == final  # it is done: nothing is written
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("tuning", ["full", "dora"])
def test_a_resolved_recipe_reads_as_the_recipe_itself(tiny_backbone_path, photo_data, tmp_path, tuning):
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path, tuning)
    content["stages"][0]["joint_reconstruction"]["data"] = {"max_rows_per_subset": 7}
    content["stages"][2]["contrastive"] |= {"image": {"train_tokens": [4, 25]}, "learning_rate": 2e-05}
    content["data"] |= {"subsets": ["MSCOCO_i2t"], "validation_rows": 0}
    recipe = parse_recipe(content)
    assert parse_recipe(as_mapping(recipe)) == recipe


def test_files_of_others_are_left_alone(tiny_backbone_path, photo_data, tmp_path, caplog):
    (tmp_path / README_NAME).write_text("my notes\n")
    recipe = recipe_of(tiny_backbone_path(), photo_data, tmp_path)
    run_folder.explain(recipe, [tmp_path / "final"])
    run_folder.explain(recipe, [tmp_path / "final"])
    assert (tmp_path / README_NAME).read_text() == "my notes\n" and "not ours, left as it is" in caplog.text
    assert len(json.loads((tmp_path / ENVIRONMENT_NAME).read_text())) == 2  # sessions
    assert run_folder.MARK in (tmp_path / RECIPE_NAME).read_text()
    for others in ('{"of": "another program"}', "no JSON"):
        (tmp_path / ENVIRONMENT_NAME).write_text(others)
        run_folder.explain(recipe, [tmp_path / "final"])
        assert (tmp_path / ENVIRONMENT_NAME).read_text() == others


def test_nothing_is_written_into_the_folder_of_another_run(tiny_backbone_path, photo_data, tmp_path):
    """Also where the other one was stopped before its first stage was done."""
    recipe = recipe_of(tiny_backbone_path(), photo_data, tmp_path / "run")
    pipeline.claim_stage(recipe, 0, False)
    trainer = recipe.output_dir / "trainer" / "1-eos_bridge"
    (trainer / "checkpoint-1").mkdir()
    (trainer / "checkpoint-1" / "complete").touch()
    other = recipe_of(tiny_backbone_path(), photo_data, tmp_path / "run", max_steps=7)
    with pytest.raises(CocoaError, match="made by another recipe"):
        train(other)
    assert not {README_NAME, RECIPE_NAME, ENVIRONMENT_NAME} & {path.name for path in recipe.output_dir.iterdir()}


def test_the_git_state_is_that_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state() is None
    (tmp_path / "file").write_text("a")
    own = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*own, *command], check=True)
    found = git_state()
    assert len(found["commit"]) == 40 and not found["dirty"]
    (tmp_path / "new").write_text("not tracked")
    assert git_state() == found
    (tmp_path / "file").write_text("b")
    assert git_state() == {**found, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() is None


# ------------------------------------------------------------------------------------------------- metrics


def trained(backbone, folder, path, stop_at=None):
    """Lines of a stage of four steps that logs each, saved after every second; stopped at a step, if one is named."""
    options = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    args = arguments(EosBridgeArguments, folder, **options)
    trainer = EosBridgeTrainer(backbone, args, content_rows(8, True))
    trainer.add_callback(MetricsFile(path, "1-eos_bridge"))
    if stop_at:
        log = trainer.log

        def stop(logs, start_time=None):
            log(logs, start_time)
            if trainer.state.global_step == stop_at:
                raise InterruptedError

        trainer.log = stop
    trainer.train_or_resume()


def figures(lines):
    return [{key: line[key] for key in line if key != "time" and not key.startswith("train_")} for line in lines]


def test_a_resumed_stage_has_every_line_once_and_whole(tiny_backbone, tmp_path):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    trained(tiny_backbone(), tmp_path / "whole", whole)
    other = {"stage": "0-other", "step": 9, "time": "", "loss": 1.0}
    stopped.write_text(json.dumps(other) + "\n" + json.dumps({"stage": "1-eos_bridge", "step": 0, "loss": 2.0}) + "\n")
    with pytest.raises(InterruptedError):
        trained(tiny_backbone(), tmp_path / "stopped", stopped, stop_at=3)
    assert [line["step"] for line in read_metrics(stopped)] == [9, 1, 2, 3]  # a line of an earlier start is gone
    with stopped.open("a") as file:
        file.write('{"stage": "1-eos_bri')  # what a full disk may leave
    trained(tiny_backbone(), tmp_path / "stopped", stopped)
    assert figures(read_metrics(stopped)) == [figures([other])[0], *figures(read_metrics(whole))]
    text = stopped.read_text()
    assert text.endswith("\n") and len(text.splitlines()) == len(read_metrics(stopped)) == 6


def test_figures_that_are_evaluated_again_at_the_start_are_there_once(tmp_path, tiny_backbone):
    path = tmp_path / "metrics.jsonl"
    args = arguments(EosBridgeArguments, tmp_path)
    state = EosBridgeTrainer(tiny_backbone(), args, content_rows(8, True)).state
    for _ in range(2):
        metrics = MetricsFile(path, "1-contrastive")
        metrics.on_train_begin(args, state, None)
        for names in ("loss", "eval_validation_hit@1"):
            state.global_step = 4
            metrics.on_log(args, state, None, {names: 0.5})
    assert [sorted(line)[-1] for line in read_metrics(path)] == ["time", "time"]
    assert len(read_metrics(path)) == 2
    state.is_world_process_zero = False
    metrics.on_log(args, state, None, {"other": 1.0})
    assert len(read_metrics(path)) == 2


# ------------------------------------------------------------------------------------------------ trackers


@pytest.mark.slow
def test_tensorboard_gets_every_stage_under_its_own_name(tiny_backbone_path, photo_data, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = recipe_of(tiny_backbone_path(), photo_data, tmp_path / "run", slice(None), report_to=["tensorboard"])
    train(recipe)
    logs = recipe.output_dir / LOGS
    names = [f"{number}-{stage.name}" for number, stage in enumerate(recipe.stages, 1)]
    assert sorted(path.name for path in logs.iterdir()) == names
    lines = read_metrics(recipe.output_dir / METRICS_NAME)
    for name in names:
        found = events.EventAccumulator(str(logs / name))
        found.Reload()
        losses = [line["loss"] for line in lines if line["stage"] == name and "loss" in line]
        assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses) and len(losses) == 2
    assert found.Scalars("eval/validation_hit@1")


@pytest.mark.parametrize(
    ("given", "missing", "message"),
    [
        (["wandb"], "wandb", r"stages\.eos_bridge: report_to: wandb is not installed; `pip install wandb`"),
        (
            ["tensorbord"],
            None,
            r"stages\.eos_bridge: report_to: unknown tracker 'tensorbord'; did you mean tensorboard",
        ),
    ],
)
def test_a_tracker_that_is_not_there_is_found_before_anything(
    tiny_backbone_path, photo_data, tmp_path, monkeypatch, given, missing, message
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == missing else name)
    monkeypatch.setattr(pipeline, "run_stage", lambda *args: pytest.fail("trained before it looked"))
    recipe = recipe_of(tiny_backbone_path(), photo_data, tmp_path / "run", slice(0, 2))
    recipe.stages[1].options["report_to"] = given
    with pytest.raises(CocoaError, match=message):
        train(recipe)


def test_names_of_runs_are_the_recipe_s_or_say_run_and_stage(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert trackers.names({}, "cocoa-2b", "1-eos_bridge") == {"run_name": "cocoa-2b-1-eos_bridge", "project": "cocoa"}
    assert trackers.names({"run_name": "mine", "project": "p"}, "cocoa-2b", "1-eos_bridge") == {}
    monkeypatch.setenv("WANDB_PROJECT", "ours")
    assert trackers.names({}, "r", "s")["project"] == "ours"
