"""`import cocoa`: what it offers, that its examples run, and that its trainers train what `cocoa train` trains."""

import doctest
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from short_run import NAMES, short_recipe
from toy import captions, dialogues, pictures

import cocoa
from cocoa.checkpoint import read_record
from cocoa.recipe import parse_recipe
from cocoa.sources import read_pairs
from cocoa.stages.saving import changed_options

TRAINERS = {
    "joint_reconstruction": (cocoa.JointReconstructionTrainer, cocoa.JointReconstructionArguments),
    "eos_bridge": (cocoa.EosBridgeTrainer, cocoa.EosBridgeArguments),
    "compression": (cocoa.CompressionTrainer, cocoa.CompressionArguments),
    "contrastive": (cocoa.ContrastiveTrainer, cocoa.ContrastiveArguments),
}
LONG = ("CompressionTrainer", "EosBridgeTrainer", "JointReconstructionTrainer", "train")
"""Names whose examples train for seconds."""


def test_every_name_is_there_and_none_is_loaded_before_it_is_asked_for():
    said = (
        "import sys, cocoa; print(cocoa.__version__, 'torch' in sys.modules or 'numpy' in sys.modules, len(dir(cocoa)))"
    )
    found = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout.split()
    assert found[:2] == [cocoa.__version__, "False"] and int(found[2]) > len(cocoa.__all__)
    assert all(callable(getattr(cocoa, name)) for name in cocoa.__all__)
    assert sorted(name for names in cocoa._PLACES.values() for name in names) == sorted(cocoa.__all__)
    assert set(cocoa.__all__) <= set(dir(cocoa))
    with pytest.raises(AttributeError, match="module 'cocoa' has no attribute 'nothing'"):
        cocoa.nothing  # noqa: B018


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in cocoa.__all__],
)
def test_the_example_of_a_public_name_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(cocoa, name), name, globs={})
    assert test.examples, f"cocoa.{name} has no example"
    said = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not said, "".join(said)


# ------------------------------------------------------------------------------ the same as `cocoa train`


