"""`cocoa preview` shows what the trainers train on, counts what they count, and needs no weights."""

import dataclasses
import io
import json
import logging
import re
import shutil

import pytest
import torch
from PIL import Image
from rich.console import Console
from short_run import NAMES, short_recipe
from torch import nn
from toy import VISION
from typer.testing import CliRunner

import cocoa.preview
from cocoa.backbone import Form
from cocoa.cli import app
from cocoa.corruption import IGNORE_INDEX
from cocoa.errors import CocoaError
from cocoa.estimate import ASSUMPTIONS
from cocoa.pairs import Side
from cocoa.pipeline import build_trainer, load_stage_backbone
from cocoa.preview import SAMPLES, Schedule, preview
from cocoa.preview_cost import whole_at_once
from cocoa.preview_html import to_html
from cocoa.preview_pictures import picture_of
from cocoa.preview_render import Histogram, epoch_line, show, tokens_text
from cocoa.preview_samples import Token, visible
from cocoa.recipe import parse_recipe
from cocoa.stage_data import stage_data
from cocoa.stages.weights import trainable

JOINT, BRIDGE, CONTRASTIVE = 0, 1, 2


def make_recipe(backbone, output, train, lora=True, model_type="qwen2_vl", **stages):
    """Three short stages; `stages` are further keys of each."""
    common = {"batch_size": 8, "max_steps": 6, "report_to": "none"}
    own = {
        "joint_reconstruction": {},
        "eos_bridge": {"max_steps": -1, "num_train_epochs": 2, "layout": "strict"},
        "contrastive": {"tokens_per_pass": 200, "sub_batch_size": 4, "data": {"hard_negatives": 1}},
    }
    content = {
        "backbone": str(backbone),
        "output_dir": str(output),
        "dtype": "float32",
        "seed": 5,
        "data": {"train": str(train), "validation_rows": 4},
        "image": {"train_tokens": [4, 16], "eval_tokens": [4, 16]},
        "stages": [{name: {**common, **keys, **stages.get(name, {})}} for name, keys in own.items()],
    }
    if lora:
        content["lora"] = {"vision": list(VISION[model_type])}
    return parse_recipe(content)


@pytest.fixture(scope="module")
def recipe(tiny_backbone_path, photo_data, tmp_path_factory):
    """On a checkpoint without weight files."""
    folder = tmp_path_factory.mktemp("preview")
    ignore = shutil.ignore_patterns("*.safetensors")
    backbone = shutil.copytree(tiny_backbone_path(), folder / "no-weights", ignore=ignore)
    return make_recipe(backbone, folder / "run", photo_data / "MMEB-train")


@pytest.fixture(scope="module")
def found(recipe):
    return preview(recipe)


@pytest.fixture(scope="module", params=[JOINT, BRIDGE, CONTRASTIVE], ids=["joint", "bridge", "contrastive"])
def both(request, recipe, found, tiny_backbone_path):
    """A stage's preview, and its real trainer (with weights) and rows."""
    return found.stages[request.param], *real_trainer(recipe, request.param, tiny_backbone_path())


def real_trainer(recipe, index, backbone_path):
    stage = recipe.stages[index]
    args = recipe.arguments(stage, recipe.output_dir / "trainer", disable_tqdm=True)
    backbone = load_stage_backbone(recipe, stage, str(backbone_path), args.form(None))
    data = stage_data(stage, backbone, args)
    return build_trainer(stage, backbone, data, args, recipe.lora), backbone, data.rows or data.pairs


def terminal(found):
    """What the terminal prints, 100 columns wide."""
    text = io.StringIO()
    show(Console(file=text, width=100), found)
    return text.getvalue()


# --- samples -----------------------------------------------------------------------------------------


