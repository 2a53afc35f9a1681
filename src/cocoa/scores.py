"""What an evaluation leaves in its folder: score files that other tools read, and a table beside published numbers.

`<dataset>_score.json` is flat, as VLM2Vec's; `leaderboard.json` is what MMEB's leaderboard takes; `table.md` is for
people. All of them say which model and data they are of. `ranks.parquet` has the rank of every query's right candidate,
from which hit@1 and the rest come (`cocoa compare` pairs the queries of two runs by it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from torch import Tensor

from cocoa.catalogue import datasets
from cocoa.errors import CocoaError, first_line
from cocoa.files import write_json, write_text
from cocoa.metrics import GROUPS, summary
from cocoa.parquet import write_table
from cocoa.wording import count

ABOUT = ("model", "model_hash", "recipe", "split", "image", "prompt_style", "max_length", "versions")
"""What every file says about how its numbers came about, beside the hash of the data."""
BAD_ROWS_SHOWN = 20
SUMMARY_NAME, RANKS_NAME = "summary.json", "ranks.parquet"
MISSING = "FILE_N/A"
"""What the leaderboard writes in place of a data set that was not scored."""


def write_scores(output: Path, scores: dict[str, dict[str, float]], about: dict[str, Any]) -> dict[str, Any]:
    """Write every file, and return the summary.

    Args:
        output: made where it does not exist.
        scores: the metrics of each data set.
        about: what else there is to say (`evaluate` does): `model`, `model_hash`, `recipe`, `data_hash` by data set,
            `image`, `versions`, ...; every file repeats it under `about`.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name, score in scores.items():
        facts = {key: about[key] for key in ABOUT if key in about}
        if name in about.get("data_hash", {}):
            facts["data_hash"] = about["data_hash"][name]
        write_json(output / f"{name}_score.json", {**score, "about": facts})
    result = summary(scores) | about
    write_json(output / SUMMARY_NAME, result)
    write_json(output / "leaderboard.json", leaderboard(scores, about))
    write_text(output / "table.md", markdown(result))
    return result


