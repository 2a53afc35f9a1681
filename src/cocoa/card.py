"""The model card of a checkpoint: `README.md` with the hub's front matter, made from `cocoa.json` alone.

No local path stands in it, and it is no part of what an embedding depends on (`cocoa.embedding_cache.hash_folder`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import ModelCard

from cocoa.account import stages_of
from cocoa.architectures import EMBEDDED
from cocoa.checkpoint import RECORD_NAME, find_record, model_file, read_record, trained_length
from cocoa.compare import read_summary
from cocoa.embedding_cache import hash_folder
from cocoa.errors import CocoaError
from cocoa.files import write_text, writing
from cocoa.scores import SUMMARY_NAME, markdown, short_name
from cocoa.wording import count

CARD_NAME = "README.md"
HERE = 'SentenceTransformer(".")'
"""How the card loads the model; `cocoa push` puts the repository's name in."""
METHODS = {
    "joint_reconstruction": "masked text and masked image patches, rebuilt together under bidirectional attention "
    "(CoCoA, arXiv 2603.01471; MoCa, arXiv 2506.23115)",
    "eos_bridge": "masked text, rebuilt behind an image and the EOS token (CoCoA, arXiv 2603.01471)",
    "compression": "questions on an image, answered from compression tokens (CoMa, arXiv 2511.08480)",
    "contrastive": "InfoNCE from query to target among the targets of the batch",
}
FEW_ROWS = 10_000
"""Below it a training is called a miniature."""
_SHOWN_SCORES = ("averages", "datasets", "data_hash", "truncated", "facts", "shortened", "max_length", "split", "image")


def write_card(folder: Path, scores: Path | None = None, title: str | None = None) -> Path:
    """Write a checkpoint's card, in place of the one that is there.

    Args:
        folder: of the checkpoint.
        scores: what `cocoa evaluate` wrote of this very model, to be shown beside published numbers.
        title: by default the folder's name.

    Returns:
        The card.

    Raises:
        CocoaError: no checkpoint of ours, or the scores are of another model.
    """
    record = read_record(folder)
    if "stage" not in record:
        raise CocoaError(f"{folder}: no {RECORD_NAME} of a trained stage here; name a checkpoint of `cocoa train`")
    summary = None if scores is None else _summary(folder, scores)
    path = folder / CARD_NAME
    with writing(path):
        write_text(path, card(record, title or short_name(folder.resolve()), summary))
    return path


