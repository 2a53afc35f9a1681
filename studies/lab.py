"""Many small runs in little time: what `cocoa train` and `cocoa evaluate` do through files, done in memory.

Objectives, masks, order of rows, optimiser and schedule are the package's own (`tests/test_studies.py` compares the
weights with the pipeline's). What is left out costs more than the training at this size: trainers, checkpoints,
encoding the same picture again, and most of the padding, since a batch is computed in groups of like length.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from embed import embed
from filelock import FileLock
from loops import KINDS, SEE_PIXELS, Reconstruction, stage_of, train_contrastive
from results import RUNS, lock_path, start_log
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed

from cocoa.adapters import Lora, add_adapters, merge_adapters
from cocoa.backbone import Backbone, Form, load_backbone
from cocoa.blocks import IN_BLOCKS
from cocoa.catalogue import stage_rows
from cocoa.eval_inputs import Inputs, distinct_inputs
from cocoa.evaluation import rank_all
from cocoa.features import keep_features
from cocoa.inputs import ImageBudget
from cocoa.mmeb_eval import EvalDataset, read_eval
from cocoa.pairs import ContentPair, Pair, Side, content_pairs, limit_rows
from cocoa.recipe import STAGES
from cocoa.scenes.write import write_scenes
from cocoa.sources import DataConfig, load_pairs
from cocoa.stages.arguments import StageArguments
from cocoa.stages.contrastive import ContrastiveArguments
from cocoa.stages.reconstruction import Reconstructor

IMAGES = ImageBudget((1, 16))
MORE_TESTS = ("more-scenes-1", "more-scenes-2")
"""Folders with test scenes only, as many as in `scenes` each: so that which queries there are adds little luck."""


@dataclass(frozen=True)
class Phase:
    """One stage of a run.

    Attributes:
        stage: a stage of the package, or one of `KINDS`.
        options: of the stage's arguments class.
        shuffled: every text with the image of another row of its data set, another one in each epoch.
        either_side: of the bridge, every text of a pair behind every image of it, not only what the table chooses.
        dialogues: rows are conversations on the scenes instead of the run's pairs (CoMa).
        lora: adapters, merged behind the phase; None trains all weights.
        token_weight: of its token loss; the patch loss has its own in `options`.
        beside: a phase whose loss is added to each contrastive step, a batch of its own at a time.
        beside_weight: its weight.
    """

    stage: str
    options: dict[str, Any] = field(default_factory=dict)
    shuffled: bool = False
    either_side: bool = False
    dialogues: bool = False
    lora: Lora | None = None
    token_weight: float = 1.0
    beside: Phase | None = None
    beside_weight: float = 1.0

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
        frozen_tower: leave the vision tower as it is, so that every picture goes through it once.

    Attributes:
        objective: of the last phase but contrastive ones that was trained, with what it learnt beside the backbone.
    """

    def __init__(self, folder: Path, frozen_tower: bool = True) -> None:
        self.folder = folder
        self.frozen_tower = frozen_tower
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.objective: Reconstructor | None = None
        self.things: dict[str, Any] = {}
        self.encoded: dict[tuple[str, str, int], dict[Any, dict[str, Tensor]]] = {}  # see `known`
        torch.set_flush_denormal(True)
        if self.device.type == "cpu":
            torch.set_num_threads(1)  # one run a core

    def load(self, start: Start, phases: Sequence[Phase] = (), form: Form | None = None) -> Backbone:
        """The backbone behind these phases, whose weights must be kept, in a form or in that of the last phase."""
        form = form or _form(phases)
        backbone = self._read(start, form)
        if phases:
            saved = load_file(self._state(start, phases), device=str(self.device))
            with torch.no_grad():
                for name, parameter in backbone.model.named_parameters():
                    parameter.copy_(saved[name])
        return backbone

    def train(self, start: Start, phases: Sequence[Phase], keep: int = 0) -> Backbone:
        """The backbone behind these phases; the weights behind each of the first `keep` ones stay on disk."""
        done = next((n for n in range(keep, 0, -1) if self._state(start, phases[:n]).exists()), 0)
        backbone = self.load(start, phases[:done], _form(phases[: done + 1]))
        for number in range(done, len(phases)):
            phase = phases[number]
            backbone = self._reread(backbone, start, _form(phases[: number + 1]))
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
        pool = self.kept("pool", lambda: load_pairs(config, start.seed).pairs)  # all of it: no seed decides
        return limit_rows(pool, start.pairs, start.seed)

    def hits(self, backbone: Backbone, split: str, folders: Sequence[str] = ("scenes",)) -> dict[str, np.ndarray]:
        """For each data set of a split (queries,) whether the right candidate came first, one folder after another."""
        parts: dict[str, list[np.ndarray]] = defaultdict(list)
        for folder in folders:
            found, inputs = self.evaluation(split, folder)
            vectors = self.embed_sides(backbone, inputs.sides, f"{folder} {split}")
            for name, own in rank_all(found, (vectors[place] for place in inputs.places)).items():
                parts[name].append((own == 1).numpy())
        return {name: np.concatenate(own) for name, own in parts.items()}

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Something that is made once in a process, by name."""
        if name not in self.things:
            self.things[name] = make()
        return self.things[name]

    def evaluation(self, split: str, folder: str = "scenes") -> tuple[list[EvalDataset], Inputs]:
        """The data sets of a split and their distinct inputs."""
        path = self.folder / folder / "MMEB-eval"
        return self.kept(f"{folder} {split}", lambda: distinct_inputs(read_eval(path, split=split)))

    def embed_sides(self, backbone: Backbone, sides: Sequence[Side], kept_as: str) -> Tensor:
        """Embeddings (sides, D) on the CPU; what a backbone's tower makes of the sides is kept under a name."""
        backbone.encoded = self.known(backbone, kept_as)
        backbone.model.eval().set_attn_implementation({"text_config": IN_BLOCKS})
        with torch.inference_mode():
            keep_features(backbone, sides)
            return embed(backbone, [backbone.encode_side(side) for side in sides]).cpu()

    def _read(self, start: Start, form: Form) -> Backbone:
        backbone = load_backbone(start.backbone, IMAGES, **form._asdict())
        backbone.model.to(self.device)
        backbone.model.set_attn_implementation({"text_config": IN_BLOCKS})
        if self.frozen_tower:
            backbone.model.model.visual.requires_grad_(False)
        return backbone

    def known(self, backbone: Backbone, kept_as: str) -> dict[Any, dict[str, Tensor]]:
        """What is encoded of inputs that go by a name, for as long as the process lasts: no run changes the tower."""
        return self.encoded.setdefault((backbone.name, kept_as, backbone.compression_tokens), {})

    def _reread(self, backbone: Backbone, start: Start, form: Form) -> Backbone:
        """The same weights in another form."""
        if backbone.form == form:
            return backbone
        if form.compression_tokens and not backbone.compression_tokens:
            raise ValueError("compression tokens come with the first phase")
        fresh = self._read(start, form)
        fresh.model.load_state_dict(backbone.model.state_dict())
        return fresh

    def _reconstruction(self, backbone: Backbone, pairs: Sequence[Pair], start: Start, phase: Phase) -> Reconstruction:
        args = arguments(phase, start.seed)
        rows = every_text(pairs) if phase.either_side else list(stage_rows(pairs, stage_of(args)))
        return Reconstruction(backbone, rows, args, phase.stage, phase.token_weight, phase.shuffled)

    def _state(self, start: Start, phases: Sequence[Phase]) -> Path:
        what = json.dumps([self.frozen_tower, asdict(start), [asdict(phase) for phase in phases]], sort_keys=True)
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
        of_pixels = phase.stage in SEE_PIXELS or not self.frozen_tower
        backbone.encoded = {} if of_pixels else self.known(backbone, "training")
        adapters = None
        if phase.lora is not None:
            set_seed(start.seed)
            adapters = add_adapters(
                backbone.model, phase.lora, [] if isinstance(args, ContrastiveArguments) else [backbone.mask_token_id]
            )
        backbone.model.train()
        if isinstance(args, ContrastiveArguments):
            beside = self._reconstruction(backbone, pairs, start, phase.beside) if phase.beside else None
            keep_features(backbone, [side for pair in pairs for side in (pair.query, pair.target)])
            train_contrastive(backbone, pairs, args, beside, phase.beside_weight)
        else:
            reconstruction = self._reconstruction(backbone, pairs, start, phase)
            reconstruction.train()
            self.objective = reconstruction.model
        if adapters is not None:
            with TemporaryDirectory() as unused:
                backbone.model = merge_adapters(adapters, Path(unused)).to(self.device)
        backbone.encoded = None
        gc.collect()


