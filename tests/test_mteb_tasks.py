"""MMEB as mteb tasks: mteb's own runner and `cocoa evaluate` give equal numbers, for our models and for others'."""

import shutil

import datasets
import numpy as np
import pytest
from parquet_files import write_eval
from PIL import Image

from cocoa.checkpoint import save_checkpoint
from cocoa.errors import CocoaError
from cocoa.evaluation import evaluate

mteb = pytest.importorskip("mteb")
from mteb.models import SentenceTransformerEncoderWrapper  # noqa: E402
from mteb.results.task_result import TaskError, TaskResult  # noqa: E402

from cocoa.mteb_tasks import MMEBTask, mmeb_tasks, model_meta, task_name  # noqa: E402


def run(model, tasks):
    """hit@1 in percent of each data set by mteb's own runner, without its cache."""
    results = mteb.evaluate(model, tasks, cache=None, encode_kwargs={"batch_size": 4}, show_progress_bar=False)
    found = {}
    for result in results.task_results:
        (scores,) = result.scores["test"]
        assert scores["main_score"] == scores["hit_at_1"] == pytest.approx(scores["hit_rate_at_1"], abs=1e-4)  # rounded
        found[result.task_name.removeprefix("MMEB-")] = 100 * scores["hit_at_1"]
    return found


@pytest.mark.slow
def test_a_checkpoint_of_ours_scores_the_same_by_both(tiny_backbone, photo_data, tmp_path):
    save_checkpoint(tiny_backbone(), tmp_path / "final", {"rows": {"OK-VQA": 8, "ImageNet_1K": 3, "mine": 1}})
    data = photo_data / "MMEB-eval"
    meta = model_meta(tmp_path / "final")
    assert meta.training_datasets == {"MMEB-OK-VQA", "MMEB-ImageNet-1K", "MMEB-mine"}
    assert meta.modalities == ["text", "image"] and meta.n_parameters > 1000 and meta.embed_dim == 64
    ours = evaluate(tmp_path / "final", data, tmp_path / "scores")["datasets"]
    assert len(set(ours.values())) > 4
    assert run(meta, mmeb_tasks(data)) == pytest.approx(ours)


@pytest.mark.slow
def test_a_checkpoint_runs_on_every_kind_of_text_and_image_task(tiny_backbone, tmp_path):
    """mteb's own check of a model, on its mock tasks."""
    save_checkpoint(tiny_backbone(), tmp_path, {})
    results = mteb.mock_run(model_meta(tmp_path).load_model()).task_results
    assert not [name for name, result in results.items() if isinstance(result, TaskError)]
    ran = {name for name, result in results.items() if isinstance(result, TaskResult)}
    assert {"MockAny2AnyRetrievalI2T", "MockVisionCentricQA", "MockImageClassification", "MockVisualSTS"} <= ran
    assert {"MockSTSTask", "MockInstructionRetrieval", "MockZeroShotClassification"} <= ran and len(ran) > 40


@pytest.mark.slow
def test_a_model_of_others_scores_the_same_by_both(foreign_path, photo_data, tmp_path):
    """By mteb's own wrapper, which knows nothing of us: mean pooling, another chat template."""
    data = photo_data / "MMEB-eval"
    model = SentenceTransformerEncoderWrapper(str(foreign_path), device="cpu")
    model.mteb_model_meta = model.mteb_model_meta.model_copy(update={"modalities": ["text", "image"]})
    ours = evaluate(foreign_path, data, tmp_path / "scores")["datasets"]
    assert len(set(ours.values())) > 4
    assert run(model, mmeb_tasks(data)) == pytest.approx(ours)


def test_a_text_model_runs_on_text_data_and_is_refused_on_images_by_name(tiny_text_model_path, photo_data, tmp_path):
    rows = [(f"the {word}", "", ["a red cup", "the cat", word], [""] * 3) for word in ("cat", "cup", "rocket")]
    write_eval(tmp_path / "data", "mine", *rows)
    ours = evaluate(tiny_text_model_path, tmp_path / "data", tmp_path / "scores")["datasets"]
    model = SentenceTransformerEncoderWrapper(str(tiny_text_model_path), device="cpu")
    assert run(model, mmeb_tasks(tmp_path / "data")) == pytest.approx(ours)
    with pytest.raises(CocoaError, match=r"data set A-OKVQA, row 0: the model does not embed image with text"):
        evaluate(tiny_text_model_path, photo_data / "MMEB-eval", tmp_path / "scores")


