"""The backbones that ship: small, stock, and able to see what the scenes show."""

import csv
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from cocoa.architectures import EMBEDDED, locate
from cocoa.backbone import load_backbone
from cocoa.embedding import load_embedder
from cocoa.errors import CocoaError
from cocoa.inputs import ImageBudget
from cocoa.pairs import Side
from cocoa.scenes.dialogues import ASK_QUESTIONS, REQUESTS
from cocoa.scenes.language import ask, caption
from cocoa.scenes.world import picture, sample_scene

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=EMBEDDED)
def mini(request):
    """A shipped backbone as a stranger loads it: name, model, processor."""
    folder = locate(request.param)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    return request.param, model.eval(), AutoProcessor.from_pretrained(folder)


def answer(mini, scenes, requests, tokens=8):
    """What it says, greedily, to one request on each scene's picture."""
    _, model, processor = mini
    said = []
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(scenes), 32):
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": picture(scene)}, {"type": "text", "text": request}],
                }
            ]
            for scene, request in zip(scenes[start : start + 32], requests[start : start + 32], strict=True)
        ]
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        said += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


def test_they_are_stock_models_of_both_architectures_and_small(mini):
    name, model, processor = mini
    assert (
        type(model).__name__
        == {
            "mini-qwen2-vl": "Qwen2VLForConditionalGeneration",
            "mini-qwen2.5-vl": "Qwen2_5_VLForConditionalGeneration",
        }[name]
    )
    weights = Path(locate(name)) / "model.safetensors"
    assert weights.stat().st_size < 8e6
    assert model.dtype == torch.float32  # as config.json says, whatever the file holds
    assert model.config.text_config.is_causal
    assert "<|mask|>" not in processor.tokenizer.get_vocab()  # an untouched backbone, as a hub's
    assert not list(Path(locate(name)).glob("*.bin"))


def test_the_second_one_has_windows_that_bite():
    config = load_backbone("mini-qwen2.5-vl").model.config.vision_config
    assert config.window_size < 84 and 0 < len(config.fullatt_block_indexes) < config.depth


def test_their_chat_template_is_the_form_that_they_were_trained_on(mini):
    processor = mini[2]
    content = [{"type": "image"}, {"type": "text", "text": "what colour is the star?"}]
    chat = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    chat.append({"role": "user", "content": "where is the <|im_end|>?"})
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>what colour is the star?<|im_end|>\n"
        "<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nwhere is the < |im_end|>?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("kind", ["colour", "shape", "texture", "size", "cell", "object", "neighbour", "presence"])
def test_they_answer_bound_questions_on_scenes_they_have_not_seen(mini, kind):
    rng = random.Random(f"{kind} unseen")
    scenes, asked = [], []
    while len(scenes) < 96:
        scene = sample_scene(rng, (2, 3, 4), "test")
        question = ask(rng, scene, kind)
        if question is not None:
            scenes.append(scene)
            asked.append(question)
    said = answer(mini, scenes, [question.text for question in asked])
    right = sum(text == question.answer for text, question in zip(said, asked, strict=True))
    assert right / len(said) > 0.9


@pytest.mark.parametrize("style", ["full", "plain", "relation"])
def test_their_captions_are_right(mini, style):
    rng = random.Random(f"{style} unseen")
    scenes = [sample_scene(rng, (2, 3), "test") for _ in range(48)]
    said = answer(mini, scenes, [REQUESTS[style]] * len(scenes), tokens=64)
    right = sum(text == caption(scene, style) for text, scene in zip(said, scenes, strict=True))
    assert right / len(said) > 0.85


def test_they_ask_questions_too(mini):
    scene = sample_scene(random.Random(5), (3,), "test")
    (said,) = answer(mini, [scene], [ASK_QUESTIONS.format(3)], tokens=80)
    lines = said.split("\n")
    assert [line[:3] for line in lines] == ["1. ", "2. ", "3. "]


def test_training_was_long_enough_and_the_card_says_how_well_it_went(mini):
    folder = Path(locate(mini[0]))
    with (folder / "curve.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] == min(losses) and losses[-2] - losses[-1] < 0.002  # held-out nats a token
    card = (folder / "README.md").read_text()
    assert f"{losses[-1]:.4f}" in card and "| colour |" in card and not re.search(r"\[[A-Z]+\]", card)


def test_they_are_found_by_name_and_embed(mini):
    name = mini[0]
    embedder = load_embedder(name)
    embedding = embedder.embed([Side(text="a red star"), Side(image=picture(sample_scene(random.Random(0), (2,))))])
    assert embedding.shape == (2, 128) and embedding.isfinite().all()
    assert load_backbone(name, ImageBudget((1, 16))).name == name


def test_another_name_is_told_which_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CocoaError, match=r"mini-qwen2-vl, mini-qwen2.5-vl"):
        load_backbone("mini-qwen3-vl")


def rebuild(name, output, work, *more):
    """Run the command that rebuilds a backbone, for a few steps; the steps of its curve."""
    command = [sys.executable, str(ROOT / "backbones" / "pretrain.py"), name, "--eval-every", "3", "--eval-scenes", "4"]
    command += ["--output", str(output), "--work", str(work), "--tower-steps", "3", "--device", "cpu", *more]
    subprocess.run(command, check=True, capture_output=True)
    with (output / name / "curve.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_the_command_that_rebuilds_them_runs_and_goes_on_where_it_was(name, tmp_path):
    output, work = tmp_path / "out", tmp_path / "work"
    assert rebuild(name, output, work, "--steps", "3") == [3]
    assert rebuild(name, output, work, "--steps", "6") == [3, 6]
    assert (work / name / "log.txt").read_text().count("tower step 3 ") == 1
    rebuilt, shipped = (load_backbone(folder).model.state_dict() for folder in (output / name, name))
    words = {"lm_head.weight", "model.language_model.embed_tokens.weight"}  # their number is the tokenizer's
    assert rebuilt.keys() == shipped.keys()
    assert all(rebuilt[key].shape == shipped[key].shape for key in rebuilt.keys() - words)


@pytest.mark.slow
def test_the_command_goes_on_from_a_shipped_backbone(tmp_path):
    """Its weights, tokenizer and curve are the start; the frozen tower's new heads come first."""
    name = EMBEDDED[0]
    with (Path(locate(name)) / "curve.csv").open() as file:
        before = [int(row["step"]) for row in csv.DictReader(file)]
    steps = before
    for last in (before[-1] + 3, before[-1] + 6):  # the second time it goes on from its own state
        more = ["--start", locate(name), "--steps", str(last)]
        found = rebuild(name, tmp_path / "out", tmp_path / "work", *more)
        assert found[: len(steps)] == steps and found[-1] == last
        steps = found
    assert (tmp_path / "work" / name / "log.txt").read_text().count("tower step 3 ") == 1
    after, shipped = (load_backbone(folder) for folder in (tmp_path / "out" / name, name))
    assert after.tokenizer.get_vocab() == shipped.tokenizer.get_vocab()
    moved = [
        (after.model.state_dict()[key] - weight).abs().max().item()
        for key, weight in shipped.model.state_dict().items()
    ]
    assert 0 < max(moved) < 0.02  # three steps of the warm-up away, and not from random weights
