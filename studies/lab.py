"""Many small runs in little time: what `cocoa train` and `cocoa evaluate` do through files, done in memory.

Objectives, masks, order of rows, optimiser and schedule are the package's own (`tests/test_studies.py` compares the
weights with the pipeline's). What is left out costs more than the training at this size: trainers, checkpoints, encoding
the same picture again, and most of the padding, since a batch is computed in groups of like length.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import get_scheduler, set_seed

from cocoa.adapters import Lora, add_adapters, merge_adapters
from cocoa.attention import causal
from cocoa.backbone import Backbone, Form, load_backbone
from cocoa.catalogue import stage_rows
from cocoa.checkpoint import as_sentence_transformer
from cocoa.corruption import IGNORE_INDEX, row_generator
from cocoa.eval_inputs import Inputs, distinct_inputs
from cocoa.evaluation import rank_all
from cocoa.inputs import ImageBudget
from cocoa.mmeb_eval import EvalDataset, read_eval
from cocoa.pairs import ContentPair, Pair, Side, limit_rows
from cocoa.rebuild import swapped
from cocoa.reconstruction import PatchDecoder
from cocoa.recipe import STAGES
from cocoa.sources import DataConfig, load_pairs
from cocoa.stages import compression, eos_bridge, joint_reconstruction
from cocoa.stages.content import collate
from cocoa.stages.contrastive import ContrastiveArguments, EqualTargetsLoss
from cocoa.stages.eos_bridge import EosBridgeArguments
from cocoa.stages.reconstruction import Reconstructor
from cocoa.stages.sampling import GlobalBatchSampler
from cocoa.stages.training import StageArguments, trainable

IMAGES = ImageBudget((1, 16))
GROUPS = 4
"""Parts of a batch, by length. On a CPU core a step of the bridge takes 0.47 s so, 0.64 s in one part."""
AT_ONCE = 128
"""Inputs embedded at once when scoring."""


@dataclass(frozen=True)
class Phase:
    """One stage of a run.

    Attributes:
        stage: a stage of the package, or `next_token`: block B predicted word by word, causally, with all of A seen,
            which is how the backbone was pre-trained.
        options: of the stage's arguments class (`next_token` has the bridge's).
        shuffled: every text with the image of another row of its data set.
        dialogues: rows are conversations on the scenes instead of the run's pairs (CoMa).
        lora: adapters, merged behind the phase; None trains all weights.
    """

    stage: str
    options: dict[str, Any] = field(default_factory=dict)
    shuffled: bool = False
    dialogues: bool = False
    lora: Lora | None = None

    def having(self, **options: Any) -> Phase:
        """The same with other options."""
        return replace(self, options=self.options | options)


@dataclass(frozen=True)
class Start:
    """What a run starts from: everything but its phases."""

    backbone: str
    pairs: int
    seed: int


class Lab:
    """Trains phases one after another and scores what comes out; what several runs begin with is trained once.

    Args:
        folder: holds `scenes` (of `write_scenes`) and gets `states`, the weights behind phases that others share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sets: dict[str, tuple[list[EvalDataset], Inputs]] = {}
        self.encoded: dict[tuple[str, int], dict[Any, dict[str, Tensor]]] = {}  # by split and compression tokens
        torch.set_flush_denormal(True)
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # one run a core

    def load(self, start: Start, phases: Sequence[Phase] = ()) -> Backbone:
        """The backbone behind these phases, whose weights must be kept, in the form that the last one asks for."""
        form = _form(phases)
        backbone = load_backbone(start.backbone, IMAGES, **form._asdict())
        backbone.model.to(self.device)
        if phases:
            saved = load_file(self._state(start, phases), device=str(self.device))
            with torch.no_grad():
                for name, parameter in backbone.model.named_parameters():
                    parameter.copy_(saved[name])
        return backbone

    def train(self, start: Start, phases: Sequence[Phase], keep: int = 0) -> Backbone:
        """The backbone behind these phases; the weights behind each of the first `keep` ones stay on disk."""
        done = next((n for n in range(keep, 0, -1) if self._state(start, phases[:n]).exists()), 0)
        backbone = self.load(start, phases[:done])
        for number in range(done, len(phases)):
            phase = phases[number]
            backbone = _reread(backbone, _form(phases[: number + 1]))
            self._train_phase(backbone, start, phase)
            if number < keep:
                self._keep(backbone, self._state(start, phases[: number + 1]))
        return backbone

    def rows(self, start: Start, phase: Phase) -> list[Pair]:
        """The pairs of a run: a sample that its seed decides."""
        scenes = self.folder / "scenes"
        if phase.dialogues:  # as many as the other arms have rows, on the pictures of the whole pool
            config = DataConfig(str(scenes / "dialogues.parquet"), max_rows_per_subset=6 * start.pairs)
            return load_pairs(config, start.seed).pairs
        config = DataConfig(str(scenes / "MMEB-train"))
        return limit_rows(load_pairs(config, start.seed).pairs, start.pairs, start.seed)

    def hits(self, backbone: Backbone, split: str) -> dict[str, np.ndarray]:
        """For each data set of a split (queries,) whether the right candidate came first."""
        found, inputs = self.evaluation(split)
        vectors = self.embed_sides(backbone, inputs.sides, split)
        ranks = rank_all(found, (vectors[place] for place in inputs.places))
        return {name: (own == 1).numpy() for name, own in ranks.items()}

    def evaluation(self, split: str) -> tuple[list[EvalDataset], Inputs]:
        """The data sets of a split and their distinct inputs."""
        if split not in self.sets:
            self.sets[split] = distinct_inputs(read_eval(self.folder / "scenes" / "MMEB-eval", split=split))
        return self.sets[split]

    def embed_sides(self, backbone: Backbone, sides: Sequence[Side], kept_as: str) -> Tensor:
        """Embeddings (sides, D) on the CPU; what the sides are encoded as is kept under a name."""
        backbone.encoded = self.encoded.setdefault((kept_as, backbone.compression_tokens), {})
        backbone.model.eval()
        with torch.inference_mode():
            return embed(backbone, [backbone.encode_side(side) for side in sides], AT_ONCE).cpu()

    def _state(self, start: Start, phases: Sequence[Phase]) -> Path:
        what = json.dumps([vars(start), [vars(phase) for phase in phases]], default=vars, sort_keys=True)
        return self.folder / "states" / f"{hashlib.blake2b(what.encode(), digest_size=12).hexdigest()}.safetensors"

    @staticmethod
    def _keep(backbone: Backbone, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        save_file({name: p.detach().cpu().contiguous() for name, p in backbone.model.named_parameters()}, partial)
        os.replace(partial, path)

    def _train_phase(self, backbone: Backbone, start: Start, phase: Phase) -> None:
        args = arguments(phase, start.seed)
        pairs = self.rows(start, phase)
        backbone.encoded = {}
        adapters = None
        if phase.lora is not None:
            adapters = add_adapters(
                backbone.model, phase.lora, [] if isinstance(args, ContrastiveArguments) else [backbone.mask_token_id]
            )
        backbone.model.train()
        if isinstance(args, ContrastiveArguments):
            train_contrastive(backbone, pairs, args)
        else:
            name = "eos_bridge" if phase.stage == "next_token" else phase.stage
            rows: list[ContentPair] = list(stage_rows(pairs, name))
            train_reconstruction(backbone, swapped(rows) if phase.shuffled else rows, args, phase.stage)
        if adapters is not None:
            with TemporaryDirectory() as unused:
                backbone.model = merge_adapters(adapters, Path(unused))
        backbone.encoded = None
        gc.collect()


def arguments(phase: Phase, seed: int) -> StageArguments:
    """The arguments object of a phase."""
    kind = STAGES["eos_bridge" if phase.stage == "next_token" else phase.stage]
    return kind(output_dir="unused", seed=seed, use_cpu=True, **{"batch_size": 64} | phase.options)


def _form(phases: Sequence[Phase]) -> Form:
    """How the last of some phases reads the backbone; the untouched one is read as the pipeline reads it."""
    form = None
    for phase in phases:
        form = arguments(phase, 0).form(form)
    return form or Form("causal")


def _reread(backbone: Backbone, form: Form) -> Backbone:
    """The same weights in another form."""
    if backbone.form == form:
        return backbone
    fresh = load_backbone(backbone.name, IMAGES, **form._asdict())
    fresh.model.to(backbone.model.device)
    if backbone.form.compression_tokens or not form.compression_tokens:
        fresh.model.load_state_dict(backbone.model.state_dict())
    else:
        raise ValueError("compression tokens come with the first phase")
    return fresh


# ------------------------------------------------------------------------------------------------------- training


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

    def attention(
        self, attention_mask: Tensor, eos_position: Tensor | None, compression_start: Tensor | None
    ) -> Tensor:
        """(B, 1, T, T)."""
        return causal(attention_mask)


def train_reconstruction(
    backbone: Backbone, rows: Sequence[ContentPair], args: StageArguments, stage: str
) -> list[float]:
    """Stages 1 and 2, compression, and next-token prediction; the losses of the steps."""
    pad, length = backbone.tokenizer.pad_token_id, args.max_length
    weights = {"token": 1.0}

    def sample(key: tuple[int, int]) -> dict[str, Tensor]:
        row = rows[key[1]]
        generator = row_generator(args.seed, stage, key[0], row.row_id)
        if isinstance(args, joint_reconstruction.JointReconstructionArguments):
            return joint_reconstruction.corrupt(
                backbone, row, length, args.text_mask_ratio, args.patch_mask_ratio, generator
            )
        if isinstance(args, compression.CompressionArguments):
            return compression.converse(backbone, row, length, args.prompt)
        assert isinstance(args, EosBridgeArguments)
        if stage == "next_token":
            return all_shown(eos_bridge.bridge(backbone, row, length, 1.0, generator))
        return eos_bridge.bridge(backbone, row, length, args.text_mask_ratio, generator)

    if isinstance(args, joint_reconstruction.JointReconstructionArguments):
        set_seed(args.seed)
        decoder = PatchDecoder(backbone.model.model.language_model, backbone.unit_size)
        model = Reconstructor(backbone, patch_decoder=decoder, shifted=args.text_objective == "mntp")
        weights["patch"] = args.patch_loss_weight
    elif stage == "next_token":
        model = NextToken(backbone)
    else:
        model = Reconstructor(backbone, layout=getattr(args, "layout", "published"))

    def backward(keys: list[tuple[int, int]]) -> float:
        samples = sorted(map(sample, keys), key=lambda each: len(each["input_ids"]))
        counts = {"token": sum(int((each["labels"] != IGNORE_INDEX).sum()) for each in samples)}
        counts["patch"] = sum(int(each["hidden_units"].sum()) for each in samples if "hidden_units" in each)
        total = 0.0
        for part in np.array_split(np.arange(len(samples)), GROUPS):
            batch = collate([samples[i] for i in part], pad)
            sums = model(**{name: value.to(backbone.model.device) for name, value in batch.items()})
            loss = sum(weight * sums[term][0] / counts[term] for term, weight in weights.items())
            loss.backward()
            total += loss.item()
        return total

    sampler = GlobalBatchSampler(
        [row.dataset for row in rows], args.batch_size, args.batch_size, args.seed, with_epoch=True
    )
    return fit(trainable(model), args, global_batches(sampler), backward)


def all_shown(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """A sample of the bridge with the hidden tokens put back; the labels stay."""
    ids, labels = sample["input_ids"], sample["labels"]
    return sample | {"input_ids": torch.where(labels == IGNORE_INDEX, ids, labels)}


def train_contrastive(backbone: Backbone, pairs: Sequence[Pair], args: ContrastiveArguments) -> list[float]:
    """Stage 3 on full batches; the losses of the steps."""
    model = as_sentence_transformer(backbone)
    scale, size = 1 / args.temperature, args.batch_size
    loss_of = EqualTargetsLoss(model, mask_equal_targets=args.mask_equal_targets, scale=scale, mini_batch_size=size)

    def backward(rows: list[int]) -> float:
        chosen = [pairs[row] for row in rows]
        sides = [pair.query for pair in chosen] + [pair.target for pair in chosen]
        vectors = embed(backbone, [backbone.encode_side(side) for side in sides], size // 2)
        labels = torch.tensor([[pair.target.content_id()] for pair in chosen], device=vectors.device)
        loss = loss_of.calculate_loss([[vectors[:size]], [vectors[size:]]], labels)
        loss.backward()
        return loss.item()

    sampler = GlobalBatchSampler([pair.dataset for pair in pairs], size, size, args.seed)
    return fit(trainable(backbone.model), args, global_batches(sampler), backward)


def embed(backbone: Backbone, encoded: Sequence[dict[str, Tensor]], at_once: int) -> Tensor:
    """Embeddings (N, D) of sides that `Backbone.encode_side` has encoded, computed in groups of like length."""
    order = sorted(range(len(encoded)), key=lambda i: ("pixel_values" in encoded[i], len(encoded[i]["input_ids"])))
    groups: list[list[int]] = []
    for i in order:  # inputs with an image and without are not mixed
        if (
            not groups
            or len(groups[-1]) == at_once
            or ("pixel_values" in encoded[i]) != ("pixel_values" in encoded[groups[-1][0]])
        ):
            groups.append([])
        groups[-1].append(i)
    vectors = torch.cat([_embed_group(backbone, [encoded[i] for i in group]) for group in groups])
    return vectors[torch.tensor(order).argsort()]


def _embed_group(backbone: Backbone, samples: list[dict[str, Tensor]]) -> Tensor:
    batch = collate(samples, backbone.tokenizer.pad_token_id)
    batch = {name: value.to(backbone.model.device) for name, value in batch.items()}
    mask = batch["attention_mask"]  # (N, T)
    positions = backbone.rope_positions(batch["input_ids"], mask, batch.get("image_grid_thw"))
    states = backbone.model.model(**batch, position_ids=positions, use_cache=False).last_hidden_state  # (N, T, D)
    if backbone.pooling == "mean":
        weights = mask
    else:  # the last tokens: EOS, or the compression tokens
        weights = mask * (mask.flip(1).cumsum(1).flip(1) <= backbone.ending)
    pooled = (states * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)
    return torch.nn.functional.normalize(pooled, dim=-1)
