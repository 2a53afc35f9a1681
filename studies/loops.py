"""The loops of the lab: the package's objectives on batches in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from embed import embed
from nats import with_other_images
from objectives import FinalState, LateBridge, WordByWord, picture_model, with_picture
from torch import Tensor
from transformers import get_scheduler, set_seed

from cocoa.attention import BridgeLayout
from cocoa.backbone import Backbone
from cocoa.blocks import Layout, own
from cocoa.contrastive_loss import info_nce
from cocoa.corruption import IGNORE_INDEX, row_generator
from cocoa.features import keep_features
from cocoa.packing import pack
from cocoa.pairs import ContentPair, Pair, Side
from cocoa.recipe import STAGES
from cocoa.reconstruction import PatchDecoder
from cocoa.stages import compression, eos_bridge, joint_reconstruction
from cocoa.stages.arguments import StageArguments
from cocoa.stages.contrastive import ContrastiveArguments
from cocoa.stages.eos_bridge import EosBridgeArguments
from cocoa.stages.reconstruction import Prediction, Reconstructor
from cocoa.stages.sampling import GlobalBatchSampler
from cocoa.stages.weights import trainable

OBJECTIVES: dict[str, Callable[[Backbone], Reconstructor]] = {
    "final": FinalState,
    "late": LateBridge,
    "picture": picture_model,
    "word by word": WordByWord,
}
"""Bridges of our own, see `objectives`; the arguments are the bridge's."""
STRICT = ("late", "picture", "word by word")
"""Those that have the strict bridge's layout."""
KINDS = ("next_token", *OBJECTIVES)
"""Phases that are no stage of the package. `next_token` predicts block B word by word, causally, with all of A seen:
that is how the backbone was pre-trained."""
SEE_PIXELS = ("joint_reconstruction", "picture")
"""Phases that hide patches."""
PICTURE_WEIGHT = 0.5
"""Weight of the patch loss in `picture`, as in stage 1."""


