"""Embeddings on disk, by the content of model and input: what was encoded once is not encoded again.

A folder holds shards, each written whole or not at all, so that a run may stop at any moment and several
processes may write beside each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from cocoa.files import whole, writing
from cocoa.pairs import Side

KEY_BYTES = 16
MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")
"""Endings of the files that decide what a model makes of an input."""
NO_MODEL_FILES = ("cocoa.json", "training_log.json", "adapter", "patch_decoder")


class EmbeddingCache:
    """The embeddings of one model.

    Args:
        folder: of this model alone, see `fingerprint`; made when the first shard is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[bytes, Tensor] = {}

    def read(self) -> None:
        """Take in every shard of the folder."""
        for path in sorted(self.folder.glob("*.safetensors")):
            shard = load_file(path)
            keys = shard["keys"].numpy()  # (N, KEY_BYTES)
            self.rows |= {key.tobytes(): row for key, row in zip(keys, shard["embeddings"], strict=True)}

    def write(self, keys: Sequence[bytes], embeddings: Tensor) -> None:
        """Add the rows (N, D) that are new, and put them on disk as one shard; what is there stays as it is.

        Raises:
            CocoaError: the disk is full, or does not let us.
        """
        new = [i for i, key in enumerate(keys) if key not in self.rows]
        keys, embeddings = [keys[i] for i in new], embeddings[new].contiguous()
        self.rows |= dict(zip(keys, embeddings, strict=True))
        packed = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, KEY_BYTES)
        path = self.folder / f"{hashlib.blake2b(b''.join(keys), digest_size=8).hexdigest()}.safetensors"
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(path) as unfinished:
                save_file({"keys": packed, "embeddings": embeddings}, unfinished)


def fingerprint(*facts: object) -> str:
    """A short name for what an embedding depends on besides its input."""
    return hashlib.blake2b(repr(facts).encode(), digest_size=8).hexdigest()


def hash_folder(folder: Path) -> str:
    """A hash of a folder's files by name and content, wherever it lies and whatever made it.

    Of the hub's cache, whose folders fill file by file as they are asked for, it is the commit.
    """
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.name
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.suffix in MODEL_FILES and path.is_file() and name.parts[0] not in NO_MODEL_FILES:
            digest.update(f"{name.as_posix()}\0{hash_file(path)}\0".encode())
    return digest.hexdigest()


def hash_file(path: Path) -> str:
    """A hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def content_key(side: Side, image_digest: bytes | None = None) -> bytes:
    """`KEY_BYTES` bytes that stand for what the model would read.

    Args:
        side: instruction, text and image.
        image_digest: a hash of the image file's content; not needed for an image in memory.
    """
    digest = hashlib.blake2b(side.instruction.encode(), digest_size=KEY_BYTES)
    digest.update(b"\0" + side.text.encode() + b"\0")  # outer whitespace counts in the reference's plain form
    if isinstance(side.image, Image.Image):
        digest.update(f"{side.image.mode}{side.image.size}".encode() + side.image.tobytes())
    elif isinstance(side.image, bytes):
        digest.update(side.image)
    elif side.image is not None:
        digest.update(image_digest or b"")
    return digest.digest()
