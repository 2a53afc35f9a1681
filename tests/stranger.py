"""Checkpoints read by plain sentence-transformers, in a process where `cocoa` cannot be imported; no hub is asked."""

import json
import os
import subprocess
import sys

import numpy as np

SCRIPT = """
import sys
sys.modules["cocoa"] = None  # `import cocoa` fails from here on
import json, numpy
from PIL import Image
from sentence_transformers import SentenceTransformer

job = json.load(open(sys.argv[1]))
images = [Image.open(path) for path in job["images"]]

def item(value):
    if isinstance(value, int):
        return images[value]
    return value | {"image": images[value["image"]]} if isinstance(value, dict) else value

found = {}
for name, folder in job["folders"].items():
    model = SentenceTransformer(folder, device="cpu")
    for kind, (items, prompt) in job["inputs"].items():
        found[f"{name} {kind}"] = model.encode([item(value) for value in items], prompt=prompt)
numpy.savez(sys.argv[2], **found)
"""


def embed_as_a_stranger(folder, images, folders, inputs):
    """Embeddings by `<checkpoint> <kind of input>`.

    Args:
        folder: to work in.
        images: PIL images.
        folders: checkpoints by name.
        inputs: by kind, the items of one `encode` call (a text, the number of an image, or a dictionary of
            both) and its prompt.
    """
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
    paths = [str(folder / f"{i}.png") for i in range(len(images))]
    job = {"images": paths, "folders": {name: str(path) for name, path in folders.items()}, "inputs": inputs}
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-c", SCRIPT, str(folder / "job.json"), str(folder / "found.npz")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, cwd=folder, env=environment, timeout=300)
    return np.load(folder / "found.npz")
