"""`cocoa preview`: what a recipe would train on and at what cost, before a single weight is loaded.

Everything is read from what training itself uses: `stage_data`, the stages' data sets and samplers, and the
model with its adapters on the meta device. Later stages are shown on the recipe's backbone, since the
checkpoint they will start from is not there yet.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cocoa.adapters import adapted_layers, describe
from cocoa.attention import eos_bridged
from cocoa.backbone import Backbone, Form
from cocoa.errors import CocoaError
from cocoa.estimate import Estimate
from cocoa.pairs import ContentPair, Pair
from cocoa.pipeline import load_stage_backbone, of_stage, stage_forms
from cocoa.preview_cost import estimate_stage, rows_of, stage_model, trained_by_place
from cocoa.preview_samples import Measured, Sample, StageDataset, is_encoded, measure, sample
from cocoa.recipe import Recipe, Stage
from cocoa.stage_data import StageData, stage_data
from cocoa.stages.arguments import StageArguments
from cocoa.stages.compression import CompressionArguments, CompressionDataset
from cocoa.stages.content import room_for_text
from cocoa.stages.contrastive import ContrastiveArguments, PairDataset
from cocoa.stages.eos_bridge import EosBridgeArguments, EosBridgeDataset
from cocoa.stages.joint_reconstruction import JointReconstructionArguments, JointReconstructionDataset
from cocoa.stages.sampling import GlobalBatchSampler

SAMPLES = 5
"""Rows shown a stage."""
MOST_LENGTHS = 256
"""Rows whose lengths are taken."""


@dataclass(frozen=True)
class DatasetRows:
    """How many rows of a data set a stage keeps, holds out for validation, and leaves out by reason."""

    name: str
    kept: int
    validation: int
    left_out: dict[str, int]

    @property
    def left_out_rows(self) -> int:
        """Rows left out, whatever the reason."""
        return sum(self.left_out.values())


@dataclass(frozen=True)
class Schedule:
    """Optimiser steps of a stage, and what an epoch is.

    Attributes:
        steps: optimiser steps.
        warmup_steps: of them, while the learning rate rises.
        learning_rate: at its peak.
        batch_size: pairs a step, over all devices.
        steps_per_epoch: steps that an epoch has.
        sub_batch_rest: rows an epoch leaves out because they fill no run of `sub_batch_size`.
        last_batch_rest: rows it leaves out because they fill no last batch.
        uniform: the data set of each run is drawn with equal probability, so that rows may come again or not at all.
    """

    steps: int
    warmup_steps: int
    learning_rate: float
    batch_size: int
    steps_per_epoch: int
    sub_batch_rest: int
    last_batch_rest: int
    uniform: bool = False

    @property
    def epochs(self) -> float:
        """That the steps make."""
        return self.steps / self.steps_per_epoch

    @property
    def pairs_seen(self) -> int:
        """Over the whole stage, repetitions counted."""
        return self.steps * self.batch_size


@dataclass(frozen=True)
class StagePreview:
    """One stage of a recipe; see the fields' classes.

    Attributes:
        name: the stage's.
        rows: by data set.
        schedule: steps and epochs.
        attention: who sees whom, in words.
        adapted: which layers get adapters, or that all weights are trained.
        trainable: trained parameters by where they are.
        parameters: all parameters of the stage's model.
        max_length: tokens that a sequence may have.
        measured: lengths of up to `MOST_LENGTHS` rows, drawn by the seed.
        estimate: memory and time.
        samples: rows as the model sees them.
    """

    name: str
    rows: list[DatasetRows]
    schedule: Schedule
    attention: str
    adapted: str
    trainable: dict[str, int]
    parameters: int
    max_length: int
    measured: Measured
    estimate: Estimate
    samples: list[Sample]

    @property
    def kept(self) -> int:
        """Rows trained on, over all data sets."""
        return sum(rows.kept for rows in self.rows)

    @property
    def trained(self) -> int:
        """Trained parameters in all."""
        return sum(self.trainable.values())


@dataclass(frozen=True)
class Preview:
    """All stages of a recipe."""

    recipe: Recipe
    stages: list[StagePreview]


def preview(recipe: Recipe, tflops: float = 400.0, devices: int = 1, split: bool = False) -> Preview:
    """Look at every stage of a recipe without training and without weights.

    Args:
        recipe: of which nothing is written.
        tflops: 10^12 operations a second that a device is assumed to reach.
        devices: that a run would have.
        split: the model over the devices, by FSDP2.

    Raises:
        CocoaError: a mistake in recipe, data or backbone, as training would raise it.
    """
    if tflops <= 0 or devices < 1:
        raise CocoaError("preview: tflops must be more than 0, and devices 1 or more")
    if split and devices == 1:
        raise CocoaError("preview: one device holds all of the model; with split, devices must be 2 or more")
    stages = zip(recipe.stages, stage_forms(recipe), strict=True)
    return Preview(recipe, [_stage(recipe, stage, form, tflops, devices, split) for stage, form in stages])


def _stage(recipe: Recipe, stage: Stage, form: Form, tflops: float, devices: int, split: bool) -> StagePreview:
    args = recipe.arguments(stage, recipe.output_dir / "trainer", disable_tqdm=True, use_cpu=True)
    backbone = load_stage_backbone(recipe, stage, recipe.backbone, form, weights=False)
    data = stage_data(stage, backbone, args)
    rows: Sequence[Pair | ContentPair] = data.rows or data.pairs
    draw = random.Random(f"{recipe.seed}/{stage.name}/preview")
    looked_at = sorted(draw.sample(range(len(rows)), min(len(rows), MOST_LENGTHS)))
    with of_stage(stage):
        rows_of(args, devices)
        schedule = _schedule(args, [row.dataset for row in rows])
        adapted = describe(adapted_layers(backbone.model, recipe.lora)) if recipe.lora else "all weights"
        model = stage_model(recipe, backbone, args)
        dataset = stage_dataset(backbone, data, args)
        chosen = _choose(rows, draw)
        if args.on_bad_row == "skip":
            looked_at, chosen = ([row for row in each if is_encoded(dataset, row)] for each in (looked_at, chosen))
        if not looked_at:
            raise CocoaError("of the rows that were drawn, none can be encoded; see `on_bad_row: error` for the first")
        measured = measure(dataset, rows, looked_at, backbone, args)
        samples = [sample(dataset, backbone, index, rows[index].row_id) for index in chosen]
    pairs = schedule.pairs_seen
    return StagePreview(
        name=stage.name,
        rows=_dataset_rows(data),
        schedule=schedule,
        attention=_attention(backbone, args),
        adapted=adapted,
        trainable=trained_by_place(model),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_length=args.max_length,
        measured=measured,
        estimate=estimate_stage(recipe, args, backbone, model, measured, pairs, tflops, devices, split),
        samples=samples,
    )


def stage_dataset(backbone: Backbone, data: StageData, args: StageArguments) -> StageDataset:
    """The data set that the stage's trainer reads."""
    if isinstance(args, JointReconstructionArguments):
        room_for_text(backbone, args.max_length)
        return JointReconstructionDataset(data.rows, backbone, args)
    if isinstance(args, EosBridgeArguments):
        return EosBridgeDataset(data.rows, backbone, args)
    if isinstance(args, CompressionArguments):
        return CompressionDataset(data.rows, backbone, args)
    assert isinstance(args, ContrastiveArguments)
    return PairDataset(data.pairs, backbone, args)


