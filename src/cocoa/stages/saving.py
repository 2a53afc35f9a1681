"""Writing what a trainer has trained as a checkpoint: merged in float32, rounded once, there only once it is whole."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cocoa.account import history
from cocoa.adapters import Lora, merge_adapters
from cocoa.backbone import Backbone
from cocoa.card import base_facts, write_card
from cocoa.checkpoint import LOG_NAME, save_checkpoint
from cocoa.embedding import Embedder, embedder_of
from cocoa.errors import CocoaError
from cocoa.files import writing
from cocoa.inputs import ImageBudget
from cocoa.pairs import ContentPair, Pair, Side
from cocoa.scores import short_name
from cocoa.stages.arguments import StageArguments
from cocoa.stages.start import stage_adapters
from cocoa.stages.weights import is_split, load_weights

if TYPE_CHECKING:
    from cocoa.stages.training import StageTrainer

logger = logging.getLogger(__name__)

PROBES = 8
"""Inputs embedded before and after the merge."""
_NOT_TOLD = ("output_dir", "per_device_train_batch_size", "hub_token", "logging_dir")
"""Arguments that a record does not repeat: places, secrets, and what others say."""


def save_trained(trainer: StageTrainer, folder: Path, images: ImageBudget | None, record: Mapping[str, Any]) -> Path:
    """See `StageTrainer.save_checkpoint`."""
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        with _cores_of_all(trainer.args.world_size):
            _write(trainer, folder, images, record)
    trainer.accelerator.wait_for_everyone()
    return folder


@contextmanager
def _cores_of_all(processes: int) -> Iterator[None]:
    """The threads that all processes have, torchrun's one each, while the others wait."""
    own = torch.get_num_threads()
    torch.set_num_threads(own * processes)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def put_together(trainer: StageTrainer, backbone: Backbone, lora: Lora | None, weights: dict[str, Tensor]) -> None:
    """Give a trainer whose model is split over processes a whole one, with what was trained.

    Args:
        trainer: of the main process.
        backbone: loaded as the stage began with it.
        lora: adapters of the stage.
        weights: what `StageTrainer.trained_weights` gave.
    """
    trainer.train_dataset.backbone = backbone
    trainer.adapters = stage_adapters(backbone, trainer.args, lora)
    trainer.model = trainer.model.anew(backbone)
    load_weights(trainer.model, weights)


def _write(trainer: StageTrainer, folder: Path, images: ImageBudget | None, record: Mapping[str, Any]) -> None:
    if folder.exists():
        raise CocoaError(f"{folder}: is there already; choose another folder, or remove it")
    if is_split(trainer.model):
        raise CocoaError(
            f"{folder}: the model is split over processes; let `cocoa train` run the stage, which puts it together"
        )
    backbone, args = trainer.train_dataset.backbone, trainer.args
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    backbone.model.eval()

    with writing(partial):
        partial.mkdir(parents=True)
        trained = embedder_of(backbone, args.max_length)
        sides = _probes(trainer, trained)
        before, device = trained.embed(sides), backbone.model.device
        if trainer.adapters is not None:
            backbone.model = merge_adapters(trainer.adapters.handle, partial / "adapter")
        for parameter in backbone.model.parameters():  # model.to(...) would round the rotary frequencies too
            parameter.data = parameter.data.to(torch.bfloat16 if args.bf16 else torch.float32)
        backbone.model.to(device)
        saved = embedder_of(backbone, args.max_length).embed(sides)
        cosine = F.cosine_similarity(before, saved).min().item()
        logger.info("embeddings as trained and as saved: least cosine %.6f (equal: 1)", cosine)
        if images is not None:
            backbone.set_image_budget(images)
        save_checkpoint(backbone, partial, facts(trainer) | dict(record) | {"merge_cosine": cosine})
        write_card(partial, title=short_name(folder.resolve()))
        trainer.save_beside(partial)
        log = json.dumps(trainer.state.log_history, indent=1)
        (partial / LOG_NAME).write_text(log, encoding="utf-8")
        os.replace(partial, folder)


def _probes(trainer: StageTrainer, embedder: Embedder) -> list[Side]:
    """The first inputs that can be read, of rows that were not left out; an empty one where there is none."""
    found: list[Side] = []
    for row in trainer.train_dataset.rows:
        if len(found) == PROBES:
            break
        side = row.query if isinstance(row, Pair) else row.side
        if row.row_id not in trainer.bad_rows:
            with suppress(CocoaError):
                embedder.render(side)
                found.append(side)
    return found or [Side()]


def facts(trainer: StageTrainer) -> dict[str, Any]:
    """What a trainer knows of how its checkpoint was made."""
    dataset = trainer.train_dataset
    return {
        "stage": trainer.name,
        "source": dataset.backbone.name,
        "options": changed_options(trainer.args),
        "seed": trainer.args.seed,
        "steps": trainer.state.global_step,
        **trainer.account,
        "history": history(dataset.backbone.name),
        **base_facts(dataset.backbone.name),
        "rows": dict(Counter(row.dataset for row in dataset.rows)),
        "instructions": instructions_of(dataset.rows),
        "left_out": {name: dict(reasons) for name, reasons in trainer.left_out.items()},
        "trained": trainer.trained,
    }


def instructions_of(rows: Iterable[Pair | ContentPair]) -> dict[str, dict[str, str]]:
    """The most frequent instruction of each data set's queries and targets; of rows that are pairs."""
    found: dict[str, dict[str, Counter[str]]] = {}
    for row in rows:
        if isinstance(row, Pair):
            sides = found.setdefault(row.dataset, {"query": Counter(), "target": Counter()})
            sides["query"][row.query.instruction] += 1
            sides["target"][row.target.instruction] += 1
    return {name: {side: most.most_common(1)[0][0] for side, most in sides.items()} for name, sides in found.items()}


def changed_options(args: StageArguments) -> dict[str, Any]:
    """The arguments that are not at their defaults, as JSON has them."""
    needed = {name: getattr(args, name) for name in ("batch_size", "gradient_accumulation_steps", "use_cpu")}
    default = type(args)(output_dir=args.output_dir, **needed)
    names = [field.name for field in dataclasses.fields(args) if field.init and field.name not in _NOT_TOLD]
    given = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(default, name)}
    return json.loads(json.dumps({"batch_size": args.batch_size} | given, default=str))