def fit(
    parameters: Sequence[tuple[str, torch.nn.Parameter]],
    args: StageArguments,
    batches: Iterator[Any],
    backward: Callable[[Any], float],
) -> list[float]:
    """Take `max_steps` steps as the trainers do: AdamW, linear schedule with warm-up, gradients clipped.

    Args:
        parameters: what is trained.
        args: of the stage.
        batches: one for each step.
        backward: adds a batch's gradients, and returns its loss.

    Returns:
        The loss of every step.
    """
    weights = [parameter for _, parameter in parameters]
    optimizer = torch.optim.AdamW(
        weights,
        args.learning_rate,
        (args.adam_beta1, args.adam_beta2),
        args.adam_epsilon,
        args.weight_decay,
        fused=True,
    )
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(args.max_steps), args.max_steps)
    losses = []
    for _ in range(args.max_steps):
        losses.append(backward(next(batches)))
        torch.nn.utils.clip_grad_norm_(weights, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses


def global_batches(sampler: GlobalBatchSampler) -> Iterator[list[Any]]:
    """The sampler's batches, epoch after epoch."""
    while True:
        yield from sampler
        sampler.epoch += 1


class NextToken(Reconstructor):
    """Causal, whatever the batch says."""

    def predict(self, *args: Any, **batch: Any) -> Prediction:
        """As `Reconstructor.predict`."""
        seen = Layout(own(batch["lengths"].tolist(), causal=True)).to(self.model.device)
        return super().predict(*args, **batch | {"attention": seen})


def model_of(backbone: Backbone, args: StageArguments, kind: str) -> Reconstructor:
    """What is trained in a phase, around the backbone."""
    if isinstance(args, joint_reconstruction.JointReconstructionArguments):
        set_seed(args.seed)
        decoder = PatchDecoder(backbone.model.model.language_model, backbone.unit_size)
        return Reconstructor(backbone, patch_decoder=decoder, shifted=args.text_objective == "mntp")
    if kind in OBJECTIVES:
        set_seed(args.seed)
        return OBJECTIVES[kind](backbone)
    if kind == "next_token":
        return NextToken(backbone)
    return Reconstructor(backbone)


def sample_of(backbone: Backbone, row: ContentPair, args: StageArguments, kind: str, epoch: int) -> dict[str, Tensor]:
    """One row of a phase, hidden in part as its seed, epoch and row say."""
    generator, length = row_generator(args.seed, stage_of(args), epoch, row.row_id), args.max_length
    if isinstance(args, joint_reconstruction.JointReconstructionArguments):
        ratios = args.text_mask_ratio, args.patch_mask_ratio
        return joint_reconstruction.corrupt(backbone, row, length, *ratios, generator)
    if isinstance(args, compression.CompressionArguments):
        return compression.converse(backbone, row, length, args.prompt)
    assert isinstance(args, EosBridgeArguments)
    if kind in ("next_token", "word by word"):
        return all_shown(eos_bridge.bridge(backbone, row, length, 1.0, generator))
    if kind == "picture":
        return with_picture(backbone, row, length, args.text_mask_ratio, 0.5, generator)
    return eos_bridge.bridge(backbone, row, length, args.text_mask_ratio, generator)


def stage_of(args: StageArguments) -> str:
    """The name of the stage that some arguments are of."""
    return next(name for name, kind in STAGES.items() if type(args) is kind)


class Reconstruction:
    """The token loss of a phase (and its patch loss) on batches of its rows.

    Args:
        backbone: what is trained.
        rows: what is rebuilt.
        args: of the stage.
        kind: the stage, or one of `KINDS`.
        token_weight: of the token loss.
        shuffled: each row with the image of another one, of yet another one in each epoch.
    """

    def __init__(
        self,
        backbone: Backbone,
        rows: Sequence[ContentPair],
        args: StageArguments,
        kind: str,
        token_weight: float = 1.0,
        shuffled: bool = False,
    ) -> None:
        self.backbone, self.rows, self.args, self.kind, self.shuffled = backbone, rows, args, kind, shuffled
        self._epoch, self._now = -1, rows
        self.model = model_of(backbone, args, kind)
        self.layout: BridgeLayout = "strict" if kind in STRICT else getattr(args, "layout", "published")
        self.weights = {"token": token_weight}
        if self.model.patch_decoder is not None:
            self.weights["patch"] = getattr(args, "patch_loss_weight", PICTURE_WEIGHT)
        sampler = GlobalBatchSampler(
            [row.dataset for row in rows], args.batch_size, args.batch_size, args.seed, with_epoch=True
        )
        self.batches = global_batches(sampler)

    def rows_of(self, epoch: int) -> Sequence[ContentPair]:
        """The rows of an epoch, the features of their images kept."""
        if self._epoch < 0 or (self.shuffled and epoch != self._epoch):
            self._now = with_other_images(self.rows, epoch) if self.shuffled else self.rows
            if self.kind not in SEE_PIXELS:
                keep_features(self.backbone, block_a(self._now, self.args))
        self._epoch = epoch
        return self._now

    def backward(self, keys: Sequence[tuple[int, int]], weight: float = 1.0) -> float:
        """Add the gradients of a batch's loss; the loss."""
        samples = [
            sample_of(self.backbone, self.rows_of(epoch)[row], self.args, self.kind, epoch) for epoch, row in keys
        ]
        counts = {"token": sum(int((each["labels"] != IGNORE_INDEX).sum()) for each in samples)}
        counts["patch"] = sum(int(each["hidden_units"].sum()) for each in samples if "hidden_units" in each)
        samples.sort(key=lambda sample: len(sample["input_ids"]))
        batch = pack(samples, self.backbone, self.layout)
        sums = self.model(**{name: value.to(self.backbone.model.device) for name, value in batch.items()})
        loss = sum(share * sums[term][0] / max(counts[term], 1) for term, share in self.weights.items())
        (weight * loss).backward()
        return loss.item()

    def train(self) -> list[float]:
        """All steps of the phase; their losses."""
        losses = fit(trainable(self.model), self.args, self.batches, self.backward)
        if isinstance(self.model, LateBridge):
            self.model.release()
        return losses


def block_a(rows: Sequence[ContentPair], args: StageArguments) -> list[Side]:
    """What stands in front of EOS, or of the compression tokens."""
    if isinstance(args, compression.CompressionArguments):
        return [compression.to_compress(row.side, args.prompt) for row in rows]
    return [row.side for row in rows]


def all_shown(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """A sample of the bridge with the hidden tokens put back; the labels stay."""
    ids, labels = sample["input_ids"], sample["labels"]
    return sample | {"input_ids": torch.where(labels == IGNORE_INDEX, ids, labels)}


def train_contrastive(
    backbone: Backbone, pairs: Sequence[Pair], args: ContrastiveArguments, beside: Reconstruction | None, weight: float
) -> list[float]:
    """Stage 3 on full batches, perhaps with a reconstruction loss beside it; the contrastive losses of the steps."""
    size = args.batch_size

    def backward(rows: list[int]) -> float:
        chosen = [pairs[row] for row in rows]
        sides = [pair.query for pair in chosen] + [pair.target for pair in chosen]
        vectors = embed(backbone, [backbone.encode_side(side) for side in sides]).view(2, size, -1)
        ids = torch.tensor([[pair.target.content_id() for pair in chosen]], device=vectors.device)
        loss = info_nce(vectors, ids, args.temperature, args.mask_equal_targets)
        loss.backward()
        if beside is not None:
            beside.backward(next(beside.batches), weight)
        return loss.item()

    sampler = GlobalBatchSampler([pair.dataset for pair in pairs], size, size, args.seed)
    return fit(trainable(beside.model if beside else backbone.model), args, global_batches(sampler), backward)
