"""Real pixels, as far as they are to be had without a download: handwritten digits, and a dozen photographs.

    python studies/real_pixels.py        # as often as there are cores
    python studies/report.py

Decided before it was run: eight seeds, no tuning (learning rates are the first that `deciding.py` tries), `published`,
`full` and contrastive learning alone; the vision tower is trained, since it has seen drawn shapes only. Both sets are
small, so what they can show is whether the miniature's order of the arms holds on real pixels at all.

- digits: UCI's optical digits (1,797 pictures of 8 x 8, shown as 56 x 56 px), picture -> "the digit seven"; 10 of each
  are trained on, hit@1 among the ten on the last 900. (Of a bare "seven" EOS itself predicts the first token, and so
  which digit it is, under every layout.)
- photographs: pieces -> the photograph, and pieces -> what is said of it. In each of three folds, four of the twelve
  photographs are held out: hit@1 of their pieces among all twelve photographs.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from functools import partial
from importlib import resources

import numpy as np
import yaml
from deciding import CONTRASTIVE, JOINT
from lab import Lab, Phase, Start
from PIL import Image
from results import FOLDER, RUNS, Row, hit_rows, start_log, work
from sklearn.datasets import load_digits

from cocoa.backbone import Backbone
from cocoa.images import load_image
from cocoa.metrics import distinct_rows
from cocoa.pairs import Pair, Side

BACKBONE = "mini-qwen2-vl"
RESULTS = FOLDER / "real_pixels.csv"
SEEDS = tuple(range(1, 9))
NAMES = tuple(
    f"the digit {name}" for name in ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
)
OF_EACH, HELD_OUT = 10, 900
FOLDS = 3
PIECES, PIECE, SHOWN = 12, 0.5, 84
"""Pieces of a photograph, their share of its shorter side, and the pixels that they and it are shown in."""
WHICH, SAID, PHOTO = "Find the photograph that this piece is from.", "Find a caption of the photograph.", ""

BRIDGE = Phase("eos_bridge", {"batch_size": 16, "max_steps": 300, "learning_rate": 6e-4})
LAST = CONTRASTIVE.having(max_steps=300, learning_rate=1e-3)
ARMS = {
    "contrastive": [LAST],
    "published": [JOINT, BRIDGE.having(layout="published"), LAST],
    "full": [JOINT, BRIDGE.having(layout="full"), LAST],
}


class PairLab(Lab):
    """A lab whose pairs are given, and scored among given targets."""

    def __init__(self, pairs: Sequence[Pair], held_out: Sequence[Pair], targets: Sequence[Side]) -> None:
        super().__init__(RUNS, frozen_tower=False)
        self.pairs, self.held_out, self.targets = list(pairs), list(held_out), list(targets)

    def rows(self, start: Start, phase: Phase) -> list[Pair]:
        """The given pairs."""
        return self.pairs

    def train(self, start: Start, phases: Sequence[Phase], keep: int = 0) -> Backbone:
        """As `Lab.train`; nothing is kept, for a start does not tell these pairs from others."""
        return super().train(start, phases, 0)

    def found(self, backbone: Backbone) -> np.ndarray:
        """(held out,) whether a pair's own target is the nearest; a tie is a miss."""
        queries = self.embed_sides(backbone, [pair.query for pair in self.held_out], "queries")
        vectors, which = distinct_rows(self.embed_sides(backbone, self.targets, "targets"))
        scores = (queries @ vectors.T)[:, which]  # (Q, T)
        own = scores[range(len(scores)), [self.targets.index(pair.target) for pair in self.held_out]]
        return ((scores >= own[:, None]).sum(1) == 1).numpy()


def digits(seed: int) -> PairLab:
    """A few of each digit, drawn by the seed from the first 897."""
    data = load_digits()
    rng, pairs = random.Random(f"digits/{seed}"), []
    for row in range(len(data.images)):
        shade = (255 - data.images[row] * 255 / 16).astype(np.uint8)
        picture = Image.fromarray(shade).convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
        pairs.append(
            Pair(Side("Identify the digit.", image=picture), Side(text=NAMES[data.target[row]]), (), "digits", row)
        )
    first, last = pairs[:-HELD_OUT], pairs[-HELD_OUT:]
    chosen = [each for name in NAMES for each in rng.sample([p for p in first if p.target.text == name], OF_EACH)]
    return PairLab(chosen, last, [Side(text=name) for name in NAMES])


def photographs(seed: int, fold: int) -> PairLab:
    """Pieces of eight photographs to train on, of four others to score."""
    folder = resources.files("cocoa") / "data" / "photos"
    told = yaml.safe_load((folder / "photos.yaml").read_text(encoding="utf-8"))
    random.Random("folds").shuffle(told)
    rng = random.Random(f"photographs/{seed}")
    trained: list[Pair] = []
    held_out: list[Pair] = []
    targets = []
    for number, each in enumerate(told):
        photo = load_image(str(folder / each["file"])).convert("RGB")
        whole = Side(PHOTO, image=photo.resize((SHOWN, SHOWN)))
        targets.append(whole)
        for piece in range(PIECES):
            side = Side(WHICH, image=_piece(rng, photo))
            pair = Pair(side, whole, (), "photographs", number * PIECES + piece)
            if number % FOLDS == fold:
                held_out.append(pair)
                continue
            said = Side(text=each["captions"][piece % 2])
            trained += [pair, Pair(Side(SAID, image=side.image), said, (), "captions", pair.row)]
    return PairLab(trained, held_out, targets)


def _piece(rng: random.Random, photo: Image.Image) -> Image.Image:
    size = round(PIECE * min(photo.size))
    left, top = rng.randint(0, photo.width - size), rng.randint(0, photo.height - size)
    return photo.crop((left, top, left + size, top + size)).resize((SHOWN, SHOWN))


def run(lab: PairLab, arm: str, seed: int) -> np.ndarray:
    """The hits of an arm."""
    return lab.found(lab.train(Start(BACKBONE, 0, seed), ARMS[arm]))


def main() -> None:
    """Run what is missing."""
    start_log()

    def rows(arm: str, seed: int) -> list[Row]:
        started = time.perf_counter()
        folds = [run(photographs(seed, fold), arm, seed) for fold in range(FOLDS)]
        hits = {"digits": run(digits(seed), arm, seed), "photographs": np.concatenate(folds)}
        return [row | {"seconds": f"{time.perf_counter() - started:.0f}"} for row in hit_rows(hits)]

    work(RESULTS, [({"arm": arm, "seed": seed}, partial(rows, arm, seed)) for seed in SEEDS for arm in ARMS])


if __name__ == "__main__":
    main()
