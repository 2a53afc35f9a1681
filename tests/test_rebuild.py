"""What the stages rebuild, looked at: the trained decoder kept, pixels put back in place, texts through EOS."""

from collections import defaultdict

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops
from short_run import short_recipe
from toy import arguments, content_rows, row_of

from cocoa.checkpoint import save_checkpoint
from cocoa.corruption import IGNORE_INDEX
from cocoa.errors import CocoaError
from cocoa.packing import pack
from cocoa.pairs import ContentPair, Side
from cocoa.pipeline import train
from cocoa.preview_pictures import picture_of, to_image
from cocoa.rebuild import rebuild_images, rebuild_texts, swapped, words_of
from cocoa.recipe import parse_recipe
from cocoa.stages import eos_bridge, joint_reconstruction
from cocoa.stages.joint_reconstruction import DECODER_NAME, load_patch_decoder, save_patch_decoder
from cocoa.stages.reconstruction import Reconstructor

ARCHITECTURES = ["qwen2_vl", "qwen2_5_vl"]
ROWS = 5


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def difference(one, other):
    """The largest difference of any pixel value."""
    return max(high for _, high in ImageChops.difference(one, other).getextrema())


@pytest.fixture(scope="module", params=ARCHITECTURES)
def joint(request, tiny_backbone, tmp_path_factory):
    """(checkpoint folder, trainer) of a joint reconstruction stage whose decoder has changed since it was made."""
    folder = tmp_path_factory.mktemp(request.param)
    args = arguments(joint_reconstruction.JointReconstructionArguments, folder / "trainer", batch_size=4, max_steps=2)
    trainer = joint_reconstruction.JointReconstructionTrainer(
        tiny_backbone(request.param), args, content_rows(8, bridge=False)
    )
    trainer.train()
    save(folder, trainer)
    save_patch_decoder(trainer.model.patch_decoder, folder)
    return folder, trainer


@pytest.fixture(scope="module")
def bridged(tiny_backbone, tmp_path_factory):
    """(checkpoint folder, trainer) of an EOS-bridge stage that has learned a few rows by heart.

    All texts are equally long, so that the number of masks tells nothing.
    """
    folder, backbone = tmp_path_factory.mktemp("bridged"), tiny_backbone()
    options = {"batch_size": 2, "max_steps": 150, "learning_rate": 4e-3, "text_mask_ratio": 1.0}
    args = arguments(eos_bridge.EosBridgeArguments, folder / "trainer", **options)
    lengths = defaultdict(list)
    for row in content_rows(24, bridge=True):
        lengths[len(backbone.encode_text(row.text))].append(row)
    rows = next(rows for rows in lengths.values() if len(rows) >= 2)[:2]
    trainer = eos_bridge.EosBridgeTrainer(backbone, args, rows)
    trainer.train()
    save(folder, trainer)
    return folder, trainer


def save(folder, trainer):
    trainer.model.eval()
    save_checkpoint(trainer.train_dataset.backbone, folder, {"stage": "toy"})


# ----------------------------------------------------------------------------------------------- the decoder


def test_the_decoder_is_saved_with_its_checkpoint_and_gives_equal_pixels(joint):
    folder, trainer = joint
    dataset = trainer.train_dataset
    loaded = load_patch_decoder(folder, dataset.backbone).eval()
    batch = row_of(trainer, [dataset[0, i] for i in range(4)])
    seen = {}
    handle = trainer.model.patch_decoder.register_forward_hook(lambda m, i, o: seen.update(inputs=i, pixels=o))
    with torch.no_grad():
        trainer.model(**batch)
        handle.remove()
        assert torch.equal(loaded(*seen["inputs"]), seen["pixels"])


