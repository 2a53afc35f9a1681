"""Peak memory and time of reading a large MMEB-train folder into each stage's rows, image files looked up included.

Writes a folder of generated rows in MMEB-train's layout (every image path its own, each an empty file: nothing is
decoded before training), then reads it as each stage does, in a process of its own.

    python benchmarks/training_data.py [--rows 1000000] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

SETS = 20
STAGES = ("joint_reconstruction", "eos_bridge", "contrastive")


def write(folder: Path, rows: int) -> None:
    """The 20 training sets by their names, `rows` in all: half image to text, half text to image."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from rich.progress import track

    from cocoa.catalogue import datasets

    names = [entry.train_name or entry.name for entry in datasets().values() if not entry.ood]
    assert len(names) == SETS
    caption = "A street at night in the rain, number {}, with a red car, two people and a neon sign over a shop."
    for number, name in enumerate(track(names, "writing")):
        images = folder / "images" / name / "Train"
        images.mkdir(parents=True)
        count = rows // SETS
        paths = [f"images/{name}/Train/{name}_image_{i}.jpg" for i in range(count)]
        for path in paths:
            (folder / path).touch()
        texts = [caption.format(i * SETS + number) for i in range(count)]
        empty = [""] * count
        find = [f"Find me an everyday image that matches the given caption: {text}\n" for text in texts]
        represent = ["<|image_1|>\nRepresent the given image.\n"] * count
        describe = ["<|image_1|>\nFind an image caption describing the given everyday image.\n"] * count
        columns = (find, empty, represent, paths) if number % 2 else (describe, paths, texts, empty)
        table = dict(zip(("qry", "qry_image_path", "pos_text", "pos_image_path"), columns, strict=True))
        table |= {"neg_text": empty, "neg_image_path": empty}
        (folder / name).mkdir()
        pq.write_table(pa.table(table), folder / name / "original-00000-of-00001.parquet")


def read(folder: Path, stage: str) -> dict[str, float]:
    """Rows, seconds and peak memory of reading the data of a stage in this process."""
    from cocoa.recipe import Stage
    from cocoa.sources import DataConfig
    from cocoa.stage_data import stage_data

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    backbone = SimpleNamespace(fits=lambda side, length: True, room=lambda image, length: 10**6, encode_text=str.split)
    data = stage_data(
        Stage(stage, {}, DataConfig(str(folder)), None), backbone, SimpleNamespace(seed=0, max_length=4096)
    )
    return {
        "rows": sum(data.datasets().values()),
        "seconds": time.perf_counter() - start,
        "imports_mb": before / 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="keep the data here, and use what is there")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(read(options.folder, options.stage)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not any(folder.glob("*/*.parquet")):
            write(folder, options.rows)
        print(f"{'stage':22}{'rows':>10}{'seconds':>10}{'peak MB':>10}{'of it imports':>15}")
        for stage in STAGES:
            command = [sys.executable, __file__, "--folder", str(folder), "--stage", stage]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(
                f"{stage:22}{found['rows']:10}{found['seconds']:10.1f}{found['peak_mb']:10.0f}{found['imports_mb']:15.0f}"
            )


if __name__ == "__main__":
    main()