def _schedule(args: StageArguments, names: list[str]) -> Schedule:
    size = args.sub_batch_size if isinstance(args, ContrastiveArguments) else 1
    pieces = (args.batch_size, args.per_device_train_batch_size)
    sampling = args.dataset_sampling if isinstance(args, ContrastiveArguments) else "proportional"
    sampler = GlobalBatchSampler(names, *pieces, args.seed, size, dataset_sampling=sampling)
    epoch = sampler.steps_per_epoch
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * epoch)
    usable = sum(len(rows) // size * size for rows in sampler.rows_of.values())
    return Schedule(
        steps=steps,
        warmup_steps=args.get_warmup_steps(steps),
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        steps_per_epoch=epoch,
        sub_batch_rest=len(names) - usable,
        last_batch_rest=usable - epoch * args.batch_size,
        uniform=sampling == "uniform",
    )


def _dataset_rows(data: StageData) -> list[DatasetRows]:
    kept, held = data.datasets(), Counter(pair.dataset for pair in data.validation)
    names = sorted({*kept, *held, *data.left_out}, key=lambda name: (-kept[name], name))
    return [
        DatasetRows(name, kept[name], held[name], dict(data.left_out.get(name, Counter()).most_common()))
        for name in names
    ]


def _choose(rows: Sequence[Pair | ContentPair], draw: random.Random) -> list[int]:
    """Rows to show, of as many data sets as possible."""
    by_dataset: dict[str, list[int]] = defaultdict(list)
    for index in draw.sample(range(len(rows)), len(rows)):
        by_dataset[rows[index].dataset].append(index)
    turns = [(turn, index) for members in by_dataset.values() for turn, index in enumerate(members[:SAMPLES])]
    return [index for _, index in sorted(turns, key=lambda item: item[0])[:SAMPLES]]


def _attention(backbone: Backbone, args: StageArguments) -> str:
    if isinstance(args, CompressionArguments):
        return f"causal; the dialogue sees the {args.compression_tokens} compression tokens and nothing before them"
    if not isinstance(args, EosBridgeArguments):
        pooled = {"lasttoken": "EOS", "mean": "mean of all tokens", "compression": "mean of the compression tokens"}
        attention, pooling, _ = backbone.form
        return f"{attention}; embedding: {pooled[pooling]}" if isinstance(args, ContrastiveArguments) else attention
    sees = eos_bridged(torch.tensor([1]), torch.ones(1, 3), args.layout)[0, 0].tolist()
    blocks = ("A", "EOS", "B")
    seen = [" and ".join(b for b, there in zip(blocks, row, strict=True) if there) for row in sees]
    words = ", ".join(f"{block} sees {others}" for block, others in zip(blocks, seen, strict=True))
    return f"{args.layout} layout ({words})"
