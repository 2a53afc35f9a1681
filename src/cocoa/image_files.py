"""Where image files lie (in folders and archives), and whether all are there.

A member of an archive has a path as if the archive were a folder: `/data/images.zip/A-OKVQA/image_0.jpg`.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from cocoa.errors import CocoaError

IMAGE_FOLDERS = ("", "images", "eval_images")
"""Where in a data folder the image paths of MMEB may start."""
PATIENCE = 100
"""Missing files of one folder after which the others are no longer looked for elsewhere."""
MAX_IMAGE_BYTES = 200_000_000
"""Of an image file, or of an archive's member unpacked; 64 million pixels of three bytes fit."""
ARCHIVE_FOLDERS = ("", "images_zip", "images")
"""Where in it archives are looked for: MMEB-eval has one `images.zip`, MMEB-train one a data set."""


def split_archive(path: str) -> tuple[str, str]:
    """Archive and member of a path; two empty strings for a file that is in no archive."""
    head, found, member = path.partition(".zip/")
    return (f"{head}.zip", member) if found and os.path.isfile(f"{head}.zip") else ("", "")


def read_member(archive: str, member: str) -> bytes:
    """The content of an archive's member.

    Raises:
        KeyError: it has none of this name.
        ValueError: unpacked, the member would be larger than `MAX_IMAGE_BYTES`, or cannot be unpacked bit by bit.
    """
    file = _open_archive(archive, os.getpid())
    info = file.getinfo(member)
    check_bytes(info.file_size)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("neither stored nor deflated in its archive; pack it anew")
    with file.open(info) as opened:
        return opened.read(info.file_size)  # `file.read` would unpack more where the member holds more than it says


def check_bytes(size: int) -> None:
    """See that a file of that many bytes may be read whole.

    Raises:
        ValueError: it is larger than `MAX_IMAGE_BYTES`.
    """
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{size} bytes are more than {MAX_IMAGE_BYTES}; scale the image down")


@cache
def _open_archive(path: str, process: int) -> zipfile.ZipFile:
    """An open archive, one a process: a forked one would share, and move, its place in the file."""
    return zipfile.ZipFile(path)


@cache
def _archive_folders(path: str) -> dict[str, set[str]]:
    """The names in each folder of an archive."""
    folders: dict[str, set[str]] = {}
    try:
        names = _open_archive(path, os.getpid()).namelist()
    except Exception as error:  # a damaged archive raises as much as a damaged image does
        raise CocoaError(f"{path}: not a readable archive ({error}); download it again") from None
    for name in names:
        folder, _, file = name.rpartition("/")
        folders.setdefault(folder, set()).add(file)
    return folders


def image_locator(folder: str | Path, image_root: str | Path | None = None) -> Callable[[str], str]:
    """A function from image paths as they stand in a data set to the paths of their files.

    Absolute paths count from the root too, so that none leaves it; `check_image_files` refuses `..`.

    Args:
        folder: of the data; paths are relative to it or to one of `IMAGE_FOLDERS`, in it or in an archive. Where
            a file is found, the others of its folder (two levels of it: `images/A-OKVQA`) are taken to be too.
        image_root: the folder or archive that paths are relative to, where it is known.
    """
    places = [(os.path.abspath(image_root), "")] if image_root else _places(os.path.abspath(folder))
    known: dict[str, tuple[str, str]] = {}
    missed: Counter[str] = Counter()

    def locate(path: str) -> str:
        inside = "/".join(path.split("/")[:-1][:2])
        if inside not in known:
            found = _find(places, path)
            missed[inside] += found is None
            if found is None and missed[inside] < PATIENCE:
                return _join(*places[0], path)  # missing; another of its folder may tell where they are
            known[inside] = found or places[0]
        return _join(*known[inside], path)

    return locate


def _find(places: Sequence[tuple[str, str]], path: str) -> tuple[str, str] | None:
    """The first place that an image file is in; None if in none.

    Raises:
        CocoaError: it is in none, and an archive that it might be in cannot be read.
    """
    broken: CocoaError | None = None
    for place in places:
        try:
            if _exists(_join(*place, path)):
                return place
        except CocoaError as error:
            broken = broken or error
    if broken is not None:
        raise broken
    return None


def _places(folder: str) -> list[tuple[str, str]]:
    """(prefix, what to cut off a path before it) in the order they are tried."""
    places = [(os.path.join(folder, name).rstrip("/"), "") for name in IMAGE_FOLDERS]
    for name in ARCHIVE_FOLDERS:
        for archive in sorted(Path(folder, name).glob("*.zip")):
            places += [(str(archive), ""), (str(archive), "images/"), (f"{archive}/images", "")]
    return places