@pytest.mark.slow
def test_a_run_leaves_the_trained_decoder_in_the_first_stage_only(tiny_backbone_path, photo_data, tmp_path):
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path, "dora")
    recipe = parse_recipe(content | {"stages": content["stages"][:2], "dtype": "bfloat16"})
    train(recipe)
    assert [path.parents[1].name for path in tmp_path.rglob(DECODER_NAME)] == ["1-joint_reconstruction"]
    folder = tmp_path / "1-joint_reconstruction"
    rebuilt = rebuild_images(folder, content_rows(2, bridge=False))
    assert all(np.isfinite(image.error) for image in rebuilt)
    with pytest.raises(CocoaError, match=r"final.*no patch decoder here; name the checkpoint of a joint"):
        rebuild_images(tmp_path / "final", content_rows(2, bridge=False))


# -------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("size", [(112, 56), (84, 84), (56, 112)])
def test_the_processor_s_pixels_put_together_are_the_picture(tiny_backbone, architecture, size):
    backbone, picture = tiny_backbone(architecture), noise(*size)
    pixels = backbone.pixels.values(backbone.encode_side(Side(image=picture))["pixel_values"])
    columns, rows = (side // 28 for side in size)
    assert difference(to_image(pixels, rows, columns, backbone), picture) <= 1


def test_rebuilt_pictures_differ_from_the_original_on_hidden_units_alone(joint):
    folder, trainer = joint
    backbone = trainer.train_dataset.backbone
    rows = [ContentPair(Side(image=noise(112, 84, i)), "a red cup on a table", f"toy/{i}") for i in range(ROWS)]
    for row, rebuilt in zip(rows, rebuild_images(folder, rows, seed=1, batch_size=2), strict=True):
        assert difference(rebuilt.original, row.side.image) <= 1
        generator = joint_reconstruction.row_generator(1, joint_reconstruction.NAME, 0, row.row_id)
        sample = joint_reconstruction.corrupt(backbone, row, 4096, 0.2, 0.5, generator)
        hidden = picture_of(sample, backbone).hidden
        assert sum(hidden) == 6  # round(0.5 * 12)
        for index, is_hidden in enumerate(hidden):
            left, top = index % 4 * 28, index // 4 * 28
            boxes = [one.crop((left, top, left + 28, top + 28)) for one in pictures_of(rebuilt)]
            assert (difference(boxes[0], boxes[1]) > 50) == is_hidden
            assert (difference(boxes[0], boxes[2]) > 50) == is_hidden


def pictures_of(rebuilt):
    return rebuilt.original, rebuilt.masked, rebuilt.rebuilt


def test_the_error_is_the_stage_s_patch_loss(joint):
    folder, trainer = joint
    rows = trainer.train_dataset.rows
    seed = trainer.args.seed
    rebuilt = rebuild_images(folder, rows, seed=seed)
    with torch.no_grad():
        for index, image in enumerate(rebuilt):
            total, count = trainer.model(**row_of(trainer, [trainer.train_dataset[0, index]]))["patch"]
            assert image.error == pytest.approx((total / count).item(), rel=1e-4)


def test_a_decoder_that_knows_the_pixels_rebuilds_the_picture(joint, monkeypatch):
    """Every unit of every row back in its place, whatever the decoder is."""
    folder, trainer = joint
    backbone = trainer.train_dataset.backbone
    rows = [ContentPair(Side(image=noise(84, 112, i)), "a red cup", f"toy/{i}") for i in range(3)]
    targets = []
    corrupt = joint_reconstruction.corrupt

    def keep(*args):
        sample = corrupt(*args)
        targets.append(sample["target_pixels"])
        return sample

    class Oracle(torch.nn.Module):
        def forward(self, states, mask, positions, hidden_units):
            return torch.cat(targets)

    monkeypatch.setattr(joint_reconstruction, "load_patch_decoder", lambda *_: Oracle())
    monkeypatch.setattr(joint_reconstruction, "corrupt", keep)
    for row, rebuilt in zip(rows, rebuild_images(folder, rows), strict=True):
        assert difference(rebuilt.rebuilt, row.side.image) <= 1
        assert rebuilt.error == 0 < rebuilt.flat_error
    assert backbone.unit_size == targets[0].shape[1]


def test_a_flat_guess_has_no_error_on_a_flat_picture(joint):
    folder, _ = joint
    flat, half = Image.new("RGB", (84, 84), "teal"), Image.new("RGB", (84, 84), "white")
    half.paste("black", (0, 0, 42, 84))
    rows = [ContentPair(Side(image=image), "cup", f"toy/{i}") for i, image in enumerate((flat, half))]
    found = rebuild_images(folder, rows, patch_mask_ratio=1.0)
    assert found[0].flat_error == pytest.approx(0, abs=1e-6)
    # black and white in equal shares: half the range from the mean, which the processor divides by its deviations
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    assert found[1].flat_error == pytest.approx(((0.5 / std) ** 2).mean(), rel=1e-3)


# ----------------------------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("layout", ["published", "strict"])
def test_texts_are_rebuilt_as_the_stage_predicts_them_in_batches_and_alone(bridged, layout):
    folder, trainer = bridged
    dataset = trainer.train_dataset
    model = Reconstructor(dataset.backbone).eval()
    for index, text in enumerate(rebuild_texts(folder, dataset.rows, layout, batch_size=2)):
        batch = pack([dataset[0, index]], dataset.backbone, layout)  # the stage hides all of B here
        with torch.no_grad():
            sums = model(**batch)
        assert (text.tokens_right, text.tokens) == (sums["accuracy"][0].item(), sums["accuracy"][1].item())
        assert text.tokens == int((batch["labels"] != IGNORE_INDEX).sum())
        assert text.truth == dataset.rows[index].text and text.side is dataset.rows[index].side
        assert (text.text == text.truth) == (text.share == 1)


def test_what_was_learned_by_heart_is_rebuilt_but_not_from_another_picture(bridged):
    folder, trainer = bridged
    rows = trainer.train_dataset.rows
    assert [text.share for text in rebuild_texts(folder, rows)] == [1.0, 1.0]
    others = rebuild_texts(folder, swapped(rows))
    assert all(text.share < 0.5 for text in others)
    assert [text.text for text in others] == [row.text for row in (*rows[1:], rows[0])], "not what the picture says"


def test_words_are_wrong_where_one_of_their_tokens_is(tiny_backbone):
    tokenizer = tiny_backbone().tokenizer

    def judged(truth, guess):
        pad = [tokenizer.encode(text) for text in (guess, truth)]
        assert len(pad[0]) == len(pad[1]), "choose texts of equal length"
        words = words_of(*pad, tokenizer)
        assert "".join(word.text for word in words) == guess
        return [(word.text, word.right) for word in words]

    assert judged("a red cup", "a red cup") == [("a", True), (" red", True), (" cup", True)]
    assert judged("a red cup", "a red cat") == [("a", True), (" red", True), (" cat", False)]
    assert judged("a red cup.", "a red cat.")[2:] == [(" cat", False), (".", True)]


def test_swapped_rows_keep_their_text_and_data_set():
    rows = [ContentPair(Side(text=f"{name}{i}"), f"B of {name}{i}", f"{name}/{i}") for name in "xy" for i in range(3)]
    alone = ContentPair(Side(text="z"), "B", "z/0")
    found = swapped([*rows, alone])
    assert [(row.row_id, row.text) for row in found] == [(row.row_id, row.text) for row in rows]
    for before, after in zip(rows, found, strict=True):
        assert after.side != before.side and after.side.text[0] == before.dataset


def test_an_error_names_its_row(bridged, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    row = ContentPair(Side(image=str(tmp_path / "broken.png")), "text", "toy/7")
    with pytest.raises(CocoaError, match=r"row toy/7: .*broken\.png: not a readable image"):
        rebuild_texts(bridged[0], [row])
