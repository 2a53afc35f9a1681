"""Running a recipe's stages in order, each from the checkpoint before it; stopped anywhere, it goes on from there.

`output_dir` holds one folder a stage (`1-joint_reconstruction`, ..., the last one `final`), each a
checkpoint that appears only once it is whole, and `trainer/`, the running stage's own files.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import set_seed

from cocoa.account import history
from cocoa.adapters import adapted_layers, add_adapters, describe, merge_adapters
from cocoa.backbone import Backbone, Form, load_backbone
from cocoa.checkpoint import LOG_NAME, as_sentence_transformer, recorded_form, save_checkpoint, writing
from cocoa.embedding import Embedder
from cocoa.errors import CocoaError
from cocoa.output_folder import claim, is_done, owned
from cocoa.pairs import Side
from cocoa.processes import this_process
from cocoa.recipe import DTYPES, Recipe, Stage
from cocoa.stage_data import StageData, stage_data
from cocoa.stages import compression, contrastive, eos_bridge, joint_reconstruction
from cocoa.stages.arguments import StageArguments
from cocoa.stages.reconstruction import Reconstructor
from cocoa.stages.training import StageTrainer
from cocoa.stages.weights import is_split, load_weights

logger = logging.getLogger(__name__)

PROBES = 8
"""Inputs embedded before and after the merge."""


def train(recipe: Recipe, accept_changes: bool = False) -> Path:
    """Run every stage of a recipe that is not done yet.

    Args:
        recipe: what to run.
        accept_changes: go on in a folder of a recipe with other settings: what is done stays, what was stopped goes
            on under the new ones.

    Returns:
        The folder of the last stage's checkpoint, `<output_dir>/final`.

    Raises:
        CocoaError: a mistake in recipe, data or backbone; another run in the folder, or another recipe's.
    """
    state = this_process()
    with owned(recipe.output_dir, state.is_main_process):
        folders = enumerate(stage_folders(recipe), 1)
        done = [is_done(folder, recipe.settings(stages), accept_changes) for stages, folder in folders]
        forms = stage_forms(recipe)  # a mistake in a later stage is found before the first one
        source = recipe.backbone
        for index, stage in enumerate(recipe.stages):
            folder = stage_folder(recipe, index)
            if not done[index]:
                run_stage(recipe, index, source, forms[index], accept_changes)
                gc.collect()  # trainers refer to themselves; the next stage needs the memory
            else:
                logger.info("stage %s is done: %s", stage.name, folder)
            source = str(folder)
    return Path(source)


def stage_folder(recipe: Recipe, index: int) -> Path:
    """Where the checkpoint of a stage is written."""
    last = index == len(recipe.stages) - 1
    return recipe.output_dir / ("final" if last else f"{index + 1}-{recipe.stages[index].name}")


def stage_folders(recipe: Recipe) -> list[Path]:
    """Where the checkpoints of all stages are written, in order."""
    return [stage_folder(recipe, index) for index in range(len(recipe.stages))]


def run_stage(recipe: Recipe, index: int, source: str, form: Form, accept_changes: bool = False) -> None:
    """Train one stage from the checkpoint `source`, read as `form` says, and write its own."""
    stage, state = recipe.stages[index], this_process()
    trainer_folder = recipe.output_dir / "trainer" / f"{index + 1}-{stage.name}"
    if state.is_main_process:
        claim(trainer_folder, recipe.settings(index + 1), accept_changes)
    noisy = sys.stderr.isatty() and state.is_local_main_process and not stage.options.get("disable_tqdm")
    args = recipe.arguments(stage, trainer_folder, disable_tqdm=not noisy)

    set_seed(recipe.seed)
    backbone = load_stage_backbone(recipe, stage, source, form)
    data = stage_data(stage, backbone, args)
    what = describe(adapted_layers(backbone.model, recipe.lora)) if recipe.lora else "all weights"
    adapters = add_stage_adapters(recipe, backbone, args)
    trainer = build_trainer(stage, backbone, data, args)
    logger.info("stage %s: %d rows, training %s", stage.name, sum(data.datasets().values()), what)
    for reason, count in sum(data.left_out.values(), Counter()).most_common():
        logger.info("stage %s: %d rows left out: %s", stage.name, count, reason)
    trainer.train_or_resume()

    state.wait_for_everyone()
    weights = trainer.trained_weights() if is_split(trainer.model) else None
    if state.is_main_process:
        if weights is not None:
            backbone = load_stage_backbone(recipe, stage, source, form)
            adapters = add_stage_adapters(recipe, backbone, args)
            trainer.model = trainer.model.anew(backbone)
            load_weights(trainer.model, weights)
        record = {
            "stage": stage.name,
            "source": source,
            "fingerprint": recipe.fingerprint(index + 1),
            "settings": recipe.settings(index + 1),
            "options": stage.options,
            "seed": recipe.seed,
            "steps": trainer.state.global_step,
            **trainer.account,
            "history": history(source),
            "rows": dict(data.datasets()),
            "left_out": {dataset: dict(reasons) for dataset, reasons in data.left_out.items()},
            "trained": what,
        }
        _finish(recipe, backbone, adapters, probes(data), stage_folder(recipe, index), record, trainer)
        shutil.rmtree(trainer_folder.parent)
    state.wait_for_everyone()


def stage_forms(recipe: Recipe) -> list[Form]:
    """How each stage reads its backbone: as it says, else as the stage before it left it.

    Raises:
        CocoaError: a mistake in a stage's arguments, another number of compression tokens than there are by then, or
            more of them than the backbone has room for.
    """
    forms: list[Form] = []
    known = recorded_form(recipe.backbone)
    there = known.compression_tokens if known else 0
    for stage in recipe.stages:
        args = recipe.arguments(stage, recipe.output_dir)
        try:
            form = args.form(known)
            if form.compression_tokens and not there:
                load_backbone(recipe.backbone, weights=False, **form._asdict())  # is there room for them?
            if there and form.compression_tokens not in (0, there):
                raise CocoaError(f"compression_tokens: {form.compression_tokens}, but there are {there}")
        except CocoaError as error:
            raise CocoaError(f"stages.{stage.name}: {error}") from None
        forms.append(form)
        known, there = form, form.compression_tokens or there
    return forms


def load_stage_backbone(recipe: Recipe, stage: Stage, source: str, form: Form, weights: bool = True) -> Backbone:
    """The backbone as the stage reads it, with its training budget.

    Raises:
        CocoaError: see `load_backbone`; the message names the stage.
    """
    try:
        return load_backbone(source, stage.image.train(), recipe.load_dtype, weights=weights, **form._asdict())
    except CocoaError as error:
        raise CocoaError(f"stages.{stage.name}: {error}") from None


def add_stage_adapters(recipe: Recipe, backbone: Backbone, args: StageArguments) -> PeftModel | None:
    """Adapters as the recipe says, with the rows of the tokens that the stage brings in; None for full tuning.

    Those are the compression tokens where they are pooled, and the mask token where masks are predicted.
    """
    if recipe.lora is None:
        return None
    tokens = backbone.compression_token_ids
    if isinstance(args, (joint_reconstruction.JointReconstructionArguments, eos_bridge.EosBridgeArguments)):
        tokens = [backbone.mask_token_id]
    return add_adapters(backbone.model, recipe.lora, tokens)


def build_trainer(stage: Stage, backbone: Backbone, data: StageData, args: StageArguments) -> StageTrainer:
    """The stage's trainer over its data.

    Raises:
        CocoaError: arguments that do not fit the data; the message names the stage.
    """
    try:
        if isinstance(args, joint_reconstruction.JointReconstructionArguments):
            return joint_reconstruction.build_trainer(backbone, data.rows, args)
        if isinstance(args, eos_bridge.EosBridgeArguments):
            return eos_bridge.build_trainer(backbone, data.rows, args)
        if isinstance(args, compression.CompressionArguments):
            return compression.build_trainer(backbone, data.rows, args)
        assert isinstance(args, contrastive.ContrastiveArguments)
        return contrastive.build_trainer(backbone, data.pairs, data.validation, args)
    except CocoaError as error:
        raise CocoaError(f"stages.{stage.name}: {error}") from None


def probes(data: StageData) -> list[Side]:
    """A few inputs of the stage, to compare embeddings before and after the merge."""
    return [row.side for row in data.rows[:PROBES]] or [pair.query for pair in data.pairs[:PROBES]]


def _finish(
    recipe: Recipe,
    backbone: Backbone,
    adapters: PeftModel | None,
    sides: list[Side],
    folder: Path,
    record: dict[str, Any],
    trainer: StageTrainer,
) -> None:
    """Merge in float32, round once, and write the checkpoint so that it appears only when whole."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    backbone.model.eval()

    def embed() -> Tensor:
        model, length = as_sentence_transformer(backbone), trainer.args.max_length
        return Embedder(model, backbone.images, length, ending=backbone.ending).embed(sides)

    with writing(partial):
        partial.mkdir(parents=True)
        before = embed()
        if adapters is not None:
            backbone.model = merge_adapters(adapters, partial / "adapter")
        for parameter in backbone.model.parameters():  # model.to(...) would round the rotary frequencies too
            parameter.data = parameter.data.to(DTYPES[recipe.dtype])
        after = embed()
        cosine = torch.nn.functional.cosine_similarity(before, after).min().item()
        logger.info("least cosine between embeddings before the merge and as saved: %.6f", cosine)
        backbone.set_image_budget(recipe.image.evaluation())
        save_checkpoint(backbone, partial, {**record, "merge_cosine": cosine})
        if isinstance(trainer.model, Reconstructor) and trainer.model.patch_decoder is not None:
            joint_reconstruction.save_patch_decoder(trainer.model.patch_decoder, partial)
        log = json.dumps(trainer.state.log_history, indent=1)
        (partial / LOG_NAME).write_text(log, encoding="utf-8")
        os.replace(partial, folder)
