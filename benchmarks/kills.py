"""Kill a run again and again, start it again by the same command, and compare its weights with an uninterrupted one's.

    python benchmarks/kills.py [--kills 20] [--signal KILL|TERM] [--seed 0] [--tuning dora|full]

All stages of `mini-qwen2-vl` on a hundred scenes, a checkpoint every five steps, on one CPU thread. Each kill comes
after a random share, a tenth to eight tenths, of the time that the whole run takes. Prints what each kill left; ends
with an error if any weight of any stage's checkpoint differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

console = Console(width=120)
STAGES = ("joint_reconstruction", "eos_bridge", "contrastive")
STEPS = 40
"""Of each stage."""
FOLDERS = ("1-joint_reconstruction", "2-eos_bridge", "final")


def write_scenes(folder: Path) -> Path:
    """The synthetic scenes, in a folder's `scenes`."""
    command = [sys.executable, "-m", "cocoa.cli", "scenes", "--output", str(folder / "scenes")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "scenes"


def write_recipe(folder: Path, data: Path, tuning: str, **changes: Any) -> Path:
    """A recipe of all stages whose output goes to `folder`; `changes` are options of every stage."""
    options: dict[str, Any] = {"batch_size": 8, "max_steps": STEPS, "save_steps": 5, "logging_steps": 10} | changes
    recipe: dict[str, Any] = {
        "backbone": "mini-qwen2-vl",
        "output_dir": str(folder),
        "data": {"train": str(data / "MMEB-train"), "max_rows_per_subset": 20, "validation_rows": 2},
        "stages": [{stage: dict(options)} for stage in STAGES],
    }
    if tuning == "dora":
        recipe["lora"] = {"r": 4, "alpha": 16}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(recipe: Path) -> subprocess.Popen[bytes]:
    """`cocoa train`, as a user starts it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "cocoa.cli", "train", str(recipe)]
    log = recipe.with_suffix(".log").open("ab")
    return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def where(folder: Path) -> str:
    """How far a run has come, by what it left on the disk."""
    done = [name for name in FOLDERS if (folder / name).is_dir()]
    partial = [path.name for path in folder.glob("*.partial")]
    checkpoints = sorted((folder / "trainer").glob("*/checkpoint-*"), key=lambda path: int(path.name.split("-")[-1]))
    saved = [
        f"{path.parent.name} {path.name}{'' if (path / 'complete').exists() else ', torn'}" for path in checkpoints
    ]
    return "; ".join([*(f"{name} done" for name in done), *partial, *saved[-1:]]) or "nothing yet"


def largest_difference(one: Path, other: Path) -> float:
    """Of any weight of any stage's checkpoint."""
    most = 0.0
    for name in FOLDERS:
        a, b = (load_file(folder / name / "model.safetensors") for folder in (one, other))
        assert a.keys() == b.keys()
        most = max([most, *((a[key].float() - b[key].float()).abs().max().item() for key in a)])
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tuning", choices=("dora", "full"), default="dora")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scenes = write_scenes(folder)
        whole, killed = folder / "whole", folder / "killed"
        began = time.monotonic()
        if start(write_recipe(whole, scenes, options.tuning)).wait():
            raise SystemExit((folder / "whole.log").read_text())
        seconds = time.monotonic() - began
        recipe = write_recipe(killed, scenes, options.tuning)
        table = Table(
            "kill", "after", "what it left", title=f"SIG{options.signal}, seed {options.seed}, {options.tuning}"
        )
        kills = finished = 0
        while kills < options.kills:
            console.log(f"{kills} kills")
            process = start(recipe)
            wait = chance.uniform(0.1, 0.8) * seconds
            try:
                if status := process.wait(wait):
                    raise SystemExit((folder / "killed.log").read_text()[-3000:] + f"\nstatus {status}")
                finished += 1  # before the kill; another begins
                check(whole, killed)
                shutil.rmtree(killed)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.Signals[f"SIG{options.signal}"])
                process.wait()
                kills += 1
                table.add_row(str(kills), f"{wait:.1f} s", where(killed))
        if start(recipe).wait():
            raise SystemExit((folder / "killed.log").read_text()[-3000:])
        console.print(table)
        check(whole, killed)
        console.print(
            f"{kills} kills over {finished + 1} runs of {seconds:.0f} s each: all ended with the weights of the one "
            "that was not killed"
        )


def check(whole: Path, killed: Path) -> None:
    """End the program if a weight differs."""
    if difference := largest_difference(whole, killed):
        raise SystemExit(f"a weight differs by {difference:g}")


if __name__ == "__main__":
    main()