def card(record: dict[str, Any], title: str, summary: Mapping[str, Any] | None = None) -> str:
    """The text of a card.

    Args:
        record: of the checkpoint, see `cocoa.checkpoint.read_record`.
        title: of the page.
        summary: of an evaluation, or None.
    """
    record = without_paths(record)
    stages = stages_of(record)
    header = yaml.safe_dump(front_matter(record, stages), sort_keys=False, allow_unicode=True)
    base = record.get("base") or record.get("settings", {}).get("backbone", "an unknown backbone")
    said = {key: value for key, value in record.get("settings", record.get("options", {})).items() if value is not None}
    settings = yaml.safe_dump(said, sort_keys=False, allow_unicode=True, default_flow_style=None)
    parts = [
        f"---\n{header}---\n\n# {title}",
        f"An embedding model of texts, images, and both together, made of `{base}` by the stages below with "
        "[cocoa](https://arxiv.org/abs/2603.01471). It is read by stock sentence-transformers and transformers.",
        f"## Use\n\n```python\nfrom sentence_transformers import SentenceTransformer\n\nmodel = {HERE}\n"
        'vectors = model.encode([{"image": "picture.jpg"}, "a red star"])\n```\n\n'
        "An instruction goes beside the inputs that it is for, as in training: `model.encode(..., prompt=INSTRUCTION)`."
        + _instructions(record.get("instructions", {})),
        "## Training\n\n" + "\n".join(_training(record, stages)),
        "Settings of all stages:\n\n```yaml\n" + settings + "```" if said else "",
        "## Scores\n\n" + _scores(summary) if summary else "",
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits(record, stages, summary is not None)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def front_matter(record: Mapping[str, Any], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """What the hub reads of a card; a licence and a base model only where they are known to it."""
    base = record.get("base", "")
    papers = ["2603.01471"] + ["2511.08480"] * any(stage["stage"] == "compression" for stage in stages)
    found: dict[str, Any] = {"license": record["base_license"]} if record.get("base_license") else {}
    if base.count("/") == 1 and not base.startswith((".", "~")) and base not in EMBEDDED and record.get("base_on_hub"):
        found["base_model"] = base
    return found | {
        "library_name": "sentence-transformers",
        "pipeline_tag": "feature-extraction",
        "tags": ["sentence-transformers", "feature-extraction", "multimodal", "cocoa", *(f"arxiv:{p}" for p in papers)],
    }


def _training(record: Mapping[str, Any], stages: list[dict[str, Any]]) -> list[str]:
    """The lines on stages, data, versions and the merge."""

    def shown(value: Any) -> str:
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    keys = ("steps", "seconds", "tokens", "peak_memory_gb", "device")
    lines = ["| stage | steps | seconds | tokens | peak GB | device |", "|---|---:|---:|---:|---:|---|"]
    lines += [f"| {stage['stage']} | {' | '.join(shown(stage[key]) for key in keys)} |" for stage in stages]
    lines += [
        "",
        *(f"- `{name}`: {METHODS[name]}" for name in dict.fromkeys(s["stage"] for s in stages) if name in METHODS),
    ]
    rows = record.get("rows", {})
    dropped = sum(sum(reasons.values()) for reasons in record.get("left_out", {}).values())
    lines += ["", f"Data of the last stage: {sum(rows.values()):,} rows ({dropped:,} were left out):", ""]
    lines += ["| data set | rows |", "|---|---:|", *(f"| {name} | {number:,} |" for name, number in rows.items())]
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    lines += ["", f"Trained: {record.get('trained', '-')}. Seed {record.get('seed')}. {versions}."]
    if "merge_cosine" in record:
        lines[-1] += f" Least cosine of embeddings as trained and as saved: {record['merge_cosine']:.6f}."
    return lines


def limits(record: Mapping[str, Any], stages: list[dict[str, Any]], scored: bool) -> list[str]:
    """What a reader has to know before using the model; each is true of this checkpoint."""
    found = []
    if all(stage["stage"] != "contrastive" for stage in stages):
        found.append("No contrastive stage yet: a step on the way, whose vectors are not arranged for search.")
    if record.get("base") in EMBEDDED:
        found.append(
            "The backbone is a toy of two million parameters that knows drawn scenes: for tests and demonstrations."
        )
    rows = sum(record.get("rows", {}).values())
    if rows < FEW_ROWS:
        found.append(f"A miniature: the last stage had {count(rows, 'row')}.")
    least, most = record.get("image", {}).get("tokens", (None, None))
    if most:
        found.append(f"An image is resized to {least} to {most} tokens of 28 x 28 px each.")
    found.append(f"In training an input had at most {trained_length(dict(record)):,} tokens.")
    if record.get("skipped_steps"):
        steps = count(record["skipped_steps"], "step")
        found.append(f"Left out in training, since a loss or gradient was no finite number: {steps}.")
    if record.get("bad_rows"):
        found.append(f"Left out in training, since unreadable: {count(record['bad_rows'], 'row')}.")
    if not scored:
        found.append("No scores stand in this card (`cocoa evaluate`, then `cocoa card --scores`).")
    if not record.get("base_license"):
        found.append("The licence of the backbone is not known to this card; look it up before you share the model.")
    return found


def _instructions(found: Mapping[str, Mapping[str, str]]) -> str:
    """A table of each data set's instructions, if there are any; a line break in one would end its row."""
    if not any(text for sides in found.values() for text in sides.values()):
        return ""
    lines = ["\n\n| data set | queries' instruction | targets' instruction |", "|---|---|---|"]
    for name, sides in found.items():
        cells = (" ".join(text.replace("|", "\\|").split()) for text in (sides["query"], sides["target"]))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _summary(folder: Path, scores: Path) -> dict[str, Any]:
    """An evaluation's summary, seen to be of this model."""
    if not (scores / SUMMARY_NAME).is_file():
        raise CocoaError(f"{scores}: no {SUMMARY_NAME} here; name what `cocoa evaluate` wrote (--output)")
    summary = read_summary(scores / SUMMARY_NAME)
    if summary.get("model_hash") != hash_folder(folder):
        raise CocoaError(f"{scores}: of another model than {folder}; evaluate this one: cocoa evaluate {folder} ...")
    return summary


def _scores(summary: Mapping[str, Any]) -> str:
    """The evaluation's own table, without the paths in it."""
    shown = {key: summary[key] for key in _SHOWN_SCORES if key in summary} | {"model": ""}
    lost = sum(row["left_out"] for row in summary.get("bad_rows", ()))
    without = f"\n\nThe scores leave out {count(lost, 'row')} that could not be used." if lost else ""
    return "hit@1 in percent.\n" + markdown(shown).partition("\n")[2].rstrip("\n") + without


def without_paths(content: Any) -> Any:
    """A record as it may be published: the names of absolute paths, and how many rows could not be read."""
    if isinstance(content, dict):
        clean = {key: without_paths(value) for key, value in content.items()}
        if isinstance(bad := content.get("bad_rows"), dict):
            clean["bad_rows"] = len(bad)
        return clean
    if isinstance(content, list):
        return [without_paths(value) for value in content]
    if isinstance(content, str):
        for path in (PurePosixPath(content), PureWindowsPath(content)):
            if path.is_absolute() or content.startswith("~"):
                return path.name
    return content


def base_facts(model: str) -> dict[str, Any]:
    """What a checkpoint was made of in the first place: `base`, whether that is a name of the hub, and `base_license`.

    Args:
        model: a backbone, or a checkpoint that has such facts already.
    """
    before = find_record(model)
    if before:
        base = before.get("base") or before.get("settings", {}).get("backbone") or before.get("source", model)
        return {
            "base": base,
            "base_on_hub": before.get("base_on_hub", False),
            "base_license": before.get("base_license"),
        }
    return {
        "base": model,
        "base_on_hub": model not in EMBEDDED and not Path(model).exists(),
        "base_license": _license(model),
    }


def _license(model: str) -> str | None:
    """The licence that a backbone's own card states; None where it has no card, or no licence in it."""
    if model in EMBEDDED:
        return "apache-2.0"
    try:
        path = model_file(model, CARD_NAME)
        return ModelCard.load(path).data.license if path else None
    except (CocoaError, OSError, ValueError, yaml.YAMLError):  # a card that cannot be read ends no training
        return None
