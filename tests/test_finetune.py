"""The fine-tuning recipe, from mining to the scores before and after, on photographs and a tiny checkpoint."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cocoa.backbone import Form, load_backbone
from cocoa.checkpoint import read_record, recorded_form, save_checkpoint
from cocoa.evaluation import evaluate
from cocoa.images import load_image
from cocoa.inputs import ImageBudget
from cocoa.mining import mine
from cocoa.pipeline import train
from cocoa.recipe import load_recipe
from cocoa.stages.training import StageTrainer

RECIPE = Path(__file__).parents[1] / "recipes" / "finetune.yaml"
FITTED = [
    "image.train_tokens=[1,16]",
    "image.eval_tokens=[1,16]",
    "stages.contrastive.batch_size=8",
    "stages.contrastive.num_train_epochs=1",
    "stages.contrastive.report_to=none",
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """`pairs.jsonl` and `held-out.jsonl`: pieces of photographs, each with the photograph it was cut from."""
    folder = tmp_path_factory.mktemp("pieces")
    rows = {"pairs": [], "held-out": []}
    for path in sorted(Path(str(resources.files("cocoa") / "data/photos")).glob("*.jpg"))[:6]:
        photo = load_image(str(path))
        photo.save(folder / f"{path.stem}.png")
        for i in range(6):
            box = (20 * i, 20, 20 * i + 40, 60)
            photo.crop(box).save(folder / f"{path.stem}-{i}.png")
            row = {"query": {"image": f"{path.stem}-{i}.png", "instruction": "Find the photograph."}}
            row["target"] = {"image": f"{path.stem}.png"}
            rows["held-out" if i == 5 else "pairs"].append(row)
    rows["pairs"].append(rows["held-out"][0])  # by mistake
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def fitted(model, output, pieces, train, *more):
    """The recipe, made small."""
    named = [f"backbone={model}", f"output_dir={output}", f"data.train={pieces / train}.jsonl"]
    return load_recipe(RECIPE, [*named, f"data.validation={pieces / 'held-out.jsonl'}", *FITTED, *more])


@pytest.mark.slow
@pytest.mark.parametrize("form", [Form("bidirectional", "lasttoken"), Form("causal", "mean")])
def test_a_checkpoint_is_fine_tuned_as_the_recipe_says(tiny_backbone_path, pieces, tmp_path, form):
    backbone = load_backbone(tiny_backbone_path(), ImageBudget((1, 16)), **form._asdict())
    save_checkpoint(backbone, tmp_path / "model", {"stage": "contrastive"})
    before = evaluate(tmp_path / "model", pieces / "held-out.jsonl", tmp_path / "before")
    found = mine(tmp_path / "model", pieces / "pairs.jsonl", pieces / "mined.jsonl")
    assert found.mined > 0
    assert all(not Path(side["image"]).is_absolute() for side in json_sides(pieces / "mined.jsonl"))

    recipe = fitted(tmp_path / "model", tmp_path / "run", pieces, "mined")
    final = train(recipe)
    record = read_record(final)
    assert recorded_form(final) == form
    assert record["rows"] == {"mined": 30} and record["left_out"] == {"mined": {"stands in the validation file": 1}}
    log = json.loads((final / "training_log.json").read_text())
    hits = {entry["step"]: entry["eval_validation_hit@1"] for entry in log if "eval_validation_hit@1" in entry}
    assert 0 in hits and 3 in hits  # before the first step and after the last
    assert 100 * hits[0] == pytest.approx(before["datasets"]["held-out"])
    after = evaluate(final, pieces / "held-out.jsonl", tmp_path / "after")
    assert 100 * hits[3] == pytest.approx(after["datasets"]["held-out"], abs=100 / 6 + 1e-6)  # the merge rounds
    assert after["data_hash"] == before["data_hash"]
    assert (final / "adapter").is_dir()


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(tiny_backbone, pieces, tmp_path, monkeypatch):
    """Validation before the first step, again where the run goes on, changes nothing; dropout is on."""
    save_checkpoint(tiny_backbone(), tmp_path / "model", {"stage": "contrastive"})
    more = ("stages.contrastive.num_train_epochs=2", "stages.contrastive.save_steps=1")
    whole = train(fitted(tmp_path / "model", tmp_path / "whole", pieces, "pairs", *more))
    step, steps = StageTrainer.training_step, []

    def stop(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    stopped = fitted(tmp_path / "model", tmp_path / "stopped", pieces, "pairs", *more)
    monkeypatch.setattr(StageTrainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train(stopped)
    final = train(stopped)
    assert steps == [0, 1, 2, 3, 3, 4, 5]
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, final))
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()


def json_sides(path):
    """Every side of a file of mined pairs."""
    for line in path.read_text().splitlines():
        row = json.loads(line)
        yield from (row["query"], row["target"], *row.get("negatives", []))


def test_the_recipe_trains_with_the_negatives_that_were_mined(pieces):
    """`data.hard_negatives` keeps them, and the stage's own option puts them into the loss."""
    recipe = load_recipe(RECIPE)
    stage = recipe.stages[0]
    assert stage.data.hard_negatives == recipe.arguments(stage, pieces).hard_negatives == 2
