"""What a stage trains on: the pairs of its data that it can use, and the reasons for those that it cannot."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cocoa.backbone import Backbone
from cocoa.catalogue import StageRows
from cocoa.errors import CocoaError
from cocoa.image_files import check_image_files, missing_images
from cocoa.pair_files import read_file
from cocoa.pairs import ContentPair, Pair, Side, check_images, hold_out, limit_rows
from cocoa.recipe import Stage
from cocoa.sources import DataConfig, load_pairs
from cocoa.stages import compression, contrastive, eos_bridge, joint_reconstruction
from cocoa.stages.arguments import StageArguments

logger = logging.getLogger(__name__)


@dataclass
class StageData:
    """The rows a stage trains on, and what was left out by data set and reason.

    Exactly one of `rows` (reconstruction) and `pairs` (contrastive) is filled.
    """

    rows: list[ContentPair] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    validation: list[Pair] = field(default_factory=list)
    left_out: dict[str, Counter[str]] = field(default_factory=dict)

    def datasets(self) -> Counter[str]:
        """Rows kept, by data set."""
        return Counter(row.dataset for row in (self.rows or self.pairs))


def stage_data(stage: Stage, backbone: Backbone, args: StageArguments) -> StageData:
    """Read the pairs of a stage, hold rows out for validation, and choose what the stage can use.

    Raises:
        CocoaError: a mistake in the data, a missing image, or no row that the stage can use.
    """
    # Every stage holds out the same rows, so they are chosen before a stage's own limit is applied.
    found = load_pairs(replace(stage.data, max_rows_per_subset=None), args.seed)
    left_out = {dataset: Counter(reasons) for dataset, reasons in found.left_out.items()}
    if stage.data.validation is None:
        held = found.roots
        pairs, validation = hold_out(found.pairs, stage.data.validation_rows, args.seed)
    else:
        validation, held = load_validation(stage.data)
        pairs = without_validation(found.pairs, validation, left_out)
    pairs = limit_rows(pairs, stage.data.max_rows_per_subset, args.seed)
    if stage.data.on_bad_row == "skip":
        pairs = with_images(pairs, found.roots, stage.data.max_bad_share, left_out)
        unseen: dict[str, Counter[str]] = {}
        validation = with_images(validation, held, stage.data.max_bad_share, unseen)
        for reason, rows in sum(unseen.values(), Counter()).items():
            logger.warning("stage %s: left out of the held-out rows: %d, %s", stage.name, rows, reason)
    data = StageData(validation=validation, left_out=left_out)
    if isinstance(args, contrastive.ContrastiveArguments):
        data.validation = [pair for pair in validation if pair.target != Side()]
        usable = contrastive.usable_pairs(pairs, backbone, args)
        data.pairs, reasons = usable, usable.left_out
        check_images(pairs, found.roots)
        check_images(validation, held)
    else:
        found_rows = usable_rows(pairs, backbone, args)
        data.rows, reasons = list(found_rows), found_rows.left_out
        images = ((row.side.image, row.dataset, row.row) for row in data.rows if isinstance(row.side.image, str))
        check_image_files(images, found.roots)
    for dataset, counts in reasons.items():
        left_out.setdefault(dataset, Counter()).update(counts)
    if not data.datasets():
        reasons_text = "; ".join(f"{d}: {dict(r)}" for d, r in left_out.items()) or "the data is empty"
        raise CocoaError(f"stages.{stage.name}: no row of the data can be used ({reasons_text})")
    return data


def with_images(
    pairs: Sequence[Pair], roots: Mapping[str, str], most: float, left_out: dict[str, Counter[str]]
) -> list[Pair]:
    """The pairs whose image files are all there, and in their data set's root.

    Raises:
        CocoaError: more than that share of them are left out.
    """
    files: dict[str, list[str]] = defaultdict(list)
    for pair in pairs:
        files[pair.dataset] += [side.image for side in pair.sides if isinstance(side.image, str)]
    missing = {name: missing_images(own, roots.get(name)) for name, own in files.items()}
    kept: list[Pair] = []
    faults: list[str] = []
    for pair in pairs:
        own = missing[pair.dataset]
        path = next((side.image for side in pair.sides if isinstance(side.image, str) and side.image in own), None)
        if path is None:
            kept.append(pair)
        else:
            faults.append(f"{path}: {own[path]}")
            left_out.setdefault(pair.dataset, Counter())[f"an image: {own[path]}"] += 1
    if len(faults) > most * len(pairs):
        raise CocoaError(
            f"{len(faults)} of {len(pairs)} rows lack an image, more than data.max_bad_share {most:g} allows; "
            f"unpack the images, or name the folder that holds them (data.image_root). The first: {faults[0]}"
        )
    return kept


def load_validation(data: DataConfig) -> tuple[list[Pair], dict[str, str]]:
    """The pairs of `data.validation`, and the folder that their images must not leave, by data set.

    Raises:
        CocoaError: no such file, or a mistake in it.
    """
    path = Path(str(data.validation))
    if not path.is_file():
        raise CocoaError(f"data.validation: {path}: no such file; name a file of pairs")
    found = read_file(path, data.image_root)
    pairs = [pair for pair in found.pairs if pair.target != Side()]
    if not pairs:
        raise CocoaError(f"data.validation: {path}: no pair in it")
    return pairs, found.roots


def without_validation(
    pairs: Sequence[Pair], validation: Sequence[Pair], left_out: dict[str, Counter[str]]
) -> list[Pair]:
    """The pairs whose query and target, by text and image path, do not stand together in the validation file too."""

    def content(pair: Pair) -> tuple[int, ...]:
        # a file that lies elsewhere may name the same image another way: `../photos/cat.jpg`
        sides = (pair.query, pair.target)
        return tuple(
            replace(side, image=os.path.normpath(side.image)).content_id()
            if isinstance(side.image, str)
            else side.content_id()
            for side in sides
        )

    held = {content(pair) for pair in validation}
    kept = []
    for pair in pairs:
        if content(pair) in held:
            left_out.setdefault(pair.dataset, Counter())["stands in the validation file"] += 1
        else:
            kept.append(pair)
    return kept


def usable_rows(pairs: Sequence[Pair], backbone: Backbone, args: StageArguments) -> StageRows[ContentPair]:
    """What a stage that is not contrastive rebuilds of the pairs."""
    if isinstance(args, compression.CompressionArguments):
        return compression.usable_rows(pairs, backbone, args)
    if isinstance(args, eos_bridge.EosBridgeArguments):
        return eos_bridge.usable_rows(pairs, backbone, args)
    return joint_reconstruction.usable_rows(pairs)
