"""CoMa in miniature: scenes and their true dialogues, a backbone that ships, and scores far above where it began."""

import pytest

from cocoa.evaluation import evaluate
from cocoa.pipeline import train
from cocoa.recipe import parse_recipe
from cocoa.scenes.write import write_scenes

SETS = ["SceneQuestions", "Scenes_t2i", "SceneChanges", "SceneGrounding"]


def short_coma(scenes, output, backbone):
    """`recipes/coma-mini.yaml` at half its size and learning from a third of the rows."""
    common = {"batch_size": 32, "report_to": "none"}
    compression = {"compression_tokens": 8, "prompt": "describe the {content}.", "cache_inputs": True}
    data = {"train": str(scenes / "dialogues.parquet"), "validation_rows": 0}
    contrastive = {"warmup_steps": 0.1, "temperature": 0.03}
    return {
        "backbone": backbone,
        "output_dir": str(output),
        "data": {"train": str(scenes / "MMEB-train"), "validation_rows": 2},
        "dtype": "float32",
        "image": {"train_tokens": [1, 16], "eval_tokens": [1, 16]},
        "stages": [
            {"compression": common | compression | {"data": data, "max_steps": 60, "learning_rate": 6e-4}},
            {"contrastive": common | contrastive | {"max_steps": 45, "learning_rate": 1e-3}},
        ],
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_coma_beats_the_untouched_backbone(tmp_path):
    backbone = "mini-qwen2-vl"
    write_scenes(tmp_path / "scenes", 0, 420, 40, splits=("test",))
    final = train(parse_recipe(short_coma(tmp_path / "scenes", tmp_path / "run", backbone)))
    scores = {}
    for name, model in (("coma", final), ("untouched", backbone)):
        output = tmp_path / "scores" / name
        found = evaluate(model, tmp_path / "scenes" / "MMEB-eval", output, SETS, batch_size=32)
        scores[name] = {group: average["hit@1"] for group, average in found["averages"].items()}
    assert scores["untouched"]["All"] < 5  # of 40 and more candidates
    assert scores["coma"]["All"] > scores["untouched"]["All"] + 12, scores
    for group in ("Retrieval", "Grounding"):  # seventy rows a data set are too few for questions and labels
        assert scores["coma"][group] > scores["untouched"][group] + 12, scores