def data_of(stage, folder):
    """A file of eight pairs that the stage can use, and the same pairs in memory."""
    folder.mkdir()
    images = [f"{number}.png" for number in range(8)]
    for image, picture in zip(images, pictures(8), strict=True):
        picture.save(folder / image)
    if stage == "compression":
        rows = [
            {"image_path": image, "dialogue": [turn._asdict() for turn in row.turns]}
            for image, row in zip(images, dialogues(8), strict=True)
        ]
    else:
        rows = [
            {"query": {"image": image, "instruction": "Find the caption."}, "target": {"text": text}}
            for image, text in zip(images, captions(8), strict=True)
        ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, read_pairs(rows, folder)


@pytest.mark.parametrize(
    ("stage", "tuning"),
    [
        pytest.param(stage, tuning, marks=() if (stage, tuning) == ("eos_bridge", "full") else pytest.mark.slow)
        for stage in TRAINERS
        for tuning in ("full", "dora")
    ],
)
def test_a_trainer_trains_what_a_recipe_trains(tiny_backbone_path, tmp_path, stage, tuning):
    path, pairs = data_of(stage, tmp_path / "data")
    content = short_recipe(tiny_backbone_path(), tmp_path, tmp_path / "run", tuning)
    options = dict(content["stages"][0][NAMES[0]])
    if stage == "compression":
        options["compression_tokens"] = 4
    content |= {"stages": [{stage: options}], "data": {"train": str(path), "validation_rows": 0}}
    recipe = parse_recipe(content)
    final = cocoa.train(recipe)

    trainer_class, arguments_class = TRAINERS[stage]
    args = arguments_class(output_dir=str(tmp_path / "trainer"), seed=5, use_cpu=True, disable_tqdm=True, **options)
    form = args.form(None)
    if stage in ("joint_reconstruction", "eos_bridge"):
        form = form._replace(attention="causal")  # as an untouched one is loaded; these stages set it themselves
    model = cocoa.load_backbone(tiny_backbone_path(), cocoa.ImageBudget((4, 16)), **form._asdict())
    pairs = [cocoa.Pair(p.query, p.target, p.negatives, "pairs", p.row, p.dialogue) for p in pairs]  # masks go by name
    trainer = trainer_class(model, args, pairs, lora=recipe.lora)
    trainer.train()
    saved = trainer.save_checkpoint(tmp_path / "saved", cocoa.ImageBudget((4, 25)))
    assert saved == tmp_path / "saved"
    ours, theirs = load_file(saved / "model.safetensors"), load_file(final / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    untouched = load_file(tiny_backbone_path() / "model.safetensors")
    assert any(not torch.equal(ours[name], untouched[name]) for name in untouched if name in ours)
    assert {p.relative_to(saved) for p in saved.rglob("*")} == {p.relative_to(final) for p in final.rglob("*")}
    said, record = read_record(saved), read_record(final)
    same = ("stage", "source", "seed", "steps", "tokens", "rows", "left_out", "trained", "history", "image")
    assert {key: said[key] for key in same} == {key: record[key] for key in same}
    assert said["options"].items() >= {"batch_size": 8, "max_steps": 2, "learning_rate": 1e-3}.items()
    assert said["merge_cosine"] == record["merge_cosine"]
    texts = ["a red cup", "the sky"]
    vectors = [
        SentenceTransformer(str(folder), device="cpu").encode(texts, convert_to_tensor=True)
        for folder in (saved, final)
    ]
    assert torch.equal(*vectors)


@pytest.mark.slow
def test_a_path_does_as_well_as_a_backbone_and_a_file_as_pairs(tiny_backbone_path, tmp_path):
    """And the next stage goes on from the folder that a trainer has written."""
    path, pairs = data_of("eos_bridge", tmp_path / "data")
    options = {"batch_size": 4, "max_steps": 1, "use_cpu": True, "disable_tqdm": True}
    args = cocoa.JointReconstructionArguments(output_dir=str(tmp_path / "first"), **options)
    trainer = cocoa.JointReconstructionTrainer(tiny_backbone_path(), args, path)
    trainer.train()
    first = trainer.save_checkpoint(tmp_path / "joint")
    args = cocoa.ContrastiveArguments(output_dir=str(tmp_path / "second"), eval_steps=1, max_length=300, **options)
    trainer = cocoa.ContrastiveTrainer(first, args, pairs[:4], validation=pairs[4:])
    trainer.train()
    last = trainer.save_checkpoint(tmp_path / "last")
    record = read_record(last)
    assert [stage["stage"] for stage in record["history"]] == ["joint_reconstruction"]
    assert record["source"] == str(first) and record["options"]["max_length"] == 300
    assert any("eval_validation_hit@1" in entry for entry in trainer.state.log_history)
    with pytest.raises(cocoa.CocoaError, match="last: is there already; choose another folder"):
        trainer.save_checkpoint(last)


def test_what_does_not_fit_is_a_mistake(tiny_backbone_path, tiny_backbone, tmp_path):
    args = cocoa.CompressionArguments(output_dir=str(tmp_path / "t"), compression_tokens=4, use_cpu=True)
    with pytest.raises(cocoa.CocoaError, match=r"its pooling is lasttoken .*the stage's compression \(4\)"):
        cocoa.CompressionTrainer(tiny_backbone(), args, [])
    with pytest.raises(cocoa.CocoaError, match="record 2, target: neither text nor image"):
        read_pairs([{"query": {"text": "a"}, "target": {"text": "b"}}, {"query": {"text": "a"}, "target": {}}])
    with pytest.raises(cocoa.CocoaError, match=r"none\.png: no such image file.*data set records, row 1"):
        read_pairs([{"query": {"image": "none.png"}, "target": {"text": "b"}}], tmp_path)
    with pytest.raises(cocoa.CocoaError, match="batch_size 64 is more than the 0 rows"):
        cocoa.EosBridgeTrainer(
            tiny_backbone_path(), cocoa.EosBridgeArguments(output_dir=str(tmp_path), use_cpu=True), []
        )


def test_options_of_a_record_are_those_that_were_changed_and_no_secret(tmp_path):
    args = cocoa.EosBridgeArguments(
        output_dir=str(tmp_path), batch_size=8, layout="strict", hub_token="secret", use_cpu=True
    )
    assert changed_options(args) == {"batch_size": 8, "layout": "strict"}
