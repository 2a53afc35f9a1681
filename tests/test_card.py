"""Model cards say what is true of their checkpoint, and what goes to the hub has nothing of this machine in it."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from short_run import short_recipe
from toy import pictures
from typer.testing import CliRunner

from cocoa import publish
from cocoa.card import CARD_NAME, base_facts, card, limits, without_paths, write_card
from cocoa.checkpoint import read_record
from cocoa.cli import app
from cocoa.embedding_cache import hash_folder
from cocoa.errors import CocoaError
from cocoa.evaluation import evaluate
from cocoa.pairs import Pair, Side
from cocoa.pipeline import train
from cocoa.publish import push
from cocoa.recipe import parse_recipe
from cocoa.stages.saving import instructions_of

FOLDERS = ("1-joint_reconstruction", "final")


@pytest.fixture(scope="module")
def run(tiny_backbone_path, photo_data, tmp_path_factory):
    """`output_dir` of a run of two stages with adapters."""
    content = short_recipe(tiny_backbone_path(), photo_data, tmp_path_factory.mktemp("run") / "mine", "dora")
    content["stages"] = content["stages"][::2]
    return train(parse_recipe(content)).parent


@pytest.fixture
def model(run, tmp_path):
    """A copy of the last checkpoint."""
    return shutil.copytree(run / "final", tmp_path / "final")


@pytest.fixture(scope="module")
def scores(run, photo_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("scores")
    evaluate(run / "final", photo_data / "MMEB-eval", output, on_bad_row="skip")
    return output


def test_every_checkpoint_of_a_run_has_a_card(run, tiny_backbone_path):
    for name in FOLDERS:
        found = ModelCard.load(run / name / CARD_NAME)
        assert (found.data.library_name, found.data.pipeline_tag) == ("sentence-transformers", "feature-extraction")
        assert "arxiv:2603.01471" in found.data.tags
        assert found.data.base_model is None and found.data.license is None  # of a folder, which has no card
        text, record = found.text, read_record(run / name)
        assert text.lstrip().startswith(f"# {'mine/final' if name == 'final' else name}\n")
        assert f"`{tiny_backbone_path().name}`" in text and str(tiny_backbone_path().parent) not in text
        assert f"| {record['stage']} | 2 | {record['seconds']} | {record['tokens']:,} |" in text
        assert "| MSCOCO_i2t | 32 |" in text and f"{record['merge_cosine']:.6f}" in text
        assert f"torch {record['versions']['torch']}" in text and "lora.r: 4" in text
        assert "The licence of the backbone is not known" in text
        assert ("No contrastive stage yet" in text) == (name != "final")


def test_the_card_s_own_lines_load_the_model(model, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (model / CARD_NAME).read_text(), re.S)
    monkeypatch.chdir(model)
    pictures(1)[0].save("picture.jpg")
    values = {}
    exec(snippet, values)
    assert len(values["vectors"]) == 2 and values["vectors"].shape[1] == 64
    assert len(snippet.strip().splitlines()) <= 4


@pytest.mark.slow
def test_scores_stand_beside_published_ones_and_are_those_of_the_model(model, scores, run):
    before = hash_folder(model)
    assert "No scores stand in this card" in (model / CARD_NAME).read_text()
    text = write_card(model, scores).read_text()
    assert hash_folder(model) == before  # embeddings that are kept on disk stay good
    assert "| CoCoA Qwen2-VL 2B | 63.0 | 57.4 | 69.6 | 85.8 | 70.2 | 60.7 | 66.0 |" in text
    summary = json.loads((scores / "summary.json").read_text())
    for name, hit in summary["datasets"].items():
        assert f"| {name} | {hit:.1f} |" in text
    assert "**this model**" in text and "data sets; missing:" in text and "No scores" not in text
    assert not [path for path in (str(scores), str(run), summary["data"]) if path in text]
    with pytest.raises(CocoaError, match=r"of another model than .*1-joint_reconstruction; evaluate this one"):
        write_card(run / "1-joint_reconstruction", scores)
    with pytest.raises(CocoaError, match=r"no summary\.json here; name what `cocoa evaluate` wrote"):
        write_card(model, model)


@pytest.mark.slow
def test_the_commands_write_the_card_and_list_what_would_be_sent(model, scores, monkeypatch):
    monkeypatch.setattr(publish, "HfApi", lambda: pytest.fail("asked the hub"))
    wide = {"COLUMNS": "200"}
    done = CliRunner().invoke(app, ["card", str(model), "--scores", str(scores)], env=wide)
    assert (done.exit_code, done.output) == (0, f"card: {model / CARD_NAME}\n")
    assert "## Scores" in (model / CARD_NAME).read_text()
    listed = CliRunner().invoke(app, ["push", str(model), "me/mine", "--dry-run"], env=wide)
    assert listed.exit_code == 0 and "me/mine: would be sent" in listed.output
    lines = {line.split("│")[1].strip(): line for line in listed.output.splitlines() if line.startswith("│")}
    assert f"{(model / 'model.safetensors').stat().st_size:,}" in lines["model.safetensors"]
    assert "changed for the hub" in lines["README.md"] and "changed" not in lines["model.safetensors"]


def test_instructions_that_were_trained_stand_in_the_card():
    def pair(dataset, query, target=""):
        return Pair(Side(query, "a"), Side(target, "b"), (), dataset, 0)

    found = instructions_of(
        [pair("one", "Find it:"), pair("one", "Find it:"), pair("one", "No."), pair("two", "", "|\n")]
    )
    assert found == {"one": {"query": "Find it:", "target": ""}, "two": {"query": "", "target": "|\n"}}
    text = card({"stage": "contrastive", "instructions": found}, "title")
    assert "| one | Find it: |  |\n| two |  | \\| |\n" in text
    assert "| data set | queries' " not in card({"stage": "contrastive", "instructions": {}}, "title")


def test_a_folder_without_a_record_has_no_card(tiny_backbone_path):
    with pytest.raises(CocoaError, match=r"no cocoa\.json of a trained stage here"):
        write_card(tiny_backbone_path())


def test_limits_are_true_of_the_record():
    record = {
        "stage": "contrastive",
        "rows": {"a": 20_000},
        "base": "mini-qwen2-vl",
        "base_license": "apache-2.0",
        "options": {"max_length": 300},
        "image": {"tokens": [4, 64]},
        "skipped_steps": 2,
        "bad_rows": {"a/1": "/home/me/a.jpg: not an image"},
    }
    found = " ".join(limits(without_paths(record), [{"stage": "contrastive"}], scored=True))
    for said in (
        "toy of two million",
        "4 to 64 tokens",
        "at most 300 tokens",
        "no finite number: 2 steps",
        "since unreadable: 1 row.",
    ):
        assert said in found
    for unsaid in ("miniature", "licence", "No scores", "No contrastive", "/home"):
        assert unsaid not in found
    assert "A miniature: the last stage had 9,999 rows." in limits({"rows": {"a": 9_999}}, [], scored=True)


def test_what_the_backbone_s_own_card_says_goes_through_all_stages(tiny_backbone_path, tmp_path):
    base = shutil.copytree(tiny_backbone_path(), tmp_path / "base")
    assert base_facts(str(base)) == {"base": str(base), "base_on_hub": False, "base_license": None}
    (base / CARD_NAME).write_text("---\nlicense: other\n---\n# Base\n")
    assert base_facts(str(base))["base_license"] == "other"
    (base / CARD_NAME).write_text("---\nlicense: [\n---\n")
    assert base_facts(str(base))["base_license"] is None
    known = {"base": "Qwen/Qwen2-VL-2B-Instruct", "base_on_hub": True, "base_license": "apache-2.0"}
    (base / "cocoa.json").write_text(json.dumps({"stage": "eos_bridge", **known}))
    assert base_facts(str(base)) == known
    (base / "cocoa.json").write_text(json.dumps({"stage": "eos_bridge", "settings": {"backbone": "mini-qwen2-vl"}}))
    assert base_facts(str(base))["base"] == "mini-qwen2-vl"  # a checkpoint of before there were cards
    assert base_facts("mini-qwen2-vl") == {"base": "mini-qwen2-vl", "base_on_hub": False, "base_license": "apache-2.0"}
    text = card({"stage": "contrastive", "steps": 1, **known}, "mine")
    assert text.startswith("---\nlicense: apache-2.0\nbase_model: Qwen/Qwen2-VL-2B-Instruct\nlibrary_name:")


# -------------------------------------------------------------------------------------------------- the hub


def test_a_dry_run_lists_what_would_be_sent_and_asks_nobody(model, monkeypatch):
    monkeypatch.setattr(publish, "HfApi", lambda: pytest.fail("asked the hub"))
    files = {file.name: file for file in push(model, "me/mine", dry_run=True)}
    needed = {"config.json", "modules.json", "model.safetensors", "README.md", "cocoa.json", "chat_template.jinja"}
    assert files.keys() >= needed and "adapter/adapter_model.safetensors" in files
    assert "adapter/README.md" not in files
    for name, file in files.items():
        assert file.size == (len(file.content) if file.changed else (model / name).stat().st_size)
    assert {name for name, file in files.items() if file.changed} == {
        *("README.md", "cocoa.json", "adapter/adapter_config.json")
    }


def test_what_is_sent_has_no_path_of_this_machine_and_still_reads_as_ours(model, monkeypatch, tmp_path):
    sent = {}

    def commit(repo_id, operations, commit_message):
        assert repo_id == "me/mine" and sent["private"]
        for operation in operations:
            path = tmp_path / "hub" / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as file:
                path.write_bytes(file.read())

    api = SimpleNamespace(create_repo=lambda repo_id, **options: sent.update(options), create_commit=commit)
    monkeypatch.setattr(publish, "HfApi", lambda: api)
    push(model, "me/mine", private=True)
    hub = tmp_path / "hub"
    assert hash_folder(hub) == hash_folder(model)
    ours, theirs = read_record(model), read_record(hub)
    assert ours["source"].startswith("/") and theirs["source"] == "1-joint_reconstruction"
    assert theirs["settings"]["stages.0.joint_reconstruction.data.train"] == "MMEB-train"
    same = ("stage", "steps", "rows", "attention", "pooling", "image", "history", "options")
    assert {key: theirs[key] for key in same} == {key: ours[key] for key in same}
    assert 'SentenceTransformer("me/mine")' in (hub / CARD_NAME).read_text()
    assert "/tmp" not in "".join(p.read_text() for p in hub.rglob("*.json") if p.name != "tokenizer.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: (m / CARD_NAME).unlink(), r"no README\.md here; .*`cocoa card` writes one"),
        (lambda m: (m / "cocoa.json").unlink(), r"no cocoa\.json here; name a checkpoint"),
        (lambda m: (m / "model.safetensors").unlink(), "no weights here"),
        (lambda m: (m / "optimizer.pt").write_text("x"), r"optimizer\.pt: no file of a checkpoint; take it out"),
        (
            lambda m: (m / CARD_NAME).write_text(f"see {m}/notes"),
            r"README\.md: .* stands in it, a path of this machine",
        ),
    ],
    ids=["card", "record", "weights", "optimizer", "path"],
)
def test_what_is_not_to_be_published_is_refused(model, spoil, message):
    spoil(model)
    with pytest.raises(CocoaError, match=message):
        push(model, "me/mine", dry_run=True)


def test_a_repository_is_named_with_its_owner(model):
    with pytest.raises(CocoaError, match="mine: whose"):
        push(model, "mine", dry_run=True)


def test_a_mistaken_name_and_a_hub_that_refuses_are_mistakes(model, monkeypatch):
    with pytest.raises(CocoaError, match=r"a/b/c: no name of a repository .*write owner/name"):
        push(model, "a/b/c", dry_run=True)

    def refuse(*args, **options):
        raise OSError("offline")

    monkeypatch.setattr(publish, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    with pytest.raises(CocoaError, match=r"me/mine: the hub refuses \(offline\); log in \(`hf auth login`\)"):
        push(model, "me/mine")


def test_a_hub_that_cannot_be_reached_is_a_mistake_too(model, monkeypatch):
    def unreachable(*args, **options):
        raise HTTPError("[Errno -2] Name or service not known")  # of which the client's network errors are made

    monkeypatch.setattr(publish, "HfApi", lambda: SimpleNamespace(create_repo=unreachable))
    with pytest.raises(CocoaError, match=r"me/mine: the hub refuses \(\[Errno -2\] Name or service not known\)"):
        push(model, "me/mine")
