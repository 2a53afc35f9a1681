"""Looking through data before hours are spent on it (`cocoa validate`): rows read, images decoded, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cocoa.bad_rows import BadRow, BadRows
from cocoa.errors import CocoaError
from cocoa.eval_inputs import inspect_images, with_images_present, with_images_readable
from cocoa.image_files import missing_images
from cocoa.mmeb import list_splits, list_subsets, read_train, select_subsets
from cocoa.mmeb_eval import read_eval_dataset
from cocoa.pair_files import read_file
from cocoa.pairs import PairSet

READ_BY_DEFAULT = ("original", "test")


@dataclass
class DataReport:
    """What was found in one split of one data set.

    Attributes:
        name: of the data set.
        split: of its files; empty for a file of one's own.
        rows: how many can be used.
        images: how many distinct image files they have.
        bad: rows that cannot be used, and evaluation rows that lose a wrong candidate.
        left_out: training rows that no stage can use, which is no fault: reason -> rows.
        error: why the data set cannot be used at all.
    """

    name: str
    split: str = ""
    rows: int = 0
    images: int = 0
    bad: list[BadRow] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    error: str = ""


def check_data(
    path: str | Path,
    subsets: str | Sequence[str] = "all",
    split: str | None = None,
    image_root: str | Path | None = None,
) -> list[DataReport]:
    """Read a folder in either of MMEB's layouts, or a file of one's own, as training and evaluation will.

    Args:
        path: the folder or file.
        subsets: `all`, or names of data sets.
        split: one split; by default `original` and `test`, and every one where neither is there.
        image_root: what image paths are relative to; by default `path`, or a folder or archive of images in it.

    Raises:
        CocoaError: there is no such folder or file, no data in it, or a file of which a part is asked for.
    """
    path = Path(path)
    if path.is_file():
        if subsets != "all" or split is not None:
            raise CocoaError(f"{path}: a file is one data set without splits; leave --subsets and --split out")
        reports = [DataReport(path.stem)]
    else:
        names = select_subsets(subsets, list_subsets(path), str(path))
        reports = [DataReport(name, each) for name in names for each in _splits(path / name, split)]
    for report in reports:
        try:
            _check(report, path, image_root)
        except CocoaError as error:
            report.error = str(error)
    return reports


def _splits(folder: Path, wanted: str | None) -> list[str]:
    """Which splits of a data set to look through; the ones that are read by default, not older uploads beside them."""
    there = sorted(list_splits(folder))
    return [wanted] if wanted else [split for split in there if split in READ_BY_DEFAULT] or there or [""]


def _check(report: DataReport, path: Path, image_root: str | Path | None) -> None:
    """Fill in the report of one data set."""
    if path.is_file():

        def broken(row: int, error: CocoaError) -> None:
            report.bad.append(BadRow(report.name, row, str(error)))

        _check_pairs(report, read_file(path, image_root, broken))
    elif not _is_evaluation(path / report.name, report.split):
        _check_pairs(report, read_train(path, report.split, [report.name], image_root=image_root))
    else:
        bad = BadRows("skip", report.bad)
        dataset = read_eval_dataset(path, report.name, report.split, image_root, bad)
        found, digests = with_images_readable(with_images_present([dataset], image_root or path, bad), bad)
        report.rows, report.images = len(found[0].queries), len(digests)


def _check_pairs(report: DataReport, found: PairSet) -> None:
    """Fill in the report of training pairs, whose reader has left some out already."""
    for reasons in found.left_out.values():
        report.left_out |= reasons
    used = {pair.row: [str(side.image) for side in pair.sides if side.image is not None] for pair in found.pairs}
    paths = dict.fromkeys(path for images in used.values() for path in images)
    faults = missing_images(paths, found.roots[report.name])
    looked = inspect_images(path for path in paths if path not in faults)
    faults |= {path: inspected.fault for path, inspected in looked.items() if inspected.fault}
    without_image = [
        BadRow(report.name, row, f"{path}: {faults[path]}")
        for row, images in used.items()
        if (path := next((path for path in images if path in faults), None)) is not None
    ]
    report.bad += without_image
    report.rows, report.images = len(found.pairs) - len(without_image), len(paths)


def _is_evaluation(folder: Path, split: str) -> bool:
    """Whether a split has the columns of MMEB-eval."""
    shards = list_splits(folder).get(split, [])
    try:
        return any("tgt_text" in pq.read_schema(path).names for path, *_ in shards)
    except (pa.ArrowException, OSError, UnicodeDecodeError):  # the reader says what is wrong with it
        return False
