"""What the embedding holds: linear probes on EOS' final state after each stage, and captions decoded through EOS.

    python studies/probes.py

- `probes.csv`: a ridge regression from the embedding of a picture to each of its attributes, fitted on 2,000 scenes of
  the training split and looked at on 1,000 of validation; area under the ROC curve in percent (50 is chance), the mean
  over the attributes of a kind. `bound` asks for shape and colour of one object, `cell` for which cells are taken.
- `decoded.csv`: captions of validation scenes decoded word by word through EOS alone, the length given: how many of the
  words that tell of the picture are right, and how many with another picture's EOS.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import torch
from bridge import MODELS, PAIRS, layout_of, rows_of, train
from bridge import phases_of as bridge_phases
from deciding import BACKBONE, CONTRASTIVE, STEPS
from lab import Lab, Start, open_lab
from nats import AT_ONCE, CLASSES, batch_of, token_classes, with_other_images
from PIL import Image
from results import FOLDER, Row, work
from torch import Tensor

from cocoa.attention import BridgeLayout
from cocoa.backbone import Backbone
from cocoa.corruption import IGNORE_INDEX
from cocoa.pairs import ContentPair, Side
from cocoa.scenes.world import COLOURS, SHAPES, SIZES, TEXTURES, Scene, picture, sample_scene
from cocoa.stages.reconstruction import Reconstructor

PROBES, DECODED = FOLDER / "probes.csv", FOLDER / "decoded.csv"
FITTED, LOOKED_AT = 2000, 1000
INSTRUCTION = "Find an image caption describing the given image."
PENALTIES = (0.01, 0.1, 1.0, 10.0)
STAGE_3 = {"contrastive alone": "stage 0", "stage 3 after published": "published", "stage 3 after full": "full"}
"""Models behind a contrastive stage, and what came before it."""
SEED, CONTRASTIVE_RATE = 101, 1e-3


def scenes(split: str, number: int) -> list[Scene]:
    """Scenes of two or three objects."""
    rng = random.Random(f"probes/{split}")
    return [sample_scene(rng, (2, 3), split) for _ in range(number)]


def _pictures(found: Sequence[Scene]) -> list[Image.Image]:
    return [picture(scene) for scene in found]


def attributes(found: Sequence[Scene]) -> dict[str, Tensor]:
    """By kind, (scenes, attributes) booleans: whether the scene has it."""
    kinds = {
        "colour": lambda thing: [thing.colour == value for value in COLOURS],
        "shape": lambda thing: [thing.shape == value for value in SHAPES],
        "texture": lambda thing: [thing.texture == value for value in TEXTURES],
        "size": lambda thing: [thing.size == value for value in SIZES],
        "cell": lambda thing: [thing.cell == value for value in range(9)],
        "bound": lambda thing: [(thing.shape, thing.colour) == (s, c) for s in SHAPES for c in COLOURS],
    }
    table = {
        name: torch.tensor([[any(column) for column in zip(*map(tell, scene.things), strict=True)] for scene in found])
        for name, tell in kinds.items()
    }
    return table | {"count": torch.tensor([[len(scene.things) == 3] for scene in found])}


def auc(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of (N, K) scores and booleans, the mean over the columns that vary."""
    values = []
    for column, own in zip(scores.T, truth.T, strict=True):
        ranks = column.argsort().argsort().double() + 1
        yes, no = int(own.sum()), int((~own).sum())
        if yes and no:
            values.append(((ranks[own].sum() - yes * (yes + 1) / 2) / (yes * no)).item())
    return sum(values) / len(values)


def ridge(vectors: Tensor, targets: Tensor, penalty: float) -> Tensor:
    """(D + 1, K) weights of a ridge regression with intercept, from (N, D) to (N, K)."""
    x = _with_one(vectors)
    weigh = penalty * torch.eye(x.shape[1], dtype=x.dtype)
    weigh[-1, -1] = 0
    return torch.linalg.solve(x.T @ x + weigh, x.T @ targets.double())


def _with_one(vectors: Tensor) -> Tensor:
    return torch.cat([vectors.double(), torch.ones(len(vectors), 1, dtype=torch.double)], dim=1)