def write_ranks(output: Path, ranks: dict[str, Tensor], numbers: dict[str, list[int]]) -> None:
    """Write the file of ranks: `dataset`, `row`, `rank`; rows that were left out as bad are not in it.

    Args:
        output: made where it does not exist.
        ranks: of each data set, the (queries,) that `cocoa.metrics.rank` gives.
        numbers: where each query stands in its data set's file.
    """
    names = list(ranks)
    columns = {
        "dataset": np.repeat(names, [len(ranks[name]) for name in names]),
        "row": np.concatenate([np.array(numbers[name], np.int32) for name in names]),
        "rank": np.concatenate([ranks[name].numpy().astype(np.int32) for name in names]),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_table(output / RANKS_NAME, pa.table(columns))


def read_ranks(output: Path) -> dict[str, np.ndarray]:
    """The ranks (queries,) of each data set in the order of its rows, from an evaluation's folder; empty without file.

    Raises:
        CocoaError: the file cannot be read.
    """
    path = output / RANKS_NAME
    if not path.is_file():
        return {}
    try:
        table = pq.read_table(path, columns=["dataset", "rank"])
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise CocoaError(f"{path}: cannot be read ({reason}); evaluate again (cocoa evaluate)") from None
    dataset, rank = (column.to_numpy() for column in table.columns)
    return {name: rank[dataset == name] for name in dict.fromkeys(dataset.tolist())}


def leaderboard(scores: dict[str, dict[str, float]], about: dict[str, Any]) -> dict[str, Any]:
    """The JSON that MMEB's leaderboard takes; data sets that are not MMEB's are not in it.

    Release date and address of the model are left for its owner to fill in.
    """
    facts = about.get("facts", {})
    metadata: dict[str, Any] = {
        "model_name": short_name(about["model"]),
        "model_backbone": facts.get("backbone"),
        "model_size": facts.get("billions"),
        "embedding_dimension": facts.get("dimension"),
        "max_length_tokens": facts.get("max_length"),
        "model_release_date": None,
        "data_source": "Self-Reported",
        "url": None,
        "report_generated_date": date.today().isoformat(),
        "about": {key: about[key] for key in (*ABOUT, "data_hash") if key in about},
    }
    images: dict[str, Any] = {name: scores.get(name, MISSING) for name in datasets()}
    return {"metadata": metadata, "metrics": {"image": images, "video": {}, "visdoc": {}}}


def short_name(model: str | Path) -> str:
    """What a model is called in tables: its folder, with the run's in front where that is `final`."""
    path = Path(model)
    return f"{path.parent.name}/{path.name}" if path.name == "final" else path.name


@cache
def published() -> tuple[dict[str, Any], ...]:
    """Published results on MMEB-V1: `model`, and hit@1 in percent by group (`data/published.yaml`)."""
    text = resources.files("cocoa").joinpath("data/published.yaml").read_text(encoding="utf-8")
    return tuple(yaml.safe_load(text))


def markdown(result: dict[str, Any]) -> str:
    """The averages beside published ones with the gap, what is missing from them, and every data set.

    An average over fewer data sets than the benchmark has is marked, and compared with nothing.
    """
    averages = result["averages"]
    lines = [f"# {short_name(result['model'])}: hit@1 (%)"]
    if averages["All"]["datasets"]:
        lines += ["", *_averages(averages)]
    if result.get("truncated"):
        lines += ["", *_by_length(result)]
    hashes = result.get("data_hash", {})
    lines += ["", _row("data set", ["hit@1", "data hash"]), _row("---", ["---:", "---"])]
    lines += [_row(name, [f"{hit:.1f}", hashes.get(name, "")]) for name, hit in result["datasets"].items()]
    bad = result.get("bad_rows", [])
    lost = [row for row in bad if row["left_out"]]
    shorter = [row for row in bad if not row["left_out"]]
    lines += _named(f"The scores above leave out {count(len(lost), 'row')} that could not be used:", lost)
    lines += _named(f"{count(len(shorter), 'wrong candidate')} could not be used, and left the lists:", shorter)
    if result.get("shortened"):
        lines += ["", f"Shortened to fit into {result['max_length']} tokens: {count(result['shortened'], 'text')}."]
    lines += ["", *[f"- {key}: `{result[key]}`" for key in ("data", *ABOUT) if key != "recipe" and result.get(key)]]
    return "\n".join(lines) + "\n"


def _named(what: str, bad: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on rows that could not be used, or not whole, and the first of them; nothing where there are none."""
    if not bad:
        return []
    lines = ["", what, "", *(f"- {row['dataset']}, row {row['row']}: {row['reason']}" for row in bad[:BAD_ROWS_SHOWN])]
    return lines + [f"- and {len(bad) - BAD_ROWS_SHOWN} more, in summary.json"] * (len(bad) > BAD_ROWS_SHOWN)


def _averages(averages: dict[str, Any]) -> list[str]:
    """The lines about the averages."""
    lines = [_row("", GROUPS), _row("---", ["---:"] * len(GROUPS))]
    ours = [_average(averages[group]) for group in GROUPS]
    lines.append(_row("**this model**", ours))
    if averages["All"]["of"] == len(datasets()):  # MMEB's, not those of scenes
        whole = {group: averages[group]["hit@1"] for group in GROUPS if not averages[group]["missing"]}
        for row in published():
            lines.append(_row(row["model"], [_beside(row.get(group), whole.get(group)) for group in GROUPS]))
        lines += ["", "Published numbers as printed (arXiv 2603.01471); in brackets, how far this model is ahead."]
    for group in GROUPS:
        if averages[group]["missing"]:
            there, of = averages[group]["datasets"], averages[group]["of"]
            lines += ["", f"\\* {group}: {there} of {of} data sets; missing: {', '.join(averages[group]['missing'])}"]
    return lines


def _by_length(result: dict[str, Any]) -> list[str]:
    """The lines about embeddings cut to fewer numbers, behind the whole ones."""

    def hits(part: dict[str, Any]) -> dict[str, float]:
        found = {group: part["averages"][group] for group in GROUPS}
        return {group: own["hit@1"] for group, own in found.items() if own["datasets"]} or part["datasets"]

    parts = {f"all {result['facts']['dimension']}": result} | result["truncated"]
    lines = [_row("numbers of an embedding", hits(result)), _row("---", ["---:"] * len(hits(result)))]
    return lines + [_row(dim, [f"{hit:.1f}" for hit in hits(part).values()]) for dim, part in parts.items()]


def _row(first: str, cells: Any) -> str:
    return f"| {' | '.join([first, *cells])} |"


def _average(average: dict[str, Any]) -> str:
    """Our average in bold, with a star where data sets are missing."""
    if average["hit@1"] is None:
        return "-"
    return f"**{average['hit@1']:.1f}**" + ("\\*" if average["missing"] else "")


def _beside(number: float | None, ours: float | None) -> str:
    """A published number, and the gap to ours where both are there."""
    if number is None:
        return "-"
    return f"{number:.1f}" if ours is None else f"{number:.1f} ({ours - number:+.1f})"
