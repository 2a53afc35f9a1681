"""The command line: a user's mistake is one line and exit code 2, a run is quiet where there is no terminal."""

import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from short_run import short_recipe
from typer.testing import CliRunner

import cocoa
from cocoa.cli import app

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
DRIVER = """
# Runs `cocoa` once for each list of arguments, all in one process, since its imports take long.
import json, os, sys, traceback
from cocoa import cli

outcomes = {}
for name, arguments in json.load(open("cases.json")).items():
    files = [open(f"{name}.{stream}", "w+") for stream in ("out", "err")]
    kept = [os.dup(1), os.dup(2)]
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    sys.argv, code = ["cocoa", *arguments], 0
    try:
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    for number, descriptor in enumerate(kept, 1):
        os.dup2(descriptor, number)
    outcomes[name] = [code, *(open(file.name).read() for file in files)]
json.dump(outcomes, open("outcomes.json", "w"))
"""

# name -> (arguments, what the one line names: file, row or key, and the remedy); {} is the folder of `prepare`
TRAIN = ["train", "{}/recipe.yaml"]
EVALUATE = ["evaluate", "{}/backbone", "--output", "{}/scores", "--data"]
MISTAKES = {
    "no arguments to a stage": ([*TRAIN, "stages.1=5"], ["stages.1", "name a key of the stage"]),
    "unknown key": (["train", "{}/unknown.yaml"], ["unknown.yaml", "sead: unknown key", "did you mean seed?"]),
    "no recipe": (["train", "{}/none.yaml"], ["{}/none.yaml: no such recipe"]),
    "recipe is a folder": (["train", "{}"], ["cannot be read", "name a recipe file"]),
    "no data": ([*TRAIN, "data.train={}/none"], ["data.train: {}/none: no such file or folder"]),
    "no data in the folder": ([*TRAIN, "data.train={}/scores"], ["{}/scores: no data set in it; name a folder"]),
    "no image": (
        [*TRAIN, "data.train={}/no_image"],
        ["cat.jpg: no such image file", "data set MSCOCO_i2t, row", "unpack the data set's images"],
    ),
    "no image in a file": (
        [*TRAIN, "data.train={}/pairs.jsonl"],
        ["{}/none.jpg: no such image file", "data set pairs, row 1", "`data.image_root`"],
    ),
    "broken line": ([*TRAIN, "data.train={}/broken.jsonl"], ["broken.jsonl, line 2: not JSON", "repair or drop"]),
    "broken image": (
        [*TRAIN, "data.train={}/broken_image.jsonl", "data.validation_rows=0"],
        ["broken.jpg: not a readable image", "row broken_image/", "replace it or drop its row"],
    ),
    "broken image in a worker": (
        [*TRAIN, "data.train={}/broken_image.jsonl", "data.validation_rows=0", "stages.0.dataloader_num_workers=1"],
        ["broken.jpg: not a readable image", "row broken_image/", "replace it or drop its row"],
    ),
    "no column": ([*TRAIN, "data.train={}/no_column"], ["GQA/original-00000-of-00001.parquet", "no column pos_text"]),
    "no split": ([*TRAIN, "data.split=test"], ["no split 'test'", "there are: original"]),
    "no subset": ([*TRAIN, "data.subsets=[None]"], ["no data set 'None'", "there are A-OKVQA"]),
    "batch does not divide": (
        [*TRAIN, "stages.0.gradient_accumulation_steps=3"],
        ["stages.joint_reconstruction: batch_size 8 does not divide by 1 devices x 3", "change one of them"],
    ),
    "batch too large": (
        [*TRAIN, "stages.0.batch_size=4096"],
        ["stages.joint_reconstruction: batch_size 4096 is more", "lower it"],
    ),
    "no backbone": (
        [*TRAIN, "backbone={}/none"],
        ["backbone {}/none: cannot be read (no such folder); give a hub id, a"],
    ),
    "a recipe that is called otherwise": (
        ["train", "{}/recipe.yml"],
        ["{}/recipe.yml: no such recipe; did you mean {}/recipe.yaml?"],
    ),
    "no such stage": (
        [*TRAIN, "stages.contrastve.max_steps=3"],
        ["stages.contrastve: the recipe has no such stage; it has joint_reconstruction"],
    ),
    "no such layer": ([*TRAIN, "lora={text: [query]}"], ["lora.text: 'query' names no linear layer", "q_proj"]),
    "malformed override": ([*TRAIN, "seed"], ["'seed': an override is key=value"]),
    "malformed value": ([*TRAIN, "data.subsets=[GQA"], ["'data.subsets=[GQA': the value is not YAML"]),
    "output is a file": ([*TRAIN, "output_dir={}/recipe.yaml"], ["output_dir {}/recipe.yaml: cannot be written"]),
    "evaluate: no subset": (
        [*EVALUATE, "{}/data/MMEB-eval", "--subsets", "EDIS", "Nothing"],
        ["no data set 'Nothing' (key `subsets`); there are A-OKVQA"],
    ),
    "compare: no run": (
        ["compare", "{}/data"],
        ["{}/data: neither summary.json nor final/cocoa.json is here", "output_dir of a finished `cocoa train`"],
    ),
    "evaluate: no data": ([*EVALUATE, "{}/none"], ["{}/none: no such folder; name one that holds"]),
    "evaluate: no image": ([*EVALUATE, "{}/eval_no_image"], ["no such image file", "data set EDIS, row 0", "unpack"]),
    "evaluate: no model": (
        ["evaluate", "{}/none", "--data", "{}/data/MMEB-eval", "--output", "{}/scores"],
        ["{}/none: cannot be read", "give a hub id, a checkpoint folder, or one of mini-qwen2-vl"],
    ),
    "evaluate: stray argument": (
        [*EVALUATE, "{}/data/MMEB-eval", "EDIS"],
        ["unexpected argument 'EDIS'; name data sets after --subsets"],
    ),
    "evaluate: no policy": (
        [*EVALUATE, "{}/data/MMEB-eval", "--on-bad-row", "drop"],
        ["on-bad-row 'drop': choose error or skip"],
    ),
    "evaluate: no prompt style": (
        [*EVALUATE, "{}/data/MMEB-eval", "--prompt-style", "plain"],
        ["prompt-style 'plain': choose cocoa or reference"],
    ),
    "validate: no data": (["validate", "{}/none"], ["{}/none: no such folder; name one that holds"]),
    "validate: stray argument": (
        ["validate", "{}/data/MMEB-eval", "EDIS"],
        ["validate: unexpected argument 'EDIS'; name data sets after --subsets"],
    ),
    "preview: unknown key": (["preview", "{}/unknown.yaml"], ["sead: unknown key", "did you mean seed?"]),
    "scenes: too few": (["scenes", "--output", "{}/world", "--pairs", "3"], ["at least 6 pairs", "not 3"]),
    "scenes: a folder of somebody else's": (
        ["scenes", "--output", "{}/data"],
        ["{}/data/MMEB-train: not written by `cocoa scenes`", "choose another"],
    ),
    "dialogues: no source": (
        ["dialogues", "mini-qwen2-vl", "{}/none", "--output", "{}/spoken"],
        ["{}/none: no such file or folder; name a folder of images"],
    ),
    "dialogues: no model": (
        ["dialogues", "{}/none", "{}/data", "--output", "{}/spoken"],
        ["model {}/none: cannot be read", "or one of mini-qwen2-vl"],
    ),
    "dialogues: nothing to write": (
        ["dialogues", "mini-qwen2-vl", "{}/data", "--output", "{}/spoken", "--write", "questions"],
        ["write 'questions': choose dialogues, captions, both"],
    ),
    "dialogues: no prompts": (
        ["dialogues", "mini-qwen2-vl", "{}/data", "--output", "{}/spoken", "--prompts", "{}/unknown.yaml"],
        ["unknown.yaml: prompts.backbone: unknown key", "there are: questions, answer, caption"],
    ),
    "mine: no file": (
        ["mine", "{}/backbone", "{}/none.jsonl", "--output", "{}/mined.jsonl"],
        ["{}/none.jsonl: no such file; name a file of pairs"],
    ),
    "mine: no image": (
        ["mine", "{}/backbone", "{}/pairs.jsonl", "--output", "{}/mined.jsonl"],
        ["{}/none.jpg: no such image file (data set pairs, row 1)"],
    ),
    "mine: not JSONL": (
        ["mine", "{}/backbone", "{}/pairs.jsonl", "--output", "{}/mined.csv"],
        ["{}/mined.csv: give the name of a .jsonl file"],
    ),
    "evaluate: one row": ([*EVALUATE, "{}/pairs.jsonl"], ["pairs.jsonl: no row has a target that is wrong for it"]),
    "train: no validation file": (
        [*TRAIN, "data.validation={}/none.jsonl"],
        ["data.validation: {}/none.jsonl: no such"],
    ),
    "demo: no backbone": (
        ["demo", "--output", "{}/demo", "--backbone", "big"],
        ["'big'", "choose one of mini-qwen2-vl"],
    ),
}
RUNS = {
    "train": [*TRAIN, "output_dir={}/run", "stages.0.dataloader_num_workers=1"],
    "evaluate": [
        *("evaluate", "{}/run/final", "--data", "{}/data/MMEB-eval", "--output", "{}/scores"),
        *("--subsets", "EDIS", "MSCOCO_t2i", "--batch-size", "4"),
    ],
    "validate": ["validate", "{}/data/MMEB-eval", "--subsets", "EDIS", "CIRR"],
    "validate: an image is missing": ["validate", "{}/eval_no_image"],
    "help": ["--help"],
}