def test_samples_are_the_trainers_tensors(both):
    stage, trainer, backbone, rows = both
    index = {row.row_id: i for i, row in enumerate(rows)}
    for sample in stage.samples:
        if stage.name == "contrastive":
            row = trainer.train_dataset[index[sample.row_id]]
            tensors = {name: side for name, side in row.items() if name != "label"}
        else:
            tensors = {"sequence": trainer.train_dataset[0, index[sample.row_id]]}
        assert [part.name for part in sample.parts] == [name.replace("_", " ") for name in tensors]
        for part, sequence in zip(sample.parts, tensors.values(), strict=True):
            shown = [token.id for token in part.tokens for _ in range(token.count)]
            assert shown == sequence["input_ids"].tolist()
            assert part.length() == len(shown)
            assert (part.picture is None) == ("image_grid_thw" not in sequence)
            if part.picture is not None:
                height, width = (sequence["image_grid_thw"][0, 1:] // 2).tolist()
                assert (part.picture.columns, part.picture.rows) == (width, height)
                assert part.picture.image.size == (width * 28, height * 28)
            if "labels" in sequence:
                targets = [token.target_id for token in part.tokens for _ in range(token.count)]
                labels = [None if label == IGNORE_INDEX else label for label in sequence["labels"].tolist()]
                assert targets == labels
                masked = [token for token in part.tokens if token.kind == "masked"]
                assert masked
                for token in masked:
                    assert token.id == backbone.mask_token_id
                    assert token.target == visible(backbone.tokenizer.decode([token.target_id]))
            if "hidden_units" in sequence:
                is_image = sequence["input_ids"] == backbone.model.config.image_token_id
                assert list(part.picture.hidden) == sequence["hidden_units"][is_image].tolist()


def test_five_rows_a_stage_of_different_data_sets(found):
    for stage in found.stages:
        assert len({sample.row_id for sample in stage.samples}) == SAMPLES
        assert len({sample.row_id.rpartition("/")[0] for sample in stage.samples}) == SAMPLES


def test_blocks_stand_apart_in_the_bridge_alone(both):
    stage, trainer, backbone, rows = both
    index = {row.row_id: i for i, row in enumerate(rows)}
    for sample in stage.samples:
        for part in sample.parts:
            blocks = [(block, sum(token.count for token in tokens)) for block, tokens in part.blocks()]
            if stage.name != "eos_bridge":
                assert [block for block, _ in blocks] == [""]
                continue
            sequence = trainer.train_dataset[0, index[sample.row_id]]
            eos = int(sequence["eos_position"])
            assert blocks == [("A", eos), ("EOS", 1), ("B", len(sequence["input_ids"]) - eos - 1)]
            assert part.blocks()[1][1][0].id == backbone.eos_token_id
            assert part.instruction == rows[index[sample.row_id]].side.instruction


def test_a_picture_is_the_images_own_pixels(tiny_backbone):
    backbone = tiny_backbone()
    noise = torch.randint(0, 256, (56, 84, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sequence = backbone.encode_side(Side(image=Image.fromarray(noise.numpy())))  # 3 x 2 tokens, as it is
    picture = picture_of(sequence, backbone)
    assert (picture.columns, picture.rows) == (3, 2)
    assert picture.image.tobytes() == noise.numpy().tobytes()
    assert picture.describe() == "3 x 2 tokens (84 x 56 px)"


def test_hidden_patches_are_restored_in_one_picture_and_noise_in_the_other(found):
    for sample in found.stages[JOINT].samples:
        picture = sample.parts[0].picture
        assert sum(picture.hidden) == max(1, round(len(picture.hidden) / 2))
        for unit, hidden in enumerate(picture.hidden):
            left, top = 28 * (unit % picture.columns), 28 * (unit // picture.columns)
            box = (left, top, left + 28, top + 28)
            clean, seen = (image.crop(box).tobytes() for image in (picture.image, picture.corrupted))
            assert (clean != seen) is hidden
        assert all(sample.parts[0].picture.corrupted is None for sample in found.stages[BRIDGE].samples)


def test_a_negative_that_a_row_does_not_have_says_so(found, recipe):
    negatives = [sample.parts[2] for sample in found.stages[CONTRASTIVE].samples]
    assert any(part.note.startswith("left out of the loss") and part.length() == 1 for part in negatives)
    assert any(not part.note for part in negatives)


def test_the_same_recipe_shows_the_same(recipe, found, monkeypatch):
    again = preview(recipe)
    for stage, other in zip(found.stages, again.stages, strict=True):
        shown, repeated = ([[p.tokens for p in s.parts] for s in x.samples] for x in (stage, other))
        assert shown == repeated
        assert stage.measured == other.measured


# --- rows, lengths, steps ----------------------------------------------------------------------------


def test_rows_and_reasons(both):
    stage, _, _, rows = both
    assert stage.kept == len(rows)
    by_name = {entry.name: entry for entry in stage.rows}
    assert by_name["VisualNews_t2i"].left_out["empty query"] == 1
    if stage.name == "contrastive":
        assert by_name["MSCOCO_i2t"].validation == 4
    else:
        assert by_name["CIRR"].kept == 0
        assert by_name["CIRR"].left_out == {"its data set is not for this stage": 5}
        assert by_name["MSCOCO_t2i"].left_out["same image and text as an earlier row"] > 0


def test_steps_are_the_trainers(both):
    stage, trainer, _, rows = both
    planned = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    schedule = stage.schedule
    assert schedule.steps == planned[-1]
    assert schedule.steps_per_epoch == trainer.sampler.steps_per_epoch
    assert schedule.warmup_steps == trainer.args.get_warmup_steps(planned[-1])
    assert schedule.pairs_seen == schedule.steps * 8
    rest = schedule.sub_batch_rest + schedule.last_batch_rest
    assert len(rows) - rest == schedule.steps_per_epoch * 8 == len(trainer.sampler.order(0))
    if stage.name == "contrastive":
        assert schedule.sub_batch_rest == sum(entry.kept % 4 for entry in stage.rows)


def test_an_epoch_in_words():
    schedule = Schedule(10, 1, 1e-3, 16, 5, 27, 12)
    assert epoch_line(schedule, 119) == (
        "80 of 119 rows in 5 steps, without 27 that fill no run of sub_batch_size and 12 that fill no last batch; "
        "each epoch leaves out others"
    )


def test_lengths_are_the_trainers(both):
    stage, trainer, _, rows = both
    assert stage.measured.rows == len(rows)
    if stage.name == "contrastive":
        assert set(stage.measured.counts) == {"query", "target", "negative"}
        return
    sequences = [trainer.train_dataset[0, i] for i in range(len(rows))]
    counts = stage.measured.counts["sequence"]
    assert counts["total"] == [len(s["input_ids"]) for s in sequences]
    assert counts["masked"] == [int((s["labels"] != IGNORE_INDEX).sum()) for s in sequences]
    assert counts["image"] == [int(s["image_grid_thw"].prod()) // 4 for s in sequences]
    markers = 3  # of the image, and EOS
    assert counts["text"] == [t - i - markers for t, i in zip(counts["total"], counts["image"], strict=True)]
    if stage.name == "eos_bridge":
        ends = [len(s["input_ids"]) - int(s["eos_position"]) - 1 for s in sequences]
        assert counts["block B"] == ends


def test_only_a_sample_of_many_rows_is_measured(recipe, monkeypatch):
    monkeypatch.setattr(cocoa.preview, "MOST_LENGTHS", 10)
    only = dataclasses.replace(recipe, stages=recipe.stages[:1])
    found = preview(only)
    assert found.stages[0].measured.rows == 10
    assert f"a random 10 of {found.stages[0].kept} rows" in " ".join(terminal(found).split())


def test_shortened_rows_are_counted(recipe, found, tiny_backbone_path, photo_data, tmp_path):
    assert [stage.measured.shortened for stage in found.stages] == [0, 0, 0]
    limits = {"joint_reconstruction": 34, "eos_bridge": 90, "contrastive": 90}
    short = make_recipe(
        recipe.backbone,
        tmp_path,
        photo_data / "MMEB-train",
        **{name: {"max_length": length} for name, length in limits.items()},
    )
    for before, after in zip(found.stages, preview(short).stages, strict=True):
        limit = limits[after.name]
        assert after.measured.longest("total") < before.measured.longest("total")
        assert 0 < after.measured.shortened <= after.measured.rows
        if after.name == "joint_reconstruction":  # room for text beside the largest image
            texts = before.measured.counts["sequence"]["text"]
            assert after.measured.shortened == sum(text > limit - 16 - 3 for text in texts)


# --- parameters and cost -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_are_the_real_ones(tiny_backbone_path, photo_data, tmp_path, model_type, lora, tied):
    path = tiny_backbone_path(model_type, tied)
    recipe = make_recipe(path, tmp_path, photo_data / "MMEB-train", lora, model_type)
    for index, stage in enumerate(preview(recipe).stages):
        trainer, _, _ = real_trainer(recipe, index, path)
        assert stage.trained == sum(parameter.numel() for _, parameter in trainable(trainer.model))
        assert stage.parameters == sum(parameter.numel() for parameter in trainer.model.parameters())
        assert ("patch decoder" in stage.trainable) == (index == JOINT)
        assert ("rows of new tokens" in stage.trainable) == (lora and index != CONTRASTIVE)
        assert stage.estimate.memory.weights == 4 * stage.parameters  # float32
        assert stage.estimate.memory.states == 12 * stage.trained


def test_adapters_and_attention_are_named(found):
    assert "q_proj x 3" in found.stages[0].adapted and "fc1 x 2" in found.stages[0].adapted
    assert found.stages[BRIDGE].attention == ("strict layout (A sees A and EOS, EOS sees A and EOS, B sees EOS and B)")
    assert found.stages[CONTRASTIVE].attention == "bidirectional; embedding: EOS"


@pytest.mark.slow
def test_devices_share_batch_and_time(recipe, found):
    two = preview(recipe, tflops=200.0, devices=2)
    for one, half in zip(found.stages, two.stages, strict=True):
        hours = pytest.approx(one.estimate.hours)  # twice the devices at half the speed
        assert half.estimate.hours == hours or (one.name == "contrastive" and half.estimate.hours < one.estimate.hours)
        longest = one.measured.longest("total")
        rows = (200 // longest,) * 2 if one.name == "contrastive" else (8, 4)  # tokens_per_pass bounds the last stage
        assert (one.estimate.rows_at_once, half.estimate.rows_at_once) == rows
    with pytest.raises(CocoaError, match=r"joint_reconstruction: batch_size 8 does not divide by 3 devices"):
        preview(recipe, devices=3)
    with pytest.raises(CocoaError, match="tflops"):
        preview(recipe, tflops=0)
    with pytest.raises(CocoaError, match="with split, devices must be 2 or more"):
        preview(recipe, split=True)
    for held, shared in zip(two.stages, preview(recipe, devices=2, split=True).stages, strict=True):
        before, after = held.estimate.memory, shared.estimate.memory
        bytes_each = 16 if held.name == "contrastive" else 12  # its passes add gradients up beside those exchanged
        assert after.states == before.states * 12 // bytes_each // 2
        assert after.weights > before.weights // 2  # a tiny model is mostly what is whole


def test_two_layers_and_all_that_is_outside_them_are_whole():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 3), nn.Linear(2, 3), nn.LayerNorm(5))
    model[3].requires_grad_(False)
    assert whole_at_once(model, ["Linear"], frozen_bytes=2) == 10 * 2 + 2 * 9 * (4 + 4)


@pytest.mark.slow
def test_a_batch_that_fits_is_embedded_once(recipe, found, tmp_path, photo_data):
    whole = make_recipe(recipe.backbone, tmp_path, photo_data / "MMEB-train", contrastive={"tokens_per_pass": 10_000})
    once, twice = preview(whole).stages[CONTRASTIVE].estimate, found.stages[CONTRASTIVE].estimate
    assert once.rows_at_once == 8 * 3  # queries, targets and hard negatives stay in memory together
    assert once.flops < twice.flops
    kept = make_recipe(recipe.backbone, tmp_path, photo_data / "MMEB-train", contrastive={"passes_kept": 100})
    all_kept = preview(kept).stages[CONTRASTIVE].estimate
    assert all_kept.flops == once.flops and all_kept.rows_at_once == twice.rows_at_once
    assert all_kept.memory.activations > twice.memory.activations


def test_a_stages_own_mistakes_are_named(recipe, tmp_path, photo_data):
    large = make_recipe(recipe.backbone, tmp_path, photo_data / "MMEB-train", eos_bridge={"batch_size": 4096})
    with pytest.raises(CocoaError, match=r"stages\.eos_bridge: batch_size 4096 is more than"):
        preview(large)


@pytest.mark.slow
def test_rows_that_training_leaves_out_are_not_shown(recipe, tmp_path):
    rows = [{"query": {"image": f"{i}.png"}, "target": {"text": f"row {i}"}} for i in range(16)]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    for i in range(16):
        Image.new("RGB", (60, 60), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"\x89PNG torn")
    broken = make_recipe(recipe.backbone, tmp_path / "run", tmp_path / "mine.json")
    with pytest.raises(CocoaError, match=r"row mine/4: .*3\.png: not"):
        preview(broken)
    skip = {"data": {"on_bad_row": "skip"}}
    kept = make_recipe(recipe.backbone, tmp_path / "run", tmp_path / "mine.json", **dict.fromkeys(NAMES, skip))
    for stage in preview(kept).stages:
        assert stage.measured.rows < stage.kept and not any(row.row_id == "mine/4" for row in stage.samples)


def test_no_weights_are_loaded(recipe, found):
    backbone = load_stage_backbone(recipe, recipe.stages[0], recipe.backbone, Form(), weights=False)
    assert {parameter.device.type for parameter in backbone.model.parameters()} == {"meta"}
    assert len(found.stages) == 3, "made from a folder without weight files"


# --- terminal and HTML -------------------------------------------------------------------------------


def test_the_terminal_says_it_all(found):
    text = terminal(found)
    joined = " ".join(text.split())
    for stage in found.stages:
        assert f": {stage.name} ─" in text
        for sample in stage.samples:
            assert sample.row_id in text
    assert "its data set is not for this stage" in text and "empty query" in text
    assert re.search(r"image +\d x \d tokens \(\d+ x \d+ px\), \d+ of \d+ hidden", text)
    assert "<|vision_start|>[image " in text and "<|im_end|>" in text and "‹" in text
    assert re.search(r"block A +<.*\n(.*\n)*? +EOS +<\|im_end\|> *\n +block B ", text)
    assert all(sentence in joined for sentence in ASSUMPTIONS)
    assert max(map(len, text.splitlines())) <= 100


def test_the_page_stands_alone_and_shows_everything(found):
    page = to_html(found)
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"<(script|link|iframe)|@import|url\(|src=\"(?!data:)|href=\"(?!#)", page)
    assert page.count("<article") == SAMPLES * 3
    assert "prefers-color-scheme: dark" in page
    pictures = [part.picture for stage in found.stages for s in stage.samples for part in s.parts if part.picture]
    assert page.count("data:image/jpeg;base64,") == len(pictures) + sum(p.corrupted is not None for p in pictures)
    assert page.count('class="hidden"') == sum(sum(picture.hidden) for picture in pictures)
    masked = sum(t.kind == "masked" for st in found.stages for s in st.samples for p in s.parts for t in p.tokens)
    assert page.count('class="masked" title=') == masked
    assert page.count("block-A") > 5 and "its data set is not for this stage" in page


def test_text_from_the_data_is_inert(recipe, tmp_path):
    evil = '<script>alert(1)</script> [bold]x[/bold] \x1b[31m & "q" {{ 1234 * 1001 }}'
    Image.new("RGB", (56, 56), "teal").save(tmp_path / "a.png")
    name = "set <i>&"
    with (tmp_path / f"{name}.jsonl").open("w") as file:
        for i in range(30):
            query = {"image": "a.png", "instruction": f"<b>{evil}"}
            file.write(json.dumps({"query": query, "target": {"text": f"{evil} {i}"}}) + "\n")
    found = preview(make_recipe(recipe.backbone, tmp_path / "run", tmp_path / f"{name}.jsonl"))
    page, text = to_html(found), terminal(found)
    assert not re.search(r"<script|<b><|<i>&|\x1b|1235234", page)
    assert "&lt;b&gt;&lt;script&gt;" in page and "set &lt;i&gt;&amp;" in page
    assert "\x1b" not in text and "[bold]x[/bold]" in "".join(text.split())
    assert name in text


def test_command_writes_the_page(recipe, tiny_backbone_path, photo_data, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"backbone: {tiny_backbone_path()}\noutput_dir: {tmp_path / 'run'}\ndata: {{train: {photo_data}/MMEB-train}}\n"
        "image: {train_tokens: [4, 16]}\nstages: [eos_bridge: {batch_size: 8, report_to: none}]\n"
    )
    level = logging.getLogger("cocoa").level
    result = CliRunner().invoke(app, ["preview", str(file), "stages.eos_bridge.max_steps=3"])
    assert result.exit_code == 0, result.output
    assert "3 of 8 pairs each" in result.output
    assert (tmp_path / "run" / "preview.html").is_file()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["preview.html"]
    other = tmp_path / "deep" / "p.html"
    assert CliRunner().invoke(app, ["preview", str(file), "--html", str(other)]).exit_code == 0
    assert other.is_file()
    refused = CliRunner().invoke(app, ["preview", str(file), "--html", str(file / "p.html")])
    assert isinstance(refused.exception, CocoaError)
    logging.getLogger("cocoa").setLevel(level)


def test_histogram_bins_and_bars():
    shape = Histogram.of([1, 1, 2, 8], most_bins=4)
    assert (shape.bins, shape.least, shape.median, shape.most) == ([3, 0, 0, 1], 1, 1.5, 8)
    assert shape.bars() == "█  ▃"
    assert Histogram.of([7]).bins == [1]
    assert sum(Histogram.of(list(range(1000))).bins) == 1000


def test_what_does_not_print_is_made_visible():
    assert visible("a\nb\tc\x1b[0m\u200b é 猫") == "a⏎b⇥c\\x1b[0m\\u200b é 猫"
    masked = [Token(1, "<|mask|>", "masked", target_id=2, target=" red"), Token(3, " cup", "text")]
    masked.append(Token(1, "<|mask|>", "masked", target_id=4, target=" "))
    assert tokens_text(masked).plain == " ‹red› cup ‹␣›"


# ------------------------------------------------------------------------------------------------- compression


@pytest.mark.slow
def test_a_dialogue_is_shown_behind_its_compression_tokens(tiny_backbone_path, photo_data, photo_dialogues, tmp_path):
    """The second stage takes over the form that the first one would leave."""
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path / "run", "dora")
    options = {"batch_size": 4, "compression_tokens": 3, "data": {"train": str(photo_dialogues), "validation_rows": 0}}
    content["stages"] = [{"compression": options}, content["stages"][2]]
    content["stages"][1]["contrastive"]["dataset_sampling"] = "uniform"
    found = preview(parse_recipe(content))
    compression, contrastive = found.stages
    assert compression.attention == "causal; the dialogue sees the 3 compression tokens and nothing before them"
    assert contrastive.attention == "causal; embedding: mean of the compression tokens"
    assert compression.trainable["rows of new tokens"] == contrastive.trainable["rows of new tokens"] == 3 * 64
    for sample in compression.samples:
        blocks = sample.parts[0].blocks()
        assert [block for block, _ in blocks] == ["A", "C", "dialogue"]
        assert [(token.text, token.count) for token in blocks[1][1]] == [("3 compression tokens", 3)]
        answers = "".join(token.text for token in blocks[2][1] if token.kind == "answer")
        assert answers == "the cup<|im_end|>two<|im_end|>"
        assert compression.measured.counts["sequence"]["answers"][0] == sum(
            token.kind == "answer" for token in blocks[2][1]
        )
    for sample in contrastive.samples:
        assert all(part.tokens[-1].text == "3 compression tokens" for part in sample.parts)
    assert "draws in" in epoch_line(contrastive.schedule, contrastive.kept)
    page = to_html(found)
    assert "C1 … CK" in page and 'class="answer"' in page
    assert compression.measured.shortened == 0
    content["stages"][0]["compression"]["max_length"] = compression.measured.longest("total") - 1
    cut = preview(parse_recipe(content)).stages[0].measured
    assert cut.shortened > 0 and cut.longest("total") < compression.measured.longest("total")