def test_results_say_which_data_they_are_of(tmp_path):
    revisions = []
    for candidates in (["the cat", "a red cup"], ["a red cup", "the cat"], ["the cat", "a red cup"]):
        write_eval(tmp_path, "mine", ("the cat", "", candidates, ["", ""]))
        revisions.append(mmeb_tasks(tmp_path)[0].metadata.revision)
    assert revisions[0] == revisions[2] != revisions[1]


def test_tasks_say_what_each_side_is(photo_data):
    tasks = {task.metadata.name: task for task in mmeb_tasks(photo_data / "MMEB-eval")}
    kinds = {name.removeprefix("MMEB-"): task.metadata.category for name, task in tasks.items()}
    assert kinds == {
        "A-OKVQA": "it2t",
        "CIRR": "it2it",
        "EDIS": "t2it",
        "ImageNet-1K": "it2t",
        "MSCOCO": "it2it",
        "MSCOCO_i2t": "it2t",
        "MSCOCO_t2i": "t2it",
        "RefCOCO-Matching": "it2it",
    }
    assert task_name("ImageNet_1K") == "MMEB-ImageNet-1K"
    task = tasks["MMEB-RefCOCO-Matching"]
    task.load_data()
    data = task.dataset["default"]["test"]
    assert len(data["queries"]) == 12 and all(len(names) == 12 for names in data["top_ranked"].values())  # no twins
    assert all(len(right) == 1 for right in data["relevant_docs"].values())


def test_ties_count_against_the_model(photo_data):
    (task,) = mmeb_tasks(photo_data / "MMEB-eval", ["CIRR"])
    right = {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1}}
    results = {"a": {"x": 0.5, "y": 0.4}, "b": {"x": 0.5, "y": 0.5}, "c": {"x": 0.5}}
    assert task.task_specific_scores({}, right, results, "test", "default") == {"hit_at_1": pytest.approx(2 / 3)}


def test_images_that_libraries_differ_on_are_handed_over_upright(tmp_path):
    (tmp_path / "mine").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 60), "red").save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.full((30, 30), 40_000, np.uint16)).save(tmp_path / "deep.png")
    write_eval(tmp_path, "mine", ("q", "turned.png", ["", ""], ["deep.png", "turned.png"]))
    (task,) = mmeb_tasks(tmp_path)
    task.load_data()
    corpus = task.dataset["default"]["test"]["corpus"]
    assert [image.size for image in corpus["image"]] == [(30, 30), (60, 40)]
    assert corpus[0]["image"].getpixel((0, 0)) == (155, 155, 155)
    assert isinstance(task, MMEBTask)


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_broken_exif_data_is_not_handed_over(tmp_path, kind):
    """`datasets` reads it when it decodes an image, and stumbles."""
    (tmp_path / "mine").mkdir()
    names = [f"{number}.{kind}" for number in range(2)]
    for name in names:
        Image.new("RGB", (40, 60), "red").save(tmp_path / name, exif=b"Exif\0\0nonsense", dpi=(72, 72))
    write_eval(tmp_path, "mine", ("q", names[0], ["", ""], names))
    (task,) = mmeb_tasks(tmp_path)
    task.load_data()
    assert task.dataset["default"]["test"]["corpus"][0]["image"].size == (40, 60)


def test_images_of_an_archive_are_handed_over_as_they_are(photo_data, tmp_path):
    shutil.copytree(photo_data / "MMEB-eval" / "MSCOCO_t2i", tmp_path / "MSCOCO_t2i")
    shutil.make_archive(str(tmp_path / "images"), "zip", photo_data / "MMEB-eval" / "images")
    tables = []
    for folder in (photo_data / "MMEB-eval", tmp_path):
        (task,) = mmeb_tasks(folder, "MSCOCO_t2i")
        task.load_data()
        tables.append(task.dataset["default"]["test"]["corpus"])
    assert tables[0]["image"][0] == tables[1]["image"][0] and len(tables[1]) == 12
    cells = tables[1].cast_column("image", datasets.Image(decode=False))["image"]
    assert cells[0]["bytes"].startswith(b"\xff\xd8")  # JPEG, not blown up


def test_a_side_that_only_sometimes_has_an_image_is_refused(tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "x.png")
    write_eval(tmp_path, "mine", ("q", "", ["a", "b"], ["", "x.png"]))
    with pytest.raises(CocoaError, match="data set mine: 1 of 2 candidates have an image"):
        mmeb_tasks(tmp_path)
    with pytest.raises(CocoaError, match="no such folder"):
        model_meta(tmp_path / "nowhere")