def prepare(folder, backbone, data):
    """Everything that the commands read."""
    (folder / "scores").mkdir()
    (folder / "backbone").symlink_to(backbone)
    (folder / "data").symlink_to(data)
    content = short_recipe(folder / "backbone", folder / "data", folder / "output")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content | {"stages": content["stages"][:1]}))
    (folder / "unknown.yaml").write_text(yaml.safe_dump({**content, "sead": 1}))
    shutil.copytree(data / "MMEB-train", folder / "no_image")
    (folder / "no_image" / "images" / "MSCOCO_i2t" / "Train" / "cat.jpg").unlink()
    shutil.copytree(data / "MMEB-eval" / "EDIS", folder / "eval_no_image" / "EDIS")
    (folder / "no_column" / "GQA").mkdir(parents=True)
    table = pa.table({name: ["x"] for name in ("qry", "qry_image_path", "pos_image_path")})
    pq.write_table(table, folder / "no_column" / "GQA" / "original-00000-of-00001.parquet")
    pair = {"query": {"image": "none.jpg"}, "target": {"text": "a cat"}}
    (folder / "pairs.jsonl").write_text(json.dumps(pair))
    (folder / "broken.jsonl").write_text(json.dumps(pair) + "\n{")
    (folder / "broken.jpg").write_text("no image")
    pair["query"]["image"] = "broken.jpg"
    lines = [json.dumps({**pair, "target": {"text": f"cat {i}"}}) for i in range(8)]
    (folder / "broken_image.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def folder(tiny_backbone_path, photo_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    prepare(folder, tiny_backbone_path(), photo_data)
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    """Name of a case -> (exit code, stdout, stderr)."""
    cases = RUNS | {name: arguments for name, (arguments, _) in MISTAKES.items()}
    named = {name: [part.replace("{}", str(folder)) for part in arguments] for name, arguments in cases.items()}
    (folder / "cases.json").write_text(json.dumps(named))
    subprocess.run([sys.executable, "-c", DRIVER], cwd=folder, env=ENVIRONMENT, check=True, timeout=500)
    return json.loads((folder / "outcomes.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_it_and_the_remedy(outcomes, folder, name):
    code, out, err = outcomes[name]
    assert code == 2, err
    lines = [line for line in err.splitlines() if " stage joint_reconstruction: " not in line]  # it had begun
    assert len(lines) == 1 and not out, err
    assert lines[0].startswith("cocoa: ") and "Traceback" not in lines[0]
    for fragment in MISTAKES[name][1]:
        assert fragment.replace("{}", str(folder)) in lines[0]


@pytest.mark.slow
def test_a_run_without_a_terminal_is_quiet(outcomes, folder):
    code, out, err = outcomes["train"]
    assert code == 0, err
    assert out == f"done: {folder / 'run' / 'final'}\n"
    assert "\r" not in err and "it/s" not in err and "%|" not in err and "\x1b" not in err
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d \S.*", line) for line in err.splitlines()), err
    lines = [line[9:] for line in err.splitlines()]
    assert re.fullmatch(r"stage joint_reconstruction: \d+ rows, training all weights", lines[0])
    assert [line[:24] for line in lines if "/2: loss" in line] == [f"joint_reconstruction {step}/2" for step in (1, 2)]
    assert len(lines) < 10, err


@pytest.mark.slow
def test_validate_shows_a_table_and_names_what_is_wrong(outcomes, folder):
    code, out, err = outcomes["validate"]
    assert (code, err) == (0, "")
    assert "EDIS" in out and "CIRR" in out and "MSCOCO" not in out and "bad rows" in out
    code, out, err = outcomes["validate: an image is missing"]
    said = "not all of it can be used; see above (images lie in the data's folder, or in --image-root DIR)"
    assert code == 2 and err == f"cocoa: {folder / 'eval_no_image'}: {said}\n"
    assert "no usable row" in out and "no such image file" in out


@pytest.mark.slow
def test_data_sets_to_score_may_follow_one_option(outcomes, folder):
    code, out, err = outcomes["evaluate"]
    assert code == 0, err
    assert "\r" not in err and "it/s" not in err
    assert {path.name for path in (folder / "scores").iterdir()} == {
        *("EDIS_score.json", "MSCOCO_t2i_score.json", "summary.json", "leaderboard.json", "table.md", "embeddings"),
        "ranks.parquet",
    }
    summary = json.loads((folder / "scores" / "summary.json").read_text())
    assert list(summary["datasets"]) == ["EDIS", "MSCOCO_t2i"]
    for text in ("All (2 of 36 sets)", "EDIS", "MSCOCO_t2i", f"{summary['datasets']['EDIS']:.1f}"):
        assert text in out


def test_help_needs_no_heavy_import():
    script = "import sys; from cocoa import cli; cli.app(['--help'], standalone_mode=False); "
    script += "print(sorted({'torch', 'transformers', 'datasets', 'PIL', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *text, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    for command in ("train", "preview", "evaluate", "validate", "demo", "scenes", "dialogues", "compare", "mine"):
        assert any(command in line for line in text)


def test_the_version_is_told():
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"{cocoa.__version__}\n")
