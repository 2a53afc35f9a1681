"""What an evaluation has to encode: its image files looked through once, every input that is equal by content once."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cocoa.bad_rows import BadRows
from cocoa.embedding_cache import content_key
from cocoa.image_files import check_image_files, missing_images
from cocoa.images import Inspected, inspect_image
from cocoa.mmeb_eval import EvalDataset, without
from cocoa.pairs import Side
from cocoa.processes import shared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """Every distinct input of several data sets.

    Attributes:
        sides: the inputs, distinct by what a model reads: instruction, text and the image file's content.
        keys: the key of each one's content.
        places: for each data set, which of them its own inputs are: (inputs,).
        origins: a data set and row that each stands in.
    """

    sides: list[Side]
    keys: list[bytes]
    places: list[np.ndarray]
    origins: list[tuple[str, int]]


def with_images_present(found: Sequence[EvalDataset], root: str | Path | None, bad: BadRows) -> list[EvalDataset]:
    """The data sets without rows whose image files are missing or stray.

    Args:
        found: the data sets.
        root: the folder or archive that images must lie in; None: they may lie anywhere.
        bad: told about the rows.

    Raises:
        CocoaError: by the policy of `bad` (how many files are missing is told too), or a data set has no row left.
    """
    if bad.policy == "error":
        check_eval_images(found, root)
        return list(found)
    faults = missing_images(_image_files(found), None if root is None else str(root))
    return [without(dataset, _broken(dataset, faults), bad) for dataset in found]


def with_images_readable(found: Sequence[EvalDataset], bad: BadRows) -> tuple[list[EvalDataset], dict[str, bytes]]:
    """The data sets without rows whose image files cannot be decoded, and a hash of each file's content.

    The processes share the files.

    Raises:
        CocoaError: by the policy of `bad`, or a data set has no row left.
    """
    looked = inspect_images(_image_files(found))
    faults = {path: inspected.fault for path, inspected in looked.items() if inspected.fault}
    digests = {path: inspected.digest for path, inspected in looked.items()}
    return [without(dataset, _broken(dataset, faults), bad) for dataset in found], digests


def inspect_images(paths: Iterable[str]) -> dict[str, Inspected]:
    """Read and decode every image file; the processes share them, and all get what each found."""
    paths = list(paths)
    return dict(zip(paths, shared(inspect_image, paths, "looking through images"), strict=True))


def check_eval_images(found: Sequence[EvalDataset], root: str | Path | None = None) -> None:
    """Sees that every image file of the evaluation sets exists (and lies in `root`), as `check_image_files` does."""
    files = (
        (side.image, dataset.name, row)
        for dataset in found
        for side, row in zip(dataset.inputs, dataset.first_rows(), strict=True)
        if isinstance(side.image, str)
    )
    check_image_files(files, None if root is None else {dataset.name: str(root) for dataset in found})


def distinct_inputs(
    found: Sequence[EvalDataset], digests: Mapping[str, bytes] | None = None
) -> tuple[list[EvalDataset], Inputs]:
    """The data sets over inputs that differ in content, and what is to be encoded for all of them, each input once.

    The same picture under two paths is one input: as a duplicate of the right candidate it is right too.

    Args:
        found: the data sets.
        digests: a hash of each image file's content, if they have been read already.
    """
    if digests is None:
        digests = {path: inspected.digest for path, inspected in inspect_images(_image_files(found)).items()}
    numbers: dict[bytes, int] = {}
    inputs = Inputs([], [], [], [])
    merged = []
    for dataset in found:
        keys = [content_key(side, digests.get(str(side.image))) for side in dataset.inputs]
        for key, side, row in zip(keys, dataset.inputs, dataset.first_rows(), strict=True):
            if numbers.setdefault(key, len(numbers)) == len(inputs.sides):
                inputs.sides.append(side)
                inputs.keys.append(key)
                inputs.origins.append((dataset.name, row))
        by_content, used = dataset.renumbered(inputs.sides, np.array([numbers[key] for key in keys]))
        merged.append(by_content)
        inputs.places.append(used)
    logger.info("%d data sets, %d distinct inputs", len(found), len(inputs.sides))
    return merged, inputs


def _image_files(found: Iterable[EvalDataset]) -> dict[str, None]:
    """The image files of the data sets, each once, in order."""
    sides = (side for dataset in found for side in dataset.inputs)
    return dict.fromkeys(side.image for side in sides if isinstance(side.image, str))


def _broken(dataset: EvalDataset, faults: Mapping[str, str]) -> dict[int, str]:
    """What is wrong with inputs of a data set, by their index, from what is wrong with image files."""
    images = ((i, str(side.image)) for i, side in enumerate(dataset.inputs))
    return {i: f"{path}: {faults[path]}" for i, path in images if path in faults}
