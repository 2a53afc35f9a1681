"""`cocoa push`: a checkpoint to the hub, with nothing in it that is only this machine's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from cocoa.card import CARD_NAME, HERE, without_paths
from cocoa.checkpoint import RECORD_NAME
from cocoa.errors import CocoaError, first_line

NEEDED = ("config.json", "modules.json", RECORD_NAME, CARD_NAME)
SUFFIXES = (".safetensors", ".json", ".jinja", ".md", ".txt", ".model")
"""Endings of what a checkpoint consists of; a trainer's optimizer, say, is none of it."""
LEFT_OUT = ("adapter/README.md",)
"""peft's own page, which says nothing but where the backbone lay."""
VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt")
"""Texts that are full of anything, and have no paths."""


@dataclass(frozen=True)
class PublishedFile:
    """A file as it goes to the hub.

    Attributes:
        name: in the repository.
        content: where it lies, or, where it differs from the file here, what it holds.
        size: in bytes.
    """

    name: str
    content: Path | bytes
    size: int

    @property
    def changed(self) -> bool:
        """Whether it differs from the file here."""
        return isinstance(self.content, bytes)


def push(folder: Path, repo_id: str, private: bool = False, dry_run: bool = False) -> list[PublishedFile]:
    """Upload a checkpoint in one commit; the repository is made where there is none.

    Who uploads is huggingface_hub's matter (`hf auth login`): no token is read or written here.

    Args:
        folder: of the checkpoint.
        repo_id: `owner/name` on the hub.
        private: make a new repository private.
        dry_run: check everything and send nothing.

    Returns:
        What was, or would be, sent.

    Raises:
        CocoaError: something in the folder is not to be published, or the hub refuses.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise CocoaError(f"{repo_id}: no name of a repository ({first_line(error)}); write owner/name") from None
    if "/" not in repo_id:
        raise CocoaError(f"{repo_id}: whose? Write owner/name")
    files = published_files(folder, repo_id)
    if dry_run:
        return files
    operations = [CommitOperationAdd(file.name, file.content) for file in files]
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.create_commit(repo_id, operations, commit_message="Upload by `cocoa push`")
    except (HTTPError, OSError) as error:  # the hub refuses, cannot be reached, or there is no token
        reason = first_line(error)
        raise CocoaError(
            f"{repo_id}: the hub refuses ({reason}); log in (`hf auth login`) and see that it is yours"
        ) from None
    return files


def published_files(folder: Path, repo_id: str) -> list[PublishedFile]:
    """The files of a checkpoint as they may be published, checked.

    Raises:
        CocoaError: it is no whole checkpoint of ours, holds a file that is none of its own, or a text with a path of
            this machine in it.
    """
    for name in NEEDED:
        if not (folder / name).is_file():
            raise CocoaError(
                f"{folder}: no {name} here; name a checkpoint, such as OUTPUT_DIR/final"
                + (" (`cocoa card` writes one)" if name == CARD_NAME else "")
            )
    files = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name in LEFT_OUT or any(part.startswith(".") for part in Path(name).parts):
            continue
        if path.suffix not in SUFFIXES:
            raise CocoaError(f"{path}: no file of a checkpoint; take it out of the folder, or it would be published")
        content = published_content(path, repo_id)
        files.append(PublishedFile(name, content, len(content) if isinstance(content, bytes) else path.stat().st_size))
    if not any(file.name.endswith(".safetensors") and "/" not in file.name for file in files):
        raise CocoaError(f"{folder}: no weights here; name a checkpoint, such as OUTPUT_DIR/final")
    return files


def published_content(path: Path, repo_id: str) -> Path | bytes:
    """A file, or what goes to the hub in its place.

    Raises:
        CocoaError: a path of this machine stands in it.
    """
    if path.suffix in (".safetensors", ".model") or path.name in VOCABULARY:
        return path
    text = before = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        found = json.loads(text)
        if (clean := without_paths(found)) != found:
            text = json.dumps(clean, indent=2) + "\n"
    elif path.name == CARD_NAME:
        text = text.replace(HERE, f'SentenceTransformer("{repo_id}")')
    for root in {str(Path.home()), str(Path.cwd()), str(path.parent.resolve())} - {"/"}:
        if root in text:
            raise CocoaError(f"{path}: {root} stands in it, a path of this machine; take it out")
    return path if text == before else text.encode()
