"""`cocoa demo`: CoCoA against contrastive learning alone and the untouched backbone, in minutes on a laptop.

Scenes are written, a small pre-trained backbone that ships in the package goes through the three stages and,
apart, through the last one alone, on the same few pairs; all are scored on the same test scenes. It is a
miniature of the mechanism, not of MMEB's table.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from cocoa.architectures import EMBEDDED
from cocoa.checkpoint import read_record, versions
from cocoa.compare import Score
from cocoa.errors import CocoaError
from cocoa.evaluation import evaluate
from cocoa.files import check_writable, write_json
from cocoa.pipeline import stage_folders, train
from cocoa.recipe import Recipe, load_recipe
from cocoa.report import write_report
from cocoa.report_runs import report_of
from cocoa.scenes.write import write_scenes

logger = logging.getLogger(__name__)

PAIRS, QUERIES = 1200, 200
"""Training pairs over all data sets, and test queries of each data set."""
PAIRS_A_SET = PAIRS // 6
SCENES_SEED = 0
MODELS = {"backbone": "untouched backbone", "contrastive": "contrastive alone", "cocoa": "CoCoA"}
EQUAL = (
    "pairs: the same rows of the same data sets, and the same rows held out",
    "contrastive stage: attention (both ways), batches and their order, steps, learning rate, temperature, seed",
    "tuning: three learning rates each on the validation split (studies/demo_tuning.py); the contrastive stage's is "
    "the one that is best for contrastive alone",
)
UNEQUAL = (
    "compute: CoCoA has the steps of its stages 1 and 2 on top; the seconds say how much",
    "the untouched backbone is read as it comes: causal attention, last token, no training",
)

NOTE = "A miniature: it shows the mechanism on synthetic scenes and few pairs, and is no claim about MMEB."
RIVALS = ("contrastive", "cocoa")
"""The two models whose difference the report shows."""


@dataclass
class Demo:
    """What a demo found.

    Attributes:
        models: hit@1 in percent by model (`MODELS`) and group: the four meta-tasks, IND, OOD, Overall.
        seconds: by what was done.
        folders: each model's checkpoint.
        verdict: in a sentence, whether CoCoA beat its rival.
    """

    models: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    verdict: str = ""


def run(output: Path, backbone: str = EMBEDDED[0], seed: int = 42, say: Callable[[str], None] = logger.info) -> Demo:
    """Write scenes and recipes, train CoCoA and its rival, score both and the untouched backbone, write the report.

    Run again, it trains only what is not there yet.

    Args:
        output: where everything is written; `results.json` and `report.html` are what to look at.
        backbone: an embedded one.
        seed: of the recipes (order, masks, which rows); the scenes stay the same.
        say: told, step by step, what happens and where it is explained.

    Raises:
        CocoaError: an unknown backbone, or other data or runs stand in `output`, or it cannot be written.
    """
    if backbone not in EMBEDDED:
        raise CocoaError(f"backbone {backbone!r}: choose one of {', '.join(EMBEDDED)}")
    check_writable(output, is_folder=True)
    demo, clock = Demo(), time.perf_counter()
    say("1/5 scenes: pictures of a few objects, as twelve data sets in MMEB's layout (docs/scenes.md)")
    write_scenes(output / "scenes", SCENES_SEED, PAIRS, QUERIES, splits=("test",))
    demo.seconds["scenes"] = time.perf_counter() - clock
    recipes = write_recipes(output, backbone, seed)
    say("2/5 contrastive alone, the rival: queries to their targets, no pre-training (docs/method.md, stage 3)")
    demo.folders["contrastive"] = _train(recipes["contrastive"], "contrastive alone: ", demo.seconds)
    say(
        "3/5 CoCoA: (1) rebuild masked words and patches, attending both ways; (2) rebuild a text that sees the image "
        "through <EOS> alone; (3) the same contrastive stage (docs/method.md, stages 1 to 3)"
    )
    demo.folders["cocoa"] = _train(recipes["cocoa"], "CoCoA: ", demo.seconds)
    say("4/5 scores: hit@1 among 200 and more candidates, many wrong in one attribute only (docs/scenes.md)")
    started = time.perf_counter()
    for name in MODELS:
        model = demo.folders.get(name, backbone)
        found = evaluate(model, output / "scenes" / "MMEB-eval", output / "scores" / name, batch_size=64)
        demo.models[name] = {_group(group): average["hit@1"] for group, average in found["averages"].items()}
    demo.seconds["scores"] = time.perf_counter() - started
    say("5/5 report: curves, rebuilt pictures and captions, where EOS looks, what was found (report.html)")
    started = time.perf_counter()
    runs = [recipe.output_dir for recipe in (recipes["contrastive"], recipes["cocoa"])]
    page = report_of([*(output / "scores" / name for name in MODELS), *runs], rivals=RIVALS)
    demo.seconds["report"] = time.perf_counter() - started
    demo.seconds["total"] = sum(demo.seconds.values())
    demo.verdict = verdict(demo.models, page.scores.gains.get("All") if page.scores else None)
    title = f"{backbone}: CoCoA, its rival, and the untouched backbone"
    page = replace(page, title=title, seconds=demo.seconds, equal=EQUAL, unequal=UNEQUAL)
    write_report(output / "report.html", replace(page, notes=[demo.verdict, NOTE]))
    results = {"models": demo.models, "seconds": demo.seconds, "equal": EQUAL, "unequal": UNEQUAL, "seed": seed}
    write_json(output / "results.json", results | {"backbone": backbone, "versions": versions()})
    return demo


def verdict(models: dict[str, dict[str, float]], gain: Score | None = None) -> str:
    """In a sentence whether CoCoA beat its rival, overall and by meta-task, in points of hit@1.

    Args:
        models: hit@1 by model and group.
        gain: the overall one with its interval over queries.
    """
    rival, cocoa = (models[name] for name in RIVALS)
    gains = {group: cocoa[group] - rival[group] for group in cocoa}
    overall = gains.pop("Overall")
    told = ", ".join(f"{group} {gain:+.1f}" for group, gain in gains.items())
    points = f"{overall:+.1f} points overall"
    if gain is not None and gain.low is not None and gain.high is not None:
        points += f" [{gain.low:+.1f}, {gain.high:+.1f}]"
        if gain.low <= 0 <= gain.high:
            return f"CoCoA and contrastive alone are not told apart: {points} ({told})"
    word = "wins" if overall > 0 else "does not win"
    return f"CoCoA {word} over contrastive alone: {points} ({told})"


def _group(name: str) -> str:
    return "Overall" if name == "All" else name


def write_recipes(output: Path, backbone: str, seed: int) -> dict[str, Recipe]:
    """`recipe.yaml` (CoCoA) and `contrastive.yaml`, the same with its last stage alone, written and read."""
    template = _template()
    first, last = template.index("  - joint_reconstruction:"), template.index("  - contrastive:")
    texts = {"cocoa": template, "contrastive": template[:first] + template[last:]}
    recipes = {}
    for name, text in texts.items():
        path = output / ("recipe.yaml" if name == "cocoa" else f"{name}.yaml")
        places = {"BACKBONE": backbone, "OUTPUT": output / name, "DATA": output / "scenes" / "MMEB-train"}
        values = {key: json.dumps(str(place), ensure_ascii=False) for key, place in places.items()}  # which YAML reads
        values |= {"RECIPE": shlex.quote(str(path)), "SEED": str(seed)}
        path.write_text(_filled(text, values), encoding="utf-8")
        recipes[name] = load_recipe(path)
    return recipes


def _filled(template: str, values: dict[str, str]) -> str:
    return re.sub(r"\[([A-Z]+)\]", lambda found: values[found[1]], template)


def _template() -> str:
    return resources.files("cocoa").joinpath("data/demo.yaml").read_text(encoding="utf-8")


def _train(recipe: Recipe, prefix: str, seconds: dict[str, float]) -> Path:
    """Train a recipe; the seconds of each stage, as its trainer took them, are added by name."""
    final = train(recipe)
    for folder in stage_folders(recipe):
        record = read_record(folder)
        seconds[prefix + record["stage"]] = record["seconds"]
    return final
