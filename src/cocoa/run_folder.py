"""What a run's output folder says of itself: what is in it, by which recipe, in which environment.

`README.md` and `recipe.yaml` are written anew in every session of a run, unless somebody else has put files of these
names there; `environment.json` gets an entry a session.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

import cocoa
from cocoa.files import write_json, write_text
from cocoa.processes import this_process
from cocoa.recipe import Recipe, Stage

logger = logging.getLogger(__name__)

README_NAME, RECIPE_NAME, ENVIRONMENT_NAME, METRICS_NAME = (
    "README.md",
    "recipe.yaml",
    "environment.json",
    "metrics.jsonl",
)
LOGS = "logs"
"""Folder of TensorBoard's event files."""
MARK = "written by `cocoa train`"
"""Stands in the first line of what may be written anew."""
PACKAGES = (
    *("transformers", "sentence-transformers", "peft", "accelerate", "tokenizers", "safetensors"),
    *("datasets", "numpy", "pillow"),
)


def explain(recipe: Recipe, folders: list[Path]) -> None:
    """Write the three files into the run's output folder.

    Args:
        recipe: of the run.
        folders: of the stages' checkpoints, in order.
    """
    folder = recipe.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    session = environment()
    path = folder / ENVIRONMENT_NAME
    before = _sessions(path)
    if before is None:
        logger.warning("%s: not written by `cocoa train`; it stays as it is", path)
    else:
        write_json(path, [*before, session])
    resolved = yaml.safe_dump(as_mapping(recipe), sort_keys=False, allow_unicode=True, width=120)
    _write(
        folder / RECIPE_NAME, f"# The recipe as it was resolved, {MARK}; relative paths: see {README_NAME}.\n{resolved}"
    )
    _write(folder / README_NAME, readme(recipe, folders, session))


def _sessions(path: Path) -> list[Any] | None:
    """What the file says of earlier sessions; None where it is somebody else's."""
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def as_mapping(recipe: Recipe) -> dict[str, Any]:
    """A recipe as the mapping that it can be read from again, every key of its own blocks written out."""
    content = dataclasses.asdict(recipe)
    first: Stage = recipe.stages[0]
    common = {"data": dataclasses.asdict(first.data), "image": content["image"]}
    stages = []
    for stage in recipe.stages:
        own = {"data": dataclasses.asdict(stage.data), "image": dataclasses.asdict(stage.image)}
        stages.append({stage.name: stage.options | {key: own[key] for key in own if own[key] != common[key]}})
    content |= {"output_dir": str(recipe.output_dir), **common, "stages": stages}
    return json.loads(json.dumps({key: value for key, value in content.items() if value is not None}, default=str))


def environment() -> dict[str, Any]:
    """What a result depends on beside the recipe, and the command that was given."""
    cuda = torch.cuda.is_available()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {"cocoa": cocoa.__version__, "torch": torch.__version__}
        | {name: metadata.version(name) for name in PACKAGES},
        "processes": this_process().num_processes,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "git": git_state(),
    }


def command() -> str:
    """The command line of this process, to be pasted into a shell."""
    program, *arguments = sys.argv
    if Path(program).name in ("cocoa", "cli.py"):
        return shlex.join(["cocoa", *arguments])
    return shlex.join([sys.executable, program, *arguments])


def git_state() -> dict[str, Any] | None:
    """`commit`, and whether tracked files differ from it (`dirty`), of the working directory; None without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def readme(recipe: Recipe, folders: list[Path], session: dict[str, Any]) -> str:
    """The page that says what is in the folder, and how to go on."""
    again = shlex.join(["cocoa", "train", str(recipe.output_dir / RECIPE_NAME)])
    final = str(folders[-1])
    lines = [f"<!-- {MARK} -->", f"# {recipe.output_dir.name}", "", "A run of `cocoa train`, from this folder:", ""]
    lines += ["```bash", f"cd {shlex.quote(session['folder'])}", session["command"], "```", ""]
    if session["processes"] > 1:
        lines += [f"(on {session['processes']} processes, started by `accelerate launch` or `torchrun`.)", ""]
    lines += ["The same command goes on where a stopped run was, and so does", "", "```bash", again, "```", ""]
    lines += ["| here | what it is |", "|---|---|"]
    for number, (stage, folder) in enumerate(zip(recipe.stages, folders, strict=True), 1):
        lines.append(f"| `{folder.name}/` | the checkpoint of stage {number}, `{stage.name}`; there once it is whole |")
    lines += [
        f"| `{RECIPE_NAME}` | the recipe as it was resolved, overrides and all |",
        f"| `{ENVIRONMENT_NAME}` | versions, machine, git commit and command of every session of the run |",
        f"| `{METRICS_NAME}` | all that was logged: a JSON object a line, with `stage`, `step` and `time` (UTC) |",
        f"| `{LOGS}/` | event files, with `report_to: tensorboard` |",
        "| `trainer/` | the running stage's own checkpoints; gone once it is done |",
    ]
    beside = "`README.md` (its model card), `cocoa.json` (how it was made) and `training_log.json`"
    lines += ["", f"`{final}` is the result. Every checkpoint has a {beside}."]
    lines += ["", "```bash", f"cocoa evaluate {shlex.quote(final)} --data MMEB_EVAL_DIR --output SCORES", "```"]
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str) -> None:
    """Write a file whole, unless one is there that is not ours."""
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]:
        logger.warning("%s: not ours, left as it is", path)
        return
    write_text(path, text)