def _join(prefix: str, cut: str, path: str) -> str:
    return f"{prefix}/{path.removeprefix(cut)}"


def _exists(path: str) -> bool:
    archive, member = split_archive(path)
    if not archive:
        return os.path.exists(path)
    inside, _, name = member.rpartition("/")
    return name in _archive_folders(archive).get(inside, ())


MISSING, OUTSIDE = "no such image file", "outside of the data folder"
NAME_IT = "`data.image_root` of a recipe, --image-root, or `image_root=` in Python"


def check_image_files(images: Iterable[tuple[str, str, int]], roots: Mapping[str, str] | None = None) -> None:
    """Sees that every image file exists, listing each directory once.

    Args:
        images: (path, data set, row) each.
        roots: of each data set, see `missing_images`; of one that is not there, images may lie anywhere.

    Raises:
        CocoaError: names the first missing or straying file, its data set and row, and how many are missing.
    """
    listings: dict[str, dict[str, bool]] = {}
    faults: dict[str, tuple[str, str, int]] = {}
    roots = roots or {}
    for path, dataset, row in images:
        reason = _fault(path, roots.get(dataset), listings)
        if reason == OUTSIDE:
            raise CocoaError(
                f"{path}: {reason} {roots[dataset]} (data set {dataset}, row {row}); copy the image into it, or name a "
                f"folder that holds all images ({NAME_IT}) and write paths relative to it, or absolute"
            )
        if reason:
            faults.setdefault(path, (reason, dataset, row))
    for path, (reason, dataset, row) in list(faults.items())[:1]:
        raise CocoaError(
            f"{path}: {reason} (data set {dataset}, row {row}); {len(faults)} files are missing; unpack the data "
            f"set's images, or name the folder that holds them ({NAME_IT})"
        )


def missing_images(paths: Iterable[str], root: str | None = None) -> dict[str, str]:
    """The image files that are not there, or not where they may be, and which of the two.

    Args:
        paths: each directory of them is listed once.
        root: the folder that images must not leave, by `..` or by a symbolic link; a link into the `blobs` of
            the hub cache that the folder is in is how a download lies on the disk. None: they may be anywhere.
    """
    listings: dict[str, dict[str, bool]] = {}
    return {path: reason for path in paths if (reason := _fault(path, root, listings))}


def leaves(path: str, root: str) -> bool:
    """Whether an absolute path, its links followed, is of a file outside of a folder; see `missing_images`."""
    return not _is_inside(os.path.realpath(path), root)


def _fault(path: str, root: str | None, listings: dict[str, dict[str, bool]]) -> str:
    """What is wrong with the place of an image file; empty if it is there. `listings` keeps what directories hold."""
    if "\0" in path:  # no file system takes it
        return MISSING
    folder, name = os.path.split(path)
    if root is not None and (".." in path.split("/") or not _is_inside(_real_folder(folder), root)):
        return OUTSIDE
    if folder not in listings:
        listings[folder] = _names(folder)
    if name not in listings[folder]:
        return MISSING
    linked = root is not None and listings[folder][name] and not _is_inside(os.path.realpath(path), root)
    return OUTSIDE if linked else ""


def _names(folder: str) -> dict[str, bool]:
    """The names in a folder, or in one of an archive, and which of them are symbolic links."""
    archive, inside = split_archive(f"{folder}/")
    if archive:
        return dict.fromkeys(_archive_folders(archive).get(inside.rstrip("/"), ()), False)
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name: entry.is_symlink() for entry in entries}
    except OSError:  # none, not a folder, or a name too long for one
        return {}


def _is_inside(real: str, root: str) -> bool:
    """Whether a path without links is below the root or in the blobs of the hub cache around it."""
    return any(real == folder or real.startswith(f"{folder.rstrip('/')}/") for folder in _allowed(root))


@cache
def _allowed(root: str) -> tuple[str, ...]:
    """The folders that an image below `root` may lie in: it, and the blobs of the hub cache around it."""
    root = os.path.abspath(root)
    repo, _, _ = root.partition("/snapshots/")
    cached = repo != root and os.path.basename(repo).startswith(("datasets--", "models--"))
    blobs = () if not cached else (os.path.join(os.path.realpath(repo), "blobs"),)
    return os.path.realpath(root), *blobs


@cache
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)