def open_lab() -> Lab:
    """The lab of the studies, its scenes written where they are not there yet; what it does is logged."""
    start_log()
    with FileLock(lock_path("scenes")):  # processes may start together
        write_scenes(RUNS / "scenes", seed=0, pairs=24_000, queries=200, progress=True)
        for seed, folder in enumerate(MORE_TESTS, 1):
            write_scenes(RUNS / folder, seed=seed, pairs=6, queries=200, progress=True, splits=("test",))
    return Lab(RUNS)


def arguments(phase: Phase, seed: int) -> StageArguments:
    """The arguments object of a phase."""
    kind = STAGES["eos_bridge" if phase.stage in KINDS else phase.stage]
    return kind(output_dir="unused", seed=seed, use_cpu=True, **{"batch_size": 64} | phase.options)


def every_text(pairs: Sequence[Pair]) -> list[ContentPair]:
    """Rows of the bridge: each text of a pair behind each image of it."""
    rules = [f"{a} -> {b}_text" for a in ("query", "target") for b in ("query", "target")]
    found = [content_pairs(pair, "eos_bridge", rule) for pair in pairs for rule in rules]
    return [row for row in found if isinstance(row, ContentPair)]


def _form(phases: Sequence[Phase]) -> Form:
    """How the last of some phases reads the backbone; the untouched one is read as the pipeline reads it."""
    form = None
    for phase in phases:
        form = arguments(phase, 0).form(form)
    return form or Form("causal")
