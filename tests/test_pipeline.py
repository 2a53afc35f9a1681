"""Running a recipe: what each stage leaves, and that a run may stop anywhere and go on by the same command."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from short_run import NAMES, short_recipe
from toy import states_of
from transformers import AutoModelForImageTextToText

from cocoa import pipeline
from cocoa.account import stages_of
from cocoa.backbone import load_backbone
from cocoa.checkpoint import as_sentence_transformer, read_record
from cocoa.embedding import Embedder, load_embedder
from cocoa.errors import CocoaError
from cocoa.pairs import Side
from cocoa.pipeline import train
from cocoa.recipe import parse_recipe
from cocoa.stage_data import StageData
from cocoa.stages import saving
from cocoa.stages.training import StageTrainer

FOLDERS = ("1-joint_reconstruction", "2-eos_bridge", "final")
EXPLAINED = {"README.md", "recipe.yaml", "environment.json", "metrics.jsonl"}
VARIANTS = [("qwen2_vl", "full"), ("qwen2_5_vl", "full"), ("qwen2_vl", "dora"), ("qwen2_5_vl", "dora")]


@pytest.fixture(scope="module")
def run(tiny_backbone_path, photo_data, tmp_path_factory):
    """`run(model_type, tuning)`: (recipe, `output_dir`) of the three stages, trained once."""
    done = {}

    def get(model_type="qwen2_vl", tuning="full"):
        if (model_type, tuning) not in done:
            output = tmp_path_factory.mktemp("run") / "nested" / "output"
            backbone = tiny_backbone_path(model_type, tied=model_type == "qwen2_vl")
            recipe = parse_recipe(short_recipe(backbone, photo_data, output, tuning))
            assert train(recipe) == output / "final"
            done[model_type, tuning] = recipe, output
        return done[model_type, tuning]

    return get


@pytest.fixture
def recipe(tiny_backbone_path, photo_data, tmp_path):
    """A recipe of one short stage, not run yet."""
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path / "output")
    return parse_recipe(content | {"stages": content["stages"][1:2]})


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------------- what a stage leaves


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tuning"), VARIANTS)
def test_every_stage_s_folder_is_read_by_all_with_equal_numbers(run, pictures, model_type, tuning):
    _, output = run(model_type, tuning)
    before = None
    for name in FOLDERS:
        folder = output / name
        backbone = load_backbone(folder)  # as the next stage does
        stock, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert same(stock.state_dict(), backbone.model.state_dict())
        side = Side("Find the caption:", "A red cup.", pictures[0])
        served = SentenceTransformer(str(folder), device="cpu").encode(
            [{"image": side.image, "text": side.text}], prompt=side.instruction, convert_to_tensor=True
        )[0]
        states = states_of(backbone, side, stock)
        torch.testing.assert_close(served, torch.nn.functional.normalize(states[-1], dim=0), atol=1e-6, rtol=0)
        torch.testing.assert_close(load_embedder(folder).embed([side])[0], served, atol=1e-6, rtol=0)
        assert before is None or (served - before).abs().max() > 1e-5, f"{name} has learned nothing"
        before = served
        assert (folder / "adapter" / "adapter_config.json").is_file() == (tuning == "dora")
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} <= {
            *(".json", ".safetensors", ".jinja", ".txt", ".md"),
        }, "a pickle, or something else that does not belong here"
    assert {path.name for path in output.iterdir()} - {".lock"} == {*FOLDERS, *EXPLAINED}


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "tuning"), VARIANTS)
def test_the_record_says_how_a_checkpoint_was_made(run, model_type, tuning):
    recipe, output = run(model_type, tuning)
    before = []
    for i, (name, stage) in enumerate(zip(FOLDERS, NAMES, strict=True)):
        record = read_record(output / name)
        assert (record["stage"], record["seed"], record["steps"]) == (stage, 5, 2)
        assert record["source"] == (str(output / FOLDERS[i - 1]) if i else recipe.backbone)
        assert record["fingerprint"] == recipe.fingerprint(i + 1)
        assert record["options"] == recipe.stages[i].options
        assert record["rows"]["MSCOCO_i2t"] == 32  # of 34, two held out
        assert record["image"] == {"tokens": [4, 25], "resize": "aspect"}
        assert 0.9999 < record["merge_cosine"] <= 1.00001
        own = stages_of(record)
        assert [stage["stage"] for stage in own] == list(NAMES[: i + 1]) and own[:-1] == record["history"] == before
        assert all(stage["seconds"] > 0 and stage["tokens"] > 2 * 8 * 5 for stage in own)
        before = own
        assert (
            record["trained"] == "all weights" if tuning == "full" else record["trained"].startswith("text: q_proj x 3")
        )
        log = json.loads((output / name / "training_log.json").read_text())
        assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert record["left_out"] == {"VisualNews_t2i": {"empty query": 1}}
    assert [entry["eval_validation_hit@1"] for entry in log if "eval_validation_hit@1" in entry]


@pytest.mark.slow
def test_bfloat16_is_merged_in_float32_and_rounded_once(tiny_backbone_path, photo_data, tmp_path, monkeypatch):
    embedded = []

    def keep(embedder, sides):
        embedded.append((embed(embedder, sides), sides))
        return embedded[-1][0]

    embed = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", keep)
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path, "dora", dtype="bfloat16")
    recipe = parse_recipe(content | {"stages": content["stages"][1:2]})
    recipe.stages[0].options["learning_rate"] = 0.1  # adapters that rounding twice would show in
    final = train(recipe)
    assert {tensor.dtype for tensor in weights(final).values()} == {torch.bfloat16}
    assert read_record(final)["merge_cosine"] > 0.999

    base = load_backbone(recipe.backbone, recipe.image.train(), torch.bfloat16, "bidirectional")
    merged = PeftModel.from_pretrained(base.model.to(torch.float32), final / "adapter").merge_and_unload()
    saved = load_backbone(final, recipe.image.train(), torch.bfloat16)
    found = saved.model.state_dict()
    assert same(found, {name: tensor.to(torch.bfloat16) for name, tensor in merged.state_dict().items()})
    untouched = load_backbone(recipe.backbone, dtype=torch.bfloat16).model.state_dict()
    assert sum(not torch.equal(found[name], untouched[name]) for name in found) > 20
    after, sides = embedded[-1]
    again = embed(Embedder(as_sentence_transformer(saved), saved.images), sides)
    torch.testing.assert_close(again, after, atol=1e-6, rtol=0)  # the recorded cosine is that of the files


@pytest.mark.slow
def test_validation_rows_are_in_no_stage_s_training_rows(tiny_backbone_path, photo_data, tmp_path, monkeypatch):
    """Also where stages have their own samples of a data set."""
    seen = {}
    build = pipeline.build_trainer

    def spy(stage, backbone, data, *others):
        seen[stage.name] = data
        return build(stage, backbone, data, *others)

    monkeypatch.setattr(pipeline, "build_trainer", spy)
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path, seed=10)
    content["data"]["validation_rows"] = 200  # so a fifth of each data set, and of a sample of it
    content["stages"][0]["joint_reconstruction"]["data"] = {"max_rows_per_subset": 10}
    train(parse_recipe(content))
    assert list(seen) == list(NAMES) and all(isinstance(data, StageData) for data in seen.values())
    held_out = {pair.row_id for pair in seen["contrastive"].validation}
    trained = {name: {row.row_id for row in (data.rows or data.pairs)} for name, data in seen.items()}
    assert len(held_out) > 10 and all(len(rows) >= 30 for rows in trained.values())
    for name, rows in trained.items():
        assert not rows & held_out, name
    everything = {pair.row_id for pair in seen["contrastive"].pairs} | held_out
    assert trained["joint_reconstruction"] < everything and trained["eos_bridge"] < everything


# ------------------------------------------------------------------------------------------ stopped anywhere


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_folder_appears_only_when_whole(recipe, tmp_path, monkeypatch, schedule):
    recipe.stages[0].options["lr_scheduler_type"] = schedule
    whole = train(dataclasses.replace(recipe, output_dir=tmp_path / "whole"))
    save = saving.save_checkpoint

    def fail(backbone, folder, record):
        save(backbone, folder, record)
        raise OSError("no space left on device")

    monkeypatch.setattr(saving, "save_checkpoint", fail)
    with pytest.raises(CocoaError, match=r"final.partial: cannot be written \(no space left"):
        train(recipe)
    assert not (recipe.output_dir / "final").exists()
    monkeypatch.setattr(saving, "save_checkpoint", save)
    final = train(recipe)  # from the trainer's last checkpoint: the training itself is done
    assert same(weights(final), weights(whole))
    assert {path.name for path in recipe.output_dir.iterdir()} - {".lock"} == {"final", *EXPLAINED}


def test_run_again_does_nothing(recipe):
    train(recipe)
    before = files(recipe.output_dir / "final")
    assert train(recipe) == recipe.output_dir / "final"
    assert files(recipe.output_dir / "final") == before


def test_another_recipe_in_the_same_folder_is_a_mistake(recipe, tiny_backbone_path, photo_data, monkeypatch):
    content = short_recipe(tiny_backbone_path(), photo_data, recipe.output_dir)
    train(recipe)
    monkeypatch.setattr(pipeline, "run_stage", lambda *args: pytest.fail("trained before it looked"))
    other = {**content, "stages": content["stages"][1:2], "seed": 6}
    changes = r"final: made by another recipe \(seed: 6 \(was 5\)\); choose a new output_dir, or .*--accept-changes"
    more = r"final: made by another recipe \(.*, and \d+ more\)"
    for mistaken, message in ((other, changes), (content, more)):  # another seed; more stages before the one there
        with pytest.raises(CocoaError, match=message):
            train(parse_recipe(mistaken))
    monkeypatch.undo()
    (recipe.output_dir / "final").rename(recipe.output_dir / "moved")
    trainer = recipe.output_dir / "trainer" / "1-eos_bridge"
    trainer.mkdir(parents=True)
    (trainer / "settings.json").write_text(json.dumps(recipe.settings(1)))
    (trainer / "checkpoint-1").mkdir()
    (trainer / "checkpoint-1" / "complete").touch()
    with pytest.raises(CocoaError, match=r"1-eos_bridge: made by another recipe \(seed: 6 \(was 5\)\)"):
        train(parse_recipe(other))
    shutil.rmtree(trainer / "checkpoint-1")  # stopped before its first checkpoint: there is nothing to lose
    assert train(parse_recipe(other)).is_dir()


@pytest.mark.slow
def test_a_changed_recipe_goes_on_where_that_is_asked_for(recipe, tiny_backbone_path, photo_data, caplog):
    """A stage that was stopped goes on from its checkpoint with the new learning rate; what is done stays."""
    content = short_recipe(tiny_backbone_path(), photo_data, recipe.output_dir)
    content["stages"] = content["stages"][1:2]
    content["stages"][0]["eos_bridge"] |= {"max_steps": 3, "save_steps": 1}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StageTrainer, "save_checkpoint", interrupt)
        with pytest.raises(InterruptedError):
            train(parse_recipe(content))
    shutil.rmtree(recipe.output_dir / "trainer" / "1-eos_bridge" / "checkpoint-3")
    content["stages"][0]["eos_bridge"]["learning_rate"] = 5e-4
    with pytest.raises(CocoaError, match=r"stages.0.eos_bridge.learning_rate: 0.0005 \(was 0.001\)"):
        train(parse_recipe(content))
    final = train(parse_recipe(content), accept_changes=True)
    log = json.loads((final / "training_log.json").read_text())
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert "going on, though the recipe has changed" in caplog.text
    assert rates == pytest.approx([0, 1e-3, 2.5e-4])  # a step of warm-up, then down to 0 after three
    before = files(final)
    content["stages"][0]["eos_bridge"]["learning_rate"] = 1e-4
    assert files(train(parse_recipe(content), accept_changes=True)) == before


def interrupt(*args):
    raise InterruptedError


def test_a_mistake_in_a_later_stage_is_found_before_the_first_is_trained(recipe, monkeypatch):
    content = short_recipe("unused", recipe.output_dir, recipe.output_dir)
    content["stages"][2]["contrastive"]["gradient_accumulation_steps"] = 2
    monkeypatch.setattr(pipeline, "run_stage", lambda *args: pytest.fail("trained before it looked"))
    with pytest.raises(CocoaError, match=r"stages\.contrastive: .*gradient_accumulation_steps"):
        train(parse_recipe(content))


def test_a_model_that_could_embed_no_image_is_a_mistake(recipe, monkeypatch):
    content = short_recipe("unused", recipe.output_dir, recipe.output_dir)
    content["backbone"] = "mini-qwen2-vl"
    content["stages"][2]["contrastive"]["max_length"] = 20
    content["image"] = {"train_tokens": [1, 16], "eval_tokens": [1, 18]}
    monkeypatch.setattr(pipeline, "run_stage", lambda *args: pytest.fail("trained before it looked"))
    with pytest.raises(
        CocoaError, match=r"stages\.contrastive: max_length 20: no room for an image of image\.eval_tok"
    ):
        train(parse_recipe(content))


def test_a_stage_s_own_images_are_in_its_checkpoint(recipe, tiny_backbone_path, photo_data):
    content = short_recipe(tiny_backbone_path(), photo_data, recipe.output_dir)
    last = {"image": {"train_tokens": [4, 16], "eval_tokens": [4, 9], "resize": "square"}, "max_steps": 1}
    content["stages"] = [{"contrastive": content["stages"][2]["contrastive"] | last}]
    assert read_record(train(parse_recipe(content)))["image"] == {"tokens": [4, 9], "resize": "square"}


def test_a_mistake_while_training_is_no_matter_of_the_output_folder(recipe, monkeypatch):
    def unreadable(*args):
        raise PermissionError(13, "Permission denied", "pairs.jsonl")

    monkeypatch.setattr(pipeline, "run_stage", unreadable)
    with pytest.raises(PermissionError, match=r"pairs\.jsonl"):
        train(recipe)


def test_one_process_owns_a_folder_at_a_time(recipe):
    recipe.output_dir.mkdir()
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True)"
    command = [sys.executable, "-c", f"{hold}; input()", str(recipe.output_dir / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CocoaError, match="another run is writing here"):
            train(recipe)
        holder.communicate(b"\n")
    assert train(recipe).is_dir()


@pytest.mark.slow
def test_killed_in_the_second_stage_and_run_again_equals_never_killed(tiny_backbone_path, photo_data, tmp_path):
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path / "never_killed", "dora")
    content["stages"][1]["eos_bridge"] |= {"max_steps": 30, "save_steps": 2}
    whole = train(parse_recipe(content))

    output = tmp_path / "killed"
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(content | {"output_dir": str(output)}))  # JSON is YAML
    command = [sys.executable, "-m", "cocoa.cli", "train", str(path)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 240
        while not list(output.glob("trainer/2-eos_bridge/checkpoint-*/complete")):
            assert process.poll() is None, process.stderr.read()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (output / "2-eos_bridge").exists() and (output / "1-joint_reconstruction").is_dir()
    assert not (output / "trainer" / "2-eos_bridge" / "checkpoint-30").exists()
    first = files(output / "1-joint_reconstruction")

    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "resuming from" in again.stderr
    assert files(output / "1-joint_reconstruction") == first
    assert same(weights(output / "2-eos_bridge"), weights(tmp_path / "never_killed" / "2-eos_bridge"))
    assert same(weights(output / "final"), weights(whole))
    tokens = [[stage["tokens"] for stage in stages_of(read_record(final))] for final in (output / "final", whole)]
    assert tokens[0] == tokens[1] and len(tokens[0]) == 3


def test_processes_wait_for_each_other_as_long_as_the_recipe_says(
    tiny_backbone_path, photo_data, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(pipeline, "this_process", lambda timeout: asked.append(timeout) or 1 / 0)
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path / "run")
    for seconds in (None, 600, 7200):
        content["stages"][1]["eos_bridge"] |= {"ddp_timeout": seconds} if seconds else {}
        with pytest.raises(ZeroDivisionError):
            train(parse_recipe(content))
    assert asked == [1800, 1800, 7200]
