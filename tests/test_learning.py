"""Each stage learns: it overfits 32 pairs, and EOS carries a whole caption across the bridge."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from toy import arguments, captions, content_rows, pictures, row_of, toy_pairs

from cocoa.backbone import load_backbone
from cocoa.catalogue import stage_rows
from cocoa.checkpoint import as_sentence_transformer
from cocoa.embedding import Embedder
from cocoa.inputs import ImageBudget
from cocoa.pairs import Pair, Side
from cocoa.sources import DataConfig, load_pairs
from cocoa.stages import contrastive, eos_bridge, joint_reconstruction
from cocoa.tiny import write_tiny_backbone
from cocoa.validation import InPoolEvaluator

pytestmark = pytest.mark.slow
PAIRS = 32
RUN = {"batch_size": PAIRS, "learning_rate": 3e-3, "logging_steps": 10}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def backbone(request, tmp_path_factory):
    """A tiny backbone whose tokenizer knows the captions' words."""
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_backbone(folder, captions(100), request.param)
    return lambda: load_backbone(folder, ImageBudget((4, 16)), attention="bidirectional")


def last(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry][-1]


def test_joint_reconstruction_overfits(backbone, tmp_path):
    """One fixed mask a row, so that there is something to memorise."""
    args = arguments(joint_reconstruction.JointReconstructionArguments, tmp_path, max_steps=200, **RUN)
    trainer = joint_reconstruction.JointReconstructionTrainer(backbone(), args, content_rows(PAIRS, False))
    trainer.train_dataset = FixedMasks(trainer.train_dataset)
    trainer.train_or_resume()
    first = next(entry for entry in trainer.state.log_history if "patch_loss" in entry)
    assert last(trainer, "token_accuracy") > 0.95
    assert last(trainer, "patch_loss") < 0.5 * first["patch_loss"]


class FixedMasks(torch.utils.data.Dataset):
    """The corrupted samples of the first epoch in every epoch."""

    def __init__(self, dataset):
        self.samples = [dataset[0, row] for row in range(len(dataset))]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        return self.samples[key[1]]


@pytest.mark.parametrize("layout", ["published", "strict"])
def test_eos_carries_a_caption(backbone, tmp_path, layout):
    """With all of B masked, B can be read from EOS alone; with the wrong image, only what captions share."""
    rows = content_rows(PAIRS, True)
    args = arguments(eos_bridge.EosBridgeArguments, tmp_path, max_steps=200, text_mask_ratio=1.0, layout=layout, **RUN)
    loaded = backbone()
    trainer = eos_bridge.EosBridgeTrainer(loaded, args, rows)
    trainer.train_dataset = FixedMasks(trainer.train_dataset)
    trainer.train_or_resume()

    model = trainer.model.eval()
    batch = row_of(trainer, trainer.train_dataset.samples)
    with torch.no_grad():
        right, count = model(**batch)["accuracy"]
        pixels = batch["pixel_values"].reshape(PAIRS, -1, batch["pixel_values"].shape[1])
        batch["pixel_values"] = pixels.roll(1, 0).flatten(0, 1)
        wrong, _ = model(**batch)["accuracy"]
    assert count == sum(len(loaded.encode_text(row.text)) for row in rows)
    by_chance = 1 / len(set(" ".join(captions(PAIRS)).split()))
    assert right / count > 0.9
    assert wrong / count < 3 * by_chance


def test_eos_carries_the_captions_of_real_photographs(photo_data, tmp_path):
    """As above on 32 photographs with a caption each.

    With its neighbour's image a row falls below the best blind guess. That guess is not nothing: B's own length
    is in sight, and some lengths have one caption only.
    """
    pairs = load_pairs(DataConfig(train=str(photo_data / "MMEB-train"), subsets=["MSCOCO_i2t"]), seed=0).pairs
    rows = list(stage_rows(pairs, eos_bridge.NAME))[:PAIRS]
    write_tiny_backbone(tmp_path / "backbone", [row.text for row in rows])
    backbone = load_backbone(tmp_path / "backbone", ImageBudget((4, 16)), attention="bidirectional")
    args = arguments(eos_bridge.EosBridgeArguments, tmp_path, max_steps=200, text_mask_ratio=1.0, **RUN)
    trainer = eos_bridge.EosBridgeTrainer(backbone, args, rows)
    trainer.train_dataset = FixedMasks(trainer.train_dataset)
    trainer.train_or_resume()

    shifted = [replace(row, side=replace(row.side, image=rows[i - 1].side.image)) for i, row in enumerate(rows)]
    wrong_dataset = eos_bridge.EosBridgeDataset(shifted, backbone, args)
    model = trainer.model.eval()
    with torch.no_grad():
        right, count = model(**row_of(trainer, trainer.train_dataset.samples))["accuracy"]
        wrong, _ = model(**row_of(trainer, [wrong_dataset[0, i] for i in range(PAIRS)]))["accuracy"]
    ids = [backbone.encode_text(row.text) for row in rows]
    by_length = [[caption for caption in ids if len(caption) == length] for length in {len(c) for c in ids}]
    blind = sum(Counter(column).most_common(1)[0][1] for same in by_length for column in zip(*same, strict=True))
    assert count == sum(map(len, ids))
    assert right / count > 0.9
    assert wrong < blind < 0.7 * count


def test_contrastive_overfits(backbone, tmp_path):
    pairs = toy_pairs(PAIRS)
    loaded = backbone()
    args = arguments(contrastive.ContrastiveArguments, tmp_path, max_steps=150, **RUN)
    trainer = contrastive.ContrastiveTrainer(loaded, args, pairs)
    trainer.train_or_resume()
    embedder = Embedder(as_sentence_transformer(loaded), loaded.images)
    assert InPoolEvaluator(pairs, embedder)()["validation_hit@1"] > 0.95
    shuffled = [
        Pair(Side("", "", image), pair.target, (), "toy0", i)
        for i, (image, pair) in enumerate(zip(pictures(PAIRS, 1), pairs, strict=True))
    ]
    assert InPoolEvaluator(shuffled, embedder)()["validation_hit@1"] < 0.3