def probe(lab: Lab, backbone: Backbone) -> list[Row]:
    """The area under the curve of every kind of attribute; the penalty is chosen on a fifth of the fitted scenes."""
    tables, vectors = {}, {}
    for split, number in (("train", FITTED), ("validation", LOOKED_AT)):
        found = lab.kept(f"probes {split}", partial(scenes, split, number))
        images = lab.kept(f"pictures {split}", partial(_pictures, found))
        tables[split] = attributes(found)
        sides = [Side(INSTRUCTION, image=image) for image in images]
        vectors[split] = lab.embed_sides(backbone, sides, f"probes {split}")
    mean, spread = vectors["train"].mean(0), vectors["train"].std(0) + 1e-6
    fitted, looked_at = ((vectors[split] - mean) / spread for split in ("train", "validation"))
    cut = FITTED * 4 // 5
    rows = []
    for kind, truth in tables["train"].items():
        chosen = max(
            PENALTIES,
            key=lambda p: auc(_with_one(fitted[cut:]) @ ridge(fitted[:cut], truth[:cut], p * cut), truth[cut:]),
        )
        weights = ridge(fitted, truth, chosen * FITTED)
        rows.append(
            {"kind": kind, "auc": f"{100 * auc(_with_one(looked_at) @ weights, tables['validation'][kind]):.1f}"}
        )
    return rows


@torch.inference_mode()
def decode(backbone: Backbone, rows: Sequence[ContentPair], layout: BridgeLayout) -> list[tuple[Tensor, Tensor]]:
    """For each row (words,) ids of B decoded from left to right through EOS alone, and the right ones."""
    model = Reconstructor(backbone).eval()
    found: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(rows), AT_ONCE):
        batch = batch_of(backbone, rows[start : start + AT_ONCE], layout)
        labels, starts = batch["labels"][0], batch["eos_position"] + 1  # (N,), (B,) where each B starts
        rest = batch["lengths"] - (starts - batch["lengths"].cumsum(0) + batch["lengths"])  # (B,) tokens of each B
        for place in range(int(rest.max())):
            tokens = model.predict(**batch).tokens
            now = torch.isin(tokens.positions, starts[rest > place] + place)
            batch["input_ids"][0, tokens.positions[now]] = tokens.likeliest[now]
        ids = batch["input_ids"][0, labels != IGNORE_INDEX].cpu().split(rest.tolist())
        found += zip(ids, labels[labels != IGNORE_INDEX].cpu().split(rest.tolist()), strict=True)
    return found


def decoded(backbone: Backbone, rows: Sequence[ContentPair], layout: BridgeLayout) -> list[Row]:
    """How many words of each class are right, in percent, with the row's own picture and with another's."""
    shares = []
    for these in (rows, with_other_images(rows)):
        ids, truth = (torch.cat(parts) for parts in zip(*decode(backbone, these, layout), strict=True))
        shares.append((ids == truth, token_classes(backbone, truth)))
    result = []
    for name in CLASSES:
        mine = torch.tensor([each == name for each in shares[0][1]])
        own, other = (100 * right[mine].double().mean().item() for right, _ in shares)
        result.append({"class": name, "right": f"{own:.1f}", "with another picture": f"{other:.1f}"})
    return result


def main() -> None:
    """Fill both tables."""
    lab = open_lab()

    def probed(name: str) -> list[Row]:
        if name in MODELS:
            return probe(lab, train(lab, name, SEED))
        phases = [*bridge_phases(STAGE_3[name]), CONTRASTIVE.having(max_steps=STEPS, learning_rate=CONTRASTIVE_RATE)]
        return probe(lab, lab.train(Start(BACKBONE, PAIRS, SEED), phases, keep=len(phases)))

    def captioned(name: str) -> list[Row]:
        return decoded(train(lab, name, SEED), captions, layout_of(name))

    captions = rows_of(lab, "Scenes_i2t")
    trained = [model for model in MODELS if bridge_phases(model)]
    key = {model: {"model": model, "seed": SEED} for model in (*MODELS, *STAGE_3)}
    work(PROBES, [(key[model], partial(probed, model)) for model in MODELS])
    work(
        DECODED,
        [(key[model], partial(captioned, model)) for model in trained],
    )
    work(PROBES, [(key[name], partial(probed, name)) for name in STAGE_3])


if __name__ == "__main__":
    main()
